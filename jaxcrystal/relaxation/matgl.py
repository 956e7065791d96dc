"""Any potential of matgl (TensorNet, CHGNet and their kin) on many crystals at once: one graph, one pass each way.

matgl's own forward pass is what runs, on a batch as PyTorch Geometric lays it out; the edges come from `neighbours.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxcrystal.relaxation.systems import Edges, SinglePoints, Systems


def matgl_single_points(potential: Any, systems: Systems, edges: Edges) -> SinglePoints:
    """What a loaded `matgl.apps.pes.Potential` says; `edges` are those within its cutoff, ordered by source."""
    import torch
    from ase.data import chemical_symbols
    from matgl.utils.constants import EV_PER_ANG3_TO_GPA
    from torch_geometric.data import Batch, Data

    node_of = {symbol: node for node, symbol in enumerate(potential.model.element_types)}
    nodes = [node_of[chemical_symbols[number]] for number in systems.numbers]
    graph = Batch(
        _base_cls=Data,
        num_nodes=len(systems.numbers),
        node_type=torch.tensor(nodes),
        frac_coords=torch.as_tensor(systems.frac_coords, dtype=torch.float32),
        edge_index=torch.as_tensor(np.stack([edges.source, edges.target])),
        pbc_offset=torch.as_tensor(edges.image, dtype=torch.float32),
        batch=torch.as_tensor(systems.system),
        ptr=torch.as_tensor(np.cumsum([0, *systems.counts])),
    )
    # matgl moves the graph to its own device, if the lattices are not there.
    lattices = torch.as_tensor(systems.cells, dtype=torch.float32)
    energies, forces, stresses, *_ = potential(graph, lattices, torch.zeros(len(systems), 2))
    stresses = stresses.detach().cpu().numpy().astype(float).reshape(-1, 3, 3) / EV_PER_ANG3_TO_GPA
    return SinglePoints(
        energies.detach().cpu().numpy().astype(float).reshape(-1),
        forces.detach().cpu().numpy().astype(float),
        (stresses + stresses.transpose(0, 2, 1)) / 2,
    )
