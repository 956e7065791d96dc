"""The command line: one command a verb, each a thin call of the function that does the work."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxcrystal import __version__
from jaxcrystal.errors import UserError

if TYPE_CHECKING:
    from jaxcrystal.evaluate.workers import Workers


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Exit codes: 0 done, 1 bad input (one line says what), 2 usage, 130 interrupted."""
    args = _parser().parse_args(arguments)
    # XLA's own chatter is no message of ours.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        return args.run(args) or 0
    except UserError as error:
        if args.debug:
            raise
        print(f"jaxcrystal {args.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"jaxcrystal {args.verb}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxcrystal",
        description="Designs crystals with language models: prepare data, train, sample, evaluate.",
        epilog="Start with `jaxcrystal demo`; `jaxcrystal VERB --help` explains a verb.",
    )
    parser.add_argument("--version", action="version", version=f"jaxcrystal {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable, summary: str, detail: str = "") -> argparse.ArgumentParser:
        command = verbs.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {detail}".strip(),
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=run)
        return command

    _add_prepare(verb)
    _add_convert(verb)
    _add_export(verb)
    _add_train(verb)
    _add_sample(verb)
    _add_evaluate(verb)
    _add_compare(verb)
    _add_hull(verb)
    _add_doctor(verb)
    _add_demo(verb)
    return parser


def _add_prepare(verb: Callable) -> None:
    command = verb(
        "prepare",
        _prepare,
        "check crystals, reduce them to the Niggli cell, store them",
        "INPUT is a CSV or parquet file with a `cif` column, a folder of CIFs, an extxyz file, or the word prototypes "
        "(the data set that comes with the package). Each becomes DIR/<its name>.parquet; DIR/report.json and "
        "DIR/left_out.csv tell what was left out and why.",
    )
    command.add_argument("inputs", nargs="+", metavar="INPUT", help="file, folder, or `prototypes`")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    command.add_argument("--no-niggli", dest="niggli", action="store_false", help="keep the cells as they are")
    command.add_argument("--max-atoms", type=int, default=20, metavar="N", help="leave larger cells out; 0: none")
    command.add_argument("--workers", type=int, default=_cores(), metavar="N", help="processes")


def _prepare(args: argparse.Namespace) -> None:
    from jaxcrystal.crystals.prepare import prepare

    report = prepare(args.inputs, args.out, niggli=args.niggli, max_atoms=args.max_atoms or None, workers=args.workers)
    print(report)


def _add_convert(verb: Callable) -> None:
    command = verb(
        "convert",
        _convert,
        "turn LLaMA weights, or PEFT's adapters, into a model directory",
        "SOURCE is a directory of Hugging Face (config.json; safetensors or .bin, in one file or more), of Meta "
        "(params.json, consolidated.*.pth) or of PEFT (adapter_config.json); the first two with tokenizer.model. A "
        "vocabulary without padding gets the piece [PAD], as crystal-text-llm does it: one row more, the mean of all.",
    )
    command.add_argument("source", type=Path, metavar="SOURCE", help="the directory to convert")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="the model directory to write")
    command.add_argument("--base", type=Path, metavar="DIR", help="for adapters: the model directory they belong to")
    command.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the weights (default: as in SOURCE)")
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


def _convert(args: argparse.Namespace) -> None:
    from jaxcrystal.config import MeshConfig
    from jaxcrystal.mesh import make_mesh
    from jaxcrystal.model.saved import convert

    config = convert(
        args.source,
        args.out,
        make_mesh(MeshConfig()),
        args.dtype,
        args.weights,
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


def _add_export(verb: Callable) -> None:
    command = verb(
        "export",
        _export,
        "write a model for transformers or PEFT to load",
        "`hf` is a whole model, its adapters merged; `peft` is the adapters alone, for the base that they belong to.",
    )
    command.add_argument("--model", required=True, type=Path, metavar="DIR", help="written by train or convert")
    command.add_argument("--format", required=True, choices=["hf", "peft"], help="what to write")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="the directory to write")
    command.add_argument("--shard-size", default="5GB", metavar="SIZE", help="hf: largest file, such as 500MB")
    command.add_argument(
        "--base-name", metavar="NAME", help="peft: what to load below the adapters (default: the base's path)"
    )
    command.add_argument(
        "--no-pad-token", dest="pad_token", action="store_false", help="hf: leave [PAD] and its row behind"
    )


