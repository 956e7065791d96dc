"""Named conventions: what a number means depends on them, so every result carries the name of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from jaxcrystal.errors import UserError


@dataclass(frozen=True)
class Cutoffs:
    """Distances of fingerprints up to which two structures, and two compositions, are near each other."""

    structure: float
    composition: float


@dataclass(frozen=True)
class Protocol:
    """What makes a crystal valid, and which crystals the comparison with others takes."""

    name: str
    min_distance: float = 0.5  #: Å; two atoms closer than this make a crystal structurally invalid
    min_volume: float = 0.1  #: Å³ of the cell; a smaller one is structurally invalid
    #: Share of the sum of two covalent radii that two atoms, and an atom and its own images, must be apart;
    #: with 0 there is no such limit, and an atom's own images are not looked at either.
    min_radius_share: float = 0.0
    oxidation_states: str = "smact14"  #: the table that compositional validity tries; of OXIDATION_STATES
    #: Whether invalid crystals, of the reference and of the training set too, are left out of coverage and novelty.
    fingerprints_of_valid: bool = False
    #: Whether the published denominators leave out what failed: attempts without a crystal, crystals without a
    #: fingerprint. Then every such rate is also counted over all, its name ending in `_of_all`.
    leaves_out_failures: bool = False
    draw: int | None = None  #: valid crystals drawn for distributions and diversity; None takes all
    novelty: Cutoffs | None = None  #: beyond which a crystal is new, by its fingerprint; None: no such number
    #: Whose rules make a crystal valid: CDVAE's within the limits above, or those of `lemat.py`, which has its own.
    rules: Literal["cdvae", "lemat"] = "cdvae"
    note: str = ""  #: what of the convention is not counted here, for whoever reads the numbers


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        # arXiv 2110.06197, section 5.1, and its code, by which the whole field reports validity.
        Protocol("cdvae", draw=1000),
        # arXiv 2402.04379, section 4, and its code.
        Protocol(
            "crystal-text-llm",
            fingerprints_of_valid=True,
            leaves_out_failures=True,
            novelty=Cutoffs(structure=0.1, composition=2.0),
        ),
        # As cdvae without chance, and no atom may sit inside another: the closest pair of MP-20 test is at 0.65 of
        # its radii.
        Protocol("strict", min_radius_share=0.6),
        # arXiv 2512.04562, and its code, as far as it needs neither its data nor its potentials.
        Protocol(
            "lemat",
            oxidation_states="smact-icsd24",
            rules="lemat",
            note="of LeMat-GenBench not counted: distributions and Fréchet distances, novelty beside LeMat-Bulk, and "
            "stability by ORB, MACE and UMA on hulls of their own; its own code downloads what these need",
        ),
    )
}

#: smact's tables of oxidation states, by the names that results carry. CDVAE's was smact's only one then; of today's
#: default, made from ICSD's structures, 78 of 103 elements have other states.
OXIDATION_STATES = {"smact14": "smact14", "smact-icsd24": "icsd24"}

#: Of coverage, by the data set that the reference is of (CDVAE's code).
COVERAGE_CUTOFFS: dict[str, Cutoffs] = {
    "mp_20": Cutoffs(structure=0.4, composition=10.0),
    "carbon_24": Cutoffs(structure=0.2, composition=4.0),
    "perov_5": Cutoffs(structure=0.2, composition=4.0),
}


def protocol_named(name: str) -> Protocol:
    """The protocol of this name; `cdvae+smact-icsd24` is `cdvae` with another table of oxidation states.

    Raises UserError that lists the known ones.
    """
    base, _, states = name.partition("+")
    if base not in PROTOCOLS or (states and states not in OXIDATION_STATES):
        tables = ", ".join(OXIDATION_STATES)
        raise UserError(
            f"unknown protocol {name!r}; known are {', '.join(PROTOCOLS)}, and each with + and one of {tables}"
        )
    protocol = PROTOCOLS[base]
    if states in ("", protocol.oxidation_states):
        return protocol
    return replace(protocol, name=name, oxidation_states=states)


def coverage_cutoffs(data_set: str) -> Cutoffs:
    """The cut-offs of coverage for this data set. Raises UserError that lists the known ones."""
    if data_set not in COVERAGE_CUTOFFS:
        raise UserError(f"no cut-offs of coverage are known for {data_set!r}, but for {', '.join(COVERAGE_CUTOFFS)}")
    return COVERAGE_CUTOFFS[data_set]
