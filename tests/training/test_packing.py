"""Rows hold every crystal of an epoch once, whole, and little padding."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import crystal_set

from jaxcrystal.config import Augment, MeshConfig, Recipe, TextFormat
from jaxcrystal.crystals.dataset import CrystalSet
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import batch_sharding, make_mesh
from jaxcrystal.texts.writer import Writer
from jaxcrystal.training.identity import Identity
from jaxcrystal.training.packing import Feed, pack


def test_a_writer_that_draws_otherwise_is_another_run(tokenizer, writer):
    feed = Feed.of(crystal_set(20), tokenizer, writer, 1024, rows_per_batch=4, seed=0)
    now = Identity.of(Recipe(), feed, feed)
    assert now.differing(now.to_json()) == []
    other = replace(feed, writer=replace(writer, augment=Augment(translate=False)))
    (found,) = now.differing(Identity.of(Recipe(), other, feed).to_json())
    assert "the seed gave the draws" in found


@given(st.lists(st.integers(1, 100), min_size=1, max_size=400), st.randoms())
def test_every_crystal_once_and_no_row_too_long(lengths, random):
    order = list(range(len(lengths)))
    random.shuffle(order)
    rows = pack(lengths, order, 100)
    assert sorted(crystal for row in rows for crystal in row) == list(range(len(lengths)))
    assert all(sum(lengths[crystal] for crystal in row) <= 100 for row in rows)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=400), st.integers(1, 5))
def test_a_row_has_no_more_crystals_than_slots(lengths, slots):
    rows = pack(lengths, range(len(lengths)), 100, slots)
    assert sorted(crystal for row in rows for crystal in row) == list(range(len(lengths)))
    assert all(len(row) <= slots and sum(lengths[crystal] for crystal in row) <= 100 for row in rows)


def test_slots_are_for_crystals_of_common_size(tokenizer, writer):
    """One tiny crystal must not make every row reserve room for a row full of its kind: slots cost time, even empty."""
    feed = Feed.of(crystal_set(60), tokenizer, writer, 1024, rows_per_batch=4, seed=0)
    table = feed.epoch(0)
    assert feed.slots < 1024 // int(writer.bounds(feed.examples)[0].min())
    written = np.asarray(feed._lengths(feed.key(0), feed.examples)).sum()
    rows = (table >= 0).any(-1).sum()
    assert sorted(table[table >= 0].tolist()) == list(range(60)) and written / ((rows - 1) * 1024) > 0.9


@pytest.mark.parametrize("row_length", [256, 512])
@pytest.mark.parametrize("infill", [0.0, 0.34, 1.0])
def test_an_epoch_is_written_whole(tokenizer, infill, row_length):
    writer = Writer.of(tokenizer, TextFormat(), Augment(infill=infill))
    feed = Feed.of(crystal_set(60), tokenizer, writer, row_length, rows_per_batch=4, seed=3)
    table = feed.epoch(2)
    assert table.shape[1:] == (4, feed.slots)
    assert sorted(table[table >= 0].tolist()) == list(range(60))
    write = jax.jit(lambda e: (d := writer.draw(feed.key(2), e), writer.write(e, d, row_length), writer.lengths(e, d)))
    infilled = 0
    for batch in table:
        draws, rows, lengths = write(feed.batch(batch))
        assert ((lengths > 0) == (batch >= 0)).all()
        np.testing.assert_array_equal((rows.segments > 0).sum(1), lengths.sum(1))  # nothing was cut off
        ends = (rows.tokens == tokenizer.eos_id).sum(1)
        np.testing.assert_array_equal(ends, (batch >= 0).sum(1))
        infilled += int((np.asarray(draws.infill) & (batch >= 0)).sum())
    assert infilled == {0.0: 0, 1.0: 60}.get(infill, infilled) and (infilled > 0) == (infill > 0)


@pytest.mark.parametrize("text", [TextFormat(), TextFormat(6, 4, 2), TextFormat(paper_compat=True)], ids=str)
def test_where_atoms_are_put_and_in_which_order_changes_no_length(tokenizer, text):
    """Rows are packed by lengths that are known before the draw of translations: 0.99 + 0.01 is 0.00, not 1 or 1.0."""
    crystals = crystal_set(40)
    lengths = []
    for augment in (Augment(translate=False), Augment(translate=True), Augment(translate=True, permute=True)):
        writer = Writer.of(tokenizer, text, augment)
        feed = Feed.of(crystals, tokenizer, writer, 1024, 4, seed=0)
        draws = writer.draw(feed.key(0), feed.examples)
        lengths.append(np.asarray(writer.lengths(feed.examples, draws)))
        shift = np.full_like(draws.body.translation, 2**32 - 1)  # all but one whole cell
        edge = draws.replace(body=draws.body.replace(translation=shift))
        lengths.append(np.asarray(writer.lengths(feed.examples, edge)))
    assert all((row == lengths[0]).all() for row in lengths) and len(set(lengths[0])) > 5


def test_each_device_is_given_its_rows_and_no_others(tokenizer, writer):
    """A host gathers for its own devices only: nobody ever gathers the whole batch."""
    gathered = []

    class Watched(np.ndarray):
        def __getitem__(self, rows):
            gathered.append(np.shape(rows)[0])
            return np.asarray(self)[rows]

    feed = Feed.of(crystal_set(60), tokenizer, writer, 384, rows_per_batch=8, seed=0)
    batch, sharding = feed.epoch(0)[0], batch_sharding(make_mesh(MeshConfig(2, 2, 2)))
    watched = replace(feed, examples=jax.tree.map(lambda x: x.view(Watched), feed.examples))
    placed = watched.placed(batch, sharding)
    jax.tree.map(np.testing.assert_array_equal, placed, feed.batch(batch))
    assert set(gathered) == {2} and all(x.sharding == sharding for x in jax.tree.leaves(placed))


def test_epochs_differ_and_come_again(tokenizer, writer):
    make = lambda seed: Feed.of(crystal_set(60), tokenizer, writer, 512, 4, seed)  # noqa: E731
    np.testing.assert_array_equal(make(0).epoch(1), make(0).epoch(1))
    assert not np.array_equal(make(0).epoch(0), make(0).epoch(1))
    assert not np.array_equal(make(0).epoch(0), make(1).epoch(0))


@pytest.mark.parametrize("augment", [Augment(infill=0), Augment(infill=1), Augment(), Augment(attribute_probability=0)])
def test_bounds_hold_and_are_reached(tokenizer, augment):
    crystals = crystal_set(40)
    writer = Writer.of(tokenizer, TextFormat(), augment)
    feed = Feed.of(crystals, tokenizer, writer, 512, 4, 0)
    shortest, longest = writer.bounds(feed.examples)
    drawn = np.array([writer.lengths(feed.examples, writer.draw(feed.key(n), feed.examples)) for n in range(60)])
    assert (drawn >= shortest).all() and (drawn <= longest).all()
    assert (drawn.max(0) == longest).mean() > 0.9 and (drawn.min(0) == shortest).mean() > 0.9


def test_what_cannot_be_packed(tokenizer, writer):
    with pytest.raises(UserError, match=r"crystal crystal-\d+ can take \d+ tokens, a row holds 100"):
        Feed.of(crystal_set(10), tokenizer, writer, 100, 4, 0)
    with pytest.raises(UserError, match="empty"):
        Feed.of(CrystalSet.from_crystals([], [], []), tokenizer, writer, 512, 4, 0)
