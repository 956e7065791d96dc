"""The results as tables, for the README of this folder: `python benchmarks/table.py` writes them there.

Every figure of the README is read from a JSON file of `results/`, so that none can outlive what was measured.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import RESULTS

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- results: written by table.py -->\n", "<!-- end of results -->\n"

#: Benchmarks with a page of their own: docs/precision.md, docs/pretraining.md.
PAGES = ("quantized_logits", "pretraining")


def rendered(directory: Path = RESULTS) -> str:
    """Every result of a directory, the newest of each benchmark and machine, in order of the files' names."""
    results = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    lines = [line for result in results if result["benchmark"] not in PAGES for line in _section(result)]
    return "\n".join([*lines, ""] if lines else ["None yet.", ""])


def _section(result: dict[str, Any]) -> Iterator[str]:
    measured = result["measured"]
    shape = f", LLaMA {result['shape']}" if "shape" in result else ""
    title = result.get("title", result["benchmark"])
    yield f"**{title}{shape}** on {measured['machine']}, {measured['date'][:10]}, {measured['commit']}"
    yield ""
    if result["benchmark"] == "writer":
        yield "| | crystals/s | device / this |"
        yield "| --- | --: | --: |"
        for name, rate in result["crystals_per_second"].items():
            yield _row(name, f"{rate:,.0f}", _ratio(result, name))
    elif result["benchmark"] == "sampler":
        yield "| | crystals/s | tokens/s | ours / this |"
        yield "| --- | --: | --: | --: |"
        for name, rate in result["crystals_per_second"].items():
            yield _row(name, f"{rate:.2f}", f"{result['tokens_per_second'][name]:,.0f}", _ratio(result, name))
    elif result["benchmark"] == "evaluate":
        yield f"| | atoms | crystals/s and core | {result['peer']} | ours / this | stored / this |"
        yield "| --- | --: | --: | --: | --: | --: |"
        for name in ("generated", "reference"):
            found = result[name]
            rates = [found["crystals"] / statistics.median(found["cpu_seconds"][side]) for side in ("ours", "peer")]
            ratios = (f"{found['ratio']:.1f}", f"{found['ratio_stored']:,.0f}")
            yield _row(name, str(found["atoms"]), *(f"{rate:,.1f}" for rate in rates), *ratios)
        matching = result["matching"]
        sizes = f"{matching['generated']:,} generated with {matching['known']:,} known"
        yield ""
        yield f"| {sizes}, {matching['processes']} processes, load {matching['load']:.1f} | seconds |"
        yield "| --- | --: |"
        for name, seconds in matching["seconds"].items():
            yield _row(name, f"{seconds:.1f}")
        yield _row("all of it", f"{matching['total_seconds']:.1f}")
        if "reproduced" in result:
            yield ""
            yield from _reproduced(result["published"], result["reproduced"])
    elif result["benchmark"] == "relax":
        yield f"{result['crystals']} crystals of {result['data']}, {result['atoms']} atoms, on {result['device']}"
        yield ""
        yield "| | crystals/s | one by one | ours / that | energies within 5 meV/atom | single points within, eV/atom |"
        yield "| --- | --: | --: | --: | --: | --: |"
        for found in result["potentials"].values():
            rates = [f"{result['crystals'] / found['seconds'][side]:.2f}" for side in ("ours", "peer")]
            close, worst = f"{100 * found['close']:.1f} %", f"{found['single_points']['energy']:.0e}"
            name = f"{found['potential']}, {found['peer']}"
            yield _row(name, *rates, f"{found['ratio']:.2f}", close, worst)
    elif result["benchmark"] == "living_sampler":
        yield f"{result['parameters']}; seconds from `import jaxcrystal`, or from the next call, to 8 crystals"
        yield ""
        yield "| compiled programs | first 8 | 8 of another formula |"
        yield "| --- | --: | --: |"
        for name, seconds in result["first_8_seconds"].items():
            kept = {"cold": "none are kept", "warm": "kept"}[name]
            yield _row(kept, f"{seconds:.1f}", f"{result['second_request_seconds'][name]:.1f}")
        yield ""
        yield f"| {result['formulas']:,} formulas, a crystal each | seconds | crystals/s | programs | compilation, s |"
        yield "| --- | --: | --: | --: | --: |"
        for name, found in result["many"].items():
            rate = f"{found['crystals_per_second']:.1f}"
            yield _row(name, f"{found['seconds']:.0f}", rate, str(found["programs"]), f"{found['compile_seconds']:.1f}")
    elif result["benchmark"] == "prepare":
        yield f"{result['rows']:,} rows; medians of runs in turns, and their ratio"
        yield ""
        yield "| | seconds | that / ours |"
        yield "| --- | --: | --: |"
        for side, seconds in result["median_seconds"].items():
            yield _row(side, f"{seconds:.1f}", "" if side == "this version" else f"{result['ratio']:.2f}")
    elif result["benchmark"] == "calibration":
        found = result["formation_energy"]
        errors = f"MAE {1000 * found['mae']:.1f}, bias {1000 * found['bias']:+.1f} meV/atom"
        yield f"{result['potential']['name']}, {result['crystals']} crystals; formation energies: {errors}"
        yield ""
        columns = (
            "hull | energies | placed | MAE | bias | with itself: MAE | bias | same phases: MAE | bias | < 0.1 | ≤ 0"
        )
        yield f"| {columns} |"
        yield "| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |"
        for row in result["hulls"]:
            cells = []
            for errors in (row, row["with_itself"], row.get("same_phases")):
                cells += [f"{1000 * errors['mae']:.1f}", f"{1000 * errors['bias']:+.1f}"] if errors else ["", ""]
            shares = [f"{100 * row[name]:.1f} %" for name in ("metastable", "stable")]
            yield _row(row["hull"], row["energies"], str(row["placed"]), *cells, *shares)
    elif result["benchmark"] == "decimals":
        yield f"{result['crystals']} crystals, {result['potential']}; medians, and what 95 % stay below"
        yield ""
        yield "| text | decimals | tokens | atoms moved, Å | volume, % | energy, meV/atom |"
        yield "| --- | --- | --: | --: | --: | --: |"
        for row in result["rows"]:
            energy = {name: 1000 * value for name, value in row["energy"].items()}
            told = [f"{x['median']:{d}} ({x['p95']:{d}})" for x, d in ((energy, ".1f"),)]
            if "tokens" not in row:
                yield _row(row["text"], "", "", "", "", *told)
                continue
            moved, volume = (f"{x['median']:.3f} ({x['p95']:.3f})" for x in (row["moved"], row["volume"]))
            yield _row(row["text"], ", ".join(map(str, row["decimals"])), f"{row['tokens']:.1f}", moved, volume, *told)
    elif result["benchmark"] == "worth":
        judges = sorted({f"{row['potential']}, {row['hull']}" for row in result["rows"]})
        yield f"{'; '.join(judges)}; shares of all attempts"
        yield ""
        columns = "crystals seen | minutes | nats | tokens | crystals/s | structural | compositional | metastable"
        yield f"| model | attempts | {columns} | metastable S.U.N. |"
        yield "| --- |" + " --: |" * 10
        for row in result["rows"]:
            settings = ", ".join(
                name if value is True else f"{name} {value}" for name, value in row["settings"].items()
            )
            name = f"{row['model']}, {settings}" if settings else row["model"]
            held_out = f"{row['nats']:.1f}" if "nats" in row else ""
            shares = [f"{100 * x:.1f} % ({100 * a:.0f} to {100 * b:.0f})" for x, a, b in row["shares"].values()]
            spent = (f"{row['crystals_seen']:,}", f"{row['step_seconds'] / 60:.0f}")
            rates = (f"{row['tokens']:.0f}", f"{row['crystals_per_second']:.1f}")
            yield _row(name, f"{row['samples']:,}", *spent, held_out, *rates, *shares)
    elif result["benchmark"] == "stated_groups":
        yield result["ledger"]
        yield ""
        yield "| crystals | tolerance, Å | | the stated group | more symmetric | the stated group, mean over groups |"
        yield "| --- | --: | --: | --: | --: | --: |"
        for row in result["rows"]:
            low, high = (100 * x for x in row["interval"])
            shares = [f"{100 * row['equal']:.1f} % ({low:.1f} to {high:.1f})", f"{100 * row['more_symmetric']:.1f} %"]
            evenly = f"{100 * row['evenly']:.1f} % of {row['groups']}"
            yield _row(row["crystals_are"], f"{row['symprec']:g}", f"{row['crystals']:,}", *shares, evenly)
    elif result["benchmark"] == "ground_states":
        for kind, told in result["found"].items():
            low, high = (100 * x for x in told["interval"])
            share = f"{told['found']} of {told['compounds']} ({low:.0f} to {high:.0f} %)"
            drawn = f"temperature {result['temperature']:g}, top-p {result['top_p']:g}"
            yield f"{kind}: {share} among {result['rows'][0]['attempts']} attempts, {drawn}"
            yield ""
        yield ""
        yield "| | compound | id | space group | atoms | of the attempts | the first |"
        yield "| --- | --- | --- | --: | --: | --: | --: |"
        for row in result["rows"]:
            cells = [row["kind"], row["formula"], row["material_id"], str(row["space_group"]), str(row["num_atoms"])]
            yield _row(*cells, str(row["ground_state"]), "none" if row["first"] is None else str(row["first"]))
    elif result["benchmark"] == "conditions":
        judge = result["potential"] or "no potential: energies are not judged"
        yield f"wishes of {result['wishes']}; {judge}; base rates of {result['unconditional']:,} crystals"
        yield ""
        yield "| model | asked | by | attempts | what | met | base |"
        yield "| --- | --- | --- | --: | --- | --: | --: |"
        for row in result["rows"]:
            for what, told in row["told"].items():
                met = next(name for name in ("met_rate", "forced_rate") if name in told)
                cells = [
                    _share(row, f"{what}.{name}", told[name]) if name in told else "" for name in (met, "base_rate")
                ]
                forced = " (forced)" if met == "forced_rate" else ""
                by = "grammar" if row["grammar"] else "prompt"
                yield _row(row["model"], row["asked"], by, str(row["attempts"]), what, cells[0] + forced, cells[1])
    elif result["benchmark"] == "likelihood":
        judges = f"judged by {result['potential']} and {result['hull']}"
        yield f"{result['attempts']:,} attempts of {result['model']}, {judges}"
        yield ""
        yield "| rank correlation of −log p with the energy above the hull | placed | each | a token | an atom |"
        yield "| --- | --: | --: | --: | --: |"
        for name, found in result["sets"].items():
            told = found["correlation"] or {}
            cells = [
                "{:.2f} ({:.2f} to {:.2f})".format(*told[by]) if by in told else "" for by in ("total", "token", "atom")
            ]
            yield _row(name, f"{found['placed']:,}", *cells)
        names = list(result["kept"][0]["rates"])
        yield ""
        yield "| kept | crystals | mean atoms |" + "".join(f" {name} |" for name in names)
        yield "| --- | --: | --: |" + " --: |" * len(names)
        for row in result["kept"]:
            share = f", the likeliest {row['share']:.0%} by {row['by']}".replace("%", " %") if row["share"] < 1 else ""
            cells = ["{:.1f} % ({:.1f} to {:.1f})".format(*(100 * x for x in row["rates"][name])) for name in names]
            yield _row(f"{result['model']}{share}", f"{row['crystals']:,}", f"{row['mean_num_atoms']:.1f}", *cells)
    elif result["benchmark"] == "prediction":
        shots = [n for n in (1, 5, 20) if n <= result["rows"][0]["attempts"]]
        parts = {"": "all", "new_formulas": "new formulas", "lowest": "lowest of their formula"}
        yield f"true crystals of {result['true']}; the first of {result['rows'][0]['attempts']} attempts by likelihood"
        yield ""
        yield "| model | atoms | true crystals | | an attempt |" + "".join(f" at {n} | RMSE at {n} |" for n in shots)
        yield "| --- | --- | --- | --: | --: |" + " --: | --: |" * len(shots)
        for row in result["rows"]:
            for part, words in parts.items():
                if number := row["truth"].get(part or "crystals"):
                    place = f"prediction.{part}." if part else "prediction."
                    cells = ["" if part else _within(row, "prediction.match_rate")]
                    for n in shots:
                        cells += [_within(row, f"{place}match_rate_at_{n}"), _of(row, f"{place}rmse_at_{n}")]
                    given = "given" if row["num_atoms_given"] else "not given"
                    yield _row(row["model"], given, words, f"{number:,}", *cells)
    elif result["benchmark"] == "train_step":
        yield "| | useful tokens/s | padding | MFU | peak memory | ours / this |"
        yield "| --- | --: | --: | --: | --: | --: |"
        for engine in result["engines"]:
            if engine["rate"] is None:
                yield _row(engine["name"], engine["error"], "", "", "", "")
                continue
            memory = f"{engine['peak_memory_bytes'] / 2**30:.1f} GiB" if "peak_memory_bytes" in engine else ""
            shares = (f"{100 * engine['padding']:.1f} %", f"{100 * engine['mfu']:.1f} %")
            yield _row(engine["name"], f"{engine['rate']:,.0f}", *shares, memory, _ratio(result, engine["name"]))
    else:
        raise ValueError(f"a result of {result['benchmark']!r}, of which no table is made: write it here")
    yield ""


