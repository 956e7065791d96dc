"""Pages for prompts: shared while they are followed, given on only when nobody follows them."""

import numpy as np

from jaxcrystal.model.cache import BLOCK, whole_blocks
from jaxcrystal.sampling.prompt_pool import PromptPool


def prompt_of(name: int, blocks: int) -> tuple[int, ...]:
    return (name,) * (blocks * BLOCK)


def test_a_prompt_waits_until_pages_are_left_and_the_longest_idle_gives_way():
    pool = PromptPool(4)
    a, b, c, d = (prompt_of(name, blocks) for name, blocks in ((1, 1), (2, 2), (3, 1), (4, 2)))
    pages = [pool.follow(prompt) for prompt in (a, b, c)]
    assert pool.follow(a) == pages[0] and pool.follow(d) is None
    pool.leave(a)
    assert pool.follow(d) is None  # one of two still follows it
    pool.leave(b)
    pool.leave(a)
    assert pool.follow(d) == pages[1]
    assert b not in pool and a in pool and pool.follow(a) == pages[0]


def test_no_page_has_two_prompts_that_are_there():
    random, pool, followed = np.random.default_rng(0), PromptPool(9), []
    for _ in range(2000):
        if followed and random.random() < 0.5:
            pool.leave(followed.pop(random.integers(len(followed)))[0])
            continue
        prompt = prompt_of(int(random.integers(12)), int(random.integers(1, 4)))
        if (pages := pool.follow(prompt)) is not None:
            followed.append((prompt, tuple(pages)))
        held = {prompt: pages for prompt, pages in followed}
        assert all(held[prompt] == pages and len(pages) == whole_blocks(len(prompt)) for prompt, pages in followed)
        taken = [page for pages in held.values() for page in pages]
        assert len(set(taken)) == len(taken) <= 9
