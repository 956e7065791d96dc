"""What both sides of a benchmark are given: crystals, a tokenizer, the same texts, and how the peer takes them.

The device draws and writes a batch in one program. The host is told what was drawn, and makes the same texts from it:
from our arrays, or as crystal-text-llm does, from a pymatgen Structure.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import pyarrow.parquet as pq

from jaxcrystal.config import ATTRIBUTES, TextFormat
from jaxcrystal.crystals import dataset
from jaxcrystal.crystals.crystal import COORD_BITS, ELEMENTS, Crystal
from jaxcrystal.crystals.dataset import CrystalSet
from jaxcrystal.reader.checks import Checked, Checks, check
from jaxcrystal.reader.reading import interpret
from jaxcrystal.reader.sources import open_source
from jaxcrystal.texts import prompts
from jaxcrystal.texts.forms import form_of
from jaxcrystal.texts.pieces import EMPTY
from jaxcrystal.texts.tokenizer import BYTE_PAIRS, FILES, SENTENCE_PIECES, Tokenizer
from jaxcrystal.texts.writer import Draws, Examples, Rows

if TYPE_CHECKING:
    from pymatgen.core import Structure

SHARED = Path(__file__).parents[1].parent / "shared"
LLAMA2 = SHARED / "tokenizer/llama2/tokenizer.model"
MP20 = SHARED / "data/mp20/val.parquet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--data`, `--crystals` and `--tokenizer`; what lies beside the checkout is the default."""
    data = str(MP20) if MP20.exists() else "prototypes"
    tokenizer = str(LLAMA2) if LLAMA2.exists() else "compact"
    parser.add_argument(
        "--data", default=data, help=f"a file that `jaxcrystal prepare` wrote or can read, or `prototypes` ({data})"
    )
    parser.add_argument("--crystals", type=int, default=2000, help="take so many, from its beginning (2000)")
    parser.add_argument(
        "--tokenizer", default=tokenizer, help=f"a file, a model's directory, or `compact` ({tokenizer})"
    )


def crystals(origin: str, count: int) -> CrystalSet:
    """The first `count` crystals of a prepared data set; of a raw table of CIFs, checked as `prepare` checks them."""
    if origin.endswith(".parquet") and "cif" in pq.read_schema(origin).names:
        records = open_source(origin).records[:count]
        checked = [check(interpret(record), Checks()) for record in records]
        kept = [row for row in checked if isinstance(row, Checked)]
        return CrystalSet.from_crystals([r.id for r in kept], [r.crystal for r in kept], [r.labels for r in kept])
    whole = dataset.load(origin)
    return whole.first(count)


@dataclass(frozen=True)
class Task:
    """One text to be made: a crystal, and what was drawn about it."""

    crystal: Crystal
    shift: np.ndarray  #: [3], added to every fractional coordinate
    masked: int | None  #: the atomic number that infilling asks for; None generates
    attributes: dict[str, Any]  #: stated in the prompt, in this order

    @classmethod
    def of(cls, crystals: CrystalSet, examples: Examples, draws: Draws) -> list[Task]:
        """What a batch writes, row by row; `permute` is not supported, as the original has no such thing."""
        draws = jax.device_get(draws)
        tasks = []
        for place in np.argwhere(np.asarray(examples.index) >= 0):
            index, drawn = int(examples.index[tuple(place)]), draws[tuple(place)]
            known = crystals.attributes(index)
            stated = [ATTRIBUTES[i] for i in drawn.stated if i != EMPTY]
            shift = drawn.body.translation.astype(np.float64) / 2**COORD_BITS
            masked = int(drawn.body.masked) if drawn.infill else None
            tasks.append(cls(crystals.crystal(index), shift, masked, {name: known[name] for name in stated}))
        return tasks

    def text(self, fmt: TextFormat) -> str:
        """The text from our own arrays."""
        crystal = self.crystal
        moved = Crystal(crystal.lengths, crystal.angles, crystal.species, crystal.frac_coords + self.shift)
        return self._in_prompt(form_of(fmt).write(moved, self.masked), fmt)

    def text_by_pymatgen(self, structure: Structure, fmt: TextFormat) -> str:
        """The same text from the same crystal as a Structure: translated by pymatgen, formatted site by site."""
        moved = structure.copy()
        moved.translate_sites(range(len(moved)), self.shift)
        cell = moved.lattice.parameters
        lines = [
            " ".join(f"{x:.{fmt.length_decimals}f}" for x in cell[:3]),
            " ".join(f"{x:.{fmt.angle_decimals}f}" for x in cell[3:]),
        ]
        hidden = None if self.masked is None else ELEMENTS[self.masked]
        for site in moved:
            symbol = site.specie.symbol
            lines.append(prompts.MASK if symbol == hidden else symbol)
            # 1.00 is 0.00 of the next cell, as we write it.
            coords = (f"{x:.{fmt.coord_decimals}f}" for x in site.frac_coords)
            lines.append(" ".join("0" + x[1:] if x[0] == "1" else x for x in coords))
        return self._in_prompt("\n".join(lines), fmt)

    def _in_prompt(self, body: str, fmt: TextFormat) -> str:
        if self.masked is not None:
            return prompts.INFILL_INTRODUCTION + body + prompts.INFILL_REQUEST + ELEMENTS[self.masked]
        return prompts.generation_prompt(form_of(fmt), self.attributes) + body