def _reproduced(published: dict[str, float], found: dict[str, Any]) -> Iterator[str]:
    """What was published, and what each choice of crystals gives: with its interval, or the spread of draws."""
    choices = {name: told for name, told in found.items() if isinstance(told, dict)}
    yield "| DiffCSP's crystals, MP-20 test | published |" + "".join(f" {name} |" for name in choices)
    yield "| --- |" + " --: |" * (1 + len(choices))
    for name, value in published.items():
        if name in found:
            yield _row(name, f"{value:.4f}", f"{found[name]:.4f}", *[""] * (len(choices) - 1))
            continue
        cells = []
        for told in choices.values():
            low, high = told[name].get("95 %") or told[name]["95 % of draws"]
            cells.append(f"{told[name].get('found', told[name].get('mean')):.4f} ({low:.4f} to {high:.4f})")
        yield _row(name, f"{value:.4f}", *cells)


def _share(row: dict[str, Any], name: str, value: float) -> str:
    low, high = (100 * x for x in row["intervals"][f"conditions.{row['asked']}.{name}"])
    return f"{100 * value:.1f} % ({low:.1f} to {high:.1f})"


def _of(row: dict[str, Any], name: str) -> str:
    """A number of a prediction; empty where there is none."""
    found: Any = row
    for key in name.split("."):
        found = found.get(key, {})
    return "" if found == {} else f"{found:.3f}"


def _within(row: dict[str, Any], name: str) -> str:
    low, high = (100 * x for x in row["intervals"][name])
    return f"{100 * float(_of(row, name)):.1f} % ({low:.1f} to {high:.1f})"


def _ratio(result: dict[str, Any], name: str) -> str:
    return f"{result['ratios'][name]:.2f}" if name in result["ratios"] else ""


def _row(*cells: str) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


if __name__ == "__main__":
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + BEGIN + rendered() + END + after)