def _export(args: argparse.Namespace) -> None:
    from jaxcrystal.config import MeshConfig
    from jaxcrystal.mesh import make_mesh
    from jaxcrystal.model.export import export

    report = export(
        args.model,
        args.out,
        args.format,
        shard_size=args.shard_size,
        base_name=args.base_name,
        pad_token=args.pad_token,
        mesh=make_mesh(MeshConfig()),
    )
    files = f"{report.files} file" + "s" * (report.files != 1)
    print(f"{report.out}: {report.tensors} tensors, {report.bytes / 1e6:.1f} MB in {files}")


def _add_train(verb: Callable) -> None:
    command = verb(
        "train",
        _train,
        "fine-tune a LLaMA with adapters, or train a small one from random weights",
        "CONFIG is a YAML recipe (see configs/). A run that was stopped goes on when it is started again.",
    )
    command.add_argument("config", type=Path, metavar="CONFIG", help="YAML recipe")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key of the recipe, for example optimizer.learning_rate=1e-3; may be repeated",
    )
    _add_hosts(command)


def _add_hosts(command: argparse.ArgumentParser) -> None:
    hosts = command.add_argument_group(
        "many hosts", "needed only outside Slurm, TPU pods and GKE, which are recognised"
    )
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    hosts.add_argument("--processes", type=int, metavar="N", help="number of processes of the job")
    hosts.add_argument("--process-id", type=int, metavar="I", help="number of this process, from 0")


def _train(args: argparse.Namespace) -> int:
    from jaxcrystal import hosts
    from jaxcrystal.config import Recipe, load

    recipe = load(Recipe, args.config, args.set)
    hosts.start(args.coordinator, args.processes, args.process_id)
    from jaxcrystal.train.loop import train

    report = train(recipe)
    if report.stopped is not None:
        told = f"saved after step {report.steps}, on {report.stopped.name}; run the same command again to go on"
        if hosts.is_first():
            print(told)
        return 130 if report.stopped is signal.SIGINT else 0
    if not hosts.is_first():
        return 0
    if report.loss is None:
        told = "all done before"
    else:
        told = f"loss {report.loss:.4f}, validation loss {report.validation_loss:.4f}"
    print(
        f"{report.steps} steps, {told}; "
        f"sample from it with `jaxcrystal sample --model {report.out} --num 100 --out samples.parquet`"
    )
    return 0


