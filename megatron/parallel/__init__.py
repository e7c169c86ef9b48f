"""Where ranks are and how random numbers are drawn."""
