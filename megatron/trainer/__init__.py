"""The training loop, what happens after each step, and the one place that puts a run together."""
