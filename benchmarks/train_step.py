"""Useful tokens per second of fine-tuning: our step against Hugging Face + PEFT, side by side in one run.

    python benchmarks/train_step.py --shape 50m          two CPU cores, some minutes
    python benchmarks/train_step.py --shape tiny_cpu --tokenizer compact
                                                         one core; all weights of a small model, in CPU-seconds
    python benchmarks/train_step.py --shape smollm2 --tokenizer models/smollm2_135m
                                                         two CPU cores, half an hour; in bfloat16 and in float32
    python benchmarks/train_step.py --quick              seconds, a check that it runs; its figures mean nothing
    python benchmarks/train_step.py --shape 7b --one-at-a-time --data train.parquet --tokenizer tokenizer.model
                                                         one GPU; bfloat16; the README of this folder has more

Adapters of rank 8 are trained on a frozen LLaMA of random weights. Each step has the same crystals with the same
draws on both sides, and so the same tokens, which is asserted. Ours packs rows and writes them on the device. The peer
makes texts, tokenizes and pads, in several settings; the best that pads is what the ratio is against, and a peer that
packs like us stands beside it. Padding is computed and never counted. Each engine lives in a process of its own with
a thread for every core; they take turns, so that noise hits all alike, and figures are medians. `tiny_cpu` trains all
weights, pins each engine to the same core, and counts CPU-seconds, without those in which the peer makes its texts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import machine
import material
import numpy as np
from material import Setting, Task

from jaxcrystal.config import TARGETS, LlamaConfig, MeshConfig, Recipe, load, to_dict
from jaxcrystal.crystals.dataset import CrystalSet, store
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.llama import Llama, abstract_variables
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.training.speed import FORMULA, Multiplied


def _llama(
    hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int = 32000, tied: bool = False
) -> dict[str, int]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "tie_word_embeddings": tied,
    }


PAPER = ("rank=8", "alpha=32", "dropout=0.05")


@dataclass(frozen=True)
class Shape:
    """A LLaMA, and the batch and peers that suit it."""

    model: dict[str, int]
    rows: int
    tokens_per_row: int
    peers: tuple[str, ...]
    dtype: str = "bfloat16"
    adapters: tuple[str, ...] = PAPER  #: settings of those that are trained; none: all weights are
    model_settings: tuple[str, ...] = ()  #: how ours is computed
    also: str | None = None  #: another dtype, in which both sides are measured too
    one_core: bool = False  #: every engine is pinned to the same core, and rates are over CPU-seconds


_ON_GPU = ("micro=4", "micro=8", "micro=16", "micro=8,autocast", "micro=32,checkpointing", "packed=2048,micro=1")
SHAPES = {
    "tiny": Shape(_llama(64, 128, 2, 4, 2, vocab=448), 2, 1024, ("", "micro=2"), "float32"),
    "tiny_cpu": Shape(
        _llama(128, 384, 4, 4, 4, vocab=448, tied=True),
        *(8, 512, ("", "micro=8", "packed=512"), "float32"),
        adapters=(),
        one_core=True,
    ),
    "50m": Shape(_llama(512, 1376, 8, 8, 8), 4, 512, ("", "micro=4", "micro=1", "packed=512"), "float32"),
    "smollm2": Shape(  # what configs/smollm2_135m_cpu.yaml trains
        _llama(576, 1536, 30, 9, 3, vocab=49152, tied=True),
        *(2, 1024, ("", "micro=4", "micro=1", "packed=1024"), "bfloat16"),
        adapters=("rank=16", "alpha=32", "dropout=0", f"targets={list(TARGETS)}"),
        model_settings=("scan_layers=false",),
        also="float32",
    ),
    "7b": Shape(_llama(4096, 11008, 32, 32, 32), 16, 2048, _ON_GPU),
    "13b": Shape(_llama(5120, 13824, 40, 40, 40), 16, 2048, _ON_GPU),
    "70b": Shape(_llama(8192, 28672, 80, 64, 8), 4, 2048, ()),
}
OURS = "jaxcrystal"


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    material.add_arguments(parser)
    parser.add_argument("--shape", choices=SHAPES, default="50m")
    parser.add_argument("--rows", type=int, help="packed rows of one step")
    parser.add_argument("--tokens-per-row", type=int)
    parser.add_argument("--weights", help="of our frozen model: float, int8 or nf4; 70b fits one GPU only as nf4")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of our recipe, any key of it")
    parser.add_argument("--peer", action="append", metavar="SETTING", help="for example micro=8,checkpointing; repeat")
    parser.add_argument("--no-peer", action="store_true", help="measure ours alone")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each engine has (5)")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps of one turn (1)")
    parser.add_argument("--one-at-a-time", action="store_true", help="end each engine before the next starts; twice")
    parser.add_argument("--quick", action="store_true", help="a minimal size")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.shape, chosen.tokenizer, chosen.crystals, chosen.rounds = "tiny", "compact", 60, 2
    return chosen


def make_recipe(chosen: argparse.Namespace, data: Path) -> Recipe:
    """What our side runs; the peer takes its shape, adapters and optimizer from it."""
    shape = SHAPES[chosen.shape]
    if chosen.shape == "70b" and not chosen.weights:
        raise UserError("--shape 70b is more than one GPU holds as floats; add --weights nf4 (`model.weights`)")
    keys = {f"model.{name}": value for name, value in shape.model.items()} | {
        "model.dtype": shape.dtype,
        "model.max_position_embeddings": 4096,
        "data.train": data,
        "data.rows_per_batch": chosen.rows or shape.rows,
        "data.tokens_per_row": chosen.tokens_per_row or shape.tokens_per_row,
        "optimizer.warmup_steps": 1,
        "tokenizer": chosen.tokenizer,
    }
    if chosen.weights:
        keys["model.weights"] = chosen.weights
    more = [f"lora.{setting}" for setting in shape.adapters] + [f"model.{setting}" for setting in shape.model_settings]
    recipe = load(Recipe, None, [f"{key}={value}" for key, value in keys.items()] + more + chosen.set)
    if (needed := load_tokenizer(recipe.tokenizer).vocab_size) > recipe.model.vocab_size:
        raise UserError(
            f"--shape {chosen.shape} has {recipe.model.vocab_size} pieces, {recipe.tokenizer} {needed}; "
            "choose another shape or --tokenizer compact"
        )
    return recipe


@dataclass
class Engine:
    """One side: how its process is made, and what it told."""

    name: str
    kind: str  #: `ours` or `peer`
    make: tuple[Any, ...]  #: arguments of `serve`
    setting: Setting | None = None  #: of a peer
    one_core: bool = False  #: pinned to one core
    turns: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def rates(self) -> list[float]:
        """Useful tokens per second of each turn; per CPU-second on one core."""
        clock = "cpu_seconds" if self.one_core else "seconds"
        return [turn["useful_tokens"] / turn[clock] for turn in self.turns]


def serve(connection: Connection, kind: str, one_core: bool, dtype: str, *make: Any) -> None:
    """The life of an engine's process: a turn for each list of steps, until None; then its facts."""
    try:
        if one_core:  # both engines make as many threads as there are cores that they may use
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        if kind == "ours":
            from ours import Ours as Make
        else:
            from peer import Peer as Make
        engine = Make(*make)
        connection.send(None)
        while (steps := connection.recv()) is not None:
            connection.send(engine.turn(steps))
        connection.send(engine.facts() | {"roofline_flops": engine.roofline(dtype)})
    except Exception as error:
        traceback.print_exc()
        connection.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


