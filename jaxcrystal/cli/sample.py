"""`jaxcrystal sample`: draw new crystals from a model."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from jaxcrystal.cli import options
from jaxcrystal.errors import UserError
from jaxcrystal.texts.conditions import BY_ATTRIBUTE, CONDITIONS


def add(verb: Callable) -> None:
    """Adds the verb with its options."""
    command = verb(
        "sample",
        run,
        "draw new crystals from a model",
        "Every attempt becomes a row of --out, with its text, status, log-probability and CIF; a run that was stopped "
        "goes on when it is started again. Crystal I of seed S is the same however many are drawn at once. A grammar "
        "sees to it that every text is a crystal, and that what is said of its composition, size and cell is kept.",
        resumes=True,
    )
    command.add_argument(
        "--model",
        required=True,
        type=options.place,
        metavar="DIR",
        help="written by train or convert; or mini, which comes with the package",
    )
    options.add_base(command)
    command.add_argument("--num", required=True, type=int, metavar="N", help="attempts")
    command.add_argument("--num-valid", type=int, metavar="N", help="end once so many are ok; --num is then the limit")
    command.add_argument(
        "--resample",
        type=int,
        metavar="M",
        help="draw M of each prompt's attempts again by the grammar's weights, as the model alone draws under the "
        "constraints; needs --temperature 1 --top-p 1",
    )
    command.add_argument(
        "--keep",
        type=float,
        metavar="X",
        help="keep the likeliest share of each prompt's crystals, such as 0.5; the others stay rows, as left_out",
    )
    command.add_argument(
        "--keep-by",
        choices=["total", "token", "atom"],
        help="the likeliest by log p in total, per token or per atom (default: token)",
    )
    command.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="x.parquet, x.csv, or a folder for CIFs"
    )
    conditions = command.add_argument_group("conditions, stated in the prompt")
    command._negative_number_matcher = re.compile(r"-[\d.]")  # of argparse: what is no option though it begins with -
    for each in CONDITIONS:
        conditions.add_argument(each.option, type=each.typed, metavar=each.metavar, help=each.unit)
    options.add_property(conditions, "a property of the model's own, or a range of it as NAME=1:2")
    conditions.add_argument(
        "--conditions",
        type=Path,
        metavar="FILE",
        help="instead: a CSV, each of whose rows is a prompt with --num attempts of its own; columns are "
        + ", ".join(BY_ATTRIBUTE)
        + ", and the model's own",
    )
    conditions.add_argument(
        "--guidance",
        type=float,
        metavar="W",
        help="press what is stated: 1 is the model as it is, 2 twice as far from what it says unasked",
    )
    limits = command.add_argument_group("constraints, which the grammar keeps; the prompt does not state them")
    limits.add_argument(
        "--num-atoms",
        type=options.atoms,
        metavar="N",
        help="of the cell: 8, or from 4 to 12 as 4-12, or any (default: as in training, for a formula of that size)",
    )
    limits.add_argument("--require", type=options.symbols, metavar="A,B", help="elements, each at least once")
    limits.add_argument("--allow", type=options.symbols, metavar="A,B", help="elements; all others are forbidden")
    limits.add_argument("--forbid", type=options.symbols, metavar="A,B", help="elements")
    limits.add_argument(
        "--space-groups",
        type=options.groups,
        metavar="N,M",
        help="one of which the text states: 221,225 or 195-230; for models that write crystals by their symmetry",
    )
    limits.add_argument("--lengths", type=options.interval, metavar="X-Y", help="of the cell's edges, Å")
    limits.add_argument("--angles", type=options.interval, metavar="X-Y", help="of the cell, degrees")
    limits.add_argument(
        "--new",
        action="store_true",
        help="a composition whose formula is one of the training set's is drawn again, at once; for models that write "
        "crystals by their symmetry",
    )
    limits.add_argument(
        "--no-grammar", dest="grammar", action="store_false", help="let the model write what it likes, crystal or not"
    )
    command.add_argument("--temperature", type=float, default=0.9, metavar="T", help="below 1: likelier crystals")
    command.add_argument(
        "--composition-temperature",
        type=float,
        metavar="T",
        help="of the composition, where a text begins with it (default: as --temperature)",
    )
    command.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest tokens (default: all)")
    command.add_argument("--top-p", type=float, default=0.9, metavar="P", help="keep the likeliest tokens up to P")
    command.add_argument("--min-p", type=float, metavar="P", help="keep tokens P times as likely as the likeliest")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, other crystals")
    command.add_argument(
        "--symprec", type=float, default=0.1, metavar="X", help="Å, for the symmetrized CIF beside the one in P1"
    )
    command.add_argument(
        "--exact-symmetry",
        action="store_true",
        help="a crystal that is more symmetric than its text says is not ok; with --num-valid others are drawn instead",
    )
    command.add_argument(
        "--slots", type=int, metavar="B", help="crystals that a copy draws at once (default: what its memory holds)"
    )
    options.add_dtype(command)
    command.add_argument(
        "--cache-dtype",
        choices=["float32", "bfloat16", "int8"],
        help="of keys and values (default: the model's; int8 has scales, and room for more slots)",
    )
    command.add_argument(
        "--tensor",
        type=int,
        default=1,
        metavar="N",
        help="devices that share a copy of the model; the others hold copies",
    )
    command.add_argument("--max-new-tokens", type=int, metavar="N", help="longest text (default: what the model holds)")
    options.add_hosts(command)


def run(args: argparse.Namespace) -> None:
    """Samples, and prints how the attempts ended."""
    from jaxcrystal import hosts
    from jaxcrystal.mesh import copies_mesh
    from jaxcrystal.sampling.conditions import Trained, read
    from jaxcrystal.sampling.sampling import sample
    from jaxcrystal.texts.constraints import Constraints
    from jaxcrystal.weights.saved import model_directory

    properties = Trained.read(model_directory(args.model)).text.properties
    flags = {each.attribute: getattr(args, each.name) for each in CONDITIONS}
    flags = {name: value for name, value in flags.items() if value is not None}
    flags |= options.properties(args.property, properties)
    if flags and args.conditions is not None:
        raise UserError("conditions come from --conditions or from the other options, not from both")
    constraints = {
        "required": args.require and tuple(args.require),
        "allowed": args.allow and tuple(args.allow),
        "forbidden": args.forbid and tuple(args.forbid),
        "space_groups": args.space_groups,
        "lengths": args.lengths,
        "angles": args.angles,
    }
    hosts.start(args.coordinator, args.processes, args.process_id)
    report = sample(
        args.model,
        args.num,
        args.out,
        base=args.base,
        num_valid=args.num_valid,
        resample=args.resample,
        keep=args.keep,
        keep_by=args.keep_by,
        conditions=flags if args.conditions is None else read(args.conditions, properties),
        num_atoms=args.num_atoms,
        constraints=Constraints(**{name: value for name, value in constraints.items() if value is not None}),
        grammar=args.grammar,
        guidance=args.guidance,
        temperature=args.temperature,
        composition_temperature=args.composition_temperature,
        new=args.new,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        symprec=args.symprec,
        exact_symmetry=args.exact_symmetry,
        slots=args.slots,
        dtype=args.dtype,
        cache_dtype=args.cache_dtype,
        max_new_tokens=args.max_new_tokens,
        mesh=copies_mesh(args.tensor),
    )
    if not hosts.is_first():
        return
    shares = ", ".join(f"{count} {status}" for status, count in report.counts.items())
    print(f"{report.attempts} attempts in {report.out}: {shares}; judge them with `jaxcrystal evaluate {report.out}`")
    if report.more_symmetric:
        print(f"{report.more_symmetric} of them are more symmetric than they say (column `higher_symmetry`)")
    if args.new and report.redraws is not None:
        print(f"compositions drawn again, for training had their formula: {report.redraws} (column `redraws`)")
    if report.effective_number is not None:
        print(
            f"column `resampled`: {args.resample} of each prompt's attempts, by weights under which the "
            f"{report.attempts} amount to {report.effective_number:.1f} independent draws"
        )
    if report.out != args.out:
        print("the other hosts' parts are not here: bring all to one folder, and run this there, alone, to join them")
    if args.num_valid is not None and report.ok < args.num_valid:
        print(f"fewer than --num-valid {args.num_valid} are ok: --num {args.num} was the limit")
