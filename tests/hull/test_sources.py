"""What a hull is built from: equal to pymatgen's on the same entries; what cannot be used is counted or refused."""

import itertools
import json
import pickle
import re
import sys
import types
import warnings

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from monty.serialization import dumpfn
from pymatgen.analysis.phase_diagram import PatchedPhaseDiagram, PDEntry, PhaseDiagram
from pymatgen.core import Composition, Lattice, Structure
from pymatgen.entries.compatibility import MaterialsProject2020Compatibility
from pymatgen.entries.computed_entries import ComputedEntry, ComputedStructureEntry
from test_hull import b2, emt, fcc

from jaxcrystal.cli import main
from jaxcrystal.errors import UserError
from jaxcrystal.hull import hull as hull_module
from jaxcrystal.hull import sources as hull_sources
from jaxcrystal.hull.formation import ElementReferences, Uncovered
from jaxcrystal.hull.hull import Hull, is_hull_file
from jaxcrystal.hull.sources import build, known_hull
from jaxcrystal.reader.reading import read
from jaxcrystal.relaxation.batch import Relaxation, RelaxationStatus
from jaxcrystal.relaxation.selfcheck import EnergyReference

#: eV/atom, about PBE's, of elements of whose compounds none is among the known ones: any formation energy will do.
TOTALS = {"Ac": -4.1, "Pm": -4.75, "Pa": -9.5, "Tm": -4.48, "Np": -12.9, "Tc": -10.36}


def entries(count=100, seed=0):
    """Total energies of random compounds, in eV per cell, as a `PDEntry` each; elements among them."""
    rng = np.random.default_rng(seed)
    found = [PDEntry(Composition({symbol: 2}), 2 * energy, name=symbol) for symbol, energy in TOTALS.items()]
    while len(found) < count:
        chosen = rng.choice(list(TOTALS), rng.integers(1, 5), replace=False)
        composition = Composition({str(symbol): int(rng.integers(1, 5)) for symbol in chosen})
        formation = rng.uniform(0, 0.5) if len(chosen) == 1 else rng.normal(-0.4, 0.6)
        energy = sum(n * TOTALS[e.symbol] for e, n in composition.items()) + formation * composition.num_atoms
        found.append(PDEntry(composition, energy))
    return found


def written(path, content):
    """As matbench-discovery publishes it: gzipped pickle, or JSON by monty."""
    if ".pkl" in path.name:
        import gzip

        with gzip.open(path, "wb") as file:
            pickle.dump(content, file)
    else:
        dumpfn(content, path)
    return path


def formation_energy(entry):
    totals = sum(n * TOTALS[e.symbol] for e, n in entry.composition.items())
    return (entry.energy - totals) / entry.composition.num_atoms


@pytest.mark.parametrize("name", ["ppd.pkl.gz", "ppd.json.gz"])
def test_a_patched_phase_diagram_gives_pymatgens_distances(tmp_path, name):
    known, others = entries(), entries(seed=1)[len(TOTALS) :]
    diagram = PatchedPhaseDiagram(known)
    build([written(tmp_path / name, diagram)], tmp_path / "hull.parquet", trust_pickle=True)
    hull = Hull.from_file(tmp_path / "hull.parquet")
    assert hull.references.energies == pytest.approx(TOTALS)
    kept = {entry.composition.reduced_formula for entry in known}
    assert hull.left_out == {"not the lowest of its composition": len(known) - len(kept)}
    for entry in [*known, *others]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where no patch covers a system, pymatgen tells that it stitches
            expected = diagram.get_decomp_and_e_above_hull(entry, allow_negative=True)[1]
        found = hull.e_above_hull(entry.composition, formation_energy(entry))
        # Where it stitches, pymatgen minimises by SLSQP, which ends a little above the least.
        stitched = not any(space.issuperset(entry.composition.elements) for space in diagram.spaces)
        assert found >= expected - 1e-6 if stitched else found == pytest.approx(expected, abs=1e-6)


