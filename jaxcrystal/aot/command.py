"""The command line of `launch/aot_compile.py`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

from jax.sharding import Mesh

from jaxcrystal.aot import chips, programs
from jaxcrystal.aot.report import Report
from jaxcrystal.config import LlamaConfig, MeshConfig, Recipe, load
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all fits, 1 bad input (one line says what), 3 something does not fit."""
    args = _parser().parse_args(arguments)
    try:
        reports = []
        for report in _reports(args):
            reports.append(report)
            print("\n".join(report.lines()), flush=True)
        if args.json:
            about = {"config": args.config.stem, "set": args.set, "topology": args.topology}
            about |= {package: version(package) for package in ("jax", "libtpu")}
            args.json.write_text(json.dumps([about | report.data() for report in reports], indent=1) + "\n")
    except UserError as error:
        print(f"aot_compile: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"aot_compile: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0 if all(report.fits for report in reports) else 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compiles the real steps of a recipe for a TPU topology, without the hardware.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="a recipe's file, or its name")
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="v5e:4x4, v5p:4x4x4, v6e:8x8, ...")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--step", choices=("train", "decode", "both"), default="both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same as data")
    parser.add_argument("--hlo", type=Path, metavar="DIR", help="write the compiled programs' text to DIR/STEP.txt")
    decode = parser.add_argument_group("decoding")
    decode.add_argument(
        "--tensor",
        type=int,
        metavar="N",
        help="chips that share a copy of the model; the others hold copies (default: the fewest on which it fits)",
    )
    decode.add_argument("--slots", type=int, default=64, metavar="B", help="crystals that a copy draws at once")
    decode.add_argument("--prompt-tokens", type=int, default=128, metavar="P")
    decode.add_argument("--max-new-tokens", type=int, default=512, metavar="T")
    return parser


def _reports(args: argparse.Namespace) -> Iterator[Report]:
    recipe = load(Recipe, args.config, args.set)
    chip, devices = chips.topology(args.topology)
    config, tokenizer, origin = programs.shape(recipe)
    print(
        f"{args.config} on {args.topology}: {len(devices)} chips; {config.num_hidden_layers} layers of "
        f"{config.hidden_size}, vocabulary {config.vocab_size} ({origin})",
        flush=True,
    )

    def keep(step: str) -> Callable[[str], int] | None:
        if args.hlo is None:
            return None
        args.hlo.mkdir(parents=True, exist_ok=True)
        return (args.hlo / f"{step}.txt").write_text

    if args.step in ("train", "both"):
        mesh = make_mesh(recipe.mesh, devices)
        _print_mesh(mesh, f"{recipe.data.rows_per_batch} rows of {recipe.data.tokens_per_row} tokens")
        yield Report.of(
            "train",
            chip,
            mesh,
            recipe.data.rows_per_batch * recipe.data.tokens_per_row,
            lambda: programs.compile_train(recipe, config, tokenizer, mesh),
            keep("train"),
        )
    if args.step in ("decode", "both"):
        for tensor in [args.tensor] if args.tensor else _tensor_sizes(config, len(devices)):
            mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=tensor), devices)
            slots = args.slots * mesh.shape["data"]
            _print_mesh(
                mesh, f"{slots} slots, a prompt of {args.prompt_tokens} tokens and {args.max_new_tokens} new ones"
            )
            engine = programs.engine(recipe, config, tokenizer, mesh, slots, args.max_new_tokens)
            report = Report.of(
                "decode",
                chip,
                mesh,
                engine.tokens_per_call,
                partial(engine.compile_decode, args.prompt_tokens),
                keep("decode"),
                engine.most_trips(args.prompt_tokens),
            )
            if report.fits:
                break
        yield report


def _print_mesh(mesh: Mesh, what: str) -> None:
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    print(f"mesh {axes}; {what}", flush=True)


def _tensor_sizes(config: LlamaConfig, chips: int) -> list[int]:
    """Powers of two that divide the chips and the heads of the cache, from 1."""
    return [n for n in (2**i for i in range(12)) if chips % n == 0 and config.num_key_value_heads % n == 0]
