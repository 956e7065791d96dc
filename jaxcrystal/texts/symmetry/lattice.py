"""The lattice parameters that a space group leaves free, and the intervals that they lie in."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int32

from jaxcrystal.crystals.wyckoff import GROUPS, SYSTEMS, system

ALPHA, BETA, GAMMA = 3, 4, 5  #: fields, from a = 0

#: Free parameters of each space group, in order: which of a, b, c, α, β, γ; and how many.
FREE = np.zeros((len(GROUPS) + 1, 6), np.int8)
NUMBER_FREE = np.ones(len(GROUPS) + 1, np.int8)
for _number in GROUPS:
    NUMBER_FREE[_number] = len(SYSTEMS[system(_number)][0])
    FREE[_number, : NUMBER_FREE[_number]] = SYSTEMS[system(_number)][0]


@struct.dataclass
class Lattice:
    """The parameters of each slot's cell, as far as they are written."""

    number: Int32[Array, "slots"]  #: of the one being written, among the free ones of the group
    angles: Int32[Array, "slots 2"]  #: α and β of a triclinic cell, once they are written

    @classmethod
    def none(cls, slots: int) -> Lattice:
        return cls(jnp.zeros(slots, jnp.int32), jnp.zeros((slots, 2), jnp.int32))

    def field(self, group: Int32[Array, "slots"]) -> Int32[Array, "slots"]:
        """Which of a, b, c, α, β, γ is being written."""
        return jnp.asarray(FREE, jnp.int32)[group, self.number]

    def last(self, group: Int32[Array, "slots"]) -> Bool[Array, "slots"]:
        """Whether it is the last one."""
        return self.number == jnp.asarray(NUMBER_FREE)[group] - 1

    def after(self, when: Bool[Array, "slots"], group: Int32[Array, "slots"], value: Int32[Array, "slots"]) -> Lattice:
        """The parameter being written has this value."""
        field = self.field(group)
        angle = when[:, None] & (field[:, None] == jnp.array([ALPHA, BETA]))
        return Lattice(self.number + when, jnp.where(angle, value[:, None], self.angles))

    def bounds(
        self,
        group: Int32[Array, "slots"],
        low: Int32[Array, "slots 6"],
        high: Int32[Array, "slots 6"],
        angle_decimals: int,
    ) -> tuple[Int32[Array, "slots"], Int32[Array, "slots"]]:
        """The interval of the parameter; in a triclinic cell such that angles close it, and leave some to those that
        follow: |α - β| < γ < min(α + β, 360° - α - β)."""
        field = self.field(group)
        turn, beta_or_more, gamma_or_more = 360 * 10**angle_decimals, low[:, BETA], low[:, GAMMA]
        low, high = (jnp.take_along_axis(x, field[:, None], axis=1)[:, 0] for x in (low, high))
        alpha, beta = self.angles.T
        most = jnp.select(
            [field == ALPHA, field == BETA, field == GAMMA],
            [
                turn - 1 - beta_or_more - gamma_or_more,
                turn - 1 - gamma_or_more - alpha,
                jnp.minimum(alpha + beta, turn - alpha - beta) - 1,
            ],
            high,
        )
        three = self._three(group)
        low = jnp.where(three & (field == GAMMA), jnp.maximum(low, jnp.abs(alpha - beta) + 1), low)
        return low, jnp.where(three, jnp.minimum(high, most), high)

    @staticmethod
    def _three(group: Int32[Array, "slots"]) -> Bool[Array, "slots"]:
        """Whether all angles are free."""
        return jnp.asarray(NUMBER_FREE)[group] == 6
