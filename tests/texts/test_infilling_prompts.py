"""Prompts of the infilling task: as training writes them, for every element, whatever it is that is hidden."""

import byte_pair_tokenizers
import numpy as np
import pandas as pd
import pytest
from some_crystals import p1_crystal
from symmetric_crystals import random_symmetric

from jaxcrystal.config import TextFormat
from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, ELEMENTS, Crystal
from jaxcrystal.crystals.masking import hide
from jaxcrystal.crystals.symmetric_batch import SymmetricBatch
from jaxcrystal.crystals.symmetry import symmetrize
from jaxcrystal.crystals.wyckoff import GROUPS
from jaxcrystal.errors import UserError
from jaxcrystal.texts import prompts
from jaxcrystal.texts.forms import form_of
from jaxcrystal.texts.symmetry.text import write
from jaxcrystal.texts.tokenizer import load_tokenizer

P1, SYMMETRY = form_of(TextFormat()), form_of(TextFormat(form="symmetry"))
KINDS = ["compact", "compact-symmetry", "llama2", "smollm2", "llama3", "qwen", "tekken"]


def perovskite(*symbols: str) -> Crystal:
    """ABX3 of three elements, its atoms as A, B, X, X, X."""
    species = [ATOMIC_NUMBER[symbol] for symbol in (*symbols, symbols[2], symbols[2])]
    coords = [[0, 0, 0], [0.5] * 3, [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    return Crystal([4.0] * 3, [90] * 3, species, coords)


def kin_of(symbol: str) -> list[str]:
    """Other elements, those first whose symbols begin alike: of C these are Ca, Cd, Ce, Cf, Cl …"""
    return sorted(set(ELEMENTS[1:]) - {symbol}, key=lambda other: (other[0] != symbol[0], other))


def prompt_of(form, crystal: Crystal, atoms: np.ndarray) -> str:
    masked = hide(crystal, atoms)
    return prompts.infilling_prompt(form, masked.crystal, masked.stand_in)


@pytest.mark.parametrize("symbol", ELEMENTS[1:])
def test_a_mask_hides_one_element_and_no_other(symbol):
    """Every site of every other line stays, above all those of elements whose symbols begin alike."""
    others = kin_of(symbol)[:19]
    species = np.array([ATOMIC_NUMBER[one] for one in [*others, symbol] * 2])
    coords = np.random.default_rng(0).random((len(species), 3))
    text = prompt_of(P1, Crystal([20] * 3, [90] * 3, species, coords), species == ATOMIC_NUMBER[symbol])
    body = text.removeprefix(prompts.INFILL_INTRODUCTION).removesuffix(prompts.INFILL_REQUEST).split("\n")
    assert body[2::2] == [*others, "[MASK]"] * 2

    one, other = kin_of(symbol)[:2]
    for place in range(3):
        symbols = [one, other]
        symbols.insert(place, symbol)
        crystal = perovskite(*symbols)
        text = prompt_of(SYMMETRY, crystal, crystal.species == ATOMIC_NUMBER[symbol])
        body = text.removeprefix(prompts.INFILL_INTRODUCTION).removesuffix(prompts.INFILL_REQUEST)
        composition, group, *orbits, _ = [line.split(" ") for line in body.split("\n")]
        assert (
            composition[:2] == ["[MASK]", "113"[place]] and set(composition[2::2]) == {one, other} and group == ["221"]
        )
        assert [line[0] for line in orbits].count("[MASK]") == 1 and orbits[0][0] == "[MASK]"
        assert {line[0] for line in orbits[1:]} == {one, other} and len(orbits) == 3


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    if request.param.startswith("compact"):
        return load_tokenizer(request.param)
    if request.param == "llama2":
        return load_tokenizer(request.getfixturevalue("shared") / "tokenizer/llama2/tokenizer.model")
    return byte_pair_tokenizers.load(request.param, tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("form", [P1, SYMMETRY], ids=["p1", "symmetry"])
def test_behind_a_prompt_every_element_has_the_tokens_that_training_has(tokenizer, form):
    """Whole training texts, tokenized in one go, begin with the prompt's tokens and end with the symbol's."""
    tables = form.tables(tokenizer)
    prompt = prompt_of(form, perovskite("Sr", "Ti", "O"), np.array([False, True, False, False, False]))
    begun = tokenizer.encode(prompt)
    for symbol in ELEMENTS[1:]:
        assert tokenizer.encode(prompt + symbol) == [*begun, *tables.symbol_tokens(symbol)]


def assert_prompts_are_those_of_training(crystal: Crystal) -> None:
    """Of every element that could be asked for."""
    found = symmetrize(crystal)
    batch = SymmetricBatch.of([found.descriptions], [found.masked])
    for element, z in enumerate(batch.elements[0].tolist()):
        trained = write(batch.crystal(0, int(batch.num_descriptions[0]) + element), SYMMETRY.text, z)
        text = prompt_of(SYMMETRY, crystal, crystal.species == z)
        assert text.removeprefix(prompts.INFILL_INTRODUCTION).removesuffix(prompts.INFILL_REQUEST) == trained


@pytest.mark.parametrize("number", GROUPS[::6])
def test_a_symmetry_prompt_is_what_training_writes(number):
    for seed in (3, 4):
        assert_prompts_are_those_of_training(random_symmetric(number, seed).to_crystal())


def test_a_real_crystals_prompt_is_what_training_writes(shared):
    for cif in pd.read_parquet(shared / "data/mp20/val.parquet", columns=["cif"])["cif"][::20]:
        assert_prompts_are_those_of_training(p1_crystal(cif))


@pytest.mark.parametrize("form", [P1, SYMMETRY], ids=["p1", "symmetry"])
def test_a_prompt_does_not_tell_what_it_hides(form):
    """The order of elements decides which description is canonical: with it a text might depend on the hidden one."""
    differ = 0
    for made in [random_symmetric(number, 5) for number in GROUPS[::9]]:
        crystal = made.to_crystal()
        atoms = crystal.species == crystal.species[0]
        texts, plain = set(), set()
        for other in ("Cs", "Ni", "F"):
            species = np.where(atoms, ATOMIC_NUMBER[other], crystal.species)
            changed = Crystal(crystal.lengths, crystal.angles, species, crystal.frac_coords)
            texts.add(prompt_of(form, changed, atoms))
            plain.add(form.write(changed, ATOMIC_NUMBER[other]))
        assert len(texts) == 1
        differ += len(plain) > 1
    assert differ > 5 or form is P1  # where the canonical text was only masked, it would have told


def test_a_site_is_masked_alone_or_with_its_orbit():
    crystal = perovskite("O", "Ti", "O")
    assert P1.masked_with(crystal, 0).tolist() == [True, False, False, False, False]
    assert SYMMETRY.masked_with(crystal, 0).tolist() == [True, False, False, False, False]
    assert P1.masked_with(crystal, 3).tolist() == [False, False, False, True, False]
    assert SYMMETRY.masked_with(crystal, 3).tolist() == [False, False, True, True, True]
    text = prompt_of(SYMMETRY, crystal, SYMMETRY.masked_with(crystal, 3))
    assert "[MASK] 3 Ti 1 O 1\n221\n[MASK] " in text and text.count("\nO ") == 1
    with pytest.raises(UserError, match="has no space group at any tolerance"):
        SYMMETRY.masked_with(Crystal([3.0] * 3, [90] * 3, [11, 11], [[0, 0, 0], [0, 0, 0]]), 0)
