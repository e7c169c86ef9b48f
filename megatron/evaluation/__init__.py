"""Evaluation: tasks from held-out documents, and the bridge to lm-evaluation-harness."""
