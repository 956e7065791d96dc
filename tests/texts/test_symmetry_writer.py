"""Proof that the device writes the tokens of symmetry texts, for every crystal, description, draw and tokenizer.

JAXCRYSTAL_PREPARED=data/mp20/train.parquet pytest tests/texts/test_symmetry_writer.py -k every_description
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import byte_pair_tokenizers
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from byte_pair_tokenizers import REAL
from scipy.stats import chi2
from some_crystals import p1_crystal
from symmetric_crystals import random_symmetric

from jaxcrystal.config import ATTRIBUTES, Augment, TextFormat
from jaxcrystal.crystals import dataset
from jaxcrystal.crystals.crystal import ELEMENTS, Crystal
from jaxcrystal.crystals.descriptions import descriptions, masked
from jaxcrystal.crystals.symmetric import Orbit, SymmetricCrystal
from jaxcrystal.crystals.symmetric_batch import SymmetricBatch
from jaxcrystal.crystals.symmetry import Symmetrized, symmetrize
from jaxcrystal.crystals.wyckoff import GROUPS, free_axes
from jaxcrystal.errors import UserError
from jaxcrystal.texts import prompts
from jaxcrystal.texts.pieces import EMPTY
from jaxcrystal.texts.symmetry.body import Description, Drawn
from jaxcrystal.texts.symmetry.text import REQUEST, parse, write
from jaxcrystal.texts.tokenizer import Tokenizer, load_tokenizer
from jaxcrystal.texts.writer import Draws, Examples, Writer, sentence_tokens
from jaxcrystal.training.packing import Feed, check_infilling

#: A file of `jaxcrystal prepare`: then its crystals are written, all of them, and not one in sixty of MP-20 val.
PREPARED = os.environ.get("JAXCRYSTAL_PREPARED")
CHUNK = 1024
KINDS = ["compact", "compact-symmetry", "llama2", "smollm2", "llama3", "qwen", "tekken", *REAL]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory) -> Tokenizer:
    if request.param.startswith("compact"):
        return load_tokenizer(request.param)
    if request.param == "llama2":
        return load_tokenizer(request.getfixturevalue("shared") / "tokenizer/llama2/tokenizer.model")
    return byte_pair_tokenizers.load(request.param, tmp_path_factory.mktemp("tokenizer"))


def batch_of(crystals: list[SymmetricCrystal]) -> SymmetricBatch:
    """With all descriptions, and those that hide an element."""
    return SymmetricBatch.of([descriptions(one) for one in crystals], [masked(one) for one in crystals])


def of_found(found: Sequence[Symmetrized]) -> SymmetricBatch:
    """The same of what `symmetrize` found."""
    return SymmetricBatch.of([one.descriptions for one in found], [one.masked for one in found])


@cache
def of_all_groups() -> SymmetricBatch:
    return batch_of([random_symmetric(number, 1) for number in GROUPS])


@cache
def real_crystals(shared) -> list[Crystal]:
    """One in sixty of MP-20 val."""
    rows = pd.read_parquet(shared / "data/mp20/val.parquet", columns=["cif"])["cif"][::60]
    return [p1_crystal(cif) for cif in rows]


@cache
def of_real_crystals(shared) -> SymmetricBatch:
    if PREPARED:
        return dataset.load(PREPARED).symmetric()
    return of_found([symmetrize(crystal) for crystal in real_crystals(shared)])


def labels(batch: SymmetricBatch) -> list[dict]:
    random = np.random.default_rng(0)
    found = [{"spacegroup.number": int(number), "band_gap": 1.25} for number in batch.space_group]
    return [{name: value for name, value in label.items() if random.random() > 0.3} for label in found]


def drawn_text(batch: SymmetricBatch, i: int, label: dict, draws: Draws, fmt: TextFormat) -> str:
    """The same text on the host."""
    crystal = batch.crystal(i, int(draws.body.infilled if draws.infill else draws.body.generated.number))
    shift = np.zeros(3)
    axes = [] if draws.infill else list(free_axes(crystal.space_group))
    shift[axes] = draws.body.generated.shift[axes].astype(np.float64) / 2**32
    orbits = tuple(Orbit(o.species, o.letter, tuple((np.array(o.frac_coords) + shift) % 1)) for o in crystal.orbits)
    moved = SymmetricCrystal(crystal.space_group, crystal.lengths, crystal.angles, orbits)
    if draws.infill:
        hidden = int(draws.body.masked)
        lines = write(moved, fmt, hidden)
        assert ELEMENTS[hidden] not in lines.replace("\n", " ").split(" ")  # the mask hides it everywhere
        return prompts.INFILL_INTRODUCTION + lines + prompts.INFILL_REQUEST + ELEMENTS[hidden]
    stated = "".join(prompts.sentence(ATTRIBUTES[n], label[ATTRIBUTES[n]]) for n in draws.stated if n != EMPTY)
    return prompts.INTRODUCTION + stated + REQUEST + write(moved, fmt)


def assert_written_as_encoded(tokenizer: Tokenizer, batch: SymmetricBatch, fmt: TextFormat, augment: Augment) -> None:
    writer = Writer.of(tokenizer, fmt, augment)
    known = labels(batch)
    examples = Examples(batch, sentence_tokens(tokenizer, known), np.arange(len(batch), dtype=np.int32))
    shortest, longest = writer.bounds(examples)

    @jax.jit
    def written(examples: Examples) -> tuple:
        draws = writer.draw(jax.random.key(7), examples)
        return draws, writer.lengths(examples, draws), writer.write(examples, draws, int(longest.max()))

    draws, lengths, rows = jax.device_get(written(jax.tree.map(lambda x: x[:, None], examples)))
    assert (shortest <= lengths[:, 0]).all() and (lengths[:, 0] <= longest).all()
    for i in range(len(batch)):
        text = drawn_text(batch, i, known[i], draws[i, 0], fmt)
        expected = [*tokenizer.begin, *tokenizer.encode(text), tokenizer.eos_id]
        assert rows.tokens[i, : lengths[i, 0]].tolist() == expected, text


@pytest.mark.parametrize("decimals", [2, 3, 4])
def test_all_groups(tokenizer, decimals):
    fmt = TextFormat(
        form="symmetry", coord_decimals=decimals, length_decimals=decimals - 1, angle_decimals=decimals - 2
    )
    augment = Augment(translate=False, descriptions=decimals != 3, infill=0.5)
    assert_written_as_encoded(tokenizer, of_all_groups(), fmt, augment)


@pytest.mark.parametrize("infill", [0.0, 1.0])
def test_real_crystals(tokenizer, shared, infill):
    augment = Augment(translate=False, descriptions=True, infill=infill)
    assert_written_as_encoded(
        tokenizer, of_real_crystals(shared), TextFormat(form="symmetry", length_decimals=2), augment
    )


@cache
def every_description(shared) -> tuple[SymmetricBatch, np.ndarray, list[SymmetricCrystal]]:
    """Of real crystals; a row and a crystal for each description: of which, its number, the element that it hides."""
    batch = of_real_crystals(shared)
    rows = []
    for i, count in enumerate(batch.num_descriptions):
        rows += [(i, number, 0) for number in range(count)]
        rows += [(i, count + place, z) for place, z in enumerate(batch.elements[i]) if z]
    return batch, np.array(rows, np.int32), [batch.crystal(i, number) for i, number, _ in rows]


@cache
def their_texts(shared, fmt: TextFormat) -> list[str]:
    """On the host."""
    _, rows, crystals = every_description(shared)
    infilling = prompts.INFILL_INTRODUCTION, prompts.INFILL_REQUEST
    return [
        f"{infilling[0]}{write(crystal, fmt, z)}{infilling[1]}{ELEMENTS[z]}"
        if z
        else prompts.INTRODUCTION + REQUEST + write(crystal, fmt)
        for crystal, z in zip(crystals, rows[:, 2].tolist(), strict=True)
    ]


@pytest.mark.parametrize("decimals", [2, 3, 4])
def test_every_description_of_real_crystals(tokenizer, shared, decimals):
    """All that are stored, and each element hidden, from the origin of the data."""
    fmt = TextFormat(form="symmetry", coord_decimals=decimals, length_decimals=decimals, angle_decimals=decimals - 2)
    writer = Writer.of(tokenizer, fmt, Augment(translate=False, infill=0.5, attributes=()))
    batch, rows, _ = every_description(shared)
    texts = their_texts(shared, fmt)
    nothing = np.full((len(batch), len(ATTRIBUTES), 1), EMPTY)
    longest = int(writer.bounds(Examples(batch, nothing, np.arange(len(batch))))[1].max())

    @jax.jit
    def written(crystals: SymmetricBatch, number: jax.Array, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        body = Drawn(hidden, Description(number, jnp.zeros((CHUNK, 1, 3), jnp.uint32)), number)
        stated = jnp.full((CHUNK, 1, len(ATTRIBUTES)), EMPTY)
        examples = Examples(crystals, stated[..., None], jnp.zeros((CHUNK, 1), jnp.int32))
        draws = Draws(hidden > 0, stated, body)
        return writer.lengths(examples, draws), writer.write(examples, draws, longest).tokens

    for start in range(0, len(rows), CHUNK):
        chunk = np.resize(rows[start : start + CHUNK], (CHUNK, 3))
        of, number, hidden = chunk.T[:, :, None]
        lengths, tokens = jax.device_get(written(batch[of], number, hidden))
        for text, length, row in zip(texts[start : start + CHUNK], lengths[:, 0], tokens, strict=False):
            expected = [*tokenizer.begin, *tokenizer.encode(text), tokenizer.eos_id]
            assert row[:length].tolist() == expected, text


def test_the_canonical_description_is_written_without_augmentation():
    batch, fmt = of_all_groups(), TextFormat(form="symmetry")
    writer = Writer.of(load_tokenizer("compact-symmetry"), fmt, Augment(translate=False, infill=0.0, attributes=()))
    examples = Examples(batch, np.full((len(batch), len(ATTRIBUTES), 1), EMPTY), np.arange(len(batch)))
    draws = jax.jit(writer.draw)(jax.random.key(0), examples)
    assert not np.asarray(draws.body.generated.number).any() and not np.asarray(draws.body.generated.shift).any()


def test_infilling_writes_the_description_that_hides_what_it_masks():
    """That of the masked element among the stored ones, whatever is drawn of the others."""
    batch = of_all_groups()
    augment = Augment(translate=False, descriptions=True, infill=1.0, attributes=())
    writer = Writer.of(load_tokenizer("compact-symmetry"), TextFormat(form="symmetry"), augment)
    examples = Examples(batch, np.full((len(batch), len(ATTRIBUTES), 1), EMPTY), np.arange(len(batch)))
    drawn = jax.device_get(jax.jit(writer.draw)(jax.random.key(0), examples).body)
    element = np.argmax(batch.elements == drawn.masked[:, None], axis=1)
    assert set(element) >= {0, 1, 2}
    np.testing.assert_array_equal(drawn.infilled, batch.num_descriptions + element)


def test_descriptions_are_drawn_alike_by_the_crystals_key():
    """Every stored one, each as often (chi-squared below the 1 in 10,000 quantile), and another with another key."""
    several = descriptions(random_symmetric(2, 1))
    count = 400 * len(several)
    batch = SymmetricBatch.of([several] * count)
    writer = Writer.of(
        load_tokenizer("compact-symmetry"),
        TextFormat(form="symmetry"),
        Augment(translate=False, infill=0.0, attributes=(), descriptions=True),
    )
    examples = Examples(batch, np.full((count, len(ATTRIBUTES), 1), EMPTY), np.arange(count))
    draw = jax.jit(writer.draw)
    numbers, others = (np.asarray(draw(jax.random.key(seed), examples).body.generated.number) for seed in (0, 1))
    found = np.bincount(numbers, minlength=len(several))
    assert len(several) == len(found) > 3 and chi2.sf(((found - 400) ** 2 / 400).sum(), len(found) - 1) > 1e-4
    assert 0.5 < (numbers != others).mean() < 1
    again = draw(jax.random.key(0), jax.tree.map(lambda x: x[100:], examples)).body.generated.number
    assert (np.asarray(again) == numbers[100:]).all()  # by its own key, whatever stands beside it


@pytest.mark.parametrize("seed", range(4))
def test_infilling_tells_nothing_of_the_masked_element(seed):
    """In every group a crystal with another element in the masked place has the same masked text, to the last letter;
    what only masked the canonical one would not."""
    fmt, told = TextFormat(form="symmetry"), 0
    for number in GROUPS:
        here = random_symmetric(number, seed)
        z = here.orbits[0].species
        texts, canonical = set(), set()
        for other in (z, 9, 55):  # fluorine is the last of all in formulas, caesium among the first
            orbits = tuple(replace(o, species=other if o.species == z else o.species) for o in here.orbits)
            batch = batch_of([replace(here, orbits=orbits)])
            element = batch.elements[0].tolist().index(other)
            texts.add(write(batch.crystal(0, int(batch.num_descriptions[0]) + element), fmt, other))
            canonical.add(write(batch.crystal(0), fmt, other))
        assert len(texts) == 1, number
        told += len(canonical) > 1
    assert told > 50


def test_text_and_crystal_are_the_same(shared):
    """Round trip of every description: the crystal that a text gives is the crystal, within its decimals."""
    fmt = TextFormat(form="symmetry", coord_decimals=4, length_decimals=4, angle_decimals=2)
    for batch in (of_all_groups(), of_real_crystals(shared)):
        for i in range(len(batch)):
            for number in range(int(batch.num_descriptions[i])):
                crystal = batch.crystal(i, number)
                again = parse(write(crystal, fmt))
                assert [(o.species, o.letter) for o in again.orbits] == [(o.species, o.letter) for o in crystal.orbits]
                away = np.array([o.frac_coords for o in again.orbits]) - np.array(
                    [o.frac_coords for o in crystal.orbits]
                )
                assert np.abs(away - np.round(away)).max() < 1.01e-4
                np.testing.assert_allclose(again.parameters, crystal.parameters, atol=0.006)
                assert again.composition == crystal.composition


def test_p1s_augmentations_are_refused_and_the_other_way_round():
    tokenizer = load_tokenizer("compact-symmetry")
    for name in ("translate", "permute"):
        augment = Augment(**{"translate": False, name: True})
        with pytest.raises(UserError, match=rf"augment\.{name} is true, which is for the p1 form"):
            Writer.of(tokenizer, TextFormat(form="symmetry"), augment)
    with pytest.raises(UserError, match=r"augment\.descriptions is true, which is for the symmetry form"):
        Writer.of(load_tokenizer("compact"), TextFormat(), Augment(descriptions=True))
    for fmt in ({"coord_decimals": 1}, {"coord_decimals": 5}, {"paper_compat": True}):
        with pytest.raises(UserError, match=r"text\."):
            Writer.of(tokenizer, TextFormat(form="symmetry", **fmt), Augment(translate=False))


def test_a_stored_set_is_the_same(tmp_path, monkeypatch):
    embedded = dataset.load("prototypes:validation")
    found = [symmetrize(embedded.crystal(i)) for i in range(len(embedded))]
    dataset.store(embedded, tmp_path / "x.parquet", {}, found)
    read = dataset.load(tmp_path / "x.parquet").symmetric()
    jax.tree.map(np.testing.assert_array_equal, read, embedded.symmetric())
    jax.tree.map(np.testing.assert_array_equal, read, of_found(found))
    dataset.store(embedded, tmp_path / "old.parquet", {})
    with pytest.raises(UserError, match=r"old\.parquet was prepared without symmetry, .* prepare it again"):
        dataset.load(tmp_path / "old.parquet").symmetric()
    with monkeypatch.context() as patched:
        patched.setattr(Symmetrized, "masked", ())
        dataset.store(embedded, tmp_path / "before.parquet", {}, list(map(replace, found)))
    table = pq.read_table(tmp_path / "before.parquet").drop_columns("symmetry.masked")
    pq.write_table(table, tmp_path / "before.parquet")
    before = dataset.load(tmp_path / "before.parquet")
    plain = SymmetricBatch.of([one.descriptions for one in found])
    jax.tree.map(np.testing.assert_array_equal, before.symmetric(), plain)
    writers = [
        Writer.of(load_tokenizer("compact-symmetry"), TextFormat(form="symmetry"), Augment(translate=False, infill=x))
        for x in (0.0, 0.1, 1.0)
    ]
    old = [Feed.of(before, load_tokenizer("compact-symmetry"), writer, 512, 4, 0) for writer in writers]
    new = Feed.of(dataset.load(tmp_path / "x.parquet"), load_tokenizer("compact-symmetry"), writers[1], 512, 4, 0)
    check_infilling(old[0], before)
    check_infilling(new, before)
    with pytest.raises(UserError, match=r"a canonical description tells what it hides; .* prepare them again"):
        check_infilling(old[1], before)
    # A validation set without them is written by its canonical descriptions.
    assert not np.asarray(jax.jit(writers[2].draw)(old[2].key(0), old[2].examples).body.infilled).any()
    table = pq.read_table(tmp_path / "x.parquet")
    fewer = pa.array([1, *table["symmetry.masked"].to_pylist()[1:]], pa.int32())
    at = table.column_names.index("symmetry.masked")
    pq.write_table(table.set_column(at, "symmetry.masked", fewer), tmp_path / "fewer.parquet")
    with pytest.raises(UserError, match=r"fewer\.parquet, row 0 .*species, letters, frac_coords, masked disagree"):
        dataset.load(tmp_path / "fewer.parquet").symmetric()
    dataset.store(embedded, tmp_path / "none.parquet", {}, [None, *found[1:]])
    with pytest.raises(UserError, match=r"none\.parquet, row 0 \(.*\): no space group was found"):
        dataset.load(tmp_path / "none.parquet").symmetric()


def test_a_prompt_states_the_group_of_its_text():
    """Whatever the label says, or where there is none: as 158 rows of MP-20 train have another."""
    crystals = [random_symmetric(number, 2, orbits=2).to_crystal() for number in (2, 62, 166, 194, 221, 225)]
    wrong = [{"spacegroup.number": 1, "band_gap": 0.5}, {}] * 3
    few = dataset.CrystalSet.from_crystals([str(i) for i in range(6)], crystals, wrong)
    tokenizer = load_tokenizer("compact-symmetry")
    augment = Augment(translate=False, infill=0, attributes=("spacegroup.number", "band_gap"), attribute_probability=1)
    writer = Writer.of(tokenizer, TextFormat(form="symmetry"), augment)
    feed = Feed.of(few, tokenizer, writer, row_length=512, rows_per_batch=2, seed=0)
    (table,) = feed.epoch(0)
    examples = feed.batch(table)
    rows = writer.write(examples, writer.draw(feed.key(0), examples), 512)
    texts = []
    for tokens in np.asarray(rows.tokens):
        for end in np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_id) + 1)[:-1]:
            texts.append(tokenizer.decode(end[:-1].tolist()))
    assert len(texts) == 6
    for text in texts:
        prompt, _, body = text.partition(REQUEST)
        assert f"The spacegroup number is {parse(body).space_group}." in prompt and "is 1." not in prompt
    assert sum("The band gap is 0.5000." in text for text in texts) == 3
