"""Which of spglib's 530 settings of the 230 space groups a file means, by what it states and by its cell.

A setting is a group with its choice of axes and origin: `F d -3 m :1` and `F d -3 m :2` are one group and two
settings, and an atom at 0 0 0 is 8 atoms in the one, 16 in the other. A file names it by a Hall symbol, by a
Hermann-Mauguin name in one of many spellings, by the group's number alone, or by several of these. Each narrows down
the candidates, and so does the cell, whose lengths and angles the operations must leave alone. What remains are the
settings that the file may mean; with several, only the caller can tell whether they give different crystals.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache

import numpy as np
import spglib
from jaxtyping import Float, Int

from jaxcrystal.reader.rows import Outcome, Refused

#: A cell fits a group whose operations change its lengths by less than this share, and its angles by less than this.
LENGTH_TOLERANCE, ANGLE_TOLERANCE = 0.01, 0.5  # and degrees

#: How origins and axes are written behind a name, beside spglib's own `:1`, `:H`, `:b1`, `:cab`.
_SUFFIXES = {
    "1": (":1", "s", ":s", ":o1", "o1"),
    "2": (":2", "z", ":z", ":o2", "o2"),
    "H": (":h", "h", "hr", ":hr", "-h", "-hr"),
    "R": (":r", "r", "-r"),
}


@dataclass(frozen=True)
class Operations:
    """x goes to rotation @ x + translation, in fractional coordinates."""

    rotations: Int[np.ndarray, "n 3 3"]
    translations: Float[np.ndarray, "n 3"]

    def __len__(self) -> int:
        return len(self.rotations)

    @property
    def key(self) -> frozenset[bytes]:
        """Equal for the same operations in another order; translations are compared modulo 1, to 1/24."""
        shifts = np.round(24 * self.translations).astype(np.int64) % 24
        table = np.concatenate([self.rotations.reshape(-1, 9), shifts], axis=1).astype(np.int8)
        return frozenset(row.tobytes() for row in table)

    def are_a_group(self) -> bool:
        """Whether the identity and every product are among them."""
        shifts = np.round(24 * self.translations).astype(np.int64)
        rotations = np.einsum("aij,bjk->abik", self.rotations, self.rotations).reshape(-1, 9)
        moved = (np.einsum("aij,bj->abi", self.rotations, shifts) + shifts[:, None]).reshape(-1, 3) % 24
        products = np.unique(np.concatenate([rotations, moved], axis=1).astype(np.int8), axis=0)
        return len(products) == len(self.key) and {row.tobytes() for row in products} == self.key

    def fit(self, metric: Float[np.ndarray, "3 3"]) -> bool:
        """Whether they leave a cell as it is, whose vectors have these scalar products (Å²)."""
        moved = np.einsum("nji,jk,nkl->nil", self.rotations, metric, self.rotations)
        lengths, expected = np.sqrt(np.einsum("nii->ni", moved)), np.sqrt(np.diag(metric))
        if (np.abs(lengths / expected - 1) > LENGTH_TOLERANCE).any():
            return False
        angles, at_rest = _angles(moved, lengths), _angles(metric, expected)
        return bool((np.abs(angles - at_rest) <= ANGLE_TOLERANCE).all())

    def number(self) -> int | None:
        """Of their space group; None if spglib finds none."""
        lattice = _invariant_lattice(self.rotations)
        found = spglib.get_spacegroup_type_from_symmetry(self.rotations, self.translations, lattice=lattice)
        return None if found is None else int(found.number)


def _angles(metric: Float[np.ndarray, "*n 3 3"], lengths: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3 3"]:
    """Degrees between the vectors of a cell."""
    return np.degrees(np.arccos(np.clip(metric / (lengths[..., :, None] * lengths[..., None, :]), -1, 1)))


@dataclass(frozen=True)
class Setting:
    """One of the 530."""

    hall_number: int  #: spglib's, 1 to 530
    number: int  #: of the space group, 1 to 230
    name: str  #: full Hermann-Mauguin name and spglib's choice, for example F 4_1/d -3 2/m :1
    choice: str

    @property
    def operations(self) -> Operations:
        return _operations(self.hall_number)


@dataclass(frozen=True)
class Stated:
    """What a file states of its space group, each statement as it is written."""

    hall: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  #: Hermann-Mauguin
    numbers: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()  #: Hermann-Mauguin names that say the group, but not its setting
    codes: tuple[str, ...] = ()  #: CIF's `_space_group_IT_coordinate_system_code`, such as b1, cab, 2 or h

    def __bool__(self) -> bool:
        return bool(self.hall or self.names or self.numbers or self.groups)

    def settings(self, metric: Float[np.ndarray, "3 3"]) -> tuple[dict[str, set[Setting]], list[Refused]]:
        """Of each statement, in words, the settings that it may mean; and why the others are not understood."""

        def group(name: str) -> set[Setting]:
            numbers = {setting.number for setting in _by_name(name, metric)}
            return {setting for setting in settings() if setting.number in numbers}

        readers = [(f"the Hall symbol {text}", _by_hall, text) for text in self.hall]
        readers += [(f"the name {text}", lambda name: _by_name(name, metric), text) for text in self.names]
        readers += [(f"the number {text}", _by_number, text) for text in self.numbers]
        readers += [(f"the group {text}", group, text) for text in self.groups]
        found, unknown = {}, []
        for words, reader, text in readers:
            try:
                found[words] = reader(text)
            except Refused as why:
                unknown.append(why)
        for code in self.codes if self else ():
            found[f"the setting {code}"] = {s for s in settings() if s.choice.lower() == code.strip().lower()}
        return found, unknown


def candidates(stated: Stated, metric: Float[np.ndarray, "3 3"]) -> list[Setting]:
    """The settings that all statements and the cell leave; at least one. `metric`: the cell's scalar products (Å²).

    Raises Refused (symmetry_error) if a statement is not known, but for a name beside a Hall symbol, which says more;
    or if no setting agrees with all of them and the cell.
    """
    named, unknown = stated.settings(metric)
    if unknown and not any(words.startswith("the Hall") for words in named):
        raise unknown[0]
    found = set.intersection(*named.values())
    if not found:
        raise Refused(Outcome.SYMMETRY_ERROR, f"{' and '.join(named)} contradict each other; list the operations")
    fitting = sorted((s for s in found if s.operations.fit(metric)), key=lambda s: s.hall_number)
    if not fitting:
        raise Refused(Outcome.SYMMETRY_ERROR, f"the cell contradicts {' and '.join(named)}; list the operations")
    return fitting


def ambiguous(remaining: list[Setting]) -> Refused:
    """What is said where settings remain that give different crystals."""
    names = ", ".join(setting.name for setting in remaining[:4]) + (", …" if len(remaining) > 4 else "")
    return Refused(
        Outcome.SYMMETRY_ERROR,
        f"{len(remaining)} settings of the space group remain ({names}), which are different crystals; "
        "name one, or list the operations",
    )


@cache
def settings() -> tuple[Setting, ...]:
    """All 530."""
    found = []
    for hall_number in range(1, 531):
        group = spglib.get_spacegroup_type(hall_number)
        name = f"{group.international_full} :{group.choice}" if group.choice else group.international_full
        found.append(Setting(hall_number, group.number, name, group.choice))
    return tuple(found)


def tabulated(operations: Operations) -> Setting | None:
    """The setting that has these operations, in whatever order; None if it is none of the 530."""
    return _by_key().get(operations.key)


@cache
def _by_key() -> dict[frozenset[bytes], Setting]:
    return {setting.operations.key: setting for setting in reversed(settings())}


@cache
def _operations(hall_number: int) -> Operations:
    found = spglib.get_symmetry_from_database(hall_number)
    return Operations(found["rotations"], found["translations"])


def _by_number(text: str) -> set[Setting]:
    match = re.fullmatch(r"\s*(\d+)(?:\.0*)?\s*", text)
    found = {setting for setting in settings() if match and setting.number == int(match[1])}
    if not found:
        raise Refused(Outcome.SYMMETRY_ERROR, f"the space group number is {text!r}; they run from 1 to 230")
    return found


def _by_hall(symbol: str) -> set[Setting]:
    import gemmi

    text = symbol.replace("''", '"').replace("_", " ").strip().lower()
    text = re.sub(r"[a-z]", lambda letter: letter[0].upper(), text, count=1)  # the lattice; all else is small
    try:
        key = of_gemmi(list(gemmi.symops_from_hall(text))).key
    except (RuntimeError, ValueError):
        raise Refused(Outcome.SYMMETRY_ERROR, f"{symbol!r} is no Hall symbol; list the operations") from None
    found = {setting for setting in settings() if setting.operations.key == key}
    if not found:
        raise Refused(
            Outcome.SYMMETRY_ERROR, f"the Hall symbol {symbol} is none of the 530 usual settings; list the operations"
        )
    return found


def of_gemmi(operations: list) -> Operations:
    """gemmi's triplets as arrays. Raises Refused if one is no rotation of a lattice."""
    rotations = np.array([op.rot for op in operations], float) / 24
    if (rotations != np.round(rotations)).any() or (np.abs(np.linalg.det(rotations)).round(6) != 1).any():
        raise Refused(Outcome.SYMMETRY_ERROR, "a listed operation maps the lattice onto another")
    return Operations(rotations.astype(np.int64), np.array([op.tran for op in operations], float) / 24)


