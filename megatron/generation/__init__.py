"""Text from a model: sampling, and decoding on one rank or on many."""
