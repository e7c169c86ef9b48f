"""One operation a file: the eager definition that every faster backend must equal."""
