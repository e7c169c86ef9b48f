"""Parameter groups and learning rate."""
