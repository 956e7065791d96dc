"""The command line: every verb explains itself, every option arrives at the function that does the work."""

import argparse
import importlib.metadata
import inspect
import math
import pkgutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from some_crystals import SALT

from jaxcrystal import __version__, cli
from jaxcrystal.errors import UserError
from jaxcrystal.interface.evaluation import Evaluation
from jaxcrystal.texts.conditions import Range
from jaxcrystal.texts.constraints import Constraints
from jaxcrystal.workers import Workers

#: The function behind each verb, and the least that must be typed to reach it.
VERBS = {
    "prepare": ("jaxcrystal.prepare", ["a.csv", "cifs", "--out", "data"]),
    "convert": ("jaxcrystal.weights.convert.convert", ["hf", "--out", "llama"]),
    "export": ("jaxcrystal.weights.export.export", ["--model", "run", "--format", "hf", "--out", "x"]),
    "train": ("jaxcrystal.train", ["recipe.yaml"]),
    "sample": ("jaxcrystal.sampling.sampling.sample", ["--model", "run", "--num", "9", "--out", "s.csv"]),
    "predict": ("jaxcrystal.interface.predicting.predict", ["f.csv", "--model", "run", "--out", "p.csv"]),
    "edit": ("jaxcrystal.interface.editing.edit", ["c.cif", "--model", "run", "--num", "9", "--out", "e.csv"]),
    "infill": ("jaxcrystal.interface.infilling.infill", ["c.csv", "--model", "run", "--mask", "Fe", "--out", "x"]),
    "mutate": ("jaxcrystal.interface.mutating.mutate", ["mp20-test", "--model", "run", "--out", "x"]),
    "templates": ("jaxcrystal.templates", ["--num", "9", "--out", "t.csv"]),
    "improve": ("jaxcrystal.improvement.rounds.improve", ["improve.yaml"]),
    "score": ("jaxcrystal.interface.scoring.score", ["c.csv", "--model", "run", "--out", "s.csv"]),
    "ipt": ("jaxcrystal.interface.scoring.ipt", ["c.csv", "--model", "run", "--out", "i.csv"]),
    "write": ("jaxcrystal.interface.writing.write", ["s.parquet", "--out", "w.csv"]),
    "evaluate": ("jaxcrystal.evaluate", ["s.csv", "--out", "report"]),
    "report": ("jaxcrystal.report.report.write", ["a"]),
    "compare": ("jaxcrystal.report.compare.compare", ["a", "b/metrics.json"]),
    "dft-inputs": ("jaxcrystal.Evaluation.dft_inputs", ["report", "--out", "dft"]),
    "hull": ("jaxcrystal.hull.sources.build", ["build", "e.json", "mp:Li-O", "--out", "h.parquet"]),
    "doctor": ("jaxcrystal.doctor.doctor", []),
    "demo": ("jaxcrystal.demo.demo", []),
}

