"""Raw corpora: which files, how each format is read, cleaning, duplicates, decontamination."""
