"""What an improvement depends on: the keys of the YAML file that `jaxcrystal improve` takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from jaxcrystal.config import Bounds, Count, SettingError, Settings
from jaxcrystal.evaluation.metrics import METASTABLE
from jaxcrystal.evaluation.stability import FAR_BELOW

Energy = Annotated[float, Bounds(-10, 10)]  #: eV/atom


@dataclass(frozen=True)
class Sampling(Settings):
    """How the crystals of a round are drawn; the rest is as `sampling.sampler.SamplerSettings` has it."""

    num: Count = 4000  #: attempts of a round, from which the next training set takes
    temperature: Annotated[float, Bounds(0.01, 10)] = 1.0
    warmer: Annotated[float, Bounds(0, 1)] = 0.0  #: by so much more in each round than in the one before
    composition_temperature: Annotated[float, Bounds(0.01, 10)] | None = None
    top_p: Annotated[float, Bounds(0.01, 1)] = 1.0
    new: bool = False  #: a formula of the training set is drawn again (`sample --new`)


@dataclass(frozen=True)
class Selection(Settings):
    """Which crystals of a round are trusted (`selection.select`)."""

    potential: str = "chgnet"  #: that relaxes them: `chgnet` or a matgl directory
    hull: str = "mp"  #: that they are placed against, as `evaluate --hull` has it
    low: Energy = -METASTABLE  #: eV/atom above the hull; what lies further below is not believed
    high: Energy = METASTABLE  #: eV/atom above the hull
    phases_of_system: Annotated[int, Bounds(0, 1000)] = 1  #: known compounds of its elements, fewer than which abstain
    per_composition: Count = 3  #: crystals of one reduced formula, over all rounds
    by_energy: bool = True  #: false: every sound, new crystal is kept, to see what the energies are worth

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low < -FAR_BELOW:
            raise SettingError("low", f"is {self.low}; what lies further than {FAR_BELOW} below the hull is not placed")
        if self.low > self.high:
            raise SettingError("low", f"is {self.low}, above high, {self.high}")


@dataclass(frozen=True)
class Judging(Settings):
    """By what each round's model is judged: attempts that nothing selected, another potential."""

    num: Count = 1000
    potential: str | None = None  #: null: nobody judges, and the rounds' models are not compared by energies
    hull: str = "mp"
    judge_selects: bool = False  #: that the potential that selects may judge, said because it flatters


@dataclass(frozen=True)
class Improvement(Settings):
    """Everything that an improvement depends on: `jaxcrystal improve RECIPE`."""

    model: str = "mini"  #: a directory that `train` wrote, or mini
    out: str = "runs/improved"  #: the folder of all rounds
    train: str = "mp20"  #: the crystals that the model was trained on: a set that `prepare` wrote, or one of the box
    validation: str = "mp20-val"
    rounds: Count = 3
    seed: Annotated[int, Bounds(0, 2**31 - 1)] = 0
    sampling: Sampling = field(default_factory=Sampling)
    selection: Selection = field(default_factory=Selection)
    judging: Judging = field(default_factory=Judging)
    #: how verdicts teach: kept crystals become training data; or, beside one that lay too high, are preferred
    teaching: Literal["crystals", "preferences"] = "crystals"
    #: of the model's own recipe, what a round's training does otherwise, as `train --set` takes it
    training: tuple[str, ...] = ("epochs=2", "optimizer.warmup_steps=20")