def test_real_chemical_systems_equal_pymatgens(shared):
    table = pd.read_parquet(shared / "data/hull/mp_formation_energies.parquet")
    rows = list(zip(table["formula"], table["formation_energy_per_atom"], strict=True))
    rng = np.random.default_rng(0)
    for system in ("Al-Ni", "Fe-P-S", "Ba-Ti-O", "Li-Fe-P-O", "Li-Mn-Fe-P-O"):
        symbols = system.split("-")
        only = re.compile(f"(?:(?:{'|'.join(symbols)})[0-9.]*)+")
        known = [(Composition(f), e) for f, e in rows if only.fullmatch(f)] + [(Composition(s), 0.0) for s in symbols]
        assert len(known) > 8 and {s for c, _ in known for s in c.as_dict()} == set(symbols)
        phases = [PDEntry(composition, energy * composition.num_atoms) for composition, energy in known]
        hull, diagram = Hull.from_entries(system, phases, ElementReferences({})), PhaseDiagram(phases)
        mixtures = [(Composition({s: int(rng.integers(1, 9)) for s in symbols}), 0.0) for _ in range(20)]
        for composition, energy in [*known, *mixtures]:
            expected = energy - diagram.get_hull_energy_per_atom(composition)
            assert hull.e_above_hull(composition, energy) == pytest.approx(expected, abs=1e-6)


def test_nine_elements_end(shared):
    references = ElementReferences.from_file(shared / "data/hull/mp_elemental_reference_entries.json.gz")
    hull = Hull.from_table(shared / "data/hull/mp_formation_energies.parquet", references)
    composition = Composition("LiNaMgAlFeCoNiO12F")
    distance = hull.e_above_hull(composition, -2.0)
    # Some mixture of binary oxides holds the same atoms, so the hull lies no higher than that.
    assert np.isfinite(distance) and distance > -2.0 - composition.num_atoms


def compatible(formula, energy, **parameters):
    entry = ComputedEntry(formula, energy, entry_id=f"mp-{formula}", parameters={"run_type": "GGA", "hubbards": {}})
    entry.parameters |= parameters
    return entry


def corrected(entry):
    MaterialsProject2020Compatibility(check_potcar=False).process_entries([entry])
    return entry


def by_materials_project():
    """Entries as its client returns them: with corrections, without, of another functional, of another U."""
    return [
        corrected(compatible("Li2", -3.8)),
        corrected(compatible("O2", -9.8)),
        compatible("Fe", -8.5),
        corrected(compatible("Li2O", -14.0)),
        compatible("LiO", -9.6),
        corrected(compatible("FeO", -13.4, run_type="GGA+U", hubbards={"Fe": 5.3})),
        compatible("Fe2O3", -33.0),  # without the U that the Materials Project gives an oxide
        compatible("Li4O2", -40.0, run_type="R2SCAN"),
        ComputedEntry("LiFeO2", -23.0),
    ]


LEFT_OUT = {
    "calculated with another Hubbard U than the Materials Project's": 1,
    "of another functional: R2SCAN": 1,
    "of an unknown functional: it has neither run_type nor MP2020 corrections": 1,
}


def has_the_corrected_energies(hull):
    (oxide,) = hull.phases[frozenset(["Li", "O"])][:1]
    assert oxide.energy == pytest.approx((-14.0 - 0.687 - 2 * -1.9 + 4.9) / 3)
    (wuestite,) = hull.phases[frozenset(["Fe", "O"])]
    assert wuestite.energy == pytest.approx((-13.4 - 0.687 - 2.256 + 8.5 + 4.9) / 2)
    assert hull.left_out == LEFT_OUT


