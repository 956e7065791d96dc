"""Potentials of ase, asked as ours are: exact, fast, and none of those under test."""

from collections.abc import Callable

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator

from jaxcrystal.relaxation.potentials import Potential
from jaxcrystal.relaxation.selfcheck import EnergyReference, SelfCheck
from jaxcrystal.relaxation.systems import SinglePoints, Systems

UNCHECKED = SelfCheck((), (), EnergyReference.OWN)


def all_atoms(systems: Systems) -> list[Atoms]:
    return [
        Atoms(systems.numbers[own], systems.positions[own], cell=cell, pbc=True)
        for i, cell in enumerate(systems.cells)
        for own in [systems.system == i]
    ]


def of_ase(make: Callable[[], Calculator]) -> Callable[..., SinglePoints]:
    """What a calculator says of each crystal by itself."""

    def answer(systems: Systems, edges=None) -> SinglePoints:
        energies, forces, stresses = [], [], []
        for atoms in all_atoms(systems):
            atoms.calc = make()
            energies.append(atoms.get_potential_energy())
            forces.append(atoms.get_forces())
            stresses.append(atoms.get_stress(voigt=False))
        return SinglePoints(np.array(energies), np.concatenate(forces), np.array(stresses))

    return answer


def potential(
    make: Callable[[], Calculator],
    elements=("Al", "Cu", "Ni"),
    *,
    check: SelfCheck = UNCHECKED,
    sha256: str = "0" * 64,
) -> Potential:
    return Potential("EMT", "emt", sha256, frozenset(elements), check, "", cutoff=1.0, answer=of_ase(make))
