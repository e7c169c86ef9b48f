"""Model families of `transformers`: one file each, data alone, read both ways."""