def _by_name(name: str, metric: Float[np.ndarray, "3 3"]) -> set[Setting]:
    """The settings of a name. The standard short name of a monoclinic group, which the longer names of several
    settings shorten to, means the standard one of those that the cell allows: unique axis b first."""
    exact, short = _names()
    spelled = _spelling(name)
    if spelled in exact:
        return exact[spelled]
    if spelled in short:
        allowed = [s for s in sorted(short[spelled], key=lambda s: s.hall_number) if s.operations.fit(metric)]
        return set(allowed[:1]) or short[spelled]
    raise Refused(
        Outcome.SYMMETRY_ERROR,
        f"{name!r} is no Hermann-Mauguin name of the 530 usual settings; list the operations",
    )


@cache
def _names() -> tuple[dict[str, set[Setting]], dict[str, set[Setting]]]:
    """Settings by every spelling of their names; and by the short names of monoclinic groups (P 1 21/n 1 as P21/n)."""
    older = _older_names()
    exact, short = defaultdict(set), defaultdict(set)
    for setting in settings():
        group = spglib.get_spacegroup_type(setting.hall_number)
        monoclinic = 3 <= setting.number <= 15
        # Before a monoclinic `=` stands the group's own short symbol, which all of its settings share.
        names = {group.international_full, group.international.split(" = ")[-1], *older.get(setting.hall_number, ())}
        names |= {n.replace("-3", "3") for n in names if 200 <= setting.number <= 206 or 221 <= setting.number}
        for name in map(_spelling, names):
            exact[name].add(setting)
            for suffix in _suffixes(setting.choice):
                exact[name + suffix].add(setting)
        if monoclinic:
            parts = group.international_full.split()
            brief = _spelling("".join([parts[0], *(part for part in parts[1:] if part != "1")]))
            short[brief].add(setting)
            for suffix in _suffixes(setting.choice):
                exact[brief + suffix].add(setting)
                exact[_spelling(group.international_short) + suffix].add(setting)
    return dict(exact), dict(short)