@dataclass(frozen=True)
class Setting:
    """How the peer goes through the crystals of one step."""

    micro: int = 0  #: crystals at a time; 0 takes all of a step at once
    packed: int = 0  #: tokens of a packed row; 0 pads instead, and `micro` then counts rows
    checkpointing: bool = False  #: recompute activations in the backward pass
    autocast: bool = False  #: bfloat16 by torch.autocast, as transformers' Trainer has it; else in the weights' dtype

    @classmethod
    def parse(cls, words: str) -> Setting:
        """From `micro=8,checkpointing`; raises ValueError for what is no setting."""
        values = {}
        for word in filter(None, words.split(",")):
            name, _, value = word.partition("=")
            if name not in cls.__dataclass_fields__:
                raise ValueError(f"unknown setting {name!r} of the peer; known: {', '.join(cls.__dataclass_fields__)}")
            values[name] = int(value) if value else True
        return cls(**values)

    def __str__(self) -> str:
        how = f"packed rows of {self.packed}" if self.packed else "padded to the longest"
        unit = "row" if self.packed else "crystal"
        parts = f"{self.micro} {unit}{'s' * (self.micro > 1)} at a time" if self.micro else f"all {unit}s at once"
        extra = [name for name in ("checkpointing", "autocast") if getattr(self, name)]
        return ", ".join([how, parts, *extra])


def transformers_tokenizer(tokenizer: Tokenizer) -> Any | None:
    """transformers' tokenizer of the same file; one of SentencePiece adds beginning and end of sequence.

    None for `compact`, which is no BPE model: transformers has no class for it.
    """
    if tokenizer.path.name not in FILES:
        return None
    from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast

    if tokenizer.path.name == BYTE_PAIRS:
        return PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.path))

    return LlamaTokenizerFast.from_pretrained(str(tokenizer.path.parent), add_bos_token=True, add_eos_token=True)


def encode(texts: list[str], fast: Any | None, tokenizer: Tokenizer) -> list[list[int]]:
    """Tokens of whole texts with beginning and end: transformers' batched call, or else SentencePiece's."""
    if fast is not None and tokenizer.path.name == SENTENCE_PIECES:
        return fast(texts, return_attention_mask=False)["input_ids"]
    bare = map(tokenizer.encode, texts) if fast is None else fast(texts, add_special_tokens=False)["input_ids"]
    return [[*tokenizer.begin, *ids, tokenizer.eos_id] for ids in bare]


def assert_same_tokens(rows: list[Rows], expected: list[list[int]]) -> int:
    """Every text of every row, token by token; returns how many tokens there are."""
    found = []
    for batch in rows:
        for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
            ends = np.flatnonzero(np.diff(segments[segments > 0])) + 1
            found += [part.tolist() for part in np.split(tokens[segments > 0], ends) if len(part)]
    assert found == expected, "the device and the host do not make the same tokens"
    return sum(map(len, found))
