"""CHGNet (arXiv 2302.14231) on many crystals at once: one graph, one forward and one backward pass.

The package builds the graph of each crystal in Python and differentiates the energy twice, for forces and then for
stress, so that it could be trained through. Here the graphs of all crystals come from the edges that `neighbours.py`
finds, and one backward pass gives forces and stresses.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxcrystal.relaxation.systems import Edges, SinglePoints, Systems


def chgnet_single_points(model: Any, systems: Systems, edges: Edges) -> SinglePoints:
    """What a loaded `chgnet.model.CHGNet` says; `edges` are those within its cutoff of atoms.

    An atom with no neighbour within CHGNet's 6 Å has no energy that it learnt: ValueError, rather than a number.
    """
    import torch
    from chgnet.model.model import BatchedGraph

    if lonely := len(systems.numbers) - len(np.unique(edges.source)):
        reach = model.graph_converter.atom_graph_cutoff
        raise ValueError(f"{lonely} atoms have no neighbour within CHGNet's {reach} Å")
    device = next(model.parameters()).device

    def real(array: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(array, dtype=torch.float32, device=device)

    def index(array: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(array, dtype=torch.int64, device=device)

    system, source, target, bond = map(index, (systems.system, edges.source, edges.target, edges.bond))
    vectors = real(edges.vector).requires_grad_()
    lengths = vectors.norm(dim=1)
    directions = vectors / lengths[:, None]

    bond_lengths = lengths[index(edges.edge_of_bond)]
    first, second = map(index, edges.angles(model.graph_converter.bond_graph_cutoff))
    if len(first):
        angles = model.angle_basis_expansion(directions[first], directions[second])
    else:
        angles = torch.tensor([])  # CHGNet asks for its length
    graph = BatchedGraph(
        atomic_numbers=index(systems.numbers),
        bond_bases_ag=model.bond_basis_expansion.rbf_expansion_ag(bond_lengths),
        bond_bases_bg=model.bond_basis_expansion.rbf_expansion_bg(bond_lengths),
        angle_bases=angles,
        batched_atom_graph=torch.stack([source, target], dim=1),
        batched_bond_graph=torch.stack([source[first], bond[first], bond[second]], dim=1),
        atom_owners=system,
        directed2undirected=bond,
        atom_positions=[],
        strains=[],
        volumes=real(systems.volumes),
    )
    energies = model._compute(graph)["e"] * (real(systems.counts) if model.is_intensive else 1)
    (slopes,) = torch.autograd.grad(energies.sum(), vectors)
    energies = energies.detach().cpu().numpy().astype(float)
    if model.composition_model is not None:
        of_element = model.composition_model.fc.weight.detach().cpu().numpy().astype(float)[0]
        energies = energies + np.bincount(systems.system, weights=of_element[systems.numbers - 1])
    return SinglePoints.of_slopes(systems, energies, edges, slopes.cpu().numpy().astype(float))
