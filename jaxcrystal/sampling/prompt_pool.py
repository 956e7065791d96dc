"""Which pages of the cache's pool hold which prompt, as the host keeps account of it."""

from __future__ import annotations

from collections.abc import Sequence

from jaxcrystal.model.cache import whole_blocks

Prompt = tuple[int, ...]


class PromptPool:
    """Gives pages to prompts that tasks follow, and takes them from prompts that nobody follows when they are needed.

    A prompt's number in the cache is that of its first page.
    """

    def __init__(self, pages: int) -> None:
        self._free = list(range(pages))
        self._pages: dict[Prompt, Sequence[int]] = {}
        self._followers: dict[Prompt, int] = {}
        self._idle: dict[Prompt, None] = {}  # that nobody follows, longest so first

    def __contains__(self, prompt: Prompt) -> bool:
        return prompt in self._pages

    def follow(self, prompt: Prompt) -> Sequence[int] | None:
        """The pages of a prompt that one task more follows; None where too few are free until some task leaves."""
        if prompt not in self._pages:
            needed = whole_blocks(len(prompt))
            while len(self._free) < needed and self._idle:
                oldest = next(iter(self._idle))
                del self._idle[oldest], self._followers[oldest]
                self._free += self._pages.pop(oldest)
            if len(self._free) < needed:
                return None
            self._pages[prompt], self._free = self._free[:needed], self._free[needed:]
            self._followers[prompt] = 0
        self._idle.pop(prompt, None)
        self._followers[prompt] += 1
        return self._pages[prompt]

    def leave(self, prompt: Prompt) -> None:
        """One task less follows it. Its pages stay as they are until another prompt needs them."""
        self._followers[prompt] -= 1
        if not self._followers[prompt]:
            self._idle[prompt] = None
