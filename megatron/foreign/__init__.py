"""Checkpoints of other trainers, Megatron-LM's and GPT-NeoX's: read as tensors by our names, and written."""
