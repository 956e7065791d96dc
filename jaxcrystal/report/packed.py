"""Crystals as text short enough for a page that holds ten thousand of them.

A crystal is 26 bytes and 7 an atom, in little-endian order: the number of atoms (uint16), lengths in Å and angles in
degrees (float32), atomic numbers (uint8), fractional coordinates as multiples of 1/65536 (uint16): 1e-4 Å in a cell of
6 Å. The crystals stand one after another; base64 makes four characters of three bytes. `page/crystal.js` reads it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable

import numpy as np

from jaxcrystal.crystals.crystal import Crystal

MOST_ATOMS = 65_535


def size(crystal: Crystal) -> int:
    """Bytes that a crystal takes."""
    return 26 + 7 * len(crystal)


def pack(crystals: Iterable[Crystal]) -> str:
    """Base64 of crystals of at most `MOST_ATOMS` atoms, one after another."""
    return base64.b64encode(b"".join(map(_bytes, crystals))).decode("ascii")


def _bytes(crystal: Crystal) -> bytes:
    cell = np.concatenate([crystal.lengths, crystal.angles]).astype("<f4")
    # A coordinate that rounds to 1 is 0: the ring of uint16 is the unit interval with its ends joined.
    coords = (np.round(crystal.frac_coords * 65536) % 65536).astype("<u2")
    atoms = len(crystal).to_bytes(2, "little")
    return atoms + cell.tobytes() + crystal.species.astype(np.uint8).tobytes() + coords.tobytes()
