"""What the numbers of `metrics.json` are called, mean, and how they are written: for the report and `compare`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxcrystal.evaluation.shots import SHOTS


@dataclass(frozen=True)
class Quantity:
    """One number of `metrics.json`."""

    name: str  #: its keys, joined by dots
    title: str
    meaning: str = ""
    unit: str = "%"  #: `%` of a rate, which is kept as a share; else the unit of the number, empty if it has none
    headline: bool = False  #: whether the report shows it large

    @property
    def section(self) -> str:
        return self.name.split(".")[0]

    @property
    def is_rate(self) -> bool:
        return self.unit == "%"

    def write(self, value: float, *, signed: bool = False) -> str:
        """The number without its unit: percent with one decimal, others with three; `signed` writes + too."""
        form = ("+" if signed else "") + (".1f" if self.is_rate else ".3f")
        written = f"{100 * value if self.is_rate else value:{form}}".replace("-", "−")
        return written if any(digit in written for digit in "123456789") else written.lstrip("+−")

    def write_interval(self, low: float, high: float, *, signed: bool = False) -> str:
        """Such as `12.1 to 15.8 %`."""
        return f"{self.write(low, signed=signed)} to {self.write(high, signed=signed)} {self.unit}".rstrip()


SECTIONS = {
    "stability": "Stability",
    "sun": "Stable, unique and novel",
    "validity": "Validity",
    "uniqueness": "Uniqueness",
    "novelty": "Novelty",
    "coverage": "Likeness to the reference",
    "distribution": "Distributions beside the reference's",
    "diversity": "Diversity",
    "hhi": "Supply of the elements",
    "prediction": "Structure prediction",
    "conditions": "What was asked for",
}

_KNOWN = [
    Quantity("stability.metastable_rate", "Metastable", "less than 0.1 eV/atom above the hull", headline=True),
    Quantity("stability.stable_rate", "Stable", "on the hull or below it", headline=True),
    Quantity("stability.lemat_metastable_rate", "Metastable by LeMat-GenBench", "above it by 0.1 eV/atom at most"),
    Quantity("stability.lemat_stable_rate", "Stable by LeMat-GenBench", "on the hull, or below it however far"),
    Quantity("stability.e_above_hull.median", "Energy above the hull, median", "of relaxed crystals", "eV/atom"),
    Quantity("stability.e_above_hull.p10", "Energy above the hull, 10th percentile", "", "eV/atom"),
    Quantity("stability.e_above_hull.p90", "Energy above the hull, 90th percentile", "", "eV/atom"),
    Quantity(
        "stability.relaxation_rmsd.median", "Displacement in relaxation, median", "root mean square of the atoms", "Å"
    ),
    Quantity("sun.rate", "Stable, unique, novel", "all three at once", headline=True),
    Quantity("sun.metastable_rate", "Metastable, unique, novel", "all three at once", headline=True),
    Quantity("sun.lemat_rate", "SUN by LeMat-GenBench", "on the hull or below it, unique, novel"),
    Quantity("sun.lemat_metastable_rate", "MetaSUN by LeMat-GenBench", "above it by 0.1 eV/atom at most, and both"),
    Quantity("validity.both", "Valid", "in structure and composition", headline=True),
    Quantity("validity.structural", "Valid structure", "atoms keep their distance", headline=True),
    Quantity("validity.compositional", "Valid composition", "charges can balance", headline=True),
    Quantity("validity.distances", "Distances kept", "half of the radii and 0.7 Å"),
    Quantity("validity.plausibility", "Plausible", "density, cell and space group"),
    Quantity("uniqueness.rate", "Unique", "distinct, structurally valid crystals", headline=True),
    Quantity("novelty.by_matching", "Novel", "valid, and in no training crystal's likeness", headline=True),
    Quantity("novelty.either", "Novel by fingerprint", "structure or composition is far from all of the training set"),
    Quantity("novelty.structural", "Novel structure", "its fingerprint is far from all of the training set"),
    Quantity("novelty.compositional", "Novel composition", "its fingerprint is far from all of the training set"),
    Quantity("coverage.recall", "Coverage recall", "reference crystals with a generated one near", headline=True),
    Quantity("coverage.precision", "Coverage precision", "generated crystals with a reference one near", headline=True),
    Quantity("coverage.amsd_recall", "AMSD recall", "mean distance to the nearest generated structure", ""),
    Quantity("coverage.amsd_precision", "AMSD precision", "mean distance to the nearest reference structure", ""),
    Quantity("coverage.amcd_recall", "AMCD recall", "mean distance to the nearest generated composition", ""),
    Quantity("coverage.amcd_precision", "AMCD precision", "mean distance to the nearest reference composition", ""),
    Quantity("distribution.density_wasserstein", "Wasserstein distance, density", "0: distributed alike", "g/cm³"),
    Quantity("distribution.num_elements_wasserstein", "Wasserstein distance, elements", "of their number", ""),
    Quantity("diversity.structural", "Structural diversity", "mean distance of two fingerprints", ""),
    Quantity("diversity.compositional", "Compositional diversity", "mean distance of two fingerprints", ""),
    Quantity("diversity.element_vendi", "Kinds of elements", "effective number, of all atoms", ""),
    Quantity("diversity.space_group_vendi", "Kinds of space groups", "effective number, within 0.01 Å", ""),
    Quantity("diversity.num_atoms_vendi", "Kinds of numbers of atoms", "effective number", ""),
    Quantity("diversity.size_entropy", "Entropy of sizes", "of density, cell, packing, over log₂ of the crystals", ""),
    Quantity("diversity.element_coverage", "Elements", "of 118"),
    Quantity("diversity.space_group_coverage", "Space groups", "of 230, within 0.01 Å"),
    Quantity("hhi.production", "Concentration of production", "Herfindahl-Hirschman index, 0 to 10", ""),
    Quantity("hhi.reserve", "Concentration of reserves", "Herfindahl-Hirschman index, 0 to 10", ""),
    Quantity("hhi.combined", "Concentration", "a quarter production's, three quarters reserves'", ""),
    Quantity("prediction.match_rate", "Match rate", "predictions that are the true crystal", headline=True),
    Quantity("prediction.rmse", "RMSE of matches", "in units of (V/N)^⅓", ""),
]

#: Of which true crystals n-shot numbers are, by what stands in their names.
_TRUE = {"": "", "new_formulas.": ", new formulas", "lowest.": ", lowest of their formula"}
_KNOWN += [
    quantity
    for part, words in _TRUE.items()
    for n in SHOTS
    for quantity in (
        Quantity(f"prediction.{part}match_rate_at_{n}", f"Match rate at {n}{words}", "true crystals found so soon"),
        Quantity(f"prediction.{part}rmse_at_{n}", f"RMSE at {n}{words}", "of each true crystal's best match", ""),
    )
]

#: Of what was asked for, by the end of its name.
_ASKED = {
    "met_rate": "attempts that meet it, by the prompt alone",
    "forced_rate": "attempts that meet it: the grammar saw to it, so that it says nothing of the model",
    "base_rate": "crystals for which nothing was asked that would meet it",
}

#: Ends of names of numbers that are there a second time, with another denominator or of other crystals.
_SUFFIXES = {
    "_as_sampled": ("as sampled", "of the crystals before relaxation"),
    "_of_all": ("of all", "nothing is left out"),
    "_of_constructed": ("of crystals", "of the attempts that are crystals"),
    "_of_valid": ("of valid", "nothing but valid crystals is counted"),
    "_of_kept": ("of kept", "of the crystals that `sample --keep` kept"),
    "_if_valid": ("if valid", "a match only if both are valid"),
}


@dataclass(frozen=True)
class Measured:
    """A quantity as a run found it; `interval` is its 95 % interval, None where `metrics.json` states none."""

    quantity: Quantity
    value: float
    interval: tuple[float, float] | None


def measured(metrics: Mapping[str, Any]) -> Iterator[Measured]:
    """Every number of `metrics.json` but its counts: those known here in their order, then those that are not."""
    no_numbers = ("counts", "inputs", "versions", "confidence_95")
    flat = dict(_leaves({k: v for k, v in metrics.items() if k not in no_numbers}))
    order = {quantity.name: place for place, quantity in enumerate(_KNOWN)}

    def place(name: str) -> tuple[int, bool]:
        base = _quantity(name)[0]
        return order.get(base, len(order)), name != base

    for name in sorted(flat, key=place):
        quantity = _quantity(name)[1]
        interval = metrics["confidence_95"].get(name)
        yield Measured(quantity, flat[name], None if interval is None else (interval[0], interval[1]))


def _quantity(name: str) -> tuple[str, Quantity]:
    """The number that `name` repeats, perhaps with another denominator, and what is known of `name` itself."""
    known = {quantity.name: quantity for quantity in _KNOWN}
    for suffix, (short, meaning) in _SUFFIXES.items():
        base = known.get(name.removesuffix(suffix))
        if name.endswith(suffix) and base is not None:
            return base.name, replace(base, name=name, title=f"{base.title}, {short}", meaning=meaning, headline=False)
    if name.startswith("conditions."):
        _, group, what, how = name.split(".")
        title = f"{what.replace('_', ' ')}, where {group.replace('+', ', ').replace('_', ' ')} was asked"
        return name, Quantity(name, title, _ASKED[how])
    return name, known.get(name) or Quantity(name, name, unit="%" if name.endswith("rate") else "")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
