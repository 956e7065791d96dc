"""Texts by symmetry for tests: several tokenizers' tokens, random walks, and a parser that shares no code."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrystal.config import TextFormat
from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, ELEMENTS
from jaxcrystal.crystals.symmetric import Orbit, SymmetricCrystal, cell_of
from jaxcrystal.crystals.wyckoff import LETTERS, SYSTEMS, group, system
from jaxcrystal.texts.pieces import ragged
from jaxcrystal.texts.symmetry.grammar import END


@dataclasses.dataclass(frozen=True, eq=False)
class Tables:
    """Tokens, and what each of them reads as."""

    digits: np.ndarray
    point: int
    space: int
    newline: int
    eos: int
    elements: np.ndarray
    spaced_elements: np.ndarray
    letters: np.ndarray
    group: int
    pieces: tuple[str, ...]  #: by token

    @classmethod
    def build(cls, group: int = 1, words: str = "whole") -> "Tables":
        """`words`: "whole" (a token each, spaces in them), "spaced" (a token each, behind one of the space) or
        "characters" (one by one, spaces too)."""
        pieces: list[str] = ["<unk>", "<eos>"]

        def token(piece: str) -> int:
            if piece not in pieces:
                pieces.append(piece)
            return pieces.index(piece)

        def word(text: str) -> list[int]:
            if words == "whole":
                return [token(text)]
            if words == "spaced":
                return [token(text)] if text[0] != " " else [token(" "), token(text[1:])]
            return [token(character) for character in text]

        numbers = [f"{value:0{width}}" for width in range(1, group + 1) for value in range(10**width)]
        return cls(
            digits=np.array([token(number) for number in numbers]),
            point=token("."),
            space=token(" "),
            newline=token("\n"),
            eos=1,
            elements=ragged([[], *(word(symbol) for symbol in ELEMENTS[1:])]),
            spaced_elements=ragged([[], *(word(f" {symbol}") for symbol in ELEMENTS[1:])]),
            letters=ragged([word(f" {letter}") for letter in LETTERS]),
            group=group,
            pieces=tuple(pieces),
        )


def walk(grammar, limits, key, texts, steps):
    """Letters that are drawn uniformly among those allowed, -1 behind the end; whether there always was one."""

    def step(carry, key):
        state, ended = carry
        allowed = grammar.allowed(state)
        letter = jax.random.categorical(key, jnp.where(allowed, 0.0, -jnp.inf))
        letter = jnp.where(ended, -1, letter)
        state = grammar.advance(state, jnp.maximum(letter, 0))
        return (state, ended | (letter == len(grammar.digits) + END)), (letter, ended | allowed.any(-1))

    begin = (grammar.start(limits), jnp.zeros(texts, bool))
    (_, ended), (letters, possible) = jax.lax.scan(step, begin, jax.random.split(key, steps))
    return letters.T, possible.all() & ended.all()


def repeated(limits, slots):
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (slots, *np.shape(x))), limits)


def stacked(limits):
    """Of several constraints."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *limits)


def spelled(tables: Tables, tokens: np.ndarray) -> str:
    assert tokens[-1] == tables.eos and (tokens[:-1] > 1).all()
    return "".join(tables.pieces[token] for token in tokens[:-1])


def tokens_of(tables: Tables, run: str) -> list[int]:
    """Of a run of digits, cut from its left."""
    groups = [run[i : i + tables.group] for i in range(0, len(run), tables.group)]
    return [tables.pieces.index(part) for part in groups]


def write(crystal: SymmetricCrystal, fmt: TextFormat) -> str:
    """Its orbits in the order that they have."""
    decimals = fmt.coord_decimals
    lines = [" ".join(f"{symbol} {count}" for symbol, count in crystal.composition.items()), f"{crystal.space_group}"]
    for orbit in crystal.orbits:
        free = np.array(orbit.frac_coords)[crystal.position(orbit).free]
        values = [f"{round(float(x) * 10**decimals) % 10**decimals:0{decimals}}" for x in free]
        lines.append(" ".join([orbit.symbol, orbit.letter, *values]))
    pairs = zip(crystal.free_parameters, crystal.parameters, strict=True)
    words = [f"{x:.{fmt.length_decimals if field < 3 else fmt.angle_decimals}f}" for field, x in pairs]
    return "\n".join([*lines, " ".join(words)])


def parse(text: str, fmt: TextFormat) -> tuple[dict[str, int], SymmetricCrystal]:
    """The composition as stated, and the crystal."""
    lines = text.split("\n")
    words = lines[0].split(" ")
    composition = {symbol: int(count) for symbol, count in zip(words[::2], words[1::2], strict=True)}
    assert all(str(count) == word for count, word in zip(composition.values(), words[1::2], strict=True))
    number = int(lines[1])
    assert lines[1] == str(number)
    here = group(number)
    orbits = []
    for line in lines[2:-1]:
        symbol, letter, *coords = line.split(" ")
        free = here.position(letter).free
        assert len(coords) == free.sum() and all(len(x) == fmt.coord_decimals and x.isdigit() for x in coords)
        point = np.zeros(3)
        point[free] = [int(x) / 10**fmt.coord_decimals for x in coords]
        orbits.append(Orbit(ATOMIC_NUMBER[symbol], letter, tuple(point)))
    order = list(composition)
    places = [order.index(orbit.symbol) for orbit in orbits]
    assert places == sorted(places)
    free = SYSTEMS[system(number)][0]
    words = lines[-1].split(" ")
    assert len(words) == len(free)
    for word, field in zip(words, free, strict=True):
        decimals = fmt.length_decimals if field < 3 else fmt.angle_decimals
        assert word == f"{float(word):.{decimals}f}" and float(word) > 0, word
    cell = cell_of(system(number), np.array([float(word) for word in words]))
    return composition, SymmetricCrystal(number, cell[:3], cell[3:], tuple(orbits))
