"""The run in the user's words: schema, loading, derived arithmetic. Imports nothing of the rest, and never torch."""