@contextmanager
def living(engine: Engine, warm_up: list[int]) -> Iterator[Connection]:
    """A process of this engine, warmed up. Where it fails, for example for want of memory, the engine has an error."""
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, engine.kind, engine.one_core, *engine.make), daemon=True)
    process.start()
    theirs.close()
    try:
        ask(engine, connection)
        ask(engine, connection, warm_up)
        yield connection
        engine.facts |= ask(engine, connection, None) or {}
    finally:
        if engine.error or sys.exc_info()[0]:
            process.terminate()
        process.join()


_NOTHING = object()


def ask(engine: Engine, connection: Connection, message: Any = _NOTHING) -> Any:
    """What the engine answers; an error is noted, and from then on the answer is None."""
    if engine.error:
        return None
    try:
        if message is not _NOTHING:
            connection.send(message)
        answer = connection.recv()
    except (EOFError, OSError):
        answer = "its process died"
    if isinstance(answer, str):
        engine.error, answer = answer, None
        print(f"{engine.name}: {engine.error}", file=sys.stderr)
    return answer


def measure(engines: Sequence[Engine], rounds: int, batches: int, steps: int, one_at_a_time: bool) -> None:
    """Fills in the engines' turns: in every round each has one, beginning with another engine each time."""
    plan = [[(r * steps + i) % batches for i in range(steps)] for r in range(rounds)]
    # Shapes of the peer's tensors differ from batch to batch: it is warm when it has seen each of them.
    warm_up = sorted({batch for turn in plan for batch in turn})
    if not one_at_a_time:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is for all of them
        with ExitStack() as stack:
            connections = [stack.enter_context(living(engine, warm_up)) for engine in engines]
            for r, turn in enumerate(plan):
                for i in np.roll(np.arange(len(engines)), -r):
                    engines[i].turns += filter(None, [ask(engines[i], connections[i], turn)])
        return
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    for half in filter(None, (plan[: (rounds + 1) // 2], plan[(rounds + 1) // 2 :])):
        for engine in engines:
            if not engine.error:
                with living(engine, warm_up) as connection:
                    engine.turns += filter(None, [ask(engine, connection, turn) for turn in half])


def main(arguments: list[str] | None = None) -> int:
    chosen = options(arguments)
    jax.config.update("jax_platforms", "cpu")  # of this process: accelerators are for the engines
    measured = machine.facts(uses_accelerator=True)
    settings(chosen)  # a wrong one is told before anything is done
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "crystals.parquet"
        crystals = material.crystals(chosen.data, chosen.crystals)
        store(crystals, data, {})
        recipe = make_recipe(chosen, data)
        engines, batches, context = make_engines(chosen, recipe, crystals)
        measure(engines, chosen.rounds, batches, chosen.steps, chosen.one_at_a_time)
    result = summary(chosen, recipe, engines, context) | {"measured": measured}
    show(result)
    if any(engine.turns for engine in engines):
        print(f"written to {machine.write(f'train_step_{chosen.shape}', result, chosen.out)}")
    return 1 if engines[0].error else 0


def settings(chosen: argparse.Namespace) -> list[Setting]:
    """The peers to be measured. Raises UserError for one that does not exist."""
    words = () if chosen.no_peer else chosen.peer or SHAPES[chosen.shape].peers
    try:
        return [Setting.parse(setting) for setting in words]
    except ValueError as error:
        raise UserError(f"--peer: {error}") from None


def make_engines(chosen: argparse.Namespace, recipe: Recipe, crystals: CrystalSet) -> tuple[list[Engine], int, float]:
    """Ours first, then the peers; how many different batches there are, and the mean length of their texts."""
    from ours import make_feed

    feed, tokenizer = make_feed(recipe), load_tokenizer(recipe.tokenizer)
    table, wanted = feed.epoch(0), chosen.rounds * chosen.steps
    full = int((table >= 0).any(-1).all(-1).sum())  # all but perhaps the last
    if not full:
        raise UserError("the data set does not fill one batch; take more --crystals or fewer --rows")
    table = table[: min(wanted, full)]
    write = jax.jit(lambda e: (d := feed.writer.draw(feed.key(0), e), feed.writer.write(e, d, feed.row_length)))
    fast = material.transformers_tokenizer(tokenizer)
    tasks, tokens = [], 0
    for batch in map(feed.batch, table):
        draws, rows = jax.device_get(write(batch))
        tasks.append(Task.of(crystals, batch, draws))
        texts = [task.text(recipe.text) for task in tasks[-1]]
        tokens += material.assert_same_tokens([rows], material.encode(texts, fast, tokenizer))
    dtype = recipe.model.dtype
    one_core, peer = SHAPES[chosen.shape].one_core, "HF + PEFT" if recipe.lora else "HF"
    engines = [Engine(OURS, "ours", (dtype, recipe, wanted + len(table)), one_core=one_core)]
    if also := SHAPES[chosen.shape].also:
        other = replace(recipe, model=replace(recipe.model, dtype=also))
        engines.append(Engine(f"{OURS}, {also}", "ours", (also, other, wanted + len(table)), one_core=one_core))
    for other in filter(None, (dtype, also)):
        for setting in settings(chosen):
            model = replace(recipe.model, dtype=other)
            make = (other, setting, model, recipe.lora, recipe.optimizer, recipe.tokenizer, tasks)
            name = f"{peer}, {setting}" + (f", {other}" if also else "")
            engines.append(Engine(name, "peer", make, setting, one_core))
    return engines, len(table), tokens / sum(map(len, tasks))


def summary(chosen: argparse.Namespace, recipe: Recipe, engines: Sequence[Engine], context: float) -> dict[str, Any]:
    """All that was measured, as JSON; `context` is the mean length of a text.

    Raises AssertionError if the engines did not see the same tokens.
    """
    seen = {tuple(turn["useful_tokens"] for turn in engine.turns) for engine in engines if not engine.error}
    assert len(seen) <= 1, f"useful tokens differ: {seen}"
    told = [tell(engine) for engine in engines]
    # Of a model that is stored as floats, whatever --weights says: a token is multiplied with as many weights.
    shape = LlamaConfig(**{name: getattr(recipe.model, name) for name in SHAPES[chosen.shape].model})
    variables = abstract_variables(Llama(shape, recipe.lora), make_mesh(MeshConfig(1, 1, 1)))
    flops = Multiplied.of(shape, variables, "lora" if recipe.lora else "params")
    per_token = flops.flops_per_token(context)
    peak = max((t["roofline_flops"] for t in told if "roofline_flops" in t), default=None)
    for t in told:
        t["mfu"] = t["rate"] * per_token / peak if t["rate"] and peak else None
    ours, peers = told[0]["rate"], [t for t in told if t["rate"] and t["kind"] == "peer"]
    best = max((t for t in peers if not t["setting"]["packed"]), key=lambda t: t["rate"], default=None)
    whole = max((t for t in peers if t["setting"] == asdict(Setting())), key=lambda t: t["rate"], default=None)
    return {
        "benchmark": "train_step",
        "claim": "useful tokens/s of our step / of Hugging Face's in its best setting that pads",
        "clock": "CPU-seconds of one core" if SHAPES[chosen.shape].one_core else "seconds",
        "ratio": ours / best["rate"] if ours and best else None,
        "ratio_against": best and best["name"],
        "ratio_same_batch": ours / whole["rate"] if ours and whole else None,  #: the whole step as one padded batch
        "ratios": {t["name"]: ours / t["rate"] for t in told[1:] if ours and t["rate"]},
        "engines": told,
        "useful_tokens": [list(turns) for turns in seen],
        "tokens_per_crystal": context,
        "shape": chosen.shape,
        "weights": flops.weights,
        "trained_weights": flops.trained,
        "flops_per_token": per_token,
        "roofline_flops": peak,  #: the better of both sides' own matrix products, timed in this run
        "mfu_formula": FORMULA,
        "recipe": to_dict(replace(recipe, data=replace(recipe.data, train=Path(chosen.data).name))),
        "steps_per_turn": chosen.steps,
        "one_at_a_time": chosen.one_at_a_time,
        "data": Path(chosen.data).name,
        "quick": chosen.quick,
    }


def tell(engine: Engine) -> dict[str, Any]:
    """One engine's figures."""
    useful = sum(turn["useful_tokens"] for turn in engine.turns)
    computed = sum(turn["computed_tokens"] for turn in engine.turns)
    return {
        "name": engine.name,
        "kind": engine.kind,
        "setting": engine.setting and asdict(engine.setting),
        "rate": statistics.median(engine.rates) if engine.turns else None,  #: useful tokens/s
        "rates": engine.rates,
        "padding": 1 - useful / computed if computed else None,
        "losses": [loss for turn in engine.turns for loss in turn["losses"]],
        "error": engine.error,
        **engine.facts,
    }


def show(result: dict[str, Any]) -> None:
    print(f"{result['measured']['machine']}\nLLaMA {result['shape']}, {result['weights']:,} weights, useful tokens/s:")
    for engine in result["engines"]:
        if engine["rate"] is None:
            print(f"  {engine['name']:55} {engine['error']}")
            continue
        ratio = result["ratios"].get(engine["name"])
        memory = f"{engine['peak_memory_bytes'] / 2**30:.1f} GiB" if "peak_memory_bytes" in engine else ""
        print(
            f"  {engine['name']:55} {engine['rate']:9,.0f}   padding {engine['padding']:5.1%}   {memory:>9}"
            f"   MFU {engine['mfu']:.1%}" + (f"   ours is {ratio:.2f} times it" if ratio else "")
        )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"train_step.py: {error}")