@pytest.fixture
def client(monkeypatch):
    """Stands in for `mp_api`: what it was asked, and what it answers."""

    class Rester:
        asked: list = []  # noqa: RUF012
        fails: Exception | None = None

        def __init__(self, key):
            self.asked.append(key)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def get_entries_in_chemsys(self, elements, additional_criteria):
            if self.fails:
                raise self.fails
            self.asked.append((elements, additional_criteria))
            inside = [e for e in by_materials_project() if set(e.composition.as_dict()) <= set(elements)]
            return inside

        def get_database_version(self):
            return "2026.11.1"

    Rester.asked, Rester.fails = [], None
    monkeypatch.setitem(sys.modules, "mp_api", types.ModuleType("mp_api"))
    monkeypatch.setitem(sys.modules, "mp_api.client", types.SimpleNamespace(MPRester=Rester))
    monkeypatch.setenv("MP_API_KEY", "secret")
    return Rester


def test_the_materials_projects_entries(tmp_path, client):
    hull = build(["mp:Li-Fe-O"], tmp_path / "hull.parquet")
    # r2SCAN is mixed in unless it is asked not to be.
    assert client.asked == ["secret", (["Fe", "Li", "O"], {"thermo_types": ["GGA_GGA+U"]})]
    has_the_corrected_energies(hull)
    assert hull.name.startswith("Materials Project 2026.11.1, Fe-Li-O")
    again = Hull.from_file(tmp_path / "hull.parquet")
    assert again == hull
    with pytest.raises(Uncovered, match="no crystal of S"):
        again.e_above_hull(Composition("LiS"), -1.0)


def test_a_system_that_was_not_asked_for_is_uncovered(tmp_path, client):
    build(["mp:Li-O", "mp:Fe-O"], tmp_path / "hull.parquet")
    hull = Hull.from_file(tmp_path / "hull.parquet")
    assert hull.e_above_hull(Composition("Li2O"), 0.0) > 0
    assert len(hull.phases[frozenset(["O"])]) == 1  # once, though it was fetched twice
    with pytest.raises(Uncovered, match="not built for the chemical system Fe-Li"):
        hull.e_above_hull(Composition("LiFe"), -0.1)


def test_without_package_key_or_network_it_is_said(tmp_path, client, monkeypatch):
    client.fails = ConnectionError("no route to host")
    with pytest.raises(UserError, match=r"gave no entries \(ConnectionError: no route to host\)"):
        build(["mp:Li-O"], tmp_path / "hull.parquet")
    with pytest.raises(UserError, match="mp:Li-Xx: 'Xx' is no chemical element"):
        build(["mp:Li-Xx"], tmp_path / "hull.parquet")
    monkeypatch.delenv("MP_API_KEY")
    with pytest.raises(UserError, match="environment variable MP_API_KEY"):
        build(["mp:Li-O"], tmp_path / "hull.parquet")
    monkeypatch.setitem(sys.modules, "mp_api.client", None)
    with pytest.raises(UserError, match=r"mp_api.* is not installed; pip install 'jaxcrystal\[mp\]'"):
        build(["mp:Li-O"], tmp_path / "hull.parquet")
    assert not (tmp_path / "hull.parquet").exists()


@pytest.mark.parametrize("rows", [False, True])
def test_entries_in_json(tmp_path, rows):
    found = [entry.as_dict() for entry in by_materials_project()]
    path = tmp_path / "entries.json"
    path.write_text(json.dumps([{"entry": entry} for entry in found] if rows else found))
    hull = build([path], tmp_path / "hull.parquet")
    has_the_corrected_energies(hull)
    assert hull.sources[0].startswith("entries.json sha256:")


def test_a_peroxide_is_told_by_its_structure(tmp_path):
    cell = Structure(
        Lattice.cubic(5), ["Li", "Li", "O", "O"], [[0, 0, 0], [0.5, 0.5, 0], [0.35, 0.5, 0.5], [0.65, 0.5, 0.5]]
    )
    peroxide = ComputedStructureEntry(cell, -19.0, parameters={"run_type": "GGA", "hubbards": {}})
    path = written(tmp_path / "entries.json", [compatible("Li", -1.9), compatible("O2", -9.8), peroxide])
    (phase,) = build([path], tmp_path / "hull.parquet").phases[frozenset(["Li", "O"])]
    assert phase.energy == pytest.approx((-19.0 - 2 * 0.465 + 2 * 1.9 + 2 * 4.9) / 4)


