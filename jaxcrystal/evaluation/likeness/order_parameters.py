"""How much do n neighbours look like an octahedron, a tetrahedron, a square? Local structure order parameters.

Each is 1 for its ideal motif and falls to 0 away from it (Zimmermann, Horton, Jain, Haranczyk, Front. Mater. 4, 34,
2017; Zimmermann & Jain, RSC Adv. 10, 6063, 2020); the constants are those with which they were fitted. Most look from
each neighbour j, put to the North pole, at another one k, which gives the prime meridian, and at all others m:

                     j  North pole
                     |
            θ_jk    |    θ_jm         a Gaussian of each polar angle θ around the motif's,
         k ------- atom -------- m     times cos²(f φ) of the azimuth φ_jkm of m from the meridian of k
                     |
               South pole              and the best choice of j and k is the order parameter

Constants for angles are fractions of π. Many atoms with the same number of neighbours go at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float

COLLINEAR = 1e-12  #: sine of the smallest angle between two neighbours that have a plane with the atom


@dataclass(frozen=True)
class Directions:
    """Unit vectors from atoms to their n neighbours, the likeliest neighbour first, and the angles between them."""

    vectors: Float[np.ndarray, "atoms n 3"]
    cosine: Float[np.ndarray, "atoms j k"]  #: of the angle between two neighbours

    @classmethod
    def of(cls, vectors: Float[np.ndarray, "atoms n 3"]) -> Directions:
        """Of vectors of any length."""
        unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
        return cls(unit, np.clip(unit @ unit.swapaxes(1, 2), -1, 1))

    @property
    def n(self) -> int:
        return self.vectors.shape[1]

    @cached_property
    def polar(self) -> Float[np.ndarray, "atoms j k"]:
        """θ_jk between 0 and π."""
        return np.arccos(self.cosine)

    @cached_property
    def _meridian(self) -> Float[np.ndarray, "atoms j k 3"]:
        """The part of k that is perpendicular to j."""
        pole = self.vectors[:, :, None, :]
        return self.vectors[:, None] - self.cosine[..., None] * pole

    @cached_property
    def flat(self) -> Bool[np.ndarray, "atoms j k"]:
        """Whether k is on the axis of j, so that it has no meridian."""
        return np.linalg.norm(self._meridian, axis=-1) < COLLINEAR

    @cached_property
    def azimuth(self) -> Float[np.ndarray, "atoms j k m"]:
        """φ_jkm between 0 and π; meaningless unless both k and m have a meridian."""
        length = np.linalg.norm(self._meridian, axis=-1, keepdims=True)
        unit = self._meridian / np.maximum(length, COLLINEAR)
        return np.arccos(np.clip(unit @ unit.swapaxes(-1, -2), -1, 1))

    @cached_property
    def pairs(self) -> Bool[np.ndarray, "j k"]:
        return ~np.eye(self.n, dtype=bool)

    @cached_property
    def triples(self) -> Bool[np.ndarray, "atoms j k m"]:
        """Whether j, k, m are three neighbours and k has a meridian."""
        different = self.pairs[:, :, None] & self.pairs[:, None, :] & self.pairs[None, :, :]
        return different & ~self.flat[..., None]

    @cached_property
    def turned(self) -> Bool[np.ndarray, "atoms j k m"]:
        """Whether, of three neighbours, m has a meridian too, so that there is an azimuth."""
        return self.triples & ~self.flat[:, :, None, :]


OrderParameter = Callable[[Directions], Float[np.ndarray, "atoms"]]


def gauss(x: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """exp(-x²/2), 1 at 0."""
    return np.exp(-0.5 * x * x)


@dataclass(frozen=True)
class SingleBond:
    """1 for the only neighbour; d₁ and d₂ of two and more play no part where there is one."""

    def __call__(self, d: Directions) -> Float[np.ndarray, "atoms"]:
        return np.ones(len(d.vectors))


@dataclass(frozen=True)
class Bent:
    """Two neighbours at an angle: a Gaussian around `angle`, a fraction of π."""

    angle: float
    sharpness: float

    def __call__(self, d: Directions) -> Float[np.ndarray, "atoms"]:
        return gauss(self.sharpness * (d.polar[:, d.pairs] / math.pi - self.angle)).mean(1)


@dataclass(frozen=True)
class Motif:
    """A pole j, neighbours around it at `angles`, `fold` times half a turn apart, and perhaps one at the South pole.

    The largest over j and k of [g(θ_jk) + Σ_m g(θ_jm) cos²(fold φ_jkm) + Σ_m s(θ_jm)] / (number of terms): g is a
    Gaussian around the nearest of `angles`, s one around π, for those m that are beyond `south`, which have no g.
    """

    fold: float
    sharpness: float
    angles: tuple[float, ...] = (0.5,)  #: fractions of π
    change_at: float = 0.0  #: fraction of π up to which the first of two angles holds
    south: float = math.inf  #: fraction of π from which a neighbour is at the South pole
    south_sharpness: float = 0.0
    max_azimuth: float = math.inf  #: fraction of π up to which m counts

    def __call__(self, d: Directions) -> Float[np.ndarray, "atoms"]:
        target = np.where(d.polar <= self.change_at * math.pi, self.angles[0], self.angles[-1])
        at_angle = gauss(self.sharpness * (d.polar / math.pi - target))
        at_south = gauss(self.south_sharpness * (d.polar / math.pi - 1))
        south = d.polar >= self.south * math.pi
        below = d.triples & south[:, :, None, :]
        around = d.turned & ~south[:, :, :, None] & ~south[:, :, None, :] & (d.azimuth < self.max_azimuth * math.pi)
        terms = np.where(around, at_angle[:, :, None, :] * np.cos(self.fold * d.azimuth) ** 2, 0.0)
        terms += np.where(below, at_south[:, :, None, :], 0.0)
        total = np.where(south, 0.0, at_angle) + terms.sum(-1)
        count = ~south + (around | below).sum(-1)
        return (total / np.maximum(count, 1))[:, d.pairs].max(1)


@dataclass(frozen=True)
class Cuboctahedron:
    """Twelve neighbours: from each as the pole one is at 180°, two at 90°, four at 60° and four at 120°."""

    low: float = 75 / 180  #: fractions of π; between them is the equator
    high: float = 105 / 180
    south: float = 160 / 180
    south_weight: float = 1.8
    south_sharpness: float = 28.75
    equator_sharpness: float = 25.5
    slope_sharpness: float = 31.25

    def __call__(self, d: Directions) -> Float[np.ndarray, "atoms"]:
        polar, phi = d.polar / math.pi, d.azimuth
        low, high, south = (x * math.pi for x in (self.low, self.high, self.south))
        below = self.south_weight * (d.polar >= south)
        equator = (d.polar > low) & (d.polar < high)
        counted = d.turned & equator[:, :, :, None] & (d.polar < south)[:, :, None, :]
        on_equator = np.cos(phi) ** 2 * gauss(self.equator_sharpness * (polar - 1 / 2))[:, :, None, :]
        between = gauss(0.0556 * (np.sin(phi) - 0.81649658))
        above = between * gauss(self.slope_sharpness * (polar - 1 / 3))[:, :, None, :]
        beneath = between * gauss(self.slope_sharpness * (polar - 2 / 3))[:, :, None, :]
        terms = np.where(equator[:, :, None, :], on_equator, np.where((d.polar < low)[:, :, None, :], above, beneath))
        total = below * gauss(self.south_sharpness * (polar - 1)) + np.where(counted, terms, 0.0).sum(-1)
        count = below + counted.sum(-1)
        return np.where(count > 0, total / np.where(count > 0, count, 1), 0.0)[:, d.pairs].max(1)


@dataclass(frozen=True)
class BodyCentred:
    """Eight neighbours at the corners of a cube (Peters, J. Chem. Phys. 131, 244103, 2009).

    It takes only the pairs in which j is likelier than k, so that it depends on the order of the neighbours.
    """

    south: float = 1 - math.asin(3**-0.5) / math.pi  #: fraction of π
    south_weight: float = 6.0
    south_sharpness: float = 15.0

    def __call__(self, d: Directions) -> Float[np.ndarray, "atoms"]:
        south = d.polar >= self.south * math.pi
        at_south = self.south_weight * gauss(self.south_sharpness * (d.polar / math.pi - 1))
        from_equator = (d.polar - math.pi / 2) / math.asin(1 / 3)
        slope = math.exp(0.5) * from_equator * gauss(from_equator)
        side = np.where(d.polar > math.pi / 2, 1.0, -1.0)
        terms = np.cos(3 * d.azimuth) * slope[:, :, None, :] * side[..., None]
        total = np.where(south, at_south, np.where(d.turned, terms, 0.0).sum(-1))
        n = d.n
        return np.triu(total, 1).sum((1, 2)) / (0.5 * n * (6 + (n - 2) * (n - 3)))


@dataclass(frozen=True)
class Steinhardt:
    """The rotational invariant of degree l (Steinhardt, Nelson, Ronchetti, Phys. Rev. B 28, 784, 1983).

    √(4π/(2l+1) Σ_m |Y_lm|²), Y_lm the mean over the neighbours, is by the addition theorem √(Σ_jk P_l(cos θ_jk))/n.
    """

    degree: int

    def __call__(self, d: Directions) -> Float[np.ndarray, "atoms"]:
        legendre = np.polynomial.legendre.Legendre.basis(self.degree)
        return np.sqrt(np.maximum(legendre(d.cosine).sum((1, 2)), 0)) / d.n


_TETRAHEDRAL = 0.6081734479693927  # arccos(-1/3)/π
_Q = {f"q{degree}": Steinhardt(degree) for degree in (2, 4, 6)}

#: By number of neighbours, what they may look like; the names and the order are matminer's.
ORDER_PARAMETERS: dict[int, dict[str, OrderParameter]] = {
    1: {"sgl_bd": SingleBond()},
    2: {
        "L-shaped": Bent(0.5, 15.15),
        "water-like": Bent(0.5802777777777778, 13.95),
        "bent 120 degrees": Bent(0.666666666667, 13.25),
        "bent 150 degrees": Bent(0.833333333333333, 12.45),
        "linear": Bent(1.0, 8.667),
    },
    3: {
        "trigonal planar": Motif(1, 17.5, (0.66666666667,)),
        "trigonal non-coplanar": Motif(1.5, 18.33, (_TETRAHEDRAL,)),
        "T-shaped": Motif(1, 15.5),
    },
    4: {
        "square co-planar": Motif(1, 17.7, south=0.75, south_sharpness=13.5),
        "tetrahedral": Motif(1.5, 18.5, (_TETRAHEDRAL,)),
        "rectangular see-saw-like": Motif(2, 27, south=0.75, south_sharpness=11.5, max_azimuth=0.75),
        "see-saw-like": Motif(1.5, 15.75, south=0.75, south_sharpness=12.75),
        "trigonal pyramidal": Motif(1.5, 15.5),
    },
    5: {
        "pentagonal planar": Motif(1, 19.333, (0.4, 0.8), change_at=0.6),
        "square pyramidal": Motif(2, 14.9),
        "trigonal bipyramidal": Motif(1.5, 16.6, south=0.75, south_sharpness=12),
    },
    6: {
        "hexagonal planar": Motif(
            1, 25, (0.5 - 0.16666667, 0.5 + 0.16666667), change_at=0.5, south=5 / 6, south_sharpness=7.5
        ),
        "octahedral": Motif(2, 18, south=0.75, south_sharpness=15),
        "pentagonal pyramidal": Motif(2.5, 13.8),
    },
    7: {
        "hexagonal pyramidal": Motif(3, 12.5),
        "pentagonal bipyramidal": Motif(2.5, 14.75, south=0.75, south_sharpness=12.5),
    },
    8: {
        "body-centered cubic": BodyCentred(),
        "hexagonal bipyramidal": Motif(3, 13.6, south=0.75, south_sharpness=14.1),
    },
    9: _Q,
    10: _Q,
    11: _Q,
    12: {"cuboctahedral": Cuboctahedron()} | _Q,
}
