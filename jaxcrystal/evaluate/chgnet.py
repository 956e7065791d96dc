"""CHGNet (arXiv 2302.14231) as an ase calculator that differentiates once.

The package's own calculator differentiates the energy twice, for forces and then for stress, and keeps the graph of
either so that it could be trained through. A relaxation needs neither: one backward pass for both takes about half the
time, and the numbers are the same.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator


def chgnet_calculator(model: Any) -> Calculator:
    """A calculator for a loaded `chgnet.model.CHGNet`: energy in eV, forces in eV/Å, stress in eV/Å³ (Voigt).

    An atom with no neighbour within CHGNet's 6 Å has no energy that it learnt: ValueError, rather than a number.
    """
    import torch
    from ase.calculators.calculator import Calculator, all_changes
    from ase.stress import full_3x3_to_voigt_6_stress
    from chgnet.model.model import BatchedGraph
    from pymatgen.io.ase import AseAtomsAdaptor

    model.graph_converter.set_isolated_atom_response("error")

    class ChgnetCalculator(Calculator):
        implemented_properties = ("energy", "free_energy", "forces", "stress")

        def calculate(self, atoms: Atoms | None = None, properties=("energy",), system_changes=all_changes) -> None:
            super().calculate(atoms, properties, system_changes)
            structure = AseAtomsAdaptor.get_structure(self.atoms)
            graph = model.graph_converter(structure)
            with warnings.catch_warnings():
                # It reads volumes off tensors that carry gradients, which nobody differentiates; torch warns.
                warnings.simplefilter("ignore", UserWarning)
                batch = BatchedGraph.from_graphs(
                    [graph],
                    bond_basis_expansion=model.bond_basis_expansion,
                    angle_basis_expansion=model.angle_basis_expansion,
                    compute_stress=True,
                )
            scale = len(structure) if model.is_intensive else 1
            energy = model._compute(batch)["e"].sum() * scale
            by_position, by_strain = torch.autograd.grad(energy, (batch.atom_positions[0], batch.strains[0]))
            whole = float(energy.detach())
            if model.composition_model is not None:
                whole += float(model.composition_model([graph]).sum()) * scale
            stress = full_3x3_to_voigt_6_stress(by_strain.numpy()) / structure.volume
            self.results = {
                "energy": whole,
                "free_energy": whole,
                "forces": -by_position.numpy(),
                "stress": stress,
            }

    return ChgnetCalculator()