def _add_sample(verb: Callable) -> None:
    command = verb(
        "sample",
        _sample,
        "draw new crystals from a model",
        "Every attempt becomes a row of --out, with its text, status, log-probability and CIF; a run that was stopped "
        "goes on when it is started again. Crystal I of seed S is the same however many are drawn at once. A grammar "
        "sees to it that every text is a crystal, and that what is said of its composition, size and cell is kept.",
    )
    command.add_argument("--model", required=True, type=Path, metavar="DIR", help="written by train or convert")
    command.add_argument("--num", required=True, type=int, metavar="N", help="attempts")
    command.add_argument("--num-valid", type=int, metavar="N", help="end once so many are ok; --num is then the limit")
    command.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="x.parquet, x.csv, or a folder for CIFs"
    )
    wishes = command.add_argument_group("conditions, stated in the prompt")
    wishes.add_argument("--formula", metavar="F", help="for example LiFePO4; the grammar keeps to multiples of it")
    wishes.add_argument(
        "--elements",
        type=_symbols,
        metavar="A,B",
        help="for example Li,O; the grammar keeps to all of these, no others",
    )
    wishes.add_argument("--spacegroup", type=int, metavar="N", help="1 to 230")
    wishes.add_argument("--formation-energy", type=float, metavar="X", help="eV per atom")
    wishes.add_argument("--band-gap", type=float, metavar="X", help="eV")
    wishes.add_argument("--e-above-hull", type=float, metavar="X", help="eV per atom")
    wishes.add_argument(
        "--conditions",
        type=Path,
        metavar="FILE",
        help="instead: a CSV, each of whose rows is a prompt with --num attempts of its own; columns are "
        "pretty_formula, elements (Li O), spacegroup.number, formation_energy_per_atom, band_gap, e_above_hull",
    )
    wishes.add_argument(
        "--guidance",
        type=float,
        metavar="W",
        help="press what is stated: 1 is the model as it is, 2 twice as far from what it says unasked",
    )
    limits = command.add_argument_group("constraints, which the grammar keeps; the prompt does not state them")
    limits.add_argument("--num-atoms", type=_atoms, metavar="N", help="of the cell: 8, or from 4 to 12 as 4-12")
    limits.add_argument("--require", type=_symbols, metavar="A,B", help="elements, each at least once")
    limits.add_argument("--allow", type=_symbols, metavar="A,B", help="elements; all others are forbidden")
    limits.add_argument("--forbid", type=_symbols, metavar="A,B", help="elements")
    limits.add_argument("--lengths", type=_range, metavar="X-Y", help="of the cell's edges, Å")
    limits.add_argument("--angles", type=_range, metavar="X-Y", help="of the cell, degrees")
    limits.add_argument(
        "--no-grammar", dest="grammar", action="store_false", help="let the model write what it likes, crystal or not"
    )
    command.add_argument("--temperature", type=float, default=0.9, metavar="T", help="below 1: likelier crystals")
    command.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest tokens (default: all)")
    command.add_argument("--top-p", type=float, default=0.9, metavar="P", help="keep the likeliest tokens up to P")
    command.add_argument("--min-p", type=float, metavar="P", help="keep tokens P times as likely as the likeliest")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, other crystals")
    command.add_argument(
        "--symprec", type=float, default=0.1, metavar="X", help="Å, for the symmetrized CIF beside the one in P1 (0.1)"
    )
    command.add_argument(
        "--slots", type=int, metavar="B", help="crystals that a copy draws at once (default: what its memory holds)"
    )
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
    _add_hosts(command)


def _symbols(typed: str) -> list[str]:
    return typed.replace(" ", "").split(",")


