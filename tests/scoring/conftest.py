"""A tokenizer of letters, for every test in this folder."""

from tiny_llama import pieces

__all__ = ["pieces"]
