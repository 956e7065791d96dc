"""The whole way, from a file of samples to the files that are written."""

import json
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
from monty.serialization import dumpfn
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.crystals.symmetry import space_group
from jaxcrystal.errors import UserError
from jaxcrystal.evaluation import results
from jaxcrystal.evaluation.evaluation import evaluate, summary
from jaxcrystal.evaluation.metrics import metrics_from_table
from jaxcrystal.evaluation.stability import StabilityOutcome, StabilityRow
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


def test_training_crystals_of_one_id_are_told_apart(tmp_path):
    cifs = [str(CifWriter(s)) for s in (SALT, MAGNESIA)]
    pd.DataFrame({"material_id": ["m", "m"], "cif": cifs}).to_csv(tmp_path / "train.csv", index=False)
    pd.DataFrame({"cif": cifs}).to_csv(tmp_path / "samples.csv", index=False)
    evaluate(tmp_path / "samples.csv", tmp_path / "out", train=tmp_path / "train.csv")
    found = results.read(tmp_path / "out")
    assert list(found.table["known_as"]) == ["m, row 0", "m, row 1"]
    assert [found.training[name].formula for name in found.table["known_as"]] == ["ClNa", "MgO"]


def test_files_that_agree(samples, tmp_path):
    out = tmp_path / "new" / "out"
    metrics = evaluate(samples, out, train=samples, reference=samples, nearest=True)
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


def test_the_space_group_is_the_one_that_a_ledger_says(tmp_path):
    """BaGa2 of MP-20 (mp-1227946), whose mirror spglib misses at 0.1 Å."""
    lattice = Lattice.from_parameters(4.473924, 4.473477, 5.112519, 90.000226, 90.000452, 59.996687)
    points = [[0, 0, 0.003214], [0.666598, 0.666667, 0.512393], [0.333333, 0.333296, 0.512393]]
    flat = Structure(lattice, ["Ba", "Ga", "Ga"], points)
    pd.DataFrame({"cif": [str(CifWriter(flat))]}).to_csv(tmp_path / "flat.csv", index=False)
    evaluate(tmp_path / "flat.csv", tmp_path / "out")
    table, _ = read_table(tmp_path / "out" / "structures.parquet")
    assert flat.get_space_group_info(symprec=0.1)[1] == 183
    assert table["spacegroup"].iloc[0] == space_group(Crystal.from_structure(flat)) == 191


def test_options_change_what_they_say(samples, tmp_path):
    halved = evaluate(samples, tmp_path / "a", limit=2)
    assert halved["counts"]["attempts"] == 2 and "novelty" not in halved and "stability" not in halved
    near = tmp_path / "near.csv"
    pd.DataFrame({"cif": [str(CifWriter(rock_salt("Na", "Cl", 3.0)))]}).to_csv(near, index=False)
    assert evaluate(near, tmp_path / "b")["validity"]["structural"] == 1.0
    assert evaluate(near, tmp_path / "c", protocol="strict")["validity"]["structural"] == 0.0


def test_comparison_with_a_reference(samples, tmp_path):
    metrics = evaluate(samples, tmp_path / "a", reference=samples, train=samples, nearest=True)
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
    options = {"reference": samples, "train": samples, "protocol": "crystal-text-llm"}
    paper = evaluate(samples, tmp_path / "b", nearest=True, **options)
    assert (paper["coverage"]["precision"], paper["coverage"]["recall"]) == (1.0, 1.0)  # of three valid ones
    assert (paper["coverage"]["precision_of_all"], paper["coverage"]["recall_of_all"]) == (3 / 5, 3 / 5)
    kinds = [f"{kind}{suffix}" for kind in ("structural", "compositional", "either") for suffix in ("", "_of_all")]
    assert paper["novelty"] == dict.fromkeys(["by_matching", *kinds], 0.0)
    assert paper["validity"]["both"] == 3 / 5 and paper["validity"]["both_of_constructed"] == 3 / 4
    assert "both_of_constructed" not in metrics["validity"]
    table, _ = read_table(tmp_path / "b" / "structures.parquet")
    assert list(table["no_fingerprint_because"])[2:] == ["", "it is invalid", "there is no crystal"]
    assert list((tmp_path / "cache/jaxcrystal/fingerprints").iterdir()) == stored
    quick = evaluate(samples, tmp_path / "c", **options)
    assert quick["novelty"] == {"by_matching": 0.0} and quick["coverage"] == paper["coverage"]