#: What each function receives without options (of its parameters, those worth stating).
PLAIN = {
    "prepare": {"inputs": ["a.csv", "cifs"], "out": Path("data"), "niggli": True, "max_atoms": 20},
    "convert": {
        "source": "hf",
        "out": Path("llama"),
        "dtype": None,
        "weights": "float",
        "base": None,
        "pad_token": True,
    },
    "export": {"model_dir": Path("run"), "out": Path("x"), "format": "hf", "shard_size": "5GB", "pad_token": True},
    "train": {},
    "sample": {"model_dir": Path("run"), "num": 9, "out": Path("s.csv"), "base": None, "conditions": {}},
    "predict": {"formulas": ["f.csv"], "model_dir": Path("run"), "out": Path("p.csv"), "attempts": 20, "limit": None},
    "edit": {"model_dir": Path("run"), "source": "c.cif", "num": 9, "out": Path("e.csv"), "sites": (), "cell": False},
    "infill": {"model_dir": Path("run"), "crystals": Path("c.csv"), "out": Path("x"), "mask": "Fe", "allow": None},
    "mutate": {"crystals": "mp20-test", "model_dir": Path("run"), "num": 1, "potential": "chgnet", "hull": ["mp"]},
    "templates": {"source": "mp20", "num": 9, "out": Path("t.csv"), "swaps": None, "tolerance": 0.1, "new": False},
    "improve": {},
    "score": {"model_dir": Path("run"), "crystals": Path("c.csv"), "out": Path("s.csv"), "draws": 20, "conditions": {}},
    "ipt": {"model_dir": Path("run"), "crystals": Path("c.csv"), "out": Path("i.csv"), "draws": 20, "over": None},
    "write": {"source": "s.parquet", "out": Path("w.csv"), "form": "cif"},
    "evaluate": {"samples": Path("s.csv"), "out": Path("report"), "potential": None, "hull": []},
    "report": {"out": Path("a")},
    "compare": {"paths": [Path("a"), Path("b/metrics.json")], "out": None},
    "dft-inputs": {"out": Path("dft"), "rows": None, "best": 100, "code": "vasp", "pseudopotentials": None},
    "hull": {"inputs": ["e.json", "mp:Li-O"], "out": Path("h.parquet"), "labels": "relaxed", "trust_pickle": False},
    "doctor": {"potential": "chgnet"},
    "demo": {"out": Path("demo")},
}

