"""M3GNet (Chen & Ong, Nat. Comput. Sci. 2, 718, 2022; arXiv 2202.02450) on many crystals at once, with matgl's weights.

matgl's own forward pass forms the features of every edge from both its atoms and itself, and those of every pair of
edges that leave an atom. Both are sums in disguise, and here they are taken as such:

- a message's first layer, W [v_i, v_j, e_ij] = W₁ v_i + W₂ v_j + W₃ e_ij, multiplies atoms once, not once an edge;
- the three-body sum (eq. 2) has Legendre polynomials of the angle between two edges, and these are products of a tensor
  of each, P_l(u · u') = t_l(u) · t_l(u'), so that Σ_k h_ik P_l(u_ij · u_ik) = t_l(u_ij) · Σ_k h_ik t_l(u_ik): a sum
  for each atom, and no pairs of edges.

The energy depends on the vectors of edges alone; one pass back gives its slopes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcrystal.relaxation.systems import Edges, SinglePoints, Systems

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class M3GNet:
    """Single points of a loaded `matgl.apps.pes.Potential` that holds a `matgl.models.M3GNet`.

    `at_source`: the message of an edge i → j is summed at i, as matgl has done since 3.0; else at j, as before.
    """

    def __init__(self, potential: Any, *, at_source: bool) -> None:
        self.potential, self.at_source = potential, at_source

    @staticmethod
    def can_run(potential: Any) -> bool:
        """Whether it is an M3GNet of the published kind: extensive, without a state, of angles up to l = 2."""
        from matgl.models import M3GNet as Published

        model = potential.model
        return (
            isinstance(model, Published)
            and not (model.include_state or model.is_intensive or potential.calc_repuls)
            and (potential.element_refs is None or potential.element_refs.property_offset.ndim == 1)
            and not model.basis_expansion.use_phi
            and model.max_l <= 3
            # An edge without others near it then has a three-body term of zero, and need not be looked at.
            and not any(block.update_network_bond.use_bias for block in model.three_body_interactions)
        )

    def __call__(self, systems: Systems, edges: Edges) -> SinglePoints:
        import torch
        from ase.data import chemical_symbols

        potential, model = self.potential, self.potential.model
        device, dtype = potential.data_mean.device, potential.data_mean.dtype
        node_of = {symbol: node for node, symbol in enumerate(model.element_types)}
        nodes = torch.tensor([node_of[chemical_symbols[number]] for number in systems.numbers], device=device)
        system, source, target = (
            torch.as_tensor(array, device=device) for array in (systems.system, edges.source, edges.target)
        )
        vectors = torch.as_tensor(edges.vector, dtype=dtype, device=device).requires_grad_()
        atomic = potential.data_std * self._atomic_energies(nodes, source, target, vectors)
        if potential.element_refs is not None:
            atomic = atomic + potential.element_refs.property_offset.to(atomic)[nodes]
        energies = potential.data_mean + atomic.new_zeros(len(systems)).index_add(0, system, atomic)
        (slopes,) = torch.autograd.grad(energies.sum(), vectors)
        return SinglePoints.of_slopes(systems, _array(energies), edges, _array(slopes))

    def _atomic_energies(self, nodes: Tensor, source: Tensor, target: Tensor, vectors: Tensor) -> Tensor:
        """Shapes: nodes [atoms], source and target [edges], vectors [edges, 3]; the result is [atoms]."""
        import torch
        from matgl.utils.cutoff import polynomial_cutoff

        model = self.potential.model
        length = vectors.norm(dim=1)
        radial = model.bond_expansion(length)
        atom, edge, _ = model.embedding(nodes, radial, None)

        short = torch.nonzero(length <= model.threebody_cutoff).squeeze(1)
        near, middle, end = length[short], source[short], target[short]
        cutoff = polynomial_cutoff(near, model.threebody_cutoff)[:, None]
        angular = _tensors(vectors[short] / near[:, None], model.max_l)
        bessel = model.basis_expansion.sbf(near) * cutoff
        sums_at = source if self.at_source else target
        for three_body, layer in zip(model.three_body_interactions, model.graph_layers, strict=True):
            weight = bessel * three_body.update_network_atom(atom).index_select(0, end)
            bonds = cutoff * _over_angles(weight, angular, middle, len(atom), model.max_l)
            edge = edge.index_add(0, short, three_body.update_network_bond(bonds))
            conv = layer.conv
            edge = edge + _message(conv.edge_update_func, atom, edge, source, target) * conv.edge_weight_func(radial)
            message = _message(conv.node_update_func, atom, edge, source, target) * conv.node_weight_func(radial)
            atom = atom.index_add(0, sums_at, message)
        return model.final_layer(atom).view(-1)


def _message(gated: Any, atom: Tensor, edge: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """`gated([atom[source], atom[target], edge])` of matgl's GatedMLP (eq. 4 and 5)."""
    import torch
    from torch.nn.functional import silu

    first = [gated.layers[0], gated.gates[0]]
    weight, bias = torch.cat([linear.weight for linear in first]), torch.cat([linear.bias for linear in first])
    width = atom.shape[1]
    of_source, of_target, of_edge = weight[:, :width], weight[:, width : 2 * width], weight[:, 2 * width :]
    hidden = torch.addmm(bias, edge, of_edge.T)
    hidden = hidden + (atom @ of_source.T).index_select(0, source) + (atom @ of_target.T).index_select(0, target)
    layers, gates = silu(hidden).chunk(2, dim=1)
    return gated.layers[2:](layers) * gated.gates[2:](gates)


def _tensors(unit: Tensor, max_l: int) -> list[Tensor]:
    """For l < max_l the components t of each direction u [n, 3], with t(u) · t(u') = √((2l + 1) / 4π) P_l(u · u')."""
    import torch

    x, y, z = unit.T
    found = [torch.ones_like(unit[:, :1]), unit]
    # P₂ = ³⁄₂ (u·u')² - ½ = ³⁄₂ (uu - ⅓) : (u'u' - ⅓)
    diagonal = math.sqrt(3 / 2) * (unit**2 - 1 / 3)
    found.append(torch.cat([diagonal, math.sqrt(3) * torch.stack([x * y, y * z, z * x], dim=1)], dim=1))
    return [math.sqrt(_norm(degree)) * t for degree, t in enumerate(found[:max_l])]


def _norm(degree: int) -> float:
    """√((2l + 1) / 4π), by which a spherical harmonic of m = 0 is more than its Legendre polynomial."""
    return math.sqrt((2 * degree + 1) / (4 * math.pi))


def _over_angles(weight: Tensor, angular: list[Tensor], middle: Tensor, atoms: int, max_l: int) -> Tensor:
    """Σ_k weight_ik √((2l + 1) / 4π) P_l(u_ij · u_ik) over k ≠ j, of edges ij and ik that leave the same atom i.

    Shapes: weight [edges, max_l · n], by l and then n; `angular` of `_tensors`; middle [edges], the atom i.
    """
    import torch

    found = []
    for degree, (t, w) in enumerate(zip(angular, weight.chunk(max_l, dim=1), strict=True)):
        each = (t[:, :, None] * w[:, None, :]).flatten(1)
        sums = weight.new_zeros(atoms, each.shape[1]).index_add(0, middle, each)
        around = sums.index_select(0, middle).unflatten(1, (t.shape[1], w.shape[1]))
        found.append((t[:, :, None] * around).sum(1) - _norm(degree) * w)  # without the edge itself
    return torch.cat(found, dim=1)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().astype(np.float64)