def _suffixes(choice: str) -> set[str]:
    """How spglib's choice, such as 2cab, is written behind a name."""
    if not choice:
        return set()
    found = {f":{choice.lower()}", *_SUFFIXES.get(choice, ())}
    if choice[0] in "12" and len(choice) > 1:  # the name says the axes already, the origin is what is left to say
        found |= {*_SUFFIXES[choice[0]]}
    return found


def _older_names() -> dict[int, set[str]]:
    """By hall number: names from before 1992, in which C m c e is C m c a, and others that gemmi's table knows."""
    import gemmi

    found = defaultdict(set)
    for group in gemmi.spacegroup_table():
        setting = tabulated(of_gemmi(list(group.operations())))
        if setting is not None:
            found[setting.hall_number] |= {group.hm, *([f"H{group.hm[1:]}"] if group.ext == "H" else ())}
    return found


def _spelling(name: str) -> str:
    """A name without what spellings differ in: blanks, capitals, underscores, brackets, bars written behind."""
    text = name.strip().strip("'\"").lower().replace("$", "").replace("\\overline", "-").replace("−", "-")
    text = re.sub(r"[\[(,;]?\s*origin\s*(?:choice|at)?\s*([12])\s*[\])]?", r":\1", text)
    text = re.sub(r"\(?\s*(hexagonal|rhombohedral|[hr](?=\s*\)))(?:\s+axes)?\s*\)?$", lambda m: f":{m[1][0]}", text)
    text = re.sub(r"\(?\s*(?:no\.?\s*\d+|unique axis [abc])\s*\)?$", "", text)
    text = re.sub(r"\\bar\s*\{?(\d)\}?|(\d)\s*(?:\u0304|\u0305|bar)", lambda m: f"-{m[1] or m[2]}", text)
    text = re.sub(r"(?<=[a-z])3-(?=[a-z])", "-3", text)
    text = re.sub(r"<sub>(\d)</sub>|\((\d)\)|sub(\d)|\{(\d)\}|~(\d)~", lambda m: next(filter(None, m.groups())), text)
    return re.sub(r"[\s_{}]+", "", text)


def _invariant_lattice(rotations: Int[np.ndarray, "n 3 3"]) -> Float[np.ndarray, "3 3"]:
    """A cell, as rows, that the rotations leave alone: of the mean of a general metric over all of them."""
    metric = np.array([[1.0, 0.13, 0.07], [0.13, 1.7, 0.19], [0.07, 0.19, 2.9]])
    mean = np.einsum("nji,jk,nkl->il", rotations, metric, rotations) / len(rotations)
    return np.linalg.cholesky(mean)
