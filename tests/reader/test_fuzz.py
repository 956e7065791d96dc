"""Mutated files: each is refused with a reason, or its crystal is what an independent reader makes of the same mutant.

The reader is gemmi's own `SmallStructure`, which shares with ours the syntax of CIF and nothing else: it finds
symmetry, special positions, occupancies and elements by code of its own.
"""

import json
import random
import re
import string

import gemmi
import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.errors import UserError
from jaxcrystal.reader.reading import interpret, read
from jaxcrystal.reader.sources import Record

STRUCTURES = [
    Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.69), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
    Structure.from_spacegroup("P4_2/mnm", Lattice.tetragonal(4.59, 2.96), ["Ti", "O"], [[0, 0, 0], [0.305, 0.305, 0]]),
    Structure.from_spacegroup(152, Lattice.hexagonal(4.37, 4.96), ["Se"], [[0.225, 0, 1 / 3]]),
    Structure.from_spacegroup(62, Lattice.orthorhombic(5.4, 7.6, 5.3), ["Ca", "Ti"], [[0.03, 0.25, 0.49], [0, 0, 0]]),
    Structure(Lattice.from_parameters(4.1, 5.3, 6.7, 81, 77, 85), ["Ti", "O", "Sr"], np.eye(3) * 0.41 + 0.1),
]
TEXTS = [str(CifWriter(s, symprec=p)) for s in STRUCTURES for p in (None, 0.01)]
WORDS = [
    "",
    ".",
    "?",
    "0",
    "1",
    "-1",
    "0.5",
    "1e3",
    "nan",
    "Fe",
    "O2-",
    "'P 1'",
    "loop_",
    "data_b",
    "_cell_length_a",
    ";",
]
#: Written by hand, so that names, Hall symbols and numbers stand alone.
TEXTS += [
    "data_a\n_symmetry_space_group_name_H-M 'F m -3 m'\n_cell_length_a 5.64\n_cell_length_b 5.64\n_cell_length_c 5.64\n"
    "_cell_angle_alpha 90\n_cell_angle_beta 90\n_cell_angle_gamma 90\nloop_\n_atom_site_label\n_atom_site_type_symbol\n"
    "_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\nNa1 Na 0 0 0\nCl1 Cl 0.5 0.5 0.5\n",
    "data_a\n_space_group_name_H-M_alt 'P 63/m m c'\n_cell_length_a 3.21\n_cell_length_b 3.21\n_cell_length_c 5.21\n"
    "_cell_angle_alpha 90\n_cell_angle_beta 90\n_cell_angle_gamma 120\nloop_\n_atom_site_type_symbol\n"
    "_atom_site_label\n_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\n_atom_site_occupancy\n"
    "Mg Mg1 0.33333333 0.66666667 0.25 1\n",
]


def mutant(text: str, draw: random.Random) -> str:
    """A text with one to three changes of the kinds that editors, programs and models make."""
    for _ in range(draw.randint(1, 3)):
        lines = text.split("\n")
        line = draw.randrange(len(lines))
        words = lines[line].split(" ")
        word = draw.randrange(len(words))
        match draw.randrange(11):
            case 0:
                del lines[line]
            case 1:
                lines.insert(line, lines[draw.randrange(len(lines))])
            case 2:
                words[word] = draw.choice(WORDS)
            case 3:
                del words[word]
            case 4:
                words[word] = words[word].swapcase()
            case 5:
                words[word] += draw.choice(string.printable)
            case 6:
                other = draw.randrange(len(lines))
                lines[line], lines[other] = lines[other], lines[line]
            case 7:
                lines = lines[: draw.randrange(len(lines)) + 1]
            case 8:
                words[word] = re.sub(r"\d", lambda m: str(draw.randrange(10)), words[word], count=1)
            case 9:
                lines.append(draw.choice(lines))
            case 10:
                words.insert(word, draw.choice(WORDS))
        if line < len(lines) and " ".join(words) != lines[line] and words:
            lines[line] = " ".join(words)
        text = "\n".join(lines)
    return text


def by_gemmi(text: str) -> tuple[dict[str, int], float, np.ndarray] | None:
    """Atoms by element, volume and sorted fractional coordinates; None where gemmi has no whole crystal."""
    # What gemmi asks for and we do not: labels beside types, and a number that is one, beside listed operations.
    text = re.sub(r"_atom_site_label\S+", "_atom_site_label", text)
    text = re.sub(r"_symmetry_Int_Tables_number +(?!\d+\s).*", "", text)
    document = gemmi.cif.read_string(text.encode("ascii", "replace"), check_level=0)
    found = [gemmi.make_small_structure_from_block(block) for block in document]
    (small,) = [s for s in found if len(s.sites)]
    small.setup_cell_images()
    sites = small.get_all_unit_cell_sites()
    counts: dict[str, int] = {}
    for site in sites:
        name = "H" if site.element.name == "D" else site.element.name
        counts[name] = counts.get(name, 0) + 1
    coords = np.array([[site.fract.x, site.fract.y, site.fract.z] for site in sites])
    return counts, small.cell.volume, coords