def test_the_training_set_is_fingerprinted_only_for_the_nearest_crystal(samples, tmp_path):
    metrics = evaluate(samples, tmp_path / "a", train=samples, nearest=True, protocol="strict")
    assert set(metrics["novelty"]) == {"by_matching"} and "coverage" not in metrics and "diversity" in metrics
    table, _ = read_table(tmp_path / "a" / "structures.parquet")
    assert table["train_structure_distance"].iloc[:4].to_numpy() == pytest.approx([0] * 4, abs=1e-9)
    assert "reference_nearest" not in table
    shutil.rmtree(tmp_path / "cache")
    quick = evaluate(samples, tmp_path / "b", train=samples, protocol="strict")
    assert quick["novelty"] == metrics["novelty"] and "diversity" not in quick
    assert not (tmp_path / "cache").exists() and not (tmp_path / "b" / "fingerprints").exists()
    assert "train_nearest" not in read_table(tmp_path / "b" / "structures.parquet")[0]


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
    assert metrics["counts"]["no_match"] == {"it has another composition": 1, "there is no crystal": 1}
    with pytest.raises(UserError, match=r"near\.csv holds 1 crystals for 5 predictions"):
        near = tmp_path / "near.csv"
        pd.DataFrame({"cif": [str(CifWriter(SALT))]}).to_csv(near, index=False)
        evaluate(samples, tmp_path / "c", truth=near)
    with pytest.raises(UserError, match=r"samples.csv, row 4: a true crystal cannot be read"):
        evaluate(samples, tmp_path / "c", truth=samples)