def _range(typed: str) -> tuple[float, float]:
    try:
        low, high = map(float, typed.split("-"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{typed!r} is no range; write it like 2.5-30") from None
    return low, high


def _atoms(typed: str) -> tuple[int, int]:
    low, dash, high = typed.partition("-")
    try:
        return int(low), int(high if dash else low)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{typed!r} is neither a number nor a range like 4-12") from None


def _sample(args: argparse.Namespace) -> None:
    import jax

    from jaxcrystal import hosts
    from jaxcrystal.config import MeshConfig
    from jaxcrystal.crystals.grammar import Constraints
    from jaxcrystal.mesh import make_mesh
    from jaxcrystal.sample.conditions import read
    from jaxcrystal.sample.sampling import sample

    flags = {
        "pretty_formula": args.formula,
        "elements": args.elements,
        "spacegroup.number": args.spacegroup,
        "formation_energy_per_atom": args.formation_energy,
        "band_gap": args.band_gap,
        "e_above_hull": args.e_above_hull,
    }
    flags = {name: value for name, value in flags.items() if value is not None}
    if flags and args.conditions is not None:
        raise UserError("conditions come from --conditions or from the other options, not from both")
    constraints = {
        "required": args.require and tuple(args.require),
        "allowed": args.allow and tuple(args.allow),
        "forbidden": args.forbid and tuple(args.forbid),
        "num_atoms": args.num_atoms,
        "lengths": args.lengths,
        "angles": args.angles,
    }
    hosts.start(args.coordinator, args.processes, args.process_id)
    report = sample(
        args.model,
        args.num,
        args.out,
        num_valid=args.num_valid,
        conditions=flags if args.conditions is None else read(args.conditions),
        constraints=Constraints(**{name: value for name, value in constraints.items() if value is not None}),
        grammar=args.grammar,
        guidance=args.guidance,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        symprec=args.symprec,
        slots=args.slots,
        cache_dtype=args.cache_dtype,
        max_new_tokens=args.max_new_tokens,
        mesh=make_mesh(MeshConfig(data=-1, fsdp=1, tensor=args.tensor), jax.local_devices()),
    )
    if not hosts.is_first():
        return
    shares = ", ".join(f"{count} {status}" for status, count in report.counts.items())
    print(f"{report.attempts} attempts in {report.out}: {shares}; judge them with `jaxcrystal evaluate {report.out}`")
    if report.out != args.out:
        print("the other hosts' parts are not here: bring all to one folder, and run this there, alone, to join them")
    if args.num_valid is not None and report.ok < args.num_valid:
        print(f"fewer than --num-valid {args.num_valid} are ok: --num {args.num} was the limit")


def _cores() -> int:
    """Those that this process may use: a cluster gives fewer than the node has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _add_evaluate(verb: Callable) -> None:
    command = verb(
        "evaluate",
        _evaluate,
        "say which crystals would exist",
        "SAMPLES is what `sample` wrote, any CSV or parquet with a `cif` column, a folder of CIFs, extxyz, or JSON of "
        "pymatgen's structures or entries. Writes structures.parquet (a row an attempt), metrics.json (sums over it), "
        "and report.html to --out.",
    )
    command.add_argument("samples", type=Path, metavar="SAMPLES", help="the crystals to judge")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    command.add_argument("--train", metavar="FILE", help="crystals that count as known: adds novelty")
    command.add_argument("--truth", metavar="FILE", help="the crystals that SAMPLES predict, in order: adds match rate")
    command.add_argument(
        "--reference", metavar="FILE", help="crystals to compare with: adds coverage and distributions"
    )
    command.add_argument(
        "--protocol",
        default="cdvae",
        metavar="P",
        help="cdvae (default), crystal-text-llm or strict; with +smact-icsd24, by smact's newer oxidation states",
    )
    command.add_argument("--cutoffs", default="mp_20", metavar="SET", help="the data set whose coverage is asked for")
    command.add_argument("--potential", metavar="P", help="`chgnet` or a matgl directory: adds relaxation")
    command.add_argument(
        "--hull",
        nargs="+",
        default=[],
        metavar="FILE",
        help="competing phases: adds the distance to their hull. What `hull build` wrote; crystals, which the "
        "potential labels; or, with --references, a table with formula and formation_energy_per_atom (eV/atom)",
    )
    command.add_argument("--references", metavar="FILE", help="elemental reference entries, as Materials Project's")
    _add_labels(command, "--hull-labels")
    command.add_argument("--fmax", type=float, default=0.1, metavar="F", help="relax until forces are below, eV/Å")
    command.add_argument("--max-steps", type=int, default=500, metavar="N", help="of one relaxation")
    command.add_argument("--limit", type=int, metavar="N", help="only the first N attempts")
    where = command.add_mutually_exclusive_group()
    where.add_argument("--workers", type=int, default=_cores(), metavar="N", help="processes on this machine")
    where.add_argument("--dask", metavar="ADDRESS", help="a cluster's scheduler instead, such as tcp://10.0.0.1:8786")


def _evaluate(args: argparse.Namespace) -> None:
    from jaxcrystal.evaluate import workers

    with workers.dask(args.dask) if args.dask else workers.local(args.workers) as pool:
        _evaluate_with(args, pool)


def _evaluate_with(args: argparse.Namespace, workers: Workers) -> None:
    from jaxcrystal.evaluate.evaluation import evaluate

    evaluate(
        args.samples,
        args.out,
        train=args.train,
        truth=args.truth,
        reference=args.reference,
        protocol=args.protocol,
        cutoffs=args.cutoffs,
        potential=args.potential,
        hull=args.hull,
        references=args.references,
        hull_labels=args.hull_labels,
        fmax=args.fmax,
        max_steps=args.max_steps,
        limit=args.limit,
        workers=workers,
    )


def _add_compare(verb: Callable) -> None:
    command = verb(
        "compare",
        _compare,
        "set evaluations side by side, with the differences' intervals",
        "RUN is a folder that `evaluate` wrote, or its metrics.json. Each is compared with the first; what means "
        "something else there (another protocol, reference, potential, hull) is not, and says why.",
    )
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="two or more")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for comparison.csv, comparison.md and comparison.svg"
    )


def _compare(args: argparse.Namespace) -> None:
    from jaxcrystal.evaluate.compare import as_text, compare

    print(as_text(compare(args.runs, args.out)))
    if args.out is not None:
        print(f"written to {args.out}: comparison.csv, comparison.md, comparison.svg")


def _add_labels(command: argparse.ArgumentParser, option: str) -> None:
    command.add_argument(
        option,
        choices=["relaxed", "single-point"],
        default="relaxed",
        help="how the potential labels the hull's crystals: where they relax to, or where they stand, which is quicker",
    )


def _add_hull(verb: Callable) -> None:
    command = verb(
        "hull",
        _hull,
        "build the convex hull that `evaluate --hull` takes",
        "INPUT is mp:Li-Fe-O (the Materials Project, by mp-api, with your key in MP_API_KEY), JSON of pymatgen's "
        "computed entries, a phase diagram such as matbench-discovery's, or a table of formation energies with "
        "--references; several are joined. With --potential it is crystals, which the potential labels. The file says "
        "on which scale it stands, from what it was made and what was left out.",
    )
    command.add_argument("action", choices=["build"], metavar="build", help="what to do")
    command.add_argument("inputs", nargs="+", metavar="INPUT", help="of one kind")
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help="the parquet to write")
    command.add_argument(
        "--references", metavar="FILE", help="elemental reference entries, where INPUT holds formation energies"
    )
    command.add_argument("--potential", metavar="P", help="labels crystals itself: `chgnet` or a matgl directory")
    _add_labels(command, "--labels")
    command.add_argument("--samples", metavar="FILE", help="label only crystals in the chemical systems of these")
    command.add_argument("--trust-pickle", action="store_true", help="read a pickle, which runs whatever code is in it")
    command.add_argument("--workers", type=int, default=_cores(), metavar="N", help="processes")


def _hull(args: argparse.Namespace) -> None:
    from jaxcrystal.evaluate.hull_sources import build
    from jaxcrystal.evaluate.workers import local

    with local(args.workers) as workers:
        hull = build(
            args.inputs,
            args.out,
            references=args.references,
            potential=args.potential,
            labels=args.labels,
            samples=args.samples,
            trust_pickle=args.trust_pickle,
            workers=workers,
        )
    phases = sum(map(len, hull.phases.values()))
    print(f"{args.out}: {phases} phases of {len(hull.phases)} chemical systems, from {hull.name}")
    for reason, count in sorted((hull.left_out or {}).items()):
        print(f"  left out: {count:>6} {reason}")


def _add_doctor(verb: Callable) -> None:
    command = verb("doctor", _doctor, "check this installation: versions, devices, tokens, potentials")
    command.add_argument("--potential", default="chgnet", metavar="P", help="`chgnet` or a matgl directory")


def _doctor(args: argparse.Namespace) -> int:
    from jaxcrystal.doctor import doctor

    return 0 if doctor(args.potential) else 1


def _add_demo(verb: Callable) -> None:
    command = verb(
        "demo",
        _demo,
        "train, sample, evaluate and report, small and offline, in minutes",
        "Ends with DIR/report/report.html. A demo that was stopped goes on when it is started again.",
    )
    command.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="folder to write to")


def _demo(args: argparse.Namespace) -> None:
    from jaxcrystal.demo import demo

    demo(args.out)


if __name__ == "__main__":
    sys.exit(main())