#: verb, option, and what it changes of what the function receives; nothing else may change.
OPTIONS = [
    ("prepare", ["--out", "x"], {"out": Path("x")}),
    ("prepare", ["--no-niggli"], {"niggli": False}),
    ("prepare", ["--max-atoms", "7"], {"max_atoms": 7}),
    ("prepare", ["--max-atoms", "0"], {"max_atoms": None}),
    ("prepare", ["--symprec", "0.01"], {"symprec": 0.01}),
    ("prepare", ["--workers", "31"], {"workers": 31}),
    ("prepare", ["--labels", "x"], {"labels": Path("x")}),
    ("convert", ["--out", "x"], {"out": Path("x")}),
    ("convert", ["--dtype", "bfloat16"], {"dtype": "bfloat16"}),
    ("convert", ["--base", "x"], {"base": Path("x")}),
    ("convert", ["--no-pad-token"], {"pad_token": False}),
    ("convert", ["--vocab-multiple", "64"], {"vocab_multiple": 64}),
    ("export", ["--model", "y"], {"model_dir": Path("y")}),
    ("export", ["--format", "peft"], {"format": "peft"}),
    ("export", ["--out", "y"], {"out": Path("y")}),
    ("export", ["--shard-size", "1MB"], {"shard_size": "1MB"}),
    ("export", ["--dtype", "bfloat16"], {"dtype": "bfloat16"}),
    ("export", ["--base-name", "meta-llama/Llama-2-7b-hf"], {"base_name": "meta-llama/Llama-2-7b-hf"}),
    ("export", ["--no-pad-token"], {"pad_token": False}),
    ("convert", ["--weights", "nf4"], {"weights": "nf4"}),
    ("sample", ["--model", "x"], {"model_dir": Path("x")}),
    ("sample", ["--base", "x"], {"base": Path("x")}),
    ("sample", ["--num", "7"], {"num": 7}),
    ("sample", ["--out", "x"], {"out": Path("x")}),
    ("sample", ["--formula", "LiFePO4"], {"conditions": {"pretty_formula": "LiFePO4"}}),
    ("sample", ["--elements", "Li, O"], {"conditions": {"elements": ["Li", "O"]}}),
    ("sample", ["--spacegroup", "225"], {"conditions": {"spacegroup.number": 225}}),
    ("sample", ["--formation-energy", "-1.5"], {"conditions": {"formation_energy_per_atom": -1.5}}),
    ("sample", ["--band-gap", "0"], {"conditions": {"band_gap": 0.0}}),  # zero is a wish, not the lack of one
    ("sample", ["--e-above-hull", "0.05"], {"conditions": {"e_above_hull": 0.05}}),
    ("sample", ["--band-gap", "1:2"], {"conditions": {"band_gap": Range(1, 2)}}),
    ("sample", ["--formation-energy", "-3:-1"], {"conditions": {"formation_energy_per_atom": Range(-3, -1)}}),
    ("sample", ["--spacegroup", "195:"], {"conditions": {"spacegroup.number": Range(195, math.inf)}}),
    ("sample", ["--num-atoms", "8"], {"num_atoms": (8, 8)}),
    ("sample", ["--num-atoms", "4-12"], {"num_atoms": (4, 12)}),
    ("sample", ["--num-atoms", "any"], {"num_atoms": "any"}),
    ("sample", ["--require", "Li, O"], {"constraints": Constraints(required=("Li", "O"))}),
    ("sample", ["--allow", "Li,O"], {"constraints": Constraints(allowed=("Li", "O"))}),
    ("sample", ["--forbid", "U"], {"constraints": Constraints(forbidden=("U",))}),
    ("sample", ["--space-groups", "221,194-196"], {"constraints": Constraints(space_groups=(221, 194, 195, 196))}),
    ("sample", ["--lengths", "2.5-30"], {"constraints": Constraints(lengths=(2.5, 30.0))}),
    ("sample", ["--angles", "60-120"], {"constraints": Constraints(angles=(60.0, 120.0))}),
    ("sample", ["--no-grammar"], {"grammar": False}),
    ("sample", ["--temperature", "0.7"], {"temperature": 0.7}),
    ("sample", ["--composition-temperature", "0.7"], {"composition_temperature": 0.7}),
    ("sample", ["--new"], {"new": True}),
    ("sample", ["--top-k", "40"], {"top_k": 40}),
    ("sample", ["--top-p", "0.5"], {"top_p": 0.5}),
    ("sample", ["--min-p", "0.1"], {"min_p": 0.1}),
    ("sample", ["--num-valid", "3"], {"num_valid": 3}),
    ("sample", ["--resample", "5"], {"resample": 5}),
    ("sample", ["--keep", "0.5"], {"keep": 0.5}),
    ("sample", ["--keep-by", "atom"], {"keep_by": "atom"}),
    ("sample", ["--seed", "3"], {"seed": 3}),
    ("sample", ["--slots", "5"], {"slots": 5}),
    ("sample", ["--max-new-tokens", "99"], {"max_new_tokens": 99}),
    ("sample", ["--guidance", "1.5"], {"guidance": 1.5}),
    ("sample", ["--symprec", "0.01"], {"symprec": 0.01}),
    ("sample", ["--exact-symmetry"], {"exact_symmetry": True}),
    ("sample", ["--cache-dtype", "int8"], {"cache_dtype": "int8"}),
    ("sample", ["--dtype", "bfloat16"], {"dtype": "bfloat16"}),
    ("predict", ["--dtype", "float32"], {"dtype": "float32"}),
    ("predict", ["--model", "x"], {"model_dir": Path("x")}),
    ("predict", ["--out", "x.csv"], {"out": Path("x.csv")}),
    ("predict", ["--attempts", "7"], {"attempts": 7}),
    ("predict", ["--num-atoms", "8"], {"num_atoms": (8, 8)}),
    ("predict", ["--no-num-atoms"], {"given_atoms": False}),
    ("predict", ["--limit", "4"], {"limit": 4}),
    ("predict", ["--rank-by", "energy"], {"rank_by": "energy"}),
    ("predict", ["--potential", "chgnet"], {"potential": "chgnet"}),
    ("predict", ["--fmax", "0.05"], {"fmax": 0.05}),
    ("predict", ["--max-steps", "9"], {"max_steps": 9}),
    ("predict", ["--temperature", "0.7"], {"temperature": 0.7}),
    ("predict", ["--top-p", "0.5"], {"top_p": 0.5}),
    ("predict", ["--seed", "3"], {"seed": 3}),
    ("predict", ["--symprec", "0.01"], {"symprec": 0.01}),
    ("predict", ["--slots", "5"], {"slots": 5}),
    ("predict", ["--max-new-tokens", "99"], {"max_new_tokens": 99}),
    ("predict", ["--workers", "31"], {"workers": 31}),
    ("edit", ["--model", "x"], {"model_dir": Path("x")}),
    ("edit", ["--num", "7"], {"num": 7}),
    ("edit", ["--out", "x"], {"out": Path("x")}),
    ("edit", ["--base", "b"], {"base": Path("b")}),
    ("edit", ["--guidance", "1.5"], {"guidance": 1.5}),
    ("edit", ["--keep-sites", "0,2,4-6"], {"sites": (0, 2, 4, 5, 6)}),
    ("edit", ["--keep-elements"], {"elements": True}),
    ("edit", ["--keep-composition"], {"composition": True}),
    ("edit", ["--keep-cell"], {"cell": True}),
    ("edit", ["--keep-group"], {"group": True}),
    ("edit", ["--num-atoms", "4-12"], {"num_atoms": (4, 12)}),
    ("edit", ["--allow", "Li,O"], {"constraints": Constraints(allowed=("Li", "O"))}),
    ("edit", ["--forbid", "U"], {"constraints": Constraints(forbidden=("U",))}),
    ("edit", ["--resample", "5"], {"resample": 5}),
    ("edit", ["--temperature", "0.7"], {"temperature": 0.7}),
    ("edit", ["--top-p", "0.5"], {"top_p": 0.5}),
    ("edit", ["--seed", "3"], {"seed": 3}),
    ("edit", ["--symprec", "0.01"], {"symprec": 0.01}),
    ("edit", ["--slots", "5"], {"slots": 5}),
    ("edit", ["--dtype", "float32"], {"dtype": "float32"}),
    ("edit", ["--max-new-tokens", "99"], {"max_new_tokens": 99}),
    ("infill", ["--model", "y"], {"model_dir": Path("y")}),
    ("infill", ["--base", "b"], {"base": Path("b")}),
    ("infill", ["--mask", "Mn"], {"mask": "Mn"}),
    ("infill", ["--site", "0"], {"site": 0}),
    ("infill", ["--allow", "Mn, Co"], {"allow": ["Mn", "Co"]}),
    ("infill", ["--similar", "0.1"], {"similar": 0.1}),
    ("infill", ["--out", "y.csv"], {"out": Path("y.csv")}),
    ("mutate", ["--model", "y"], {"model_dir": Path("y")}),
    ("mutate", ["--base", "b"], {"base": Path("b")}),
    ("mutate", ["--out", "y"], {"out": Path("y")}),
    ("mutate", ["--num", "7"], {"num": 7}),
    ("mutate", ["--seed", "3"], {"seed": 3}),
    ("mutate", ["--tolerance", "0.2"], {"tolerance": 0.2}),
    ("mutate", ["--potential", "m3gnet"], {"potential": "m3gnet"}),
    ("mutate", ["--hull", "a", "b"], {"hull": ["a", "b"]}),
    ("mutate", ["--references", "r"], {"references": "r"}),
    ("mutate", ["--train", "t"], {"train": "t"}),
    ("mutate", ["--fmax", "0.05"], {"fmax": 0.05}),
    ("mutate", ["--max-steps", "9"], {"max_steps": 9}),
    ("mutate", ["--workers", "31"], {"workers": 31}),
    ("improve", ["--workers", "31"], {"workers": 31}),
    ("improve", ["--dask", "tcp://a:1"], {"workers": "tcp://a:1"}),
    ("templates", ["--num", "7"], {"num": 7}),
    ("templates", ["--out", "x.csv"], {"out": Path("x.csv")}),
    ("templates", ["--swaps", "1"], {"swaps": 1}),
    ("templates", ["--tolerance", "0.2"], {"tolerance": 0.2}),
    ("templates", ["--seed", "3"], {"seed": 3}),
    ("templates", ["--new"], {"new": True}),
    ("templates", ["--workers", "31"], {"workers": 31}),
    ("score", ["--model", "y"], {"model_dir": Path("y")}),
    ("score", ["--out", "y.csv"], {"out": Path("y.csv")}),
    ("score", ["--base", "y"], {"base": Path("y")}),
    ("score", ["--beside", "mp20-val"], {"beside": Path("mp20-val")}),
    ("score", ["--draws", "0"], {"draws": 0}),
    ("score", ["--seed", "3"], {"seed": 3}),
    ("score", ["--at-once", "2"], {"at_once": 2}),
    ("score", ["--workers", "31"], {"workers": 31}),
    ("score", ["--formula", "LiFePO4"], {"conditions": {"pretty_formula": "LiFePO4"}}),
    ("score", ["--elements", "Li, O"], {"conditions": {"elements": ["Li", "O"]}}),
    ("score", ["--spacegroup", "225"], {"conditions": {"spacegroup.number": 225}}),
    ("score", ["--formation-energy", "-1.5"], {"conditions": {"formation_energy_per_atom": -1.5}}),
    ("score", ["--band-gap", "0"], {"conditions": {"band_gap": 0.0}}),
    ("score", ["--e-above-hull", "0.05"], {"conditions": {"e_above_hull": 0.05}}),
    ("ipt", ["--model", "y"], {"model_dir": Path("y")}),
    ("ipt", ["--out", "y.csv"], {"out": Path("y.csv")}),
    ("ipt", ["--base", "y"], {"base": Path("y")}),
    ("ipt", ["--over", "cells"], {"over": "cells"}),
    ("ipt", ["--draws", "5"], {"draws": 5}),
    ("ipt", ["--seed", "3"], {"seed": 3}),
    ("ipt", ["--at-once", "2"], {"at_once": 2}),
    ("ipt", ["--workers", "31"], {"workers": 31}),
    ("write", ["--out", "x"], {"out": Path("x")}),
    ("write", ["--form", "poscar"], {"form": "poscar"}),
    ("write", ["--workers", "31"], {"workers": 31}),
    ("evaluate", ["--out", "x"], {"out": Path("x")}),
    ("evaluate", ["--scores", "s.csv"], {"scores": "s.csv"}),
    ("evaluate", ["--train", "t", "--train", "u"], {"train": ["t", "u"]}),
    ("evaluate", ["--unconditional", "u"], {"unconditional": "u"}),
    ("evaluate", ["--symprec", "0.01"], {"symprec": 0.01}),
    ("evaluate", ["--nearest"], {"nearest": True}),
    ("evaluate", ["--truth", "t"], {"truth": "t"}),
    ("evaluate", ["--reference", "r"], {"reference": "r"}),
    ("evaluate", ["--protocol", "strict"], {"protocol": "strict"}),
    ("evaluate", ["--cutoffs", "carbon_24"], {"cutoffs": "carbon_24"}),
    ("evaluate", ["--potential", "chgnet"], {"potential": "chgnet"}),
    ("evaluate", ["--hull", "h", "i"], {"hull": ["h", "i"]}),
    ("evaluate", ["--references", "e"], {"references": "e"}),
    ("evaluate", ["--hull-labels", "single-point"], {"hull_labels": "single-point"}),
    ("evaluate", ["--fmax", "0.02"], {"fmax": 0.02}),
    ("evaluate", ["--max-steps", "5"], {"max_steps": 5}),
    ("evaluate", ["--limit", "4"], {"limit": 4}),
    ("evaluate", ["--workers", "31"], {"workers": 31}),
    ("evaluate", ["--dask", "tcp://10.0.0.1:8786"], {"workers": "tcp://10.0.0.1:8786"}),
    ("compare", ["--out", "x"], {"out": Path("x")}),
    ("dft-inputs", ["--out", "x"], {"out": Path("x")}),
    ("dft-inputs", ["--rows", "3,17"], {"rows": (3, 17)}),
    ("dft-inputs", ["--best", "7"], {"best": 7}),
    ("dft-inputs", ["--code", "quantum-espresso"], {"code": "quantum-espresso"}),
    ("dft-inputs", ["--pseudopotentials", "x.json"], {"pseudopotentials": Path("x.json")}),
    ("hull", ["--out", "x.parquet"], {"out": Path("x.parquet")}),
    ("hull", ["--references", "r"], {"references": "r"}),
    ("hull", ["--potential", "chgnet"], {"potential": "chgnet"}),
    ("hull", ["--labels", "single-point"], {"labels": "single-point"}),
    ("hull", ["--samples", "s.csv"], {"samples": "s.csv"}),
    ("hull", ["--trust-pickle"], {"trust_pickle": True}),
    ("hull", ["--workers", "31"], {"workers": Workers(None, 31, one_machine=True)}),
    ("doctor", ["--potential", "dir"], {"potential": "dir"}),
    ("demo", ["--out", "x"], {"out": Path("x")}),
]


