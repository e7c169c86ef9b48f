"""Corpora to indexed datasets: blocks of work, worker processes, resumable parts, the merge."""
