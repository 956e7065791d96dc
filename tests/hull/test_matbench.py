"""matbench-discovery's files in their own layout, a few rows of each: crystals, labels, energies, a hull."""

import gzip
import json
import pickle

import pandas as pd
import pytest
from pymatgen.analysis.phase_diagram import PatchedPhaseDiagram, PDEntry, PhaseDiagram
from pymatgen.core import Composition, Lattice, Structure
from pymatgen.entries.compatibility import MaterialsProject2020Compatibility
from pymatgen.entries.computed_entries import ComputedStructureEntry

import jaxcrystal
from jaxcrystal.cli import main
from jaxcrystal.crystals import dataset
from jaxcrystal.errors import UserError
from jaxcrystal.hull.hull import Hull
from jaxcrystal.hull.sources import build, known_hull

#: eV/atom, about the Materials Project's.
TOTALS = {"Li": -1.909, "O": -4.948, "Al": -3.746}
#: The columns of wbm-summary.csv.gz of 2023-12-13, in their order.
SUMMARY = (
    "material_id formula n_sites volume uncorrected_energy e_form_per_atom_wbm e_above_hull_wbm bandgap_pbe "
    "wyckoff_spglib_initial_structure uncorrected_energy_from_cse e_correction_per_atom_mp2020 "
    "e_correction_per_atom_mp_legacy e_form_per_atom_uncorrected e_form_per_atom_mp2020_corrected "
    "e_above_hull_mp2020_corrected_ppd_mp site_stats_fingerprint_init_final_norm_diff wyckoff_spglib unique_prototype"
).split()
#: Formation energies in eV/atom. Those that a hull is compared with (Al2O3, LiAlO2, Li2O) are the Materials Project's.
WBM = {"wbm-1-1": ("Al1 Li1 O2", -3.08), "wbm-1-2": ("Al1 Li5 O4", -2.49), "wbm-2-7": ("Al2 O2", -1.55)}
MP = {"mp-1960": ("Li2O", -2.062), "mp-1143": ("Al2O3", -3.427), "mp-530399": ("LiAl5O8", -3.351)}


