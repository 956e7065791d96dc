"""Total energies to formation energies: the Materials Project's corrections, and the elements' energies.

    E_f = (E + corrections - Σ_element n · ε_element) / atoms        in eV/atom

with ε the energy per atom of the element's most stable crystal. The corrections (MP2020, Sci. Rep. 11, 15496) mend
PBE's errors for anions and bring PBE+U runs onto the scale of PBE runs.
"""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcrystal.errors import UserError
from jaxcrystal.hull.scale import require_known_elements
from jaxcrystal.relaxation.selfcheck import EnergyReference

if TYPE_CHECKING:
    from pymatgen.core import Composition, Element, Structure


#: Of the Materials Project's calculations with PBE, whose energies its corrections mix.
RUN_TYPES = ("GGA", "GGA+U")


class Uncovered(UserError):
    """Nothing can be said of a crystal's stability: one of its elements has no reference."""


@dataclass(frozen=True)
class ElementReferences:
    """Energies of the elements' most stable crystals, in eV/atom. MP2020 corrects compounds only, so its are MP's."""

    energies: Mapping[str, float]
    potential_sha256: str | None = None  #: of the potential that gave them; None: the Materials Project

    @classmethod
    def from_file(cls, path: str | Path) -> ElementReferences:
        """From JSON (may be gzipped) that maps symbols to pymatgen's ComputedEntry, as the Materials Project has it.

        Raises UserError if the file cannot be read or an entry is not one element with its energy.
        """
        path = Path(path)
        try:
            raw = path.read_bytes()
            entries = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
            energies = {}
            for symbol, entry in entries.items():
                ((element, atoms),) = entry["composition"].items()
                if element != symbol:
                    raise ValueError(f"the entry of {symbol} is a crystal of {element}")
                functional = (entry.get("parameters") or {}).get("run_type", RUN_TYPES[0])
                if functional not in RUN_TYPES:
                    raise UserError(
                        f"{path}: the entry of {symbol} is of {functional}, not of {' or '.join(RUN_TYPES)}"
                    )
                energies[symbol] = entry["energy"] / atoms
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} holds no element references ({type(error).__name__}: {error}); "
                'it must map symbols to {"energy": eV per cell, "composition": {symbol: atoms}}'
            ) from error
        references = cls(energies)
        references.require_mp_scale(str(path))
        return references

    @classmethod
    def from_energies(cls, crystals: Iterable[tuple[Structure, float]], potential_sha256: str) -> ElementReferences:
        """From crystals and their energies (eV per cell) by one potential: the lowest of each element's own."""
        energies: dict[str, float] = {}
        for structure, energy in crystals:
            if len(structure.composition) == 1:
                symbol, per_atom = structure.composition.elements[0].symbol, energy / len(structure)
                energies[symbol] = min(per_atom, energies.get(symbol, float("inf")))
        return cls(energies, potential_sha256)

    def require_mp_scale(self, name: str) -> None:
        """Raises UserError if they are said to be the Materials Project's and are not (`scale.py`)."""
        if self.potential_sha256 is None:
            require_known_elements(self.energies, name)

    def formation_energy_per_atom(self, structure: Structure, energy: float, reference: EnergyReference) -> float:
        """Formation energy in eV/atom of a crystal whose energy (eV per cell) stands on the scale `reference`.

        Raises Uncovered for an element without a reference.
        """
        composition = structure.composition
        if missing := sorted({element.symbol for element in composition} - set(self.energies)):
            raise Uncovered(f"no reference energy for {', '.join(missing)} (of {composition.reduced_formula})")
        if reference is EnergyReference.MP:
            energy += mp2020_correction(structure)
        return (energy - sum(n * self.energies[e.symbol] for e, n in composition.items())) / len(structure)


def corrected_energy(entry: Any) -> float:
    """The energy of a pymatgen entry in eV, with the MP2020 corrections.

    An entry that has them, or a `PDEntry`, whose maker has seen to it, is taken at its word; one that has none gets
    them, by its run type and its Hubbard U. Raises UserError, in words that many entries share, if it cannot have them.
    """
    from pymatgen.analysis.compatibility import CompatibilityError

    if not hasattr(entry, "parameters"):
        return float(entry.energy)
    functional = entry.parameters.get("run_type")
    if functional not in (None, *RUN_TYPES):
        raise UserError(f"of another functional: {functional}")
    # pymatgen keeps what made an adjustment as a dictionary, which its JSON reader turns into the object.
    makers = [adjustment.cls for adjustment in entry.energy_adjustments]
    schemes = {maker.get("@class") if isinstance(maker, dict) else type(maker).__name__ for maker in makers}
    if schemes == {type(_scheme()).__name__}:
        return float(entry.energy)
    if functional is None:
        raise UserError("of an unknown functional: it has neither run_type nor MP2020 corrections")
    try:
        return float(entry.uncorrected_energy + _correction(entry))
    except CompatibilityError:
        raise UserError("calculated with another Hubbard U than the Materials Project's") from None


def mp2020_correction(structure: Structure) -> float:
    """The MP2020 correction in eV per cell, as for a calculation with the Materials Project's settings.

    Whether such a calculation has a Hubbard U is read from those settings: V, Cr, Mn, Fe, Co, Ni, Mo and W have one
    in oxides and fluorides. Peroxides and superoxides are recognised by the structure, anions by guessed oxidation
    states. The order of the atoms does not matter.
    """
    from pymatgen.entries.computed_entries import ComputedStructureEntry

    settings = _scheme().u_settings.get(_elements(structure.composition)[-1].symbol, {})
    hubbards = {e.symbol: settings[e.symbol] for e in structure.composition if settings.get(e.symbol)}
    parameters = {"run_type": "GGA+U" if hubbards else "GGA", "hubbards": hubbards}
    return _correction(ComputedStructureEntry(structure, 0.0, parameters=parameters))


def _correction(entry: Any) -> float:
    """Sum of the MP2020 adjustments in eV, of the entry with its elements in pymatgen's order.

    The scheme takes the last of the most electronegative elements for the anion, and the first of equally probable
    oxidation states, both in the order in which the composition names its elements.
    """
    from pymatgen.core import Composition
    from pymatgen.entries.computed_entries import ComputedEntry, ComputedStructureEntry

    atoms = entry.composition.element_composition
    ordered = Composition({element: atoms[element] for element in _elements(atoms)})
    known = {"parameters": entry.parameters, "data": dict(entry.data)}
    if structure := getattr(entry, "structure", None):
        entry = ComputedStructureEntry(structure, 0.0, composition=ordered, **known)
    else:
        entry = ComputedEntry(ordered, 0.0, **known)
    with warnings.catch_warnings():
        # pymatgen warns where no oxidation states can be guessed; the rule it then follows is the scheme's own.
        warnings.simplefilter("ignore")
        return sum(adjustment.value for adjustment in _scheme().get_adjustments(entry))


def _elements(composition: Composition) -> list[Element]:
    """By electronegativity, equals by symbol, noble gases last: as pymatgen orders the atoms of its calculations."""
    return sorted(composition.element_composition.elements)


@cache
def _scheme() -> Any:
    from pymatgen.entries.compatibility import MaterialsProject2020Compatibility

    return MaterialsProject2020Compatibility(check_potcar=False)
