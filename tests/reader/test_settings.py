"""Space group settings: every spelling finds its setting, in agreement with gemmi's own table, or is refused."""

import gemmi
import numpy as np
import pytest
import spglib
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcrystal.reader.orbits import metric_of
from jaxcrystal.reader.rows import Refused
from jaxcrystal.reader.settings import Operations, Stated, candidates, of_gemmi, tabulated
from jaxcrystal.reader.settings import settings as all_settings

CUBIC, TETRAGONAL, ORTHORHOMBIC = [5, 5, 5, 90, 90, 90], [4, 4, 6, 90, 90, 90], [5, 6, 7, 90, 90, 90]
HEXAGONAL, RHOMBOHEDRAL, MONOCLINIC = [4, 4, 9, 90, 90, 120], [5, 5, 5, 55, 55, 55], [5, 6, 7, 90, 100, 90]
TRICLINIC = [5, 6, 7, 80, 95, 100]


def metric(cell):
    return metric_of(np.array(cell[:3], float), np.array(cell[3:], float))


def fitting_cell(operations: Operations):
    """Scalar products of a cell that the operations leave alone, and no others that they need not."""
    general = metric([1, 1.3, 1.7, 83, 97, 104])
    moved = np.einsum("nji,jk,nkl->il", operations.rotations, general, operations.rotations)
    return moved / len(operations)


def found(cell=CUBIC, **stated):
    stated = {name: (value,) if isinstance(value, str) else value for name, value in stated.items()}
    return [setting.hall_number for setting in candidates(Stated(**stated), metric(cell))]


@pytest.mark.parametrize(
    ("name", "cell", "hall_number"),
    [
        ("F m -3 m", CUBIC, 523),
        ("Fm-3m", CUBIC, 523),
        ("F m 3 m", CUBIC, 523),
        ("F 4/m -3 2/m", CUBIC, 523),
        ("f M -3 M", CUBIC, 523),
        ("F m 3\u0305 m", CUBIC, 523),
        ("F d -3 m :1", CUBIC, 525),
        ("F d -3 m:2", CUBIC, 526),
        ("F d -3 m S", CUBIC, 525),
        ("F d -3 m Z", CUBIC, 526),
        ("Fd-3mZ", CUBIC, 526),
        ("F d -3 m (origin choice 2)", CUBIC, 526),
        ("R -3 m :H", HEXAGONAL, 458),
        ("R -3 m H", HEXAGONAL, 458),
        ("R -3 m HR", HEXAGONAL, 458),
        ("H -3 m", HEXAGONAL, 458),
        ("R-3m", HEXAGONAL, 458),
        ("R -3 m :R", RHOMBOHEDRAL, 459),
        ("R -3 m R", RHOMBOHEDRAL, 459),
        ("R -3 2/m", RHOMBOHEDRAL, 459),
        ("P 21/c", MONOCLINIC, 81),
        ("P 1 21/c 1", MONOCLINIC, 81),
        ("P2(1)/c", MONOCLINIC, 81),
        ("P 2_1/n", MONOCLINIC, 82),
        ("P 21/c", [5, 6, 7, 100, 90, 90], 89),
        ("C 2/c :b2", MONOCLINIC, 91),
        ("I 2/a", MONOCLINIC, 92),
        ("P b n m", ORTHORHOMBIC, 294),
        ("P n m a", ORTHORHOMBIC, 292),
        ("C m c a", ORTHORHOMBIC, 304),
        ("C m c e", ORTHORHOMBIC, 304),
        ("A b a 2", ORTHORHOMBIC, 203),
        ("P 4/n m m Z", TETRAGONAL, 409),
        ("P 42/m n m", TETRAGONAL, 419),
        ("P 63/m m c", HEXAGONAL, 488),
        ("P -1", TRICLINIC, 2),
    ],
)
def test_a_name_in_any_spelling_is_its_setting(name, cell, hall_number):
    assert found(cell, names=name) == [hall_number]


@pytest.mark.parametrize(
    ("stated", "cell", "reason"),
    [
        ({"names": "nonsense"}, CUBIC, "no Hermann-Mauguin name"),
        ({"names": ("P n m a",), "numbers": ("225",)}, ORTHORHOMBIC, "contradict each other"),
        ({"hall": "-F 4 2 3", "names": "P m -3 m"}, CUBIC, "contradict each other"),
        ({"names": "P m -3 m"}, TETRAGONAL, "the cell contradicts"),
        ({"names": "R -3 m :R"}, HEXAGONAL, "the cell contradicts"),
        ({"names": "R -3 m"}, [*CUBIC[:5], 91], "the cell contradicts"),
        ({"numbers": "0"}, CUBIC, "run from 1 to 230"),
        ({"numbers": "225.5"}, CUBIC, "run from 1 to 230"),
        ({"hall": "not Hall"}, CUBIC, "no Hall symbol"),
    ],
)
def test_what_is_unknown_or_contradicted_is_refused(stated, cell, reason):
    with pytest.raises(Refused, match=reason):
        found(cell, **stated)


def test_a_number_alone_leaves_all_its_settings_that_fit_the_cell():
    assert found(numbers="225") == [523]
    assert found(numbers="227") == [525, 526]
    assert found(HEXAGONAL, numbers="166") == [458] and found(RHOMBOHEDRAL, numbers="166") == [459]
    assert found(MONOCLINIC, numbers="14") == [81, 82, 83]
    assert found(numbers="227", codes="2") == [526]
    assert found(ORTHORHOMBIC, groups="P n m a") == [292, 293, 294, 295, 296, 297]


@pytest.mark.parametrize("setting", all_settings(), ids=lambda s: str(s.hall_number))
def test_each_of_the_530_is_found_by_hall_symbol_and_by_its_full_name(setting):
    operations, group = setting.operations, spglib.get_spacegroup_type(setting.hall_number)
    cell = fitting_cell(operations)
    by_hall = candidates(Stated(hall=(group.hall_symbol,)), cell)
    assert operations.key in {s.operations.key for s in by_hall}
    assert setting in candidates(Stated(names=(setting.name,), numbers=(str(setting.number),)), cell)
    assert tabulated(operations).operations.key == operations.key
    assert operations.are_a_group() and operations.number() == setting.number


def test_gemmis_names_mean_what_gemmi_says():
    compared = 0
    for group in gemmi.spacegroup_table():
        operations = of_gemmi(list(group.operations()))
        if tabulated(operations) is None:
            continue
        for name in {group.hm, group.xhm(), group.short_name()}:
            keys = {s.operations.key for s in candidates(Stated(names=(name,)), fitting_cell(operations))}
            assert operations.key in keys, name
            compared += 1
    assert compared > 1000


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(all_settings()), st.randoms())
def test_a_list_from_which_an_operation_is_missing_is_no_group(setting, random):
    operations = setting.operations
    if len(operations) <= 2:
        return
    order = list(range(len(operations)))
    random.shuffle(order)
    shuffled = Operations(operations.rotations[order], operations.translations[order])
    assert shuffled.are_a_group() and shuffled.key == operations.key
    left = order[:-1]
    assert not Operations(operations.rotations[left], operations.translations[left]).are_a_group()