def commands() -> dict[str, argparse.ArgumentParser]:
    (verbs,) = [a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return verbs.choices


@pytest.fixture
def received(monkeypatch, tmp_path):
    """Types a command; returns what the function behind its verb is called with, defaults included."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("steps: 5\n")
    Path("improve.yaml").write_text("rounds: 2\n")
    report = Evaluation(Path("report"), {}, pd.DataFrame())
    monkeypatch.setattr("jaxcrystal.Evaluation.read", lambda folder: report)

    class Reached(Exception):
        pass

    def type_in(verb, *options):
        name, least = VERBS[verb]
        signature = inspect.signature(pkgutil.resolve_name(name))

        def reach(*args, **kwargs):
            call = signature.bind(*args, **kwargs)
            call.apply_defaults()
            raise Reached(call.arguments | call.arguments.pop("settings", {}))

        with monkeypatch.context() as patch:
            patch.setattr(name, reach)
            with pytest.raises(Reached) as caught:
                cli.main([verb, *least, *options])
        return caught.value.args[0]

    return type_in


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_reaches_its_function(received, verb):
    assert received(verb).items() >= PLAIN[verb].items()


@pytest.mark.parametrize(
    ("verb", "option", "change"), OPTIONS, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_an_option_changes_what_its_name_says_and_nothing_else(received, verb, option, change):
    before, after = received(verb), received(verb, *option)
    assert {name: value for name, value in after.items() if value != before[name]} == change


def test_set_changes_the_recipe(received):
    plain = received("train")["recipe"]
    changed = received("train", "--set", "optimizer.learning_rate=0.5", "--set", "out=elsewhere")["recipe"]
    assert (plain.steps, changed.steps) == (5, 5)
    assert plain.optimizer.learning_rate != changed.optimizer.learning_rate == 0.5
    assert changed.out == "elsewhere"


def test_set_changes_an_improvement(received):
    plain = received("improve")["recipe"]
    changed = received("improve", "--set", "sampling.num=9", "--set", "training=[epochs=1]")["recipe"]
    assert (plain.rounds, changed.rounds, changed.sampling.num, changed.training) == (2, 2, 9, ("epochs=1",))


@pytest.mark.parametrize("verb", ["train", "sample"])
def test_hosts_are_found_before_anything_else(received, monkeypatch, verb):
    calls = []
    monkeypatch.setattr("jaxcrystal.hosts.start", lambda *arguments: calls.append(arguments))
    received(verb)
    received(verb, "--coordinator", "node1:8476", "--processes", "4", "--process-id", "3")
    assert calls == [(None, None, None), ("node1:8476", 4, 3)]


def test_sampling_takes_every_device_for_copies_or_shares_of_the_model(received):
    meshes = [received("sample", *option)["mesh"] for option in ([], ["--tensor", "4"])]
    assert [dict(mesh.shape) for mesh in meshes] == [
        {"data": 8, "fsdp": 1, "tensor": 1},
        {"data": 2, "fsdp": 1, "tensor": 4},
    ]


def test_conditions_add_up(received):
    wishes = received("sample", "--formula", "NaCl", "--band-gap", "5")["conditions"]
    assert wishes == {"pretty_formula": "NaCl", "band_gap": 5.0}


def test_conditions_of_many_prompts_come_from_a_file(received, capsys):
    Path("wishes.csv").write_text("pretty_formula,band_gap\nNaCl,5\nMgO,\n")
    wishes = received("sample", "--conditions", "wishes.csv")["conditions"]
    assert wishes == [{"pretty_formula": "NaCl", "band_gap": 5.0}, {"pretty_formula": "MgO"}]
    assert cli.main(["sample", *VERBS["sample"][1], "--conditions", "wishes.csv", "--band-gap", "1"]) == 1
    assert "from --conditions or from the other options, not from both" in capsys.readouterr().err


def test_no_option_is_forgotten_above():
    tested = {(verb, option[0]) for verb, option, _ in OPTIONS} | {
        (verb, option) for verb in ("train", "sample") for option in ("--coordinator", "--processes", "--process-id")
    }
    tested |= {("train", "--set"), ("sample", "--tensor"), ("sample", "--conditions"), ("sample", "--property")}
    tested |= {("score", "--property")}
    tested |= {("improve", "--set"), ("evaluate", "--judge")}
    there = {
        (verb, max(a.option_strings, key=len)) for verb, p in commands().items() for a in p._actions if a.option_strings
    }
    assert there ^ tested == {(verb, option) for verb in VERBS for option in ("--help", "--debug")}


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for action in commands()[verb]._actions:
        name = max(action.option_strings, key=len) if action.option_strings else action.metavar
        assert name in text
        assert action.help, f"{verb} {name} is not explained"
        if isinstance(action.default, (int, float, str)) and not isinstance(action.default, bool) and action.nargs != 0:
            assert f"(default: {action.default})" in " ".join(text.split())
    for nothing in ("None", "False", "True", "[]", "==SUPPRESS=="):
        assert f"(default: {nothing})" not in text


def test_the_verbs_are_listed(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(f"    {verb} " in text for verb in VERBS) and set(commands()) == set(VERBS)
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"jaxcrystal {__version__}\n"


@pytest.mark.parametrize(
    "typed",
    [
        [],
        ["dream"],
        ["train"],
        ["sample", "--num", "many"],
        ["sample", "--num-atoms", "4-x"],
        ["sample", "--lengths", "2"],
        ["sample", "--space-groups", "Fm-3m"],
        ["edit", "x.cif", "--keep-sites", "Ti"],
        ["edit", "x.cif", "--keep-sites", "4-1"],
        ["sample", "--space-groups", "221,230-195"],
        ["convert", "x", "--dtype", "y"],
        ["dft-inputs", "x", "--out", "y", "--rows", "NaCl"],
        ["dft-inputs", "x", "--out", "y", "--rows", "1", "--best", "2"],
    ],
)
def test_wrong_usage_exits_with_2(typed, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(typed)
    assert caught.value.code == 2
    assert "usage: jaxcrystal" in capsys.readouterr().err


def test_how_it_ends(monkeypatch, capsys):
    def ends(outcome, *options):
        def doctor(potential):
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setattr("jaxcrystal.doctor.doctor", doctor)
        return cli.main(["doctor", *options]), capsys.readouterr().err

    assert ends(True) == (0, "")
    assert ends(False) == (1, "")
    assert ends(UserError("no such file")) == (1, "jaxcrystal doctor: no such file\n")
    code, message = ends(KeyboardInterrupt())
    assert code == 130 and message.startswith("jaxcrystal doctor: interrupted") and message.count("\n") == 1
    with pytest.raises(ZeroDivisionError):  # a defect of ours is not dressed up as the user's
        ends(ZeroDivisionError())
    with pytest.raises(UserError):
        ends(UserError("no such file"), "--debug")


@pytest.mark.parametrize(
    ("typed", "function", "again"),
    [
        ("prepare prototypes --out x", "reader.preparing.prepare", "start over"),
        ("convert x --out y", "weights.convert.convert", "start over"),
        ("export --model x --format hf --out y", "weights.export.export", "start over"),
        ("train {recipe}", "training.loop.train", "go on"),
        ("sample --model x --num 1 --out y", "sampling.sampling.sample", "go on"),
        ("predict x --model y --out z.csv", "interface.predicting.predict", "go on"),
        ("edit x --model y --num 1 --out z", "interface.editing.edit", "go on"),
        ("infill x --model y --mask Fe --out z", "interface.infilling.infill", "go on"),
        ("mutate x --model y --out z", "interface.mutating.mutate", "go on"),
        ("templates x --num 1 --out {recipe}.csv", "interface.sources.read", "start over"),
        ("improve {recipe}", "improvement.rounds.improve", "go on"),
        ("score x --model y --out z.csv", "interface.scoring.score", "go on"),
        ("ipt x --model y --out z.csv", "interface.scoring.ipt", "go on"),
        ("write x --out y", "interface.writing.read", "start over"),
        ("evaluate x --out y", "evaluation.evaluation.evaluate", "go on"),
        ("compare x y --out z", "report.compare.compare", "start over"),
        ("dft-inputs x --out y", "evaluation.results.read", "start over"),
        ("hull build x --out y", "hull.sources.build", "start over"),
        ("hull build x --out y --potential chgnet", "hull.sources.build", "go on"),
        ("doctor", "doctor.doctor", "start over"),
        ("demo", "demo.demo", "go on"),
    ],
)
def test_what_ctrl_c_says_is_true_of_the_verb(typed, function, again, monkeypatch, tmp_path, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"jaxcrystal.{function}", interrupted)
    (tmp_path / "recipe.yaml").touch()
    assert cli.main(typed.format(recipe=tmp_path / "recipe.yaml").split()) == 130
    verb = typed.split()[0]
    said = capsys.readouterr().err
    assert said == f"jaxcrystal {verb}: interrupted; run the same command again to {again}\n"


def test_help_is_quick_because_it_imports_nothing_heavy():
    script = f"""
import sys
from jaxcrystal.cli import main
for typed in ["--help"], *([verb, "--help"] for verb in {list(VERBS)}):
    try:
        main(typed)
    except SystemExit as end:
        assert end.code == 0
heavy = {{"jax", "flax", "numpy", "pandas", "torch", "matgl", "chgnet", "pymatgen", "ase"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_what_a_host_that_only_trains_has_not_is_said(tmp_path, monkeypatch, capsys):
    """A module, a package whose version is asked for; a fault of the package's own is none of these."""
    command = ["prepare", str(tmp_path / "x.csv"), "--out", str(tmp_path / "data")]
    pd.DataFrame({"cif": [SALT.to_cif()]}).to_csv(tmp_path / "x.csv", index=False)
    for missing in (ModuleNotFoundError("no", name="pymatgen.core"), importlib.metadata.PackageNotFoundError("ase")):

        def lacks(*_, missing=missing):
            raise missing

        monkeypatch.setattr("importlib.metadata.version", lacks)
        assert cli.main(command) == 1
        told = capsys.readouterr().err.splitlines()[-1]
        assert told == f"jaxcrystal prepare: {missing.name} is not installed; pip install 'jaxcrystal[evaluate]'"
    missing = ModuleNotFoundError("no", name="jaxcrystal.lost")
    monkeypatch.setattr("importlib.metadata.version", lambda name: (_ for _ in ()).throw(missing))
    with pytest.raises(ModuleNotFoundError):
        cli.main(command)