def test_mutated_cifs_are_refused_or_read_as_gemmi_reads_them():
    draw = random.Random(15)
    read_well, refused, compared = 0, 0, 0
    for i in range(2000):
        text = mutant(TEXTS[i % len(TEXTS)], draw)
        row = interpret(Record(str(i), i, "cif", text))
        if row.crystal is None:
            assert row.reason and row.outcome != "ok", text
            refused += 1
            continue
        read_well += 1
        counts, volume, coords = by_gemmi(text)
        ours: dict[str, int] = {}
        for symbol in row.crystal.symbols:
            ours[symbol] = ours.get(symbol, 0) + 1
        assert ours == counts, text
        assert np.isclose(row.crystal.volume, volume, rtol=1e-6), text  # the density, with equal atoms
        apart = row.crystal.frac_coords[:, None] - coords[None]
        assert np.abs(apart - np.round(apart)).max(axis=2).min(axis=1).max() < 0.02, text
        compared += 1
    assert refused > 300 and compared == read_well > 300


def test_mutated_tables_and_json_end_in_rows_or_in_one_line(tmp_path):
    draw = random.Random(51)
    rows = [{"material_id": f"m{i}", "cif": text, "band_gap": i} for i, text in enumerate(TEXTS[:4])]
    pd.DataFrame(rows).to_csv(tmp_path / "good.csv", index=False)
    dictionaries = [s.as_dict() for s in STRUCTURES[:3]]
    shapes = [
        dictionaries,
        {f"mp-{i}": {"structure": d} for i, d in enumerate(dictionaries)},
        {"mp-0": {f"mp-0-{i}": {"structure": d} for i, d in enumerate(dictionaries)}},
        {"data": [{"id": "a", "attributes": optimade(STRUCTURES[0])}]},
    ]
    texts = [("csv", (tmp_path / "good.csv").read_text())] + [("json", json.dumps(shape)) for shape in shapes]
    ended = {"rows": 0, "line": 0}
    for i in range(600):
        suffix, text = texts[i % len(texts)]
        changed = mutant(text, draw) if suffix == "csv" else mutated_json(text, draw)
        path = tmp_path / f"mutant.{suffix}"
        path.write_bytes(changed.encode("utf-8", "surrogatepass"))
        try:
            found = read(path).rows
        except UserError as error:
            assert "\n" not in str(error) and path.name in str(error)
            ended["line"] += 1
            continue
        ended["rows"] += 1
        assert all((row.crystal is None) == bool(row.reason) for row in found), changed
    assert min(ended.values()) > 50


def mutated_json(text: str, draw: random.Random) -> str:
    """A JSON text with a letter, a number or a word changed, or its end cut off."""
    at = draw.randrange(len(text))
    match draw.randrange(4):
        case 0:
            return text[:at]
        case 1:
            return text[:at] + draw.choice(string.printable) + text[at + 1 :]
        case 2:
            number = draw.choice(["null", "[]", "{}", '"x"', "1e400", "NaN", "-3", "true"])
            return re.sub(r"-?\d+\.\d+", lambda m: number if draw.random() < 0.05 else m[0], text)
        case _:
            name = draw.choice(["lattice", "sites", "abc", "element", "matrix", "structure", "species_at_sites"])
            return text.replace(f'"{name}"', f'"{draw.choice(["x", "pbc", "cif"])}"', draw.randint(1, 3))


def optimade(structure: Structure) -> dict:
    return {
        "lattice_vectors": structure.lattice.matrix.tolist(),
        "cartesian_site_positions": structure.cart_coords.tolist(),
        "species_at_sites": [site.specie.symbol for site in structure],
    }


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"\xff\xfe\x00\x01", bytes(range(256)), b"\x1f\x8b\x08\x00", b"PAR1"]
)
@pytest.mark.parametrize(
    "name", ["a.cif", "a.csv", "a.parquet", "a.json", "a.jsonl", "a.extxyz", "POSCAR", "a.cif.gz", "a.vasp"]
)
def test_bytes_of_any_kind_are_no_traceback(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    try:
        rows = read(tmp_path / name).rows
    except UserError as error:
        assert name in str(error)
    else:
        assert all(row.crystal is None and row.reason for row in rows)


def test_a_frame_or_poscar_that_is_cut_anywhere_is_refused_or_whole(tmp_path):
    structure = STRUCTURES[1]
    structure.to(filename=str(tmp_path / "POSCAR"), fmt="poscar")
    whole = Crystal.from_structure(structure)
    text = (tmp_path / "POSCAR").read_text()
    for at in range(0, len(text), 7):
        (tmp_path / "POSCAR").write_text(text[:at])
        try:
            (row,) = read(tmp_path / "POSCAR").rows
        except UserError:
            continue
        assert row.crystal is None or (len(row.crystal) == len(whole) and np.isclose(row.crystal.volume, whole.volume))
