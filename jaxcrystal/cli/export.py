"""`jaxcrystal export`: write a model for transformers or PEFT to load."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from jaxcrystal.cli import options


def add(verb: Callable) -> None:
    """Adds the verb with its options."""
    command = verb(
        "export",
        run,
        "write a model for transformers or PEFT to load",
        "`hf` is a whole model, its adapters merged; `peft` is the adapters alone, for the base that they belong to.",
    )
    command.add_argument(
        "--model", required=True, type=options.place, metavar="DIR", help="written by train or convert"
    )
    command.add_argument("--format", required=True, choices=["hf", "peft"], help="what to write")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="the directory to write")
    command.add_argument("--dtype", choices=["float32", "bfloat16"], help="hf: of the weights (default: as they are)")
    command.add_argument("--shard-size", default="5GB", metavar="SIZE", help="hf: largest file, such as 500MB")
    command.add_argument(
        "--base-name",
        metavar="NAME",
        help="peft: what PEFT loads below the adapters, by its name at Hugging Face or as a folder; what `convert` "
        "made the base from, or `export --format hf` of it. Required unless that was a name at Hugging Face",
    )
    command.add_argument(
        "--no-pad-token", dest="pad_token", action="store_false", help="hf: leave [PAD] and its row behind"
    )


def run(args: argparse.Namespace) -> None:
    """Exports, and prints how much was written."""
    from jaxcrystal import compilation_cache
    from jaxcrystal.weights.export import export

    compilation_cache.enable()
    report = export(
        args.model,
        args.out,
        args.format,
        shard_size=args.shard_size,
        base_name=args.base_name,
        pad_token=args.pad_token,
        dtype=args.dtype,
    )
    files = f"{report.files} file" + "s" * (report.files != 1)
    print(f"{report.out}: {report.tensors} tensors, {report.bytes / 1e6:.1f} MB in {files}")
