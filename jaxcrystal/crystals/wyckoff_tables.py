"""Writes the tables that `wyckoff` reads: `python -m jaxcrystal.crystals.wyckoff_tables`.

    wyckoff.csv        positions: space group, letter, multiplicity in the conventional cell, first representative
    normalizers.csv    how else a crystal of a group may be described: the cosets of its Euclidean normalizer, which
                       keep the metric of every crystal of that group

Operations, letters and representatives are moyo's, in `Setting.standard()`: unique axis b and cell choice 1, hexagonal
axes, origin choice 2. moyo has no list of positions, it names those of a crystal's atoms. So crystals are built that
have an atom on every kind of point: the intersections of what the operations leave fixed.

Normalizers follow from the operations by search. A coset of a group without mirror images has none either, and a shift
along an axis that the origin is free in (`wyckoff.free_axes`) is no coset, for there is one of any length.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path

import moyopy
import numpy as np
from jaxtyping import Float

from jaxcrystal.crystals.symmetric import vectors
from jaxcrystal.crystals.wyckoff import (
    GRID,
    GROUPS,
    HERE,
    LETTERS,
    Coset,
    Operations,
    Position,
    cosets_among,
    operations,
    read,
    written,
)

#: What the conventional cell of each crystal system may look like, without being more symmetric: a, b, c, α, β, γ.
CELLS = {
    "Triclinic": (5.1, 6.3, 7.7, 83.0, 97.0, 104.0),
    "Monoclinic": (5.1, 6.3, 7.7, 90.0, 103.0, 90.0),
    "Orthorhombic": (5.1, 6.3, 7.7, 90.0, 90.0, 90.0),
    "Tetragonal": (5.1, 5.1, 7.7, 90.0, 90.0, 90.0),
    "Trigonal": (5.1, 5.1, 7.7, 90.0, 90.0, 120.0),
    "Hexagonal": (5.1, 5.1, 7.7, 90.0, 90.0, 120.0),
    "Cubic": (7.7, 7.7, 7.7, 90.0, 90.0, 90.0),
}


def cell_vectors(number: int) -> Float[np.ndarray, "3 3"]:
    """Rows of a conventional cell that suits the group."""
    cell = np.array(CELLS[moyopy.SpaceGroupType(number).crystal_system])
    return vectors(cell[:3], cell[3:])


def orbit(group: Operations, point: Float[np.ndarray, "3"]) -> Float[np.ndarray, "points 3"]:
    """The images of a point in the cell, each once."""
    images = (group.rotations @ point + group.translations / GRID) % 1
    return np.unique(np.round(images, 6) % 1, axis=0)


def special_points(group: Operations, random: np.random.Generator) -> Iterator[Float[np.ndarray, "3"]]:
    """Points of random intersections of what operations leave fixed, one after the other, without end."""
    while True:
        chosen = random.integers(0, len(group), random.integers(1, 4))
        shift = group.translations[chosen] / GRID + random.integers(-1, 2, (len(chosen), 3))
        matrix = np.concatenate(group.rotations[chosen] - np.eye(3))
        point = np.linalg.lstsq(matrix, -shift.reshape(-1), rcond=None)[0]
        if np.abs(matrix @ point + shift.reshape(-1)).max() < 1e-9:
            _, sizes, directions = np.linalg.svd(matrix)
            yield (point + random.uniform(0, 1, 3) * (sizes < 1e-9) @ directions) % 1


def named(number: int, point: Float[np.ndarray, "3"]) -> Iterator[tuple[str, int, str]]:
    """Letter, multiplicity and representative of a point's position, of the general one, and of those that the
    normalizer takes them to: moyo may have chosen another origin than ours."""
    group, random = operations(number), np.random.default_rng(number)
    orbits = [orbit(group, each) for each in [*random.uniform(0, 1, (3, 3)), point]]
    species = np.repeat(np.arange(1, len(orbits) + 1), [len(each) for each in orbits])
    cell = moyopy.Cell(cell_vectors(number).tolist(), np.concatenate(orbits).tolist(), species.tolist())
    found = moyopy.MoyoDataset(cell, symprec=1e-4, setting=moyopy.Setting.standard())
    if found.number != number:
        raise AssertionError(f"a crystal of group {number} was read as one of {found.number}")
    for _, all_of in found.normalizer_wyckoff_positions().coset_representatives:
        for position in all_of:
            yield position.letter, position.multiplicity, position.coordinates.replace(" ", "").replace(",", ";")


def positions(number: int) -> list[tuple[str, int, str]]:
    """All of a group, by letter: multiplicity and representative. The general position has the last letter."""
    group, random = operations(number), np.random.default_rng(number)
    found = {
        letter: Position(letter, n, *read(text)) for letter, n, text in named(number, random.uniform(0, 1, (4, 3))[3])
    }
    last = max(found, key=LETTERS.index)
    points = special_points(group, random)
    while len(found) <= LETTERS.index(last):
        point = next(points)
        images = orbit(group, point)
        if not any(len(images) == p.multiplicity and _lies_on(images, p) for p in found.values()):
            listed = {letter: Position(letter, n, *read(text)) for letter, n, text in named(number, point)}
            if listed.keys() <= found.keys():
                raise AssertionError(f"group {number}: nothing lies at {point}")
            found |= listed
    return [(letter, p.multiplicity, written(p.matrix, p.shift)) for letter in LETTERS if (p := found.get(letter))]


def _lies_on(points: Float[np.ndarray, "points 3"], position: Position) -> bool:
    """Whether one of them does."""
    away = position.representative(points) - points
    return bool((np.abs(away - np.round(away)).max(1) < 1e-5).any())


def normalizers(number: int) -> tuple[Coset, ...]:
    """Cosets of the Euclidean normalizer of a group with a generic metric; the identity first."""
    metric = cell_vectors(number) @ cell_vectors(number).T
    candidates = (np.reshape(entries, (3, 3)) for entries in itertools.product((0, 1, -1), repeat=9))
    kept = [linear for linear in candidates if np.abs(linear.T @ metric @ linear - metric).max() < 1e-9]
    if (np.linalg.det(operations(number).rotations) > 0).all():
        kept = [linear for linear in kept if np.linalg.det(linear) > 0]
    return cosets_among(number, tuple(linear.tobytes() for linear in sorted(kept, key=lambda m: -np.trace(m))))


def main(folder: Path = HERE) -> None:
    with (folder / "wyckoff.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["space_group", "letter", "multiplicity", "representative"])
        for number in GROUPS:
            table.writerows([number, *position] for position in positions(number))
    with (folder / "normalizers.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["space_group", "coset"])
        for number in GROUPS:
            for linear, shift in normalizers(number):
                table.writerow([number, written(linear, shift)])


if __name__ == "__main__":
    main()