def test_several_inputs_are_joined_and_kinds_are_not_mixed(tmp_path):
    known = entries(40)
    halves = [written(tmp_path / f"{i}.json", known[i::2]) for i in range(2)]
    together = build(halves, tmp_path / "hull.parquet")
    alone = build([written(tmp_path / "all.json", known)], tmp_path / "one.parquet")
    assert together.sha256 == alone.sha256 and together.sources != alone.sources
    (tmp_path / "t.csv").write_text("formula,formation_energy_per_atom\nLiO,-2\n")
    with pytest.raises(UserError, match=r"must be of one kind: .*0\.json is entries; .*t\.csv is a table"):
        build([halves[0], tmp_path / "t.csv"], tmp_path / "hull.parquet")


def formation_entries():
    return [PDEntry("Li", 0.0), PDEntry("O2", 0.0), PDEntry("Li2O", -6.0), PDEntry("LiS", -1.0)]


def reference_file(path, **energies):
    path.write_text(json.dumps({s: ComputedEntry(s, e).as_dict() for s, e in energies.items()}))
    return path


def test_formation_energies_need_references_and_totals_have_them(tmp_path):
    path = written(tmp_path / "entries.json", formation_entries())
    out, references = tmp_path / "hull.parquet", reference_file(tmp_path / "refs.json", Li=-1.9, O=-4.9)
    with pytest.raises(UserError, match="formation energies, which need element references: add --references"):
        build([path], out)
    hull = build([path], out, references=references)
    assert hull.references.energies == {"Li": -1.9, "O": -4.9} and hull.left_out == {"no element reference": 1}
    assert hull.e_above_hull(Composition("Li2O"), -2.0) == pytest.approx(0.0)
    totals = written(tmp_path / "totals.json", entries(20))
    with pytest.raises(UserError, match="total energies, with the elements' own: leave --references out"):
        build([totals], out, references=references)


