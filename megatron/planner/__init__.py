"""Arithmetic about a run before it is run: resolution and the plan. Never imports torch."""
