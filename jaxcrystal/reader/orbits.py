"""All atoms of a cell from the sites that a file lists and the operations of its group.

A site near a special position is one atom there, not several side by side: files write 0.3333 for 1/3. It is moved to
the mean of its images under the operations that nearly leave it alone, which is on the special position exactly.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from jaxcrystal.reader.rows import Outcome, Refused
from jaxcrystal.reader.settings import Operations

#: Å. Images of one site that are nearer to each other are one atom, written with few digits.
SAME_SITE = 0.2
#: Å. Images that are nearer than this, and not that near, are neither one atom nor two.
APART = 0.5
#: Å. A site that is moved by more onto its special position is said to be.
MOVED = 1e-3

MOVED_NOTE = "positions moved onto the special position near them"
COMPLETE_NOTE = "every atom of a stated space group is listed, and was read once"


@dataclass(frozen=True)
class Sites:
    """Atoms of a cell, or of its asymmetric unit."""

    species: Int[np.ndarray, "sites"]  #: atomic numbers
    frac_coords: Float[np.ndarray, "sites 3"]
    notes: tuple[str, ...] = ()  #: what was changed to have them

    def __len__(self) -> int:
        return len(self.species)


def metric_of(lengths: Float[np.ndarray, "3"], angles: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3 3"]:
    """The scalar products (Å²) of a cell's vectors, of its lengths (Å) and angles (degrees)."""
    ca, cb, cg = np.cos(np.radians(angles))
    return np.outer(lengths, lengths) * np.array([[1, cg, cb], [cg, 1, ca], [cb, ca, 1]])


def expand(sites: Sites, operations: Operations, metric: Float[np.ndarray, "3 3"]) -> Sites:
    """The orbits of all sites; `metric` holds the cell vectors' scalar products (Å²).

    The identity alone leaves the list as it is, coincident atoms included. Raises Refused (symmetry_error) if a site is
    an image of another, unless the list is of every atom of the cell, once; or if images are too near to be two atoms;
    and (disordered) if two elements share a site.
    """
    if len(operations) == 1:
        return sites
    kinds, atoms, notes, images = np.empty(0, np.int64), np.empty((0, 3)), {}, 0
    for i, (z, point) in enumerate(zip(sites.species, sites.frac_coords, strict=True)):
        if (distances(atoms[kinds != z], point, metric) < SAME_SITE).any():
            raise Refused(Outcome.DISORDERED, "two elements share a site")
        if (distances(atoms[kinds == z], point, metric) < SAME_SITE).any():
            if (distances(sites.frac_coords[:i], point, metric) < SAME_SITE).any():
                raise Refused(Outcome.SYMMETRY_ERROR, "an atom is listed twice")
            images += 1
            continue
        orbit, moved = _orbit(point, operations, metric)
        if moved > MOVED:
            notes[MOVED_NOTE] = True
        kinds = np.concatenate([kinds, np.full(len(orbit), z)])
        atoms = np.concatenate([atoms, orbit])
    if images:
        if len(kinds) != len(sites):
            raise Refused(Outcome.SYMMETRY_ERROR, f"{images} of the listed atoms are images of others")
        notes[COMPLETE_NOTE] = True
    return Sites(kinds, atoms, (*sites.notes, *notes))


def _orbit(
    point: Float[np.ndarray, "3"], operations: Operations, metric: Float[np.ndarray, "3 3"]
) -> tuple[Float[np.ndarray, "n 3"], float]:
    """A site's distinct images, and by how many Å it was moved for it."""
    images = operations.rotations @ point + operations.translations
    stays = distances(images, point, metric) < SAME_SITE
    shift = np.zeros(3)
    if stays.sum() > 1:
        shifts = images[stays] - point
        shift = (shifts - np.round(shifts)).mean(axis=0)
        images = operations.rotations @ (point + shift) + operations.translations
    between = images[:, None] - images[None]
    apart = lengths(between - np.round(between), metric)
    near = apart < SAME_SITE
    if (~near & (apart < APART)).any():
        nearest = apart[~near].min()
        reason = f"images of a site are {nearest:.2f} Å apart: a special position written with too few digits?"
        raise Refused(Outcome.SYMMETRY_ERROR, reason)
    return images[near.argmax(axis=1) == np.arange(len(images))], float(lengths(shift, metric))


def same_atoms(one: Sites, other: Sites, metric: Float[np.ndarray, "3 3"]) -> bool:
    """Whether two lists hold the same atoms, in whatever order."""
    if Counter(one.species.tolist()) != Counter(other.species.tolist()):
        return False
    return all(
        (distances(other.frac_coords[other.species == z], point, metric) < SAME_SITE).any()
        for z, point in zip(one.species, one.frac_coords, strict=True)
    )


def lengths(moves: Float[np.ndarray, "*n 3"], metric: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, "*n"]:
    """Å."""
    return np.sqrt(np.maximum(np.einsum("...i,ij,...j->...", moves, metric, moves), 0))


def distances(
    points: Float[np.ndarray, "n 3"], point: Float[np.ndarray, "3"], metric: Float[np.ndarray, "3 3"]
) -> Float[np.ndarray, "n"]:
    """Å to the image that is nearest in fractions of the edges: the nearest of all where it is near at all."""
    moves = points - point
    return lengths(moves - np.round(moves), metric)
