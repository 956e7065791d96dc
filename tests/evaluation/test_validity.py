"""Validity against brute force over every combination, and against the figures that DiffCSP published."""

import itertools

import numpy as np
import pytest
import smact
from pymatgen.core import Lattice, Structure

from jaxcrystal.crystals.crystal import reduced_composition
from jaxcrystal.evaluation.coverage import distribution, valid_rows
from jaxcrystal.evaluation.protocols import PROTOCOLS, protocol_named
from jaxcrystal.evaluation.table import describe
from jaxcrystal.evaluation.validity import compositional, structural
from jaxcrystal.reader.reading import read

CDVAE, STRICT = PROTOCOLS["cdvae"], PROTOCOLS["strict"]


def brute_force(composition):
    """CDVAE's loop over the product of all oxidation states, with a missing electronegativity passing."""
    elements = [smact.Element(symbol) for symbol, _ in composition]
    if len(elements) == 1 or all(symbol in smact.metals for symbol, _ in composition):
        return True
    for states in itertools.product(*(element.oxidation_states_smact14 or () for element in elements)):
        neutral = sum(state * count for state, (_, count) in zip(states, composition, strict=True)) == 0
        pairs = itertools.permutations(zip(states, (e.pauling_eneg for e in elements), strict=True), 2)
        if neutral and not any(
            cation > 0 > anion and None not in (x, y) and x >= y for (cation, x), (anion, y) in pairs
        ):
            return True
    return False


def test_composition_equals_the_product_of_all_states():
    generator = np.random.default_rng(7)
    symbols = np.array([s for s in smact.ordered_elements(1, 103)])
    common = np.array("O F S Cl N H P Li Na K Mg Ca Fe Mn Ti Cu Eu Pm He Ne".split())
    verdicts = []
    for _ in range(600):
        pool = common if generator.random() < 0.7 else symbols
        chosen = generator.choice(pool, generator.integers(1, 5), replace=False)
        composition = tuple(sorted((str(s), int(generator.integers(1, 7))) for s in chosen))
        verdict = compositional(composition, CDVAE)
        assert verdict.valid == brute_force(composition), composition
        assert bool(verdict.reason) != verdict.valid
        verdicts.append(verdict.valid)
    assert 100 < sum(verdicts) < 500  # both answers are exercised


@pytest.mark.parametrize(
    ("symbols", "valid", "reason"),
    [
        (["Na", "Cl"], True, ""),
        (["Na", "F", "F", "F"], False, "no combination of oxidation states is neutral"),
        # Na⁻ with Cl²⁺ would be neutral.
        (["Na", "Na", "Cl"], False, "every neutral combination puts a cation above an anion in electronegativity"),
        (["Fe", "Al"], True, ""),  # metals
        (["Xe"], True, ""),  # one element
        (["He", "O"], False, "smact14 has no oxidation state of He"),
        (["Og", "O"], False, "smact14 has no oxidation state of Og"),
        (["F", "F", "O"], True, ""),
    ],
)
def test_composition_and_its_reason(symbols, valid, reason):
    verdict = compositional(reduced_composition(symbols), CDVAE)
    assert (verdict.valid, verdict.reason) == (valid, reason)


def test_counts_are_reduced_by_their_common_divisor():
    assert reduced_composition(["Fe", "O"] * 4 + ["O"] * 4) == (("Fe", 1), ("O", 2))


def pair(distance, edge=10.0):
    return Structure(Lattice.cubic(edge), ["Na", "Cl"], [[0, 0, 0], [1 - distance / edge, 0, 0]])


def test_distance_is_periodic_and_its_limit_half_an_angstrom():
    assert structural(pair(0.501), CDVAE).valid
    verdict = structural(pair(0.499), CDVAE)
    assert not verdict.valid
    assert verdict.reason == "Na and Cl are 0.50 Å apart, below 0.50"


def test_volume():
    flat = Structure(Lattice.from_parameters(3, 3, 0.01, 90, 90, 90), ["Na"], [[0, 0, 0]])
    assert structural(flat, CDVAE).reason == "the cell's volume is 0.09 Å³, below 0.1"


def test_only_strict_looks_at_own_images_and_radii():
    thin = Structure(Lattice.from_parameters(0.4, 5, 5, 90, 90, 90), ["Na"], [[0, 0, 0]])
    inside = pair(1.0)
    assert structural(thin, CDVAE).valid and structural(inside, CDVAE).valid
    assert "own image" in structural(thin, STRICT).reason
    assert structural(inside, STRICT).reason == "Na and Cl are 1.00 Å apart, below 1.61"  # 0.6 · (1.66 + 1.02)
    assert structural(pair(2.8), STRICT).valid


def test_strict_accepts_real_crystals(shared):
    table = describe(read(shared / "data/mp20/test.parquet", limit=399).rows, STRICT, symmetry=False)
    assert table["structural_valid"].all()


@pytest.mark.slow
def test_published_validity_and_distributions_of_diffcsp(shared):
    """Published for exactly these crystals: structural 100.00 %, compositional 83.22 %; of the valid ones against MP-20
    test, Wasserstein distances of 0.35 g/cm³ and 0.346 elements."""
    generated, known = (
        describe(read(shared / "data" / path).rows, CDVAE, symmetry=False)
        for path in ("generated/diffcsp_mp20.parquet", "mp20/test.parquet")
    )
    assert len(generated) == 10_000
    assert generated["structural_valid"].mean() == 1.0
    assert generated["compositional_valid"].mean() == pytest.approx(0.8322, abs=0.001)
    found, _ = distribution(generated.assign(drawn=valid_rows(generated)), known)
    assert found["distribution.density_wasserstein"] == pytest.approx(0.35, abs=0.005)
    assert found["distribution.num_elements_wasserstein"] == pytest.approx(0.346, abs=0.0005)


def test_the_table_of_oxidation_states_decides():
    """What is neutral by one table and not by the other cannot be valid by that; and for some it matters."""
    icsd24 = protocol_named("cdvae+smact-icsd24")
    differ = 0
    for cation, anion in itertools.product(
        ["Li", "Mg", "Al", "Si", "P", "S", "Cl", "H", "B", "C"], ["O", "N", "F", "As", "H"]
    ):
        for counts in ((1, 1), (1, 2), (2, 1), (2, 3), (3, 2), (1, 3)):
            if cation != anion:
                composition = reduced_composition([cation] * counts[0] + [anion] * counts[1])
                element = [smact.Element(symbol) for symbol in (cation, anion)]
                neutral = {
                    table: any(
                        sum(n * state for n, state in zip(counts, states, strict=True)) == 0
                        for states in itertools.product(*(getattr(e, f"oxidation_states_{table}") for e in element))
                    )
                    for table in ("smact14", "icsd24")
                }
                old, new = compositional(composition, CDVAE).valid, compositional(composition, icsd24).valid
                assert old <= neutral["smact14"] and new <= neutral["icsd24"]
                differ += old != new
    assert differ > 5
