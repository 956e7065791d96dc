"""Crystals per second: written as tokens on the device, against tokenized on the host by transformers.

    python benchmarks/writer.py             on MP-20 beside the checkout, else on the embedded prototypes
    python benchmarks/writer.py --quick     seconds, a check that it runs; its figures mean nothing

Both sides have the same crystals with the same draws, and it is asserted first that they make the same tokens. The
device is timed from the host's arrays to finished packed rows; the host, on all cores, from finished texts to lists of
tokens, by one call for all or by one call a text, and once more with the making of the texts. Where the device is the
CPU, each core is one, as in training on a mesh: both sides have the same cores. The sides alternate, so that noise hits
all, each for half a second or one call; medians are told.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import machine
import material
import sentencepiece
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from material import Task

from jaxcrystal.config import Augment, TextFormat
from jaxcrystal.mesh import batch_sharding, make_mesh
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.texts.writer import Examples, Rows, Writer
from jaxcrystal.training.packing import Feed

DEVICE = "device: draw and write packed rows"
TRANSFORMERS = "host: transformers, batched"
TRANSFORMERS_EACH = "host: transformers, a call a text"
TRANSFORMERS_TEXT = "host: text from pymatgen + transformers"
SENTENCEPIECE = "host: SentencePiece itself, batched"
SENTENCEPIECE_TEXT = "host: text from arrays + SentencePiece"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    material.add_arguments(parser)
    parser.add_argument("--tokens-per-row", type=int, default=2048)
    parser.set_defaults(crystals=8000)
    parser.add_argument("--rows", type=int, default=128, help="packed rows that are written by one call (128)")
    parser.add_argument("--rounds", type=int, default=7, help="times that each side is timed (7)")
    parser.add_argument("--quick", action="store_true", help="a minimal size")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.crystals, options.rows, options.tokens_per_row, options.rounds = 40, 2, 1024, 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    mesh = make_mesh()
    options.rows += -options.rows % mesh.size
    measured = machine.facts(uses_accelerator=jax.default_backend() != "cpu")

    crystals = material.crystals(options.data, options.crystals)
    tokenizer, fmt = load_tokenizer(options.tokenizer), TextFormat()
    writer = Writer.of(tokenizer, fmt, Augment())
    feed = Feed.of(crystals, tokenizer, writer, options.tokens_per_row, options.rows, seed=0)
    table, key = feed.epoch(0), jax.device_put(feed.key(0), NamedSharding(mesh, P()))
    if len(table) > 1:
        table = table[:-1]  # the last batch is not full
    rows_of = batch_sharding(mesh)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), rows_of.spec), out_specs=rows_of.spec, check_vma=False)
    def write(key: jax.Array, examples: Examples) -> Rows:
        return writer.write(examples, writer.draw(key, examples), feed.row_length)

    draw = jax.jit(writer.draw)
    tasks = [task for batch in map(feed.batch, table) for task in Task.of(crystals, batch, draw(key, batch))]
    texts = [task.text(fmt) for task in tasks]
    fast = material.transformers_tokenizer(tokenizer)
    rows = [jax.device_get(write(key, feed.placed(batch, rows_of))) for batch in table]
    tokens = material.assert_same_tokens(rows, material.encode(texts, fast, tokenizer))

    def device() -> None:
        written = None
        for batch in table:  # as a train step would: two batches of rows at most are kept
            before, written = written, write(key, feed.placed(batch, rows_of))
            jax.block_until_ready(before)
        jax.block_until_ready(written)

    sides = {DEVICE: device} | host_sides(tasks, texts, fmt, fast, tokenizer)
    seconds = alternate(sides, options.rounds)
    rates = {name: len(tasks) / statistics.median(found) for name, found in seconds.items()}
    ratios = {name: rates[DEVICE] / rate for name, rate in rates.items() if name != DEVICE}
    padding = 1 - tokens / sum(r.tokens.size for r in rows)
    result = {
        "benchmark": "writer",
        "claim": "crystals/s written on the device / tokenized on the host by transformers",
        "ratio": ratios.get(TRANSFORMERS),  #: None without LLaMA-2's tokenizer
        "ratio_a_call_a_text": ratios.get(TRANSFORMERS_EACH),
        "ratio_with_text": ratios.get(TRANSFORMERS_TEXT),
        "ratios": ratios,
        "crystals_per_second": rates,
        "seconds": seconds,
        "crystals": len(tasks),
        "tokens": {"device": tokens, "host": sum(map(len, material.encode(texts, fast, tokenizer)))},
        "padding": padding,
        "slots_filled": float((table >= 0).mean()),
        "tokens_per_row": options.tokens_per_row,
        "rows": options.rows,
        "data": Path(options.data).name,
        "tokenizer": "LLaMA-2" if fast is not None else "compact",
        "quick": options.quick,
        "measured": measured,
    }
    path = machine.write("writer", result, options.out)
    print(f"{measured['machine']}\n{len(tasks)} crystals, {tokens / len(tasks):.0f} tokens each on average")
    for name, rate in rates.items():
        print(f"  {name:45} {rate:10,.0f} crystals/s" + (f"   1/{ratios[name]:.1f}" if name in ratios else ""))
    print(f"written to {path}")
    return result


def host_sides(
    tasks: list[Task], texts: list[str], fmt: TextFormat, fast: Any | None, tokenizer: Any
) -> dict[str, Callable[[], Any]]:
    """What the host does, each the best of its kind: one call for all texts."""
    threads = machine.cores()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    sides: dict[str, Callable[[], Any]] = {
        SENTENCEPIECE: lambda: pieces.encode(texts, add_bos=True, add_eos=True, num_threads=threads),
        SENTENCEPIECE_TEXT: lambda: pieces.encode(
            [task.text(fmt) for task in tasks], add_bos=True, add_eos=True, num_threads=threads
        ),
    }
    if fast is None:
        return sides
    sides[TRANSFORMERS] = lambda: material.encode(texts, fast, tokenizer)
    sides[TRANSFORMERS_EACH] = lambda: [fast(text, return_attention_mask=False)["input_ids"] for text in texts]
    try:
        structures = [task.crystal.to_structure() for task in tasks]  # parsing the CIF is not counted
    except ImportError:
        return sides
    by_pymatgen = [task.text_by_pymatgen(s, fmt) for task, s in zip(tasks, structures, strict=True)]
    differing = sum(a != b for a, b in zip(by_pymatgen, texts, strict=True))
    # A lattice turns lengths and angles into vectors and back: the last digit of a few may round the other way.
    assert differing <= 0.02 * len(texts), f"{differing} of {len(texts)} texts are not those of pymatgen"

    def from_structures() -> None:
        made = [task.text_by_pymatgen(s, fmt) for task, s in zip(tasks, structures, strict=True)]
        material.encode(made, fast, tokenizer)

    return sides | {TRANSFORMERS_TEXT: from_structures}


def alternate(sides: dict[str, Callable[[], Any]], rounds: int, turn: float = 0.5) -> dict[str, list[float]]:
    """Seconds of a call of each side, once a round; the sides take turns, after one call of each that does not count.

    A turn lasts for `turn` seconds or one call: a side that needs less is called again, and the mean is told.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round in range(rounds + 1):
        for name, run in sides.items():
            start, calls, passed = time.perf_counter(), 0, 0.0
            while passed < (turn if round else 0) or not calls:
                run()
                calls, passed = calls + 1, time.perf_counter() - start
            if round:
                seconds[name].append(passed / calls)
    return seconds


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", machine.cores())
    sys.exit(0 if main() else 1)