def crystal(formula):
    composition = Composition(formula)
    symbols = [element.symbol for element, n in composition.items() for _ in range(int(n))]
    places = [[(i % 3) / 3, (i // 3 % 3) / 3, i // 9 / 3] for i in range(len(symbols))]
    return Structure(Lattice.orthorhombic(6.1, 6.2, 6.3), symbols, places)


def entry(name, formula, formation):
    """As VASP's run of it would be: its energy before the corrections, of which oxides have -0.687 eV an O."""
    structure = crystal(formula)
    energy = formation * len(structure) + sum(n * TOTALS[e.symbol] for e, n in structure.composition.items())
    energy += 0.687 * structure.composition["O"] * (len(structure.composition) > 1)
    parameters = {"run_type": "GGA", "is_hubbard": False, "hubbards": {}}
    data = {"oxidation_states": {"Li": 1, "Al": 3, "O": -2}}
    return ComputedStructureEntry(structure, energy, parameters=parameters, entry_id=name, data=data)


def packed_lines(path, rows):
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture
def files(tmp_path):
    """By the names that they are published by."""
    summary = pd.DataFrame(
        [dict.fromkeys(SUMMARY) | {"material_id": name, "formula": f} for name, (f, _) in WBM.items()]
    )
    energies = [energy for _, energy in WBM.values()]
    summary = summary.assign(
        e_form_per_atom_mp2020_corrected=energies,
        e_form_per_atom_uncorrected=[energy + 0.4 for energy in energies],
        e_form_per_atom_wbm=[energy - 0.3 for energy in energies],
        e_above_hull_mp2020_corrected_ppd_mp=[0.05, -0.01, 0.3],
        e_above_hull_wbm=0.7,
        bandgap_pbe=[2.0, 0.0, 0.5],
        n_sites=[4, 10, 4],
        wyckoff_spglib="A_mP4_4_2a",
        unique_prototype=[True, True, False],
    )
    summary.to_csv(tmp_path / "2023-12-13-wbm-summary.csv.gz", index=False)
    names = [{"material_id": name, "formula_from_cse": formula} for name, (formula, _) in WBM.items()]
    packed_lines(
        tmp_path / "2022-10-19-wbm-init-structs.jsonl.gz",
        [row | {"initial_structure": crystal(row["formula_from_cse"]).as_dict()} for row in names],
    )
    packed_lines(
        tmp_path / "2022-10-19-wbm-computed-structure-entries.jsonl.gz",
        [
            row | {"computed_structure_entry": entry(name, *WBM[name]).as_dict()}
            for row in names
            for name in [row["material_id"]]
        ],
    )
    # Those of before 2025, and of the Materials Project: a table by columns.
    old = pd.DataFrame([row | {"initial_structure": crystal(row["formula_from_cse"]).as_dict()} for row in names])
    old.to_json(tmp_path / "2022-10-19-wbm-init-structs.json.bz2")
    elements = {f"mp-{symbol}": (symbol, 0.0) for symbol in TOTALS}
    whole = [{"material_id": name, "entry": entry(name, *one).as_dict()} for name, one in (MP | elements).items()]
    pd.DataFrame(whole).to_json(tmp_path / "2023-02-07-mp-computed-structure-entries.json.gz")
    mp = {"material_id": list(MP), "formula": [f for f, _ in MP.values()], "energy_above_hull": 0.0}
    mp["formation_energy_per_atom"] = [energy for _, energy in MP.values()]
    pd.DataFrame(mp).to_csv(tmp_path / "2025-02-01-mp-energies.csv.gz", index=False)
    references = {symbol: entry(f"mp-{symbol}", symbol, 0.0).as_dict() for symbol in TOTALS}
    with gzip.open(tmp_path / "2023-02-07-mp-elemental-reference-entries.json.gz", "wt") as file:
        json.dump(references, file)
    diagram = PatchedPhaseDiagram([PDEntry(symbol, energy) for symbol, energy in TOTALS.items()])
    with gzip.open(tmp_path / "2023-02-07-ppd-mp.pkl.gz", "wb") as file:
        pickle.dump(diagram, file)
    return {
        path.name.split("-", 3)[3].partition(".")[0]: path for path in tmp_path.iterdir() if path.suffix != ".bz2"
    } | {"old": tmp_path / "2022-10-19-wbm-init-structs.json.bz2"}


@pytest.mark.parametrize("kind", ["wbm-init-structs", "wbm-computed-structure-entries", "old"])
def test_crystals_are_read_by_their_ids(files, kind):
    found = jaxcrystal.read(files[kind])
    assert found.ids == list(WBM) and found.counts == {"ok": 3}
    for row, (formula, _) in zip(found, WBM.values(), strict=True):
        assert row.crystal.to_structure().matches(crystal(formula))


def test_crystals_are_compared_with(files, tmp_path):
    """`--train` and `--reference` take them as they take any."""
    samples = [crystal("Al1 Li1 O2"), crystal("Li2O")]
    found = jaxcrystal.evaluate(samples, train=files["wbm-init-structs"], limit=2)
    assert list(found.table["known_as"].fillna("")) == ["wbm-1-1", ""]
    assert found.metrics["inputs"]["train"]["used"] == 3
    entries = jaxcrystal.read(files["mp-computed-structure-entries"])
    assert entries.ids == [*MP, *(f"mp-{symbol}" for symbol in TOTALS)] and entries.counts == {"ok": 6}


def test_a_summary_labels_the_crystals_of_a_data_set(files, tmp_path):
    report = jaxcrystal.prepare(files["wbm-init-structs"], tmp_path / "data", labels=files["wbm-summary"])
    (part,) = report.parts
    assert part.kept == 3
    prepared = dataset.load(next((tmp_path / "data").glob("*.parquet")))
    labels = [prepared.attributes(i) for i in range(3)]
    assert [one["formation_energy_per_atom"] for one in labels] == [energy for _, energy in WBM.values()]
    assert [one["e_above_hull"] for one in labels] == [0.05, -0.01, 0.3]
    assert [one["band_gap"] for one in labels] == [2.0, 0.0, 0.5]


def diagram(*sets):
    """pymatgen's, of formation energies."""
    rows = [one for found in sets for one in found.values()] + [(symbol, 0.0) for symbol in TOTALS]
    return PhaseDiagram([PDEntry(f, energy * Composition(f).num_atoms) for f, energy in rows])


def test_summaries_are_a_hull(files, tmp_path):
    out, references = tmp_path / "hull.parquet", files["mp-elemental-reference-entries"]
    assert (
        main(
            [
                "hull",
                "build",
                *map(str, (files["mp-energies"], files["wbm-summary"])),
                "--references",
                str(references),
                "--out",
                str(out),
            ]
        )
        == 0
    )
    hull, theirs = Hull.from_file(out), diagram(MP, WBM)
    mixed = {str(i): (f, -1.5) for i, f in enumerate(["LiAlO2", "Li3AlO3", "AlO2", "Li2O2", "Li4Al3O8"])}
    for formula, energy in [*MP.values(), *WBM.values(), *mixed.values()]:
        composition = Composition(formula)
        expected = energy - theirs.get_hull_energy_per_atom(composition)
        assert hull.e_above_hull(composition, energy) == pytest.approx(expected, abs=1e-6)
    alone = known_hull([files["wbm-summary"]], references)
    expected = -1.5 - diagram(WBM).get_hull_energy_per_atom(Composition("LiAlO2"))
    assert alone.e_above_hull(Composition("LiAlO2"), -1.5) == pytest.approx(expected, abs=1e-6)


def test_entries_are_a_hull(files, tmp_path):
    inputs = [files["mp-computed-structure-entries"], files["wbm-computed-structure-entries"]]
    hull = build(inputs, tmp_path / "hull.parquet")
    everything = [entry(name, *one) for name, one in (MP | WBM | {f"mp-{s}": (s, 0.0) for s in TOTALS}).items()]
    MaterialsProject2020Compatibility(check_potcar=False).process_entries(everything, verbose=False)
    theirs = PhaseDiagram(everything)
    for one in everything:
        formation = theirs.get_form_energy_per_atom(one)
        expected = theirs.get_e_above_hull(one)
        assert hull.e_above_hull(one.composition, formation) == pytest.approx(expected, abs=1e-6)


def test_a_summary_without_energies_is_refused_in_one_line(files, tmp_path):
    summary = pd.read_csv(files["wbm-summary"])
    bare = tmp_path / "bare.csv"
    summary[["material_id", "formula", "n_sites"]].to_csv(bare, index=False)
    missing = (
        "has no column 'formation_energy_per_atom' or 'e_form_per_atom_mp2020_corrected'; its columns are material_id"
    )
    references = files["mp-elemental-reference-entries"]
    with pytest.raises(UserError, match=f"bare.csv {missing}"):
        build([bare], tmp_path / "hull.parquet", references=references)
    summary.loc[1, "e_form_per_atom_mp2020_corrected"] = None
    summary.to_csv(bare, index=False)
    with pytest.raises(UserError, match=r"bare\.csv, row 1 \(Al1 Li5 O4\): .* is no energy in eV/atom"):
        build([bare], tmp_path / "hull.parquet", references=references)
    with pytest.raises(
        UserError, match=r"2023-12-13-wbm-summary\.csv\.gz is a table .* needs element references: --ref"
    ):
        build([files["wbm-summary"]], tmp_path / "hull.parquet")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("evaluate {s} --out x --reference {wbm-summary}", "has energies and no crystals"),
        ("evaluate {s} --out x --train {ppd-mp}", "is a pickle, and reading one runs whatever code is in it"),
        (
            "evaluate {s} --out x --potential chgnet --hull {ppd-mp}",
            "or, if you trust who made it, by `jaxcrystal hull build",
        ),
        ("prepare {ppd-mp} --out x", "give its crystals as JSON"),
        ("hull build {ppd-mp} --out x.parquet", "add --trust-pickle if you trust who made it, or take the JSON"),
    ],
)
def test_what_is_not_read_is_said_in_one_line_with_a_remedy(files, tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.setattr("jaxcrystal.relaxation.relaxations.potential_card", lambda *_: None)
    monkeypatch.setattr(pickle, "load", lambda file: pytest.fail("the pickle was read"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.cif").write_text(crystal("Li2O").to(fmt="cif"))
    typed = words.format_map({name: path.name for name, path in files.items()} | {"s": "s.cif"}).split()
    workers = [] if typed[0] == "hull" else ["--workers", "0"]
    assert main([*typed, *workers]) == 1
    last = capsys.readouterr().err.splitlines()[-1].split("\r")[-1]
    assert said in last and last.startswith(f"jaxcrystal {typed[0]}: ")
