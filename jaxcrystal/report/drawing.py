"""A crystal as a picture: atoms as shaded spheres, bonds, and the cell's edges, projected along one direction."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from jaxcrystal.crystals.symmetry import SYMPREC

if TYPE_CHECKING:
    from pymatgen.core import Structure

SIZE = 240
DRAWN_ATOMS = 40  #: a cell of more is too crowded to be seen
#: An atom is drawn with this share of its covalent radius, so that bonds show between atoms.
BALL = 0.55
#: Two atoms are joined if they are closer than this multiple of the sum of their covalent radii.
BOND = 1.15
#: and than this multiple of the nearest neighbour's distance of one of them.
SHELL = 1.12


def draw(structure: Structure, *, prefix: str) -> str:
    """SVG of one cell, with the atoms on its faces, edges and corners repeated; `prefix` keeps ids in a page apart."""
    from ase.data import covalent_radii

    view = _view(structure.lattice.matrix)
    numbers, positions = _with_borders(structure)
    points = positions @ view
    corners = np.array(list(product((0, 1), repeat=3))) @ structure.lattice.matrix @ view
    everything = np.concatenate([points, corners])
    middle = (everything.max(0) + everything.min(0)) / 2
    reach = covalent_radii[numbers].max() * BALL
    scale = SIZE / 2 / (np.abs(everything - middle)[:, :2].max() + reach + 0.1)

    def place(xyz: Float[np.ndarray, "3"]) -> tuple[float, float]:
        x, y = (xyz - middle)[:2] * scale
        return SIZE / 2 + x, SIZE / 2 - y

    colours = {z: colour(z) for z in set(numbers)}
    shapes: list[tuple[float, str]] = []  # with the depth by which they are painted, back to front
    for i, j in product(range(8), repeat=2):
        if i < j and bin(i ^ j).count("1") == 1:
            (x1, y1), (x2, y2) = place(corners[i]), place(corners[j])
            depth = min(corners[i, 2], corners[j, 2])
            shapes.append((depth, f'<line class="edge" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'))
    shapes += _bonds(numbers, points, covalent_radii, colours, place)
    for z, point in zip(numbers, points, strict=True):
        x, y = place(point)
        radius = covalent_radii[z] * BALL * scale
        shapes.append((point[2], f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="url(#{prefix}-{z})"/>'))
    gradients = "".join(
        f'<radialGradient id="{prefix}-{z}" cx="0.35" cy="0.3" r="0.75">'
        f'<stop offset="0" stop-color="{_mix(c, 1.0, 0.75)}"/>'
        f'<stop offset="0.45" stop-color="{c}"/><stop offset="1" stop-color="{_mix(c, 0.0, 0.45)}"/></radialGradient>'
        for z, c in colours.items()
    )
    body = "".join(shape for _, shape in sorted(shapes, key=lambda item: item[0]))
    name = structure.composition.reduced_formula
    return f'<svg viewBox="0 0 {SIZE} {SIZE}" role="img" aria-label="{name}"><defs>{gradients}</defs>{body}</svg>'


def conventional(structure: Structure) -> tuple[Structure, int | None]:
    """The conventional cell, which shows symmetry best, and its space group; the cell as it is if that is crowded."""
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer, SymmetryUndeterminedError

    try:
        symmetry = SpacegroupAnalyzer(structure, symprec=SYMPREC)
        found = symmetry.get_conventional_standard_structure()
    except (SymmetryUndeterminedError, ValueError, TypeError):
        return structure, None
    return found if len(found) <= DRAWN_ATOMS else structure, symmetry.get_space_group_number()


def colour(z: int) -> str:
    """Jmol's colour of an element, as `#rrggbb`; meitnerium's for all that are heavier, where Jmol ends."""
    from ase.data.colors import jmol_colors

    return _hex(jmol_colors[min(z, len(jmol_colors) - 1)])


def _view(lattice: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, "3 3"]:
    """Columns: right, up, towards the reader. c points up; the eye stands a little to the side and above."""
    up = lattice[2] / np.linalg.norm(lattice[2])
    front = np.cross(lattice[1], lattice[2])
    front /= np.linalg.norm(front)
    right = np.cross(up, front)
    turn, tilt = np.radians(-24), np.radians(13)
    front, right = front * np.cos(turn) - right * np.sin(turn), right * np.cos(turn) + front * np.sin(turn)
    front, up = front * np.cos(tilt) + up * np.sin(tilt), up * np.cos(tilt) - front * np.sin(tilt)
    return np.stack([right, up, front], axis=1)


def _with_borders(structure: Structure) -> tuple[np.ndarray, Float[np.ndarray, "atoms 3"]]:
    """Atomic numbers and Cartesian positions (Å), an atom at a coordinate 0 drawn at 1 too."""
    numbers, positions = [], []
    for z, frac in zip(structure.atomic_numbers, structure.frac_coords % 1.0, strict=True):
        frac = np.where(frac > 0.985, frac - 1.0, frac)
        for shift in product(*((0, 1) if x < 0.015 else (0,) for x in frac)):
            numbers.append(z)
            positions.append(structure.lattice.get_cartesian_coords(frac + shift))
    return np.array(numbers), np.array(positions)


def _bonds(numbers, points, radii, colours, place) -> list[tuple[float, str]]:
    distances = np.linalg.norm(points[:, None] - points, axis=-1) + np.diag(np.full(len(points), np.inf))
    nearest = distances.min(axis=1)
    reach = BOND * (radii[numbers][:, None] + radii[numbers])
    # Only an atom's first shell: large cations would else be joined with each other past their anions.
    joined = (distances < reach) & (distances < SHELL * np.maximum(nearest[:, None], nearest))
    shapes = []
    for i, j in np.argwhere(np.triu(joined)):
        half = (points[i] + points[j]) / 2
        for centre, z in ((points[i], numbers[i]), (points[j], numbers[j])):
            # From the ball's surface: from its centre the stick would be painted over the ball.
            along = half - centre
            start = centre + along * min(0.95 * radii[z] * BALL / np.linalg.norm(along), 1.0)
            (x1, y1), (x2, y2) = place(start), place(half)
            depth = (start[2] + half[2]) / 2
            line = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{_mix(colours[z], 0.0, 0.2)}"'
            shapes.append((depth, f'<line class="bond" {line}/>'))
    return shapes


def _hex(rgb: Float[np.ndarray, "3"]) -> str:
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in rgb)


def _mix(colour: str, other: float, share: float) -> str:
    """A colour mixed with grey of brightness `other` (0 black, 1 white)."""
    rgb = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    return _hex(rgb * (1 - share) + other * share)
