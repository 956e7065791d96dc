"""Fingerprints, between which there are distances: how alike are two structures, how alike two compositions?

Structure: of every atom, the likelihood of each number of neighbours from 1 to 24 and, times that likelihood, how much
these look like each motif; then the mean over the atoms. It is matminer's `CrystalNNFingerprint.from_preset("ops")`
(Zimmermann & Jain, RSC Adv. 10, 6063, 2020), with which CDVAE compares crystals. Composition: Magpie.
"""

from __future__ import annotations

import hashlib
import os
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.evaluation.likeness import magpie
from jaxcrystal.evaluation.likeness.crystalnn import Neighbourhood, NoNeighbours, neighbourhoods
from jaxcrystal.evaluation.likeness.order_parameters import ORDER_PARAMETERS, BodyCentred, Directions
from jaxcrystal.workers import Lost, Workers, each_chunk

if TYPE_CHECKING:
    from pymatgen.core import Structure

MOST_NEIGHBOURS = 24
#: The columns of a structure's fingerprint: a number of neighbours, and `wt` (its likelihood) or a motif.
COLUMNS: tuple[tuple[int, str], ...] = tuple(
    (n, name) for n in range(1, MOST_NEIGHBOURS + 1) for name in ("wt", *ORDER_PARAMETERS.get(n, ()))
)
#: Changes whenever the same crystal gets another fingerprint, and so parts stored fingerprints of before and after.
VERSION = 1
BLOCK = 1000  #: crystals whose fingerprints are stored together
ROUNDING = 1e-10  #: well above what rounding does to a weight, or to a vector in Å, and well below what matters
TRIALS = 8  #: of tiny shifts, by which it is found out whether rounding matters


@dataclass(frozen=True)
class Fingerprints:
    """Of many crystals; a crystal without a fingerprint has NaN in `structure`, and a reason."""

    structure: Float[np.ndarray, "n 61"]
    composition: Float[np.ndarray, "n 132"]  #: standardised
    reasons: tuple[str, ...]  #: empty for a crystal with a fingerprint

    def __len__(self) -> int:
        return len(self.reasons)

    def __getitem__(self, rows: np.ndarray | slice) -> Fingerprints:
        """Those of some rows: their indices, or a mask."""
        reasons = np.array(self.reasons, dtype=object)[rows]
        return Fingerprints(self.structure[rows], self.composition[rows], tuple(reasons))

    @property
    def known(self) -> Bool[np.ndarray, "n"]:
        """Which crystals have one."""
        return np.array([not reason for reason in self.reasons], dtype=bool)


def fingerprints(crystals: Sequence[Crystal | None], *, workers: Workers | None = None) -> Fingerprints:
    """The fingerprints of crystals, in their order; None has none."""
    there = [i for i, crystal in enumerate(crystals) if crystal is not None]
    found = each_chunk(structure_fingerprints, [crystals[i] for i in there], workers, label="fingerprints", lost=_lost)
    structure = np.full((len(crystals), len(COLUMNS)), np.nan)
    reasons = ["there is no crystal"] * len(crystals)
    for i, fingerprint in zip(there, found, strict=True):
        reasons[i] = fingerprint if isinstance(fingerprint, str) else ""
        if not reasons[i]:
            structure[i] = fingerprint
    return Fingerprints(structure, _compositions(crystals), tuple(reasons))


def stored_fingerprints(
    crystals: Sequence[Crystal | None], directory: Path, *, workers: Workers | None = None
) -> Fingerprints:
    """The same, read from `directory` if these very crystals were there before, else computed and stored there.

    There is a file for each `BLOCK` crystals, so that a run that is stopped goes on near where it stood. A file's name
    is a hash of its crystals and of what makes the fingerprints: `VERSION`, and the versions of the programs that find
    the neighbours. One that cannot be read, as after a full disk, is written anew. Where nothing can be written that is
    said, and costs no more than computing again the next time.
    """
    blocks = [crystals[start : start + BLOCK] for start in range(0, len(crystals), BLOCK)] or [crystals]
    parts = [_stored_block(block, directory, workers) for block in blocks]
    return Fingerprints(
        np.concatenate([part.structure for part in parts]),
        np.concatenate([part.composition for part in parts]),
        tuple(reason for part in parts for reason in part.reasons),
    )


def _stored_block(crystals: Sequence[Crystal | None], directory: Path, workers: Workers | None) -> Fingerprints:
    path = directory / f"{_key(crystals)}.npz"
    try:
        with np.load(path) as file:
            structure, reasons = file["structure"], tuple(map(str, file["reasons"]))
        return Fingerprints(structure, _compositions(crystals), reasons)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    made = fingerprints(crystals, workers=workers)
    if {why.reason for why in Lost} & set(made.reasons):
        return made  # another time it may go well
    try:
        directory.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
        with unfinished.open("wb") as file:
            np.savez_compressed(file, structure=made.structure, reasons=np.array(made.reasons, dtype=str))
        unfinished.replace(path)  # a reader never meets half a file
    except OSError as error:
        print(f"fingerprints could not be stored in {directory}: {error.strerror}")
    return made


def _lost(crystal: Crystal, why: Lost) -> str:
    return why.reason