def test_a_table_is_built_once_and_says_what_it_stands_on(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("formula,formation_energy_per_atom\nLi2O,-2.0\nNaN,0.1\nO2,0\n")
    references, out = reference_file(tmp_path / "refs.json", Li=-1.9, O=-4.9), tmp_path / "hull.parquet"
    with pytest.raises(UserError, match=r"t\.csv is a table of formation energies, which needs element references"):
        build([tmp_path / "t.csv"], out)
    assert main(["hull", "build", str(tmp_path / "t.csv"), "--references", str(references), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "6 phases of 6 chemical systems, from t.csv" in told
    assert "  energies checked: 1 compounds of known formation energy, error 0.062 eV/atom" in told
    assert is_hull_file(out) and not is_hull_file(tmp_path / "t.csv") and not is_hull_file(tmp_path / "none")
    hull = known_hull([out], None)
    assert hull == Hull.from_file(out)
    assert dict(hull.phases) == dict(
        Hull.from_table(tmp_path / "t.csv", ElementReferences.from_file(references)).phases
    )
    for other in ([out, out], [out, tmp_path / "t.csv"]):
        with pytest.raises(UserError, match="is whole: it takes no other file and no references"):
            known_hull(other, None)
    with pytest.raises(UserError, match="is whole"):
        known_hull([out], references)
    with pytest.raises(UserError, match="are known: hull labels are for crystals"):
        known_hull([out], None, "single-point")


def retold(path, **changes):
    """The file with other words about itself."""
    table = pq.read_table(path)
    told = json.loads(table.schema.metadata[b"jaxcrystal hull"]) | changes
    pq.write_table(table.replace_schema_metadata({b"jaxcrystal hull": json.dumps(told).encode()}), path)


def test_a_hull_of_another_functional_is_refused(tmp_path, monkeypatch):
    own, out = emt(reference=EnergyReference.OWN), tmp_path / "hull.parquet"
    (tmp_path / "t.csv").write_text("formula,formation_energy_per_atom\nAlCu,-0.2\n")
    build([tmp_path / "t.csv"], out, references=reference_file(tmp_path / "refs.json", Al=-3.7, Cu=-4.1))
    # A file of the Materials Project's scale, and a potential of another functional.
    hull = Hull.from_file(out)
    hull.require_same_scale(emt(reference=EnergyReference.MP))
    with pytest.raises(UserError, match=r"EMT does not stand on the energy scale .* the hull t\.csv"):
        hull.require_same_scale(own)
    # A file that one potential labelled, and another potential.
    phases = [phase for system in hull.phases.values() for phase in system]
    references = ElementReferences(hull.references.energies, "e" * 64)
    Hull.from_phases("3 crystals, EMT", phases, references, potential_sha256="e" * 64).write(out)
    labelled = Hull.from_file(out)
    labelled.require_same_scale(own)
    with pytest.raises(UserError, match="3 crystals, EMT was labelled by another potential"):
        labelled.require_same_scale(emt(sha="f" * 64, reference=EnergyReference.MP))
    # A file that says so itself.
    retold(out, scale="r2scan")
    with pytest.raises(UserError, match=r"stands on the scale 'r2scan'; known are 'mp2020'"):
        Hull.from_file(out)
    # Entries, and element references, that say so or show it by silicon's energy.
    foreign = [compatible("Si", -5.42, run_type="R2SCAN"), compatible("O2", -9.8, run_type="R2SCAN")]
    with pytest.raises(UserError, match=r"no elemental entries on the .* scale \(2 x of another functional: R2SCAN\)"):
        build([written(tmp_path / "foreign.json", foreign)], out)
    with pytest.raises(UserError, match=r"shifted\.json is of another functional .*: Si has -8\.300 eV/atom, there -5"):
        build([written(tmp_path / "shifted.json", [PDEntry("Si", -8.3), PDEntry("SiO2", -25.0)])], out)
    with pytest.raises(UserError, match=r"refs\.json is of another functional"):
        ElementReferences.from_file(reference_file(tmp_path / "refs.json", Si=-8.3))
    (tmp_path / "refs.json").write_text(json.dumps({"Li": foreign[0].as_dict() | {"composition": {"Li": 1}}}))
    with pytest.raises(UserError, match="the entry of Li is of R2SCAN, not of GGA"):
        ElementReferences.from_file(tmp_path / "refs.json")


def test_a_file_that_was_changed_or_is_another_is_refused(tmp_path):
    build([written(tmp_path / "e.json", entries(20))], out := tmp_path / "new" / "hull.parquet")
    retold(out, sha256="0" * 64)
    with pytest.raises(UserError, match="was changed after it was built"):
        Hull.from_file(out)
    pd.DataFrame({"formula": ["LiO"]}).to_parquet(out)
    for path in (out, tmp_path / "e.json", tmp_path / "none.parquet"):
        with pytest.raises(UserError, match=r"is no hull that `jaxcrystal hull build` wrote"):
            Hull.from_file(path)


class Runs:
    """Unpickled, it leaves a mark."""

    def __reduce__(self):
        return (print, ("code of the pickle ran",))


def test_a_pickle_is_not_read_unless_it_is_trusted(tmp_path, capsys):
    path = written(tmp_path / "evil.pkl.gz", Runs())
    with pytest.raises(UserError, match=r"evil\.pkl\.gz: reading a pickle runs whatever code is in it; add --trust"):
        build([path], tmp_path / "hull.parquet")
    assert "ran" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"holds NoneType; expected a phase diagram"):
        build([path], tmp_path / "hull.parquet", trust_pickle=True)
    assert "ran" in capsys.readouterr().out
    path.write_bytes(b"no pickle")
    with pytest.raises(UserError, match=r"evil\.pkl\.gz cannot be read by pymatgen .*take the JSON"):
        build([path], tmp_path / "hull.parquet", trust_pickle=True)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (["none.json"], {}, "none.json does not exist"),
        (["hull.txt"], {}, "hull.txt is nothing that a hull is built from: mp:Li-Fe-O"),
        ([], {}, "must be of one kind: there are none"),
        (["e.json"], {"labels": "single-point"}, "are for crystals that a potential labels"),
        (["e.json"], {"samples": "s.csv"}, "are for crystals that a potential labels"),
        (["e.json"], {"potential": "chgnet", "references": "r.json"}, "from the same crystals"),
        (["e.json"], {"potential": "chgnet", "labels": "quick"}, "unknown labels 'quick'; known are relaxed, single"),
    ],
)
def test_what_does_not_go_together(tmp_path, inputs, options, message):
    with pytest.raises(UserError, match=message):
        build([tmp_path / name for name in inputs], tmp_path / "hull.parquet", **options)
    with pytest.raises(UserError, match=r"name it .*hull\.parquet, not .*hull\.json"):
        build([], tmp_path / "hull.json")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/hull\.parquet"):
        build([tmp_path / "none.json"], tmp_path / "file" / "hull.parquet")


