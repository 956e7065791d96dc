"""All texts that a grammar lets through, whatever their form."""

import jax
import numpy as np
from symmetry_texts import repeated

from jaxcrystal.texts.symmetry.grammar import END


class Tree:
    """All texts that the grammar allows, or their beginnings, letter by letter."""

    def __init__(self, grammar, size: int = 512) -> None:
        self.grammar, self.size, self.end = grammar, size, len(grammar.digits) + END
        self.allowed, self.advance = jax.jit(grammar.allowed), jax.jit(grammar.advance)

    def explore(self, limits, until, only_one) -> list[tuple[int, ...]]:
        """Letters that lead to a field where `until(field)`, or to the end. Where `only_one(field)` one of them is
        taken at random. Every state has a letter that goes on."""
        random = np.random.default_rng(0)
        state = jax.device_get(self.grammar.start(repeated(limits, 1)))
        open_, done = [([()], state)], []
        while open_:
            paths, states = open_.pop()
            states = self._taken(states, np.arange(len(paths)))
            allowed = np.array(self.allowed(states))[: len(paths)]
            assert allowed.any(1).all()
            one = only_one(states.field[: len(paths)])
            allowed[one] &= (allowed * random.random(allowed.shape)).argmax(1)[one, None] == np.arange(allowed.shape[1])
            rows, letters = np.nonzero(allowed)
            for some in np.split(np.arange(len(rows)), range(self.size, len(rows), self.size)):
                steps = np.zeros(self.size, np.int32)
                steps[: len(some)] = letters[some]
                after = jax.device_get(self.advance(self._taken(states, rows[some]), steps))
                there = [(*paths[rows[i]], int(letters[i])) for i in some]
                over = until(after.field[: len(some)]) | (letters[some] == self.end)
                done += [there[i] for i in np.flatnonzero(over)]
                if not over.all():
                    on = np.flatnonzero(~over)
                    open_.append(([there[i] for i in on], jax.tree.map(lambda x, on=on: x[on], after)))
        return done

    def _taken(self, states, rows):
        """These, and as many of the first as make `size`."""
        rows = np.concatenate([rows, np.zeros(self.size - len(rows), int)])
        return jax.tree.map(lambda x: x[rows], states)