def test_truth_is_paired_by_ids_whatever_the_order(tmp_path):
    def table(name, rows, ids="material_id"):
        cifs = [crystal if isinstance(crystal, str) else str(CifWriter(crystal)) for _, crystal in rows]
        frame = pd.DataFrame({"cif": cifs, ids: [i for i, _ in rows]})
        frame.drop(columns="none", errors="ignore").to_csv(tmp_path / name, index=False)
        return tmp_path / name

    predicted = table("p.csv", [("mp-2", MAGNESIA), ("mp-1", SALT), ("mp-2", MAGNESIA), ("mp-2", SALT)])
    true = [("mp-1", SALT), ("mp-3", CLOSE), ("mp-4", "broken"), ("mp-2", MAGNESIA)]
    metrics = evaluate(predicted, tmp_path / "a", truth=table("t.csv", true))
    assert metrics["prediction"]["match_rate"] == 3 / 4
    counted = metrics["inputs"]["truth"]
    assert (counted["rows"], counted["used"], counted["left_out"]) == (4, 2, {"cif_error": 1, "no_sample": 1})
    assert "1 without a match: it has another composition" in summary(metrics)
    again = evaluate(predicted, tmp_path / "b", truth=table("r.csv", true[::-1]))
    assert again["prediction"] == metrics["prediction"]
    assert evaluate(predicted, tmp_path / "c", truth=table("t.csv", true), limit=1)["prediction"]["match_rate"] == 1.0

    for rows, message in (
        (true[:1], r"p\.csv, row 0: .*less\.csv has no true crystal with the id 'mp-2'; its ids are such as 'mp-1'"),
        ([*true, true[0]], r"less\.csv: the id 'mp-1' is in rows 0 and 4"),
        ([true[0], ("mp-2", "broken")], r"less\.csv, row 1: a true crystal cannot be read: "),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(predicted, tmp_path / "d", truth=table("less.csv", rows))
    with pytest.raises(UserError, match=r"p\.csv has ids and .*no\.csv has none.* Add the ids to no\.csv as a column"):
        evaluate(predicted, tmp_path / "d", truth=table("no.csv", true, ids="none"))
    with pytest.raises(UserError, match=r"t\.csv has ids and .*no\.csv has none.* Add the ids to no\.csv as a column"):
        evaluate(table("no.csv", true, ids="none"), tmp_path / "d", truth=table("t.csv", true))


def test_rows_that_cannot_be_used_are_counted_for_every_input(tmp_path, capsys):
    """Nine of twelve training rows without atoms: a novelty of 75 % is one against three crystals, and says so."""
    salts = [rock_salt("Na", "Cl", 5.0), *(rock_salt(metal, "Br", 5.6) for metal in ("Na", "K", "Rb"))]
    cifs = [str(CifWriter(salt)) for salt in salts]
    whole, broken, none = (tmp_path / f"{name}.csv" for name in ("whole", "broken", "none"))
    pd.DataFrame({"cif": cifs * 3}).to_csv(whole, index=False)
    headless = [cif.partition("loop_\n _atom_site")[0] for cif in cifs]
    pd.DataFrame({"cif": cifs[:1] * 3 + headless[1:] * 3}).to_csv(broken, index=False)
    pd.DataFrame({"cif": headless}).to_csv(none, index=False)

    assert evaluate(whole, tmp_path / "a", train=whole)["novelty"]["by_matching"] == 0.0
    assert "warning" not in capsys.readouterr().err
    metrics = evaluate(whole, tmp_path / "b", train=broken, reference=broken)
    assert metrics["novelty"]["by_matching"] == 0.75
    for role in ("train", "reference"):
        counted = metrics["inputs"][role]
        assert (counted["file"], counted["rows"], counted["used"]) == ("broken.csv", 12, 3)
        assert counted["left_out"] == {"cif_error": 9} and "_atom_site" in counted["reasons"]["cif_error"]
    assert metrics["inputs"]["samples"]["used"] == metrics["inputs"]["samples"]["rows"] == 12
    why = f"9 cif_error ({metrics['inputs']['train']['reasons']['cif_error']})"
    assert f"train: 3 of 12 rows of broken.csv are used; left out: {why}" in summary(metrics)
    assert f"warning: 9 of 12 rows of the training set {broken} cannot be used: {why}" in capsys.readouterr().err
    table, provenance = read_table(tmp_path / "b" / "structures.parquet")
    assert metrics == metrics_from_table(table, provenance, read_table(tmp_path / "b" / "reference.parquet")[0])

    for role, words in (("train", "training set"), ("reference", "reference")):
        with pytest.raises(
            UserError, match=rf"none\.csv cannot be the {words}: none of its 4 rows .*: 4 cif_error \(the"
        ):
            evaluate(whole, tmp_path / "c", **{role: none})
    failed = evaluate(none, tmp_path / "d")
    assert failed["inputs"]["samples"]["left_out"] == {"cif_error": 4}
    assert why.replace("9", "4", 1) in summary(failed)


@pytest.mark.parametrize("cifs", [["broken"], [str(CifWriter(CLOSE))], [str(CifWriter(SALT))]])
def test_a_set_of_one_row_whatever_it_is(tmp_path, samples, cifs):
    path = tmp_path / "one.csv"
    pd.DataFrame({"cif": cifs}).to_csv(path, index=False)
    metrics = evaluate(
        path, tmp_path / "out", train=samples, nearest=True, truth=one_truth(tmp_path), reference=samples
    )
    sound = float("Na4 Cl4" in cifs[0])
    assert metrics["validity"]["structural"] == metrics["prediction"]["match_rate"] == sound
    assert metrics["uniqueness"]["rate"] == sound and metrics["novelty"]["by_matching"] == 0
    assert all(low <= high for low, high in metrics["confidence_95"].values())
    assert "1 attempts" in summary(metrics)


def one_truth(folder):
    pd.DataFrame({"cif": [str(CifWriter(SALT))]}).to_csv(folder / "truth.csv", index=False)
    return folder / "truth.csv"


def test_uniqueness_novelty_and_sun_are_of_relaxed_crystals(tmp_path, monkeypatch):
    """Four that differ as sampled; two relax to what the training set has, one to what another was, one to nothing."""
    b2 = Structure(Lattice.cubic(3.5), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    zinc = Structure.from_spacegroup("F-43m", Lattice.cubic(6.1), ["Na", "Cl"], [[0, 0, 0], [0.25, 0.25, 0.25]])
    layers = Structure(Lattice.tetragonal(3, 5), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.4]])
    ends = [SALT, zinc, SALT, None, zinc]
    path, train = tmp_path / "samples.csv", tmp_path / "train.csv"
    pd.DataFrame({"cif": [str(CifWriter(s)) for s in (SALT, b2, zinc, layers, zinc, CLOSE)]}).to_csv(path, index=False)
    pd.DataFrame({"cif": [str(CifWriter(SALT))], "material_id": ["mp-1"]}).to_csv(train, index=False)
    rows = [
        StabilityRow(StabilityOutcome.FAILED, "no neighbours")
        if end is None
        else StabilityRow(StabilityOutcome.CONVERGED, "", -3.0, -2.0, -0.01, cif=str(CifWriter(end)), converged=True)
        for end in ends
    ]
    monkeypatch.setattr("jaxcrystal.evaluation.stability.assess", lambda structures, *_, **__: rows)
    potential = SimpleNamespace(name="P", sha256="p", reference=None, check=SimpleNamespace(unchecked=()))
    monkeypatch.setattr("jaxcrystal.relaxation.relaxations.load_potential", lambda name: potential)
    phases = Hull.from_phases(
        "h", [], ElementReferences({"Na": 0.0, "Cl": 0.0}, "p"), potential_sha256="p", left_out={"of r2SCAN": 2}
    )
    monkeypatch.setattr("jaxcrystal.hull.sources.known_hull", lambda *_: phases)

    metrics = evaluate(path, tmp_path / "out", train=train, potential="P", hull="h.parquet", references=train)
    table, provenance = read_table(tmp_path / "out" / "structures.parquet")
    assert metrics == metrics_from_table(table, provenance)
    # As sampled: salt, caesium chloride's structure, zinc blende, layers; zinc blende again.
    assert list(table["unique"]) == [True, True, True, True, False, False]
    assert list(table["novel"]) == [False, True, True, True, True, False]
    assert list(table["group"].iloc[:5]) == [0, 1, 2, 3, 2]
    # Relaxed: salt, zinc blende; salt, nothing, and zinc blende again.
    assert list(table["unique_relaxed"]) == [True, True, False, False, False, False]
    assert list(table["novel_relaxed"]) == [False, True, False, False, True, False]
    assert list(table["known_as_relaxed"].fillna("")) == ["mp-1", "", "mp-1", "", "", ""]
    assert table["group_relaxed"].iloc[[0, 1, 2, 4]].tolist() == [0, 1, 0, 1]
    assert pd.isna(table["group_relaxed"].iloc[3])
    assert metrics["uniqueness"] == {"rate": 2 / 6, "rate_as_sampled": 4 / 6}
    assert metrics["novelty"] == {"by_matching": 2 / 6, "by_matching_as_sampled": 4 / 6}
    assert metrics["sun"] == {
        "rate": 1 / 6, "metastable_rate": 1 / 6, "rate_as_sampled": 2 / 6, "metastable_rate_as_sampled": 2 / 6,
        "lemat_rate": 1 / 6, "lemat_metastable_rate": 0, "lemat_rate_as_sampled": 2 / 6,
        "lemat_metastable_rate_as_sampled": 0,
    }  # fmt: skip
    counts = metrics["counts"]
    assert (counts["unique"], counts["unique_as_sampled"]) == (2, 4)
    assert (counts["novel"], counts["novel_as_sampled"], counts["relaxed"]) == (2, 4, 4)
    assert counts["relaxations"] == {"converged": 4, "failed": 1, "invalid": 1}
    counted = metrics["inputs"]["hull"]
    assert (counted["file"], counted["used"], counted["left_out"]) == ("h.parquet", 0, {"of r2SCAN": 2})
    counted = metrics["inputs"]["references"]
    assert (counted["file"], counted["rows"], counted["used"]) == ("train.csv", 2, 2)
    assert counted["sha256"] == metrics["inputs"]["train"]["sha256"]
    lines = summary(metrics)
    assert "hull: 0 of 2 rows of h.parquet are used; left out: 2 of r2SCAN" in lines
    assert "sun.rate_as_sampled" in lines and "relaxation: failed" in lines


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
    with pytest.raises(UserError, match=r"the hull a\.parquet needs a potential"):
        evaluate(samples, tmp_path / "out", hull="a.parquet")
    with pytest.raises(UserError, match="nearest needs a training set"):
        evaluate(samples, tmp_path / "out", nearest=True)
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
        counted = metrics["inputs"]["hull"]
        assert sum(counted["left_out"].values()) == 1 and counted["rows"] == counted["used"] + 1
    assert found["relaxed"] == 0.0 and found["single-point"] < -0.001
