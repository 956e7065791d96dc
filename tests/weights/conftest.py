"""Tiny LLaMA checkpoints, for every test in this folder."""

from tiny_llama import checkpoint, full_disk, pieces

__all__ = ["checkpoint", "full_disk", "pieces"]
