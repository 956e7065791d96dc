"""`jaxcrystal convert`: turn LLaMA weights, or PEFT's adapters, into a model directory."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from jaxcrystal.cli import options


def add(verb: Callable) -> None:
    """Adds the verb with its options."""
    command = verb(
        "convert",
        run,
        "turn LLaMA weights, or PEFT's adapters, into a model directory",
        "SOURCE is a directory of Hugging Face (config.json; safetensors or .bin, in one file or more), of Meta "
        "(params.json, consolidated.*.pth), both with tokenizer.model or tokenizer.json, or of PEFT "
        "(adapter_config.json); a .gguf file; a name of ours (smollm2-135m); or a model's name at Hugging Face. A "
        "SentencePiece vocabulary without padding gets the piece [PAD], as crystal-text-llm does it: one row more, the "
        "mean of all. SOURCE may then have up to 256 rows more than its tokenizer has pieces, as vocabularies that "
        "were resized to a multiple do: the first is [PAD]'s, the rest stays behind. With more, or fewer, the "
        "tokenizer is refused as another model's. A byte-level BPE is left as it is.",
    )
    command.add_argument("source", metavar="SOURCE", help="a directory, a .gguf file, or a name")
    command.add_argument(
        "--out",
        required=True,
        type=options.place,
        metavar="DIR",
        help="the model directory to write, or gs://BUCKET/DIR",
    )
    command.add_argument(
        "--base", type=options.place, metavar="DIR", help="for adapters: the model directory they belong to"
    )
    command.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of the weights (default: SOURCE's; bfloat16 for float16)"
    )
    command.add_argument(
        "--weights",
        choices=["float", "int8", "nf4"],
        default="float",
        help="how the layers' kernels are stored; int8 and nf4 take a half and a quarter, and are a frozen base",
    )
    command.add_argument(
        "--no-pad-token",
        dest="pad_token",
        action="store_false",
        help="keep the vocabulary: no piece [PAD], no row for it; <unk> fills rows of a batch instead, without loss",
    )
    command.add_argument(
        "--vocab-multiple",
        type=int,
        default=128,
        metavar="N",
        help="store rows of the vocabulary up to a multiple of N, so that a mesh can divide them; they get no logit",
    )


def run(args: argparse.Namespace) -> None:
    """Converts, and prints what the model is and how to go on with it."""
    from jaxcrystal import compilation_cache
    from jaxcrystal.weights.convert import convert

    compilation_cache.enable()
    config = convert(
        args.source,
        args.out,
        dtype=args.dtype,
        weights=args.weights,
        base=args.base,
        pad_token=args.pad_token,
        vocab_multiple=args.vocab_multiple,
    )
    shape = f"{config.num_hidden_layers} layers, width {config.hidden_size}, {config.vocab_size} pieces"
    if args.base is None:
        print(f"{args.out}: {shape}; fine-tune it with `jaxcrystal train CONFIG --set base={args.out}`")
    else:
        print(
            f"{args.out}: adapters for {shape}; sample with `jaxcrystal sample --model {args.out} --num 100 --out FILE`"
        )