def store() -> Path:
    """Where fingerprints of references are kept: `jaxcrystal/fingerprints` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxcrystal" / "fingerprints"


def _key(crystals: Sequence[Crystal | None]) -> str:
    import pymatgen.core

    programs = [f"pymatgen {pymatgen.core.__version__}", *(f"{name} {version(name)}" for name in ("scipy", "numpy"))]
    digest = hashlib.sha256(f"fingerprints {VERSION}, {', '.join(programs)}".encode())
    for crystal in crystals:
        if crystal is None:
            digest.update(b"none")
            continue
        digest.update(len(crystal).to_bytes(4, "little"))
        for values in (crystal.lengths, crystal.angles, crystal.species, crystal.frac_coords):
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:32]


def _compositions(crystals: Sequence[Crystal | None]) -> Float[np.ndarray, "n 132"]:
    unknown = np.full(len(magpie.names()), np.nan)
    rows = [unknown if crystal is None else magpie.features(crystal.species) for crystal in crystals]
    standard = magpie.standardised(np.reshape(rows, (len(crystals), len(unknown))))
    standard[[crystal is None for crystal in crystals]] = np.nan
    return standard


def structure_fingerprints(crystals: Sequence[Crystal]) -> list[Float[np.ndarray, "61"] | str]:
    """The structure's fingerprint of each crystal, or why it has none."""
    structures = [crystal.to_structure() for crystal in crystals]
    found = [_neighbourhoods(structure) for structure in structures]
    sites = [(i, atom) for i, atoms in enumerate(found) if not isinstance(atoms, str) for atom in range(len(atoms))]
    atoms = [found[i][atom] for i, atom in sites]
    values = np.zeros((len(atoms), len(COLUMNS)))
    unsaid: dict[int, str] = {}  # of a crystal whose rounding decides, why pymatgen does not say how it rounds
    for n in range(1, MOST_NEIGHBOURS + 1):
        rows = [row for row, atom in enumerate(atoms) if n in atom.likelihood]
        if not rows:
            continue
        likelihood = np.array([atoms[row].likelihood[n] for row in rows])
        vectors = np.array([atoms[row].vectors[:n] for row in rows])
        directions = Directions.of(vectors)
        looks = {name: motif(directions) for name, motif in ORDER_PARAMETERS.get(n, {}).items()}
        if n == 8:
            weights = np.array([atoms[row].weights[:n] for row in rows])
            for k in np.flatnonzero(rounding_matters(vectors, weights)):
                i, atom = sites[rows[k]]
                try:
                    directions = as_pymatgen_rounds(structures[i], atom)
                except NoNeighbours as reason:
                    unsaid[i] = str(reason)
                else:
                    looks["body-centered cubic"][k] = BodyCentred()(directions)[0]
        first = COLUMNS.index((n, "wt"))
        for column, look in enumerate([1.0, *looks.values()], start=first):
            values[rows, column] = likelihood * look
    ends = np.cumsum([0 if isinstance(atoms, str) else len(atoms) for atoms in found])
    return [
        atoms if isinstance(atoms, str) else unsaid.get(i, values[end - len(atoms) : end].mean(0))
        for i, (atoms, end) in enumerate(zip(found, ends, strict=True))
    ]


def _neighbourhoods(structure: Structure) -> list[Neighbourhood] | str:
    try:
        return neighbourhoods(structure)
    except NoNeighbours as reason:
        return str(reason)


# The body-centred order parameter takes pairs of neighbours in the order of their weights, and jumps where an angle
# passes 90°. Where symmetry makes weights equal and angles right, rounding errors decide what it is, and matminer's
# figures are those of pymatgen's rounding. So pymatgen is asked, but only for atoms of which it matters.


def rounding_matters(
    vectors: Float[np.ndarray, "atoms 8 3"], weights: Float[np.ndarray, "atoms 8"]
) -> Bool[np.ndarray, "atoms"]:
    """Whether the order parameter changes with a tiny shift of the neighbours, and if those of equal weight swap."""
    motif, generator = BodyCentred(), np.random.default_rng(0)
    value = motif(Directions.of(vectors))
    shell = (np.diff(weights, prepend=weights[:, :1]) < -ROUNDING).cumsum(axis=1)
    changed = np.zeros(len(vectors), dtype=bool)
    for _ in range(TRIALS):
        order = np.lexsort((generator.random(shell.shape), shell))
        moved = np.take_along_axis(vectors, order[..., None], axis=1) + generator.normal(0, ROUNDING, vectors.shape)
        changed |= np.abs(motif(Directions.of(moved)) - value) > 1e3 * ROUNDING
    return changed


def as_pymatgen_rounds(structure: Structure, atom: int) -> Directions:
    """The directions from an atom to its eight likeliest neighbours, in pymatgen's order and bit for bit its own.

    Raises NoNeighbours if pymatgen does not find them.
    """
    from pymatgen.analysis.local_env import CrystalNN

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of missing oxidation states
        try:
            likeliest = CrystalNN().get_nn_data(structure, atom).cn_nninfo[8]
        except (ValueError, RuntimeError, KeyError) as error:
            raise NoNeighbours(f"pymatgen finds no eight neighbours of atom {atom}: {error}") from None
    vectors = [neighbour["site"].coords - structure[atom].coords for neighbour in likeliest]
    unit = [vector / np.linalg.norm(vector) for vector in vectors]
    # A matrix product would round otherwise than products of two vectors.
    cosine = np.array([[np.inner(a, b) for b in unit] for a in unit])
    return Directions(np.array([unit]), np.clip(cosine, -1, 1)[None])
