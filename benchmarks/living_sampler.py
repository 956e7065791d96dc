"""Seconds to the first crystals, and many formulas: in one run, through one sampler, and as one command each.

    python benchmarks/living_sampler.py            the shape of configs/tiny_cpu.yaml, some minutes
    python benchmarks/living_sampler.py --quick    seconds, a check that it runs; its figures mean nothing

Weights are random: the grammar makes them write crystals of one formula unit each, so that texts are as long as real
ones. `first` is a new process, from `import jaxcrystal` to the eighth crystal: cold with an empty cache of compiled
programs, warm with what the cold one kept, again for a second request of it. The formulas are those of the embedded
set; programs are counted as JAX compiles them, those of a millisecond left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import machine

import jaxcrystal
from jaxcrystal.config import LlamaConfig, MeshConfig, Recipe, TextFormat, load
from jaxcrystal.crystals.prototypes import embedded
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.llama import Llama, initialize
from jaxcrystal.sampling.sampling import sample
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.weights.saved import describe, save_weights

ROOT = Path(__file__).parents[1]
LARGE = 0.05  #: seconds of compilation from which a program counts

FIRST = """
import sys, time
start = time.perf_counter()
import jaxcrystal
sampler = jaxcrystal.load(sys.argv[1])
for formula in ("NaCl", "MgO"):
    assert len(sampler.sample(8, formula=formula, num_atoms=2)) == 8
    print(time.perf_counter() - start)
    start = time.perf_counter()
"""


def make_model(config: LlamaConfig, out: Path) -> Path:
    """A model directory of random weights with the compact tokenizer."""
    describe(out, config, None, TextFormat(), load_tokenizer("compact"))
    save_weights(out, initialize(Llama(config), jax.random.key(0), make_mesh(MeshConfig(1, 1, 1))))
    return out


def first(model: Path, cache: Path) -> list[float]:
    """Seconds until eight crystals are there, and eight of another formula, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {
        "JAXCRYSTAL_COMPILATION_CACHE": "on",
        "XDG_CACHE_HOME": str(cache),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    command = [sys.executable, "-c", FIRST, str(model)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


def measured(work: Callable[[], int]) -> dict[str, float]:
    """Seconds, crystals a second, and the programs that JAX compiled (or read) meanwhile."""
    programs: list[float] = []

    def listen(name: str, seconds: float, **_: Any) -> None:
        if name.endswith("backend_compile_duration") and seconds >= LARGE:
            programs.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    start = time.perf_counter()
    try:
        crystals = work()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    seconds = time.perf_counter() - start
    found = {"crystals": crystals, "seconds": seconds, "crystals_per_second": crystals / seconds}
    return found | {"programs": len(programs), "compile_seconds": sum(programs)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formulas", type=int, default=1000)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    chosen = parser.parse_args(arguments)
    os.environ["JAXCRYSTAL_COMPILATION_CACHE"] = "off"  # here all programs are compiled
    facts = machine.facts(uses_accelerator=True)
    config = load(Recipe, ROOT / "configs" / "tiny_cpu.yaml").model
    count = chosen.formulas
    if chosen.quick:
        count, small = 3, {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        config = LlamaConfig(num_attention_heads=1, num_key_value_heads=1, head_dim=16, **small)
    vocab = load_tokenizer("compact").vocab_size
    config = LlamaConfig(**{**vars(config), "vocab_size": vocab, "max_position_embeddings": 1024})
    crystals = {entry.formula: len(entry.crystal) for entry in embedded()}
    formulas = [formula for formula, atoms in crystals.items() if atoms <= 8][:count]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = make_model(config, place / "model")
        seconds = {name: first(model, place / "cache") for name in ("cold", "warm")}

        def one_run() -> int:
            conditions = [{"pretty_formula": formula} for formula in formulas]
            return sample(model, 1, place / "s.parquet", conditions=conditions, num_atoms=(1, 8), seed=1).attempts

        def one_sampler() -> int:
            with jaxcrystal.load(model) as sampler:
                return sum(len(sampler.sample(1, formula=formula, num_atoms=(1, 8), seed=1)) for formula in formulas)

        many = {"one run": measured(one_run), "one sampler": measured(one_sampler)}
    result = {
        "benchmark": "living_sampler",
        "parameters": f"{config.num_hidden_layers} layers, width {config.hidden_size}",
        "first_8_seconds": {name: found[0] for name, found in seconds.items()},
        "second_request_seconds": {name: found[1] for name, found in seconds.items()},
        "formulas": len(formulas),
        "many": many,
        "quick": chosen.quick,
        "measured": facts,
    }
    print(json.dumps({name: value for name, value in result.items() if name != "measured"}, indent=1))
    print(machine.write("living_sampler", result, chosen.out))


if __name__ == "__main__":
    main()
