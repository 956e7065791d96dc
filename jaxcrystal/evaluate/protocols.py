"""Named conventions: what a number means depends on them, so every result carries the name of its own."""

from __future__ import annotations

from dataclasses import dataclass

from jaxcrystal.errors import UserError


@dataclass(frozen=True)
class Protocol:
    """What makes a crystal valid."""

    name: str
    min_distance: float = 0.5  #: Å; two atoms closer than this make a crystal structurally invalid
    min_volume: float = 0.1  #: Å³ of the cell; a smaller one is structurally invalid
    #: Share of the sum of two covalent radii that two atoms, and an atom and its own images, must be apart;
    #: 0 does not ask, and then an atom's own images are not looked at either.
    min_radius_share: float = 0.0
    oxidation_states: str = "smact14"  #: smact's table of oxidation states that compositional validity tries


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        # arXiv 2110.06197, section 5.1, and its code, by which the whole field reports validity.
        Protocol("cdvae"),
        # The same, and no atom may sit inside another: the closest pair of MP-20 test is at 0.65 of its radii.
        Protocol("strict", min_radius_share=0.6),
    )
}


def protocol_named(name: str) -> Protocol:
    """The protocol of this name. Raises UserError that lists the known ones."""
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}; known are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