ODD = [{"composition": {"Li": 1}, "energy": energy} for energy in ("low", float("nan"))]


@pytest.mark.parametrize("item", [{"energy": -1.0}, 5, None, *ODD])
def test_an_item_that_is_no_entry_is_named(tmp_path, item):
    path = tmp_path / "entries.json"
    path.write_text(json.dumps({"a": compatible("Li", -1.9).as_dict(), "b": item}))
    with pytest.raises(UserError, match=r"entries\.json, b: no computed entry"):
        build([path], tmp_path / "hull.parquet")


def test_crystals_that_a_potential_labels(tmp_path, monkeypatch):
    """Single points and relaxations differ; what is no crystal or not asked for is counted or left alone."""
    potential, asked = emt(), []

    def here(structures, potential, settings, **options):
        asked.append((settings.max_steps, options["cache_dir"], len(structures)))
        energy = -1.0 if settings.max_steps else -0.5
        return [
            Relaxation(RelaxationStatus.CONVERGED, "", s, (energy if len(s.composition) > 1 else 0.0) * len(s))
            for s in structures
        ]

    monkeypatch.setattr(hull_module, "relax_all", here)
    monkeypatch.setattr(hull_sources, "potential_card", lambda name, workers: potential)
    crystals = [fcc("Al", 4.0), fcc("Cu", 3.6), fcc("Ni", 3.5), b2("Al", "Cu"), b2("Al", "Ni"), None]
    path = written(tmp_path / "crystals.json", crystals)
    samples = written(tmp_path / "samples.json", [b2("Al", "Cu", 3.3)])
    with pytest.raises(UserError, match=r"none\.json has no crystal, whose chemical system the hull could be of"):
        build([path], tmp_path / "x.parquet", potential="emt", samples=written(tmp_path / "none.json", [None]))
    out = tmp_path / "hull.parquet"
    energies = {}
    for labels, wished in itertools.product(("relaxed", "single-point"), (None, samples)):
        build([path], out, potential="emt", labels=labels, samples=wished)
        hull = Hull.from_file(out)
        left_out = {read(path).rows[-1].outcome: 1} | ({"other_system": 2} if wished else {})
        assert hull.name.endswith(f"EMT, {labels}") and hull.left_out == left_out
        assert hull.potential_sha256 == potential.sha256 and hull.sources[0].startswith("crystals.json sha256:")
        energies[labels] = hull.phases[frozenset(["Al", "Cu"])][0].energy
        if wished:
            with pytest.raises(Uncovered):
                hull.e_above_hull(Composition("AlNi"), -1.0)
        else:
            assert hull.e_above_hull(Composition("AlNi"), -1.0) < 0.51
    assert energies == {"relaxed": -1.0, "single-point": -0.5}
    with pytest.raises(UserError, match=r"none\.json cannot be the hull: none of its 2 rows can be read as a crystal"):
        build([written(tmp_path / "none.json", [None, None])], out, potential="emt")
    kept = tmp_path / "hull.labels"
    assert asked == [(500, kept, 5), (500, kept, 3), (0, kept, 5), (0, kept, 3)]
