"""The whole way, from a file of samples to the files that are written."""

import json

import pandas as pd
import pytest
from monty.serialization import dumpfn
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from jaxcrystal.errors import UserError
from jaxcrystal.evaluation import results
from jaxcrystal.evaluation.evaluation import evaluate, summary
from jaxcrystal.evaluation.metrics import metrics_from_table
from jaxcrystal.evaluation.table import read_table
from jaxcrystal.hull.formation import ElementReferences
from jaxcrystal.hull.hull import Hull
from jaxcrystal.hull.sources import build


def rock_salt(cation, anion, edge):
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(edge), [cation, anion], [[0, 0, 0], [0.5, 0.5, 0.5]])


SALT = rock_salt("Na", "Cl", 5.69)
MAGNESIA = rock_salt("Mg", "O", 4.24)
CLOSE = Structure(Lattice.cubic(4.0), ["Na", "Cl"], [[0, 0, 0], [0.05, 0, 0]])


@pytest.fixture(autouse=True)
def kept_here(tmp_path, monkeypatch):
    """Fingerprints of references are not left in the home of whoever runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def samples(tmp_path):
    cifs = [str(CifWriter(s)) for s in (SALT, MAGNESIA, SALT.get_primitive_structure(), CLOSE)]
    path = tmp_path / "samples.csv"
    pd.DataFrame({"cif": [*cifs, "broken"]}).to_csv(path, index=False)
    return path


def test_files_that_agree(samples, tmp_path):
    out = tmp_path / "new" / "out"
    metrics = evaluate(samples, out, train=samples, reference=samples)
    assert metrics == json.loads((out / "metrics.json").read_text())
    table, provenance = read_table(out / "structures.parquet")
    assert metrics == metrics_from_table(table, provenance, read_table(out / "reference.parquet")[0])
    assert list(table["outcome"]) == ["ok", "ok", "ok", "ok", "cif_error"]
    assert list(table["structural_valid"]) == [True, True, True, False, False]
    assert list(table["unique"]) == [True, True, False, False, False]
    assert list(table["spacegroup"].iloc[:3]) == [225, 225, 225]
    assert list(table["known_as"].iloc[:3]) == ["0", "1", "0"]
    for name in ("train_nearest", "reference_nearest"):
        assert list(table[name].iloc[1:2]) == ["1"] and set(table[name].iloc[[0, 2]]) <= {"0", "2"}
        assert table[name].isna().tolist() == [False] * 4 + [True]
    nearest = read_table(out / "reference.parquet")[0]["generated_nearest"]
    assert nearest.iloc[1] == "1" and pd.isna(nearest.iloc[4])
    assert metrics["novelty"]["by_matching"] == 0.0
    assert {"samples", "train", "reference", "python", "pymatgen", "smact", "jaxcrystal"} <= set(metrics["versions"])
    read = results.read(out)  # with the training crystals that are nearest, and no others
    assert set(read.training) == set(filter(None, results.nearest_training(table))) and read.samples == "samples.csv"


def test_options_change_what_they_say(samples, tmp_path):
    halved = evaluate(samples, tmp_path / "a", limit=2)
    assert halved["counts"]["attempts"] == 2 and "novelty" not in halved and "stability" not in halved
    near = tmp_path / "near.csv"
    pd.DataFrame({"cif": [str(CifWriter(rock_salt("Na", "Cl", 3.0)))]}).to_csv(near, index=False)
    assert evaluate(near, tmp_path / "b")["validity"]["structural"] == 1.0
    assert evaluate(near, tmp_path / "c", protocol="strict")["validity"]["structural"] == 0.0


def test_comparison_with_a_reference(samples, tmp_path):
    metrics = evaluate(samples, tmp_path / "a", reference=samples, train=samples)
    assert metrics["counts"]["fingerprints"] == 4 and metrics["counts"]["drawn"] == 3
    assert metrics["coverage"]["precision"] == 4 / 5 and metrics["coverage"]["recall"] == 4 / 5
    assert metrics["coverage"]["amsd_recall"] == pytest.approx(0, abs=1e-9)
    assert metrics["coverage"]["amcd_precision"] == pytest.approx(0, abs=1e-9)
    assert metrics["diversity"]["structural"] == pytest.approx(0, abs=1e-6)
    assert metrics["diversity"]["compositional"] > 1
    assert metrics["distribution"]["num_elements_wasserstein"] == 0 and "structural" not in metrics["novelty"]
    lines = {line.split()[0]: line for line in summary(metrics).splitlines()[1:]}
    assert " 80.0%   95 %: " in lines["coverage.precision"] and " 0.000   95 %: " in lines["coverage.amsd_recall"]
    assert " 0.000   95 %: 0.000 to " in lines["distribution.num_elements_wasserstein"]
    stored = list((tmp_path / "cache/jaxcrystal/fingerprints").iterdir())
    assert len(stored) == 1
    paper = evaluate(samples, tmp_path / "b", reference=samples, train=samples, protocol="crystal-text-llm")
    assert (paper["coverage"]["precision"], paper["coverage"]["recall"]) == (1.0, 1.0)  # of three valid ones
    assert (paper["coverage"]["precision_of_all"], paper["coverage"]["recall_of_all"]) == (3 / 5, 3 / 5)
    kinds = [f"{kind}{suffix}" for kind in ("structural", "compositional", "either") for suffix in ("", "_of_all")]
    assert paper["novelty"] == dict.fromkeys(["by_matching", *kinds], 0.0)
    assert paper["validity"]["both"] == 3 / 5 and paper["validity"]["both_of_constructed"] == 3 / 4
    assert "both_of_constructed" not in metrics["validity"]
    table, _ = read_table(tmp_path / "b" / "structures.parquet")
    assert list(table["no_fingerprint_because"])[2:] == ["", "it is invalid", "there is no crystal"]
    assert list((tmp_path / "cache/jaxcrystal/fingerprints").iterdir()) == stored


def test_known_crystals_are_fingerprinted_whatever_the_protocol(samples, tmp_path):
    metrics = evaluate(samples, tmp_path / "a", train=samples, protocol="strict")
    assert set(metrics["novelty"]) == {"by_matching"} and "coverage" not in metrics
    table, _ = read_table(tmp_path / "a" / "structures.parquet")
    assert table["train_structure_distance"].iloc[:4].to_numpy() == pytest.approx([0] * 4, abs=1e-9)
    assert "reference_nearest" not in table


def test_predictions_are_compared_each_with_its_truth(samples, tmp_path):
    truth = tmp_path / "truth.csv"
    true = [MAGNESIA, MAGNESIA, SALT, CLOSE, SALT]
    pd.DataFrame({"cif": [str(CifWriter(s)) for s in true]}).to_csv(truth, index=False)
    metrics = evaluate(samples, tmp_path / "a", truth=truth)
    assert metrics["prediction"]["match_rate"] == 3 / 5 and metrics["prediction"]["match_rate_if_valid"] == 2 / 5
    assert metrics["prediction"]["rmse"] == pytest.approx(0, abs=1e-6) and "truth" in metrics["versions"]
    table, provenance = read_table(tmp_path / "a" / "structures.parquet")
    assert table["truth_displacement"].notna().tolist() == [False, True, True, True, False]
    assert metrics == metrics_from_table(table, provenance)
    assert evaluate(samples, tmp_path / "b", truth=truth, limit=2)["prediction"]["match_rate"] == 1 / 2
    with pytest.raises(UserError, match=r"near\.csv holds 1 crystals for 5 predictions"):
        near = tmp_path / "near.csv"
        pd.DataFrame({"cif": [str(CifWriter(SALT))]}).to_csv(near, index=False)
        evaluate(samples, tmp_path / "c", truth=near)
    with pytest.raises(UserError, match=r"samples.csv, row 4: a true crystal cannot be read"):
        evaluate(samples, tmp_path / "c", truth=samples)


def test_cutoffs_change_what_is_near(samples, tmp_path):
    """Bromine for chlorine is a distance of 7.1, calcium for magnesium one of 6.9."""
    near = tmp_path / "near.csv"
    cifs = [str(CifWriter(rock_salt("Na", "Br", 5.97))), str(CifWriter(rock_salt("Ca", "O", 4.8)))]
    pd.DataFrame({"cif": cifs}).to_csv(near, index=False)
    wide = evaluate(samples, tmp_path / "a", reference=near)
    narrow = evaluate(samples, tmp_path / "b", reference=near, cutoffs="perov_5")
    assert narrow["coverage"]["cutoffs"] == "perov_5" and "coverage" not in evaluate(samples, tmp_path / "d")
    assert (wide["coverage"]["recall"], narrow["coverage"]["recall"]) == (1.0, 0.0)
    with pytest.raises(UserError, match="no cut-offs of coverage are known for 'none'"):
        evaluate(samples, tmp_path / "c", cutoffs="none")


def test_options_that_do_not_go_together(samples, tmp_path):
    with pytest.raises(UserError, match="needs a potential"):
        evaluate(samples, tmp_path / "out", hull=["hull.parquet"])
    with pytest.raises(UserError, match="one table of formation energies"):
        tables = ["a.parquet", "b.parquet"]
        evaluate(samples, tmp_path / "out", potential="chgnet", hull=tables, references="references.json")
    with pytest.raises(UserError, match="hull labels need a hull"):
        evaluate(samples, tmp_path / "out", potential="chgnet", hull_labels="single-point")
    with pytest.raises(UserError, match="unknown labels 'quick'"):
        evaluate(samples, tmp_path / "out", potential="chgnet", hull=["a.csv"], hull_labels="quick")
    with pytest.raises(UserError, match="need a hull"):
        evaluate(samples, tmp_path / "out", potential="chgnet", references="references.json")
    with pytest.raises(UserError, match="unknown protocol"):
        evaluate(samples, tmp_path / "out", protocol="none")


def test_an_output_that_cannot_be_written_is_refused_first(samples, tmp_path):
    with pytest.raises(UserError, match=r"cannot write to the output folder .*samples.csv/out"):
        evaluate(samples, samples / "out")


@pytest.mark.slow
def test_with_a_potential_and_the_hull_that_it_labels(samples, tmp_path, monkeypatch):
    phases = tmp_path / "phases.csv"
    elements = [
        Structure(Lattice.cubic(4.29), ["Na", "Na"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
        Structure(Lattice.hexagonal(3.2, 5.2), ["Mg", "Mg"], [[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]]),
        Structure(Lattice.orthorhombic(6.2, 4.5, 8.2), ["Cl", "Cl"], [[0.4, 0.5, 0.5], [0.6, 0.5, 0.5]]),
        SALT,
    ]
    pd.DataFrame({"cif": [str(CifWriter(s)) for s in elements]}).to_csv(phases, index=False)
    out = tmp_path / "out"
    options = {"potential": "chgnet", "hull": [phases], "max_steps": 3}
    metrics = evaluate(samples, out, **options)
    table, _ = read_table(out / "structures.parquet")
    # No oxygen among the phases: magnesia has an energy, but nothing can be said of its distance.
    assert table["relaxation"].iloc[1] == "uncovered" and pd.isna(table["e_above_hull"].iloc[1])
    assert list(table["relaxation"].iloc[3:]) == ["invalid", "no_crystal"]
    assert table["e_above_hull"].iloc[0] == pytest.approx(0.0, abs=1e-6)  # it is itself the hull's phase
    assert metrics["counts"]["relaxed"] == 3 and metrics["stability"]["metastable_rate"] == 2 / 5
    assert metrics["stability"]["potential"].startswith("CHGNet")
    # A second run finds every relaxation where the first left it, and says the same.
    monkeypatch.setattr("jaxcrystal.relaxation.relaxations.run", lambda *args, **kwargs: iter(()))
    assert evaluate(samples, out, **options) == metrics


@pytest.mark.slow
def test_a_hull_that_was_built_and_labels_by_single_points(samples, tmp_path):
    known, references = tmp_path / "known.csv", tmp_path / "references.json"
    known.write_text("formula,formation_energy_per_atom\nNaCl,-2.1\n")
    elements = {"Na": -1.3225, "Cl": -1.8485}
    references.write_text(json.dumps({s: {"energy": e, "composition": {s: 1}} for s, e in elements.items()}))
    build([known], tmp_path / "hull.parquet", references=references)
    metrics = evaluate(samples, tmp_path / "a", potential="chgnet", hull=[tmp_path / "hull.parquet"], max_steps=0)
    table, provenance = read_table(tmp_path / "a" / "structures.parquet")
    assert metrics["stability"]["hull"] == provenance.hull == "known.csv"
    assert list(table["relaxation"].iloc[:2]) == ["converged", "uncovered"]  # magnesia: no magnesium, no zero
    assert pd.isna(table["e_above_hull"].iloc[1])
    expected = table["energy_per_atom"].iloc[0] - sum(elements.values()) / 2
    assert table["formation_energy_per_atom"].iloc[0] == pytest.approx(expected)
    assert table["e_above_hull"].iloc[0] == pytest.approx(expected + 2.1)
    foreign = ElementReferences(elements, "f" * 64)
    Hull.from_phases("foreign", [], foreign, potential_sha256="f" * 64).write(tmp_path / "foreign.parquet")
    with pytest.raises(UserError, match="the hull foreign was labelled by another potential than CHGNet"):
        evaluate(samples, tmp_path / "c", potential="chgnet", hull=[tmp_path / "foreign.parquet"])
    # A stretched crystal, in the samples and in the hull: the hull's is worth less where it is not relaxed.
    phases = [
        Structure(Lattice.cubic(4.29), ["Na", "Na"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
        Structure(Lattice.orthorhombic(6.2, 4.5, 8.2), ["Cl", "Cl"], [[0.4, 0.5, 0.5], [0.6, 0.5, 0.5]]),
        rock_salt("Na", "Cl", 6.1),
    ]
    dumpfn([*phases, "broken"], tmp_path / "phases.json")
    dumpfn(phases[2:], tmp_path / "stretched.json")
    found = {}
    for labels in ("relaxed", "single-point"):
        options = {"hull": [tmp_path / "phases.json"], "hull_labels": labels, "max_steps": 4}
        metrics = evaluate(tmp_path / "stretched.json", tmp_path / "b", potential="chgnet", **options)
        table, _ = read_table(tmp_path / "b" / "structures.parquet")
        found[labels] = table["e_above_hull"].iloc[0]
        assert metrics["stability"]["hull"].endswith(labels)
        assert metrics["versions"]["hull left out"] == "1 not read as a crystal"
    assert found["relaxed"] == 0.0 and found["single-point"] < -0.001
