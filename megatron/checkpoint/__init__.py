"""Checkpoints that are whole or absent (law C1), in safetensors and JSON only (law C2)."""
