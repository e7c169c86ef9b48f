"""Hugging Face folders: name tables, export, import of weights, and the parity proof (law C3)."""
