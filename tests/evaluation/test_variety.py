"""Effective numbers obey their laws; a set's numbers are those of loops over its structures."""

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer
from scipy.stats import entropy as scipy_entropy

from jaxcrystal.evaluation.intervals import bootstrap_totals, wilson
from jaxcrystal.evaluation.lemat import hhi, packing
from jaxcrystal.evaluation.metrics import metrics_from_table
from jaxcrystal.evaluation.protocols import PROTOCOLS
from jaxcrystal.evaluation.table import Provenance, describe
from jaxcrystal.evaluation.variety import effective_number, entropy, lemat
from jaxcrystal.reader.reading import read

counts = st.lists(st.integers(0, 50), min_size=1, max_size=12).map(np.array)


@settings(deadline=None)
@given(counts, st.integers(1, 7), st.randoms())
def test_an_effective_number_of_kinds(totals, times, random):
    shuffled = totals.tolist()
    random.shuffle(shuffled)
    number = effective_number(totals)
    assert (
        number == pytest.approx(effective_number(np.array(shuffled))) == pytest.approx(effective_number(times * totals))
    )
    assert 1 - 1e-9 <= number <= max(np.count_nonzero(totals), 1) + 1e-9
    if totals.any():
        assert entropy(totals) == pytest.approx(scipy_entropy(totals))
        twice = np.concatenate([totals, totals])  # every kind parted into two that occur equally often
        assert effective_number(twice) == pytest.approx(2 * number)
    assert effective_number(np.full(len(totals), times)) == pytest.approx(len(totals))


def rock(one, other, edge):
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(edge), [one, other], [[0, 0, 0], [0.5] * 3])


SAMPLES = [
    rock("Na", "Cl", 5.69),
    rock("Mg", "O", 4.24),
    rock("Mg", "O", 4.24).get_primitive_structure(),
    rock("K", "Cl", 6.38),
    Structure.from_spacegroup("Pm-3m", Lattice.cubic(4.12), ["Cs", "Cl"], [[0, 0, 0], [0.5] * 3]),
    Structure.from_spacegroup("Fd-3m", Lattice.cubic(5.43), ["Si"], [[0, 0, 0]]),
    Structure(Lattice.cubic(3.0), ["Na", "Cl"], [[0, 0, 0], [0.1, 0, 0]]),  # too near: not valid
    None,
]


@pytest.fixture(scope="module")
def table():
    found = describe(read(SAMPLES).rows, PROTOCOLS["lemat"])
    assert list(found["structural_valid"] & found["compositional_valid"]) == [True] * 6 + [False] * 2
    return found.assign(
        group=pd.array([0, 1, 1, 2, 3, 4, None, None], "Int64"),
        unique=[True, True, False, True, True, True, False, False],
        novel=[False, True, True, True, True, False, False, False],
    )


def test_a_sets_numbers_are_those_of_loops(table):
    numbers, intervals = lemat(table)
    valid = SAMPLES[:6]
    atoms = Counter(site.specie.symbol for structure in valid for site in structure)
    groups = Counter(SpacegroupAnalyzer(structure, 0.01).get_space_group_number() for structure in valid)
    sizes = Counter(map(len, valid))
    for name, tally in (("element", atoms), ("space_group", groups), ("num_atoms", sizes)):
        expected = np.exp(scipy_entropy(list(tally.values())))
        assert numbers[f"diversity.{name}_vendi"] == pytest.approx(expected), name
    assert numbers["diversity.element_coverage"] == len(atoms) / 118
    assert numbers["diversity.space_group_coverage"] == len(groups) / 230
    bins = [
        [int(s.density // 0.5) for s in valid],
        *([int(s.lattice.abc[axis] // 0.5) for s in valid] for axis in range(3)),
        [int(packing(s) // 0.05) for s in valid],
    ]
    entropies = [scipy_entropy(list(Counter(one).values())) for one in bins]
    assert numbers["diversity.size_entropy"] == pytest.approx(sum(entropies) / np.log2(6) / 5)
    indices = np.array([hhi(tuple(sorted(Counter(x.specie.symbol for x in s).items()))) for s in valid])
    assert numbers["hhi.production"] == pytest.approx(indices[:, 0].mean())
    assert numbers["hhi.reserve"] == pytest.approx(indices[:, 1].mean())
    assert numbers["hhi.combined"] == pytest.approx((indices @ [0.25, 0.75]).mean())
    assert numbers["uniqueness.rate_of_valid"] == 5 / 6 and intervals["uniqueness.rate_of_valid"] == wilson(5, 6)
    assert numbers["novelty.by_matching_of_valid"] == 4 / 6
    for name, (low, high) in intervals.items():
        assert low <= numbers[name] <= high, name
    assert numbers.keys() - intervals.keys() == {"diversity.element_coverage", "diversity.space_group_coverage"}


def test_the_page_names_every_number(table):
    page = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
    for name in lemat(table)[0]:
        assert f"`{name.removesuffix('_of_valid')}`" in page, name
    assert "`…_of_valid`" in page and "`lemat`" in page


def test_the_first_of_a_group_may_be_invalid(table):
    # Two that match, of which the first is left out: the second stands for them.
    table = table.assign(compositional_valid=[True, False, True, True, True, True, True, False])
    assert lemat(table)[0]["uniqueness.rate_of_valid"] == 1.0


def test_relaxed_crystals_count_where_there_are_any(table):
    relaxed = table.assign(
        group_relaxed=pd.array([0, 0, 0, 0, None, None, None, None], "Int64"), novel_relaxed=[True, *[False] * 7]
    )
    numbers, _ = lemat(relaxed)
    assert numbers["uniqueness.rate_of_valid"] == numbers["novelty.by_matching_of_valid"] == 1 / 6


@pytest.mark.parametrize("rows", [[7], [6, 7], [0], [0, 5]])
def test_small_sets(table, rows):
    part = table.iloc[rows].reset_index(drop=True)
    metrics = metrics_from_table(part, Provenance("lemat", {}))
    assert metrics["validity"]["plausibility"] == part["plausible"].mean()
    valid = int((part["structural_valid"] & part["compositional_valid"]).sum())
    assert ("hhi" in metrics) == (valid > 0) and ("size_entropy" in metrics.get("diversity", {})) == (valid > 1)
    assert all(np.isfinite(interval).all() for interval in metrics["confidence_95"].values())


def test_the_interval_covers_the_number_of_the_population():
    generator = np.random.default_rng(5)
    shares = 1 / np.arange(1, 9)
    true = effective_number(shares / shares.sum() * 1e9)
    covered = 0
    for _ in range(20):
        rows = np.eye(8)[generator.choice(8, 60, p=shares / shares.sum())]
        low, high = bootstrap_totals(rows, effective_number)
        covered += low <= true <= high
    assert covered >= 16  # 19 expected; fewer than 16 three times in a thousand
    one = np.eye(3)[[0] * 5]
    assert bootstrap_totals(one, effective_number) == (pytest.approx(1), pytest.approx(1))
    assert bootstrap_totals(one, lambda totals: float(totals.sum())) == (5.0, 5.0)
