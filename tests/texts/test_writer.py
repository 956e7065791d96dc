"""Proof that the device writes the tokens of the text: token for token, for every crystal, draw and tokenizer."""

import dataclasses
import json
import re
from functools import cache, partial
from operator import attrgetter
from pathlib import Path

import byte_pair_tokenizers
import digit_pairs
import jax
import numpy as np
import pandas as pd
import pytest
from byte_pair_tokenizers import REAL
from hypothesis import given, settings
from hypothesis import strategies as st
from some_crystals import p1_crystal

from jaxcrystal.config import ATTRIBUTES, Augment, TextFormat
from jaxcrystal.crystals.crystal import CELL_BITS, COORD_BITS, ELEMENTS, Crystal, CrystalBatch
from jaxcrystal.errors import UserError
from jaxcrystal.texts import prompts
from jaxcrystal.texts.forms import form_of
from jaxcrystal.texts.numbers import decimal, whole_number
from jaxcrystal.texts.p1.tables import build
from jaxcrystal.texts.pieces import EMPTY
from jaxcrystal.texts.tokenizer import Tokenizer, load_tokenizer
from jaxcrystal.texts.writer import Draws, Examples, Writer, sentence_tokens

MAX_ATOMS = 20


@pytest.fixture(scope="module", params=["compact", "pairs", "llama2", "smollm2", "llama3", "qwen", "tekken", *REAL])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory) -> Tokenizer:
    if request.param == "compact":
        return load_tokenizer("compact")
    if request.param == "pairs":
        return digit_pairs.load(tmp_path_factory.mktemp("tokenizer"))
    if request.param == "llama2":
        return load_tokenizer(request.getfixturevalue("shared") / "tokenizer/llama2/tokenizer.model")
    return byte_pair_tokenizers.load(request.param, tmp_path_factory.mktemp("tokenizer"))


def random_crystals(count: int, seed: int) -> list[Crystal]:
    """1 to 20 atoms, all elements, lengths of 1 to 99.9 Å, and a third of all numbers at or beside a rounding tie."""
    rng = np.random.default_rng(seed)

    def numbers(low: float, high: float, *shape: int) -> np.ndarray:
        x = rng.uniform(low, high, shape)
        decimals = rng.integers(1, 7, shape)
        tie = (np.floor(x * 10.0**decimals) + 0.5) / 10.0**decimals + rng.integers(-1, 2, shape) * 2.0**-32
        exact = np.round(x * 2.0**7) / 2.0**7  # ties that binary numbers hold without error: x.125, x.375, …
        return np.choose(rng.integers(0, 4, shape), [x, tie, exact, np.round(x, 2)])

    crystals = []
    while len(crystals) < count:
        n = int(rng.integers(1, MAX_ATOMS + 1))
        species = rng.integers(1, len(ELEMENTS), n) if rng.random() < 0.5 else rng.choice(rng.integers(1, 119, 3), n)
        try:
            crystals.append(Crystal(numbers(1, 99.9, 3), numbers(30, 150, 3), species, numbers(0, 1, n, 3)))
        except UserError:  # angles that close no cell
            continue
    return crystals


def random_labels(crystals: list[Crystal], seed: int) -> list[dict]:
    """Labels of each crystal, about a quarter of them unknown."""
    rng = np.random.default_rng(seed)
    labels = []
    for crystal in crystals:
        symbols = sorted(set(crystal.symbols))
        label = {
            "pretty_formula": "".join(f"{s}{crystal.symbols.count(s)}" for s in symbols),
            "elements": symbols,
            "spacegroup.number": int(rng.integers(1, 231)),
            "formation_energy_per_atom": float(rng.normal()),
            "band_gap": float(abs(rng.normal())),
            "e_above_hull": float(np.round(abs(rng.normal()), 2)),
        }
        labels.append({name: value for name, value in label.items() if rng.random() > 0.25})
    return labels


@cache
def mp20_train(shared: Path) -> tuple[list[Crystal], list[dict]]:
    """Every crystal of MP-20 train as its file states it, with the labels that are known."""
    table = pd.read_parquet(shared / "data/mp20/train.parquet")
    crystals = [p1_crystal(cif) for cif in table["cif"]]
    labels = []
    for row in table.to_dict("records"):
        row["elements"] = re.findall(r"[A-Z][a-z]?", row["elements"])
        labels.append({k: row[k] for k in ATTRIBUTES if not (isinstance(row[k], float) and np.isnan(row[k]))})
    return crystals, labels


def examples(crystals: list[Crystal], labels: list[dict], tokenizer, paper_compat: bool = False) -> Examples:
    return Examples(
        crystals=CrystalBatch.from_crystals(crystals, MAX_ATOMS),
        sentences=sentence_tokens(tokenizer, labels, TextFormat(paper_compat=paper_compat)),
        index=np.arange(len(crystals), dtype=np.int32),
    )


def drawn_text(crystal: Crystal, label: dict, draws: Draws, fmt: TextFormat) -> str:
    """The same text on the host, by `write` and `prompts`, in float64 and Python's own formatting."""
    order = draws.body.order[: len(crystal)]
    shift = draws.body.translation.astype(np.float64) / 2**32
    moved = Crystal(crystal.lengths, crystal.angles, crystal.species[order], crystal.frac_coords[order] + shift)
    if draws.infill:
        return prompts.infilling(form_of(fmt), moved, int(draws.body.masked))
    stated = {ATTRIBUTES[i]: label[ATTRIBUTES[i]] for i in draws.stated if i != EMPTY}
    return prompts.generation(form_of(fmt), moved, stated)


def assert_written_as_encoded(tokenizer, crystals, labels, fmt, augment, seed, chunk=4096, data=None) -> int:
    writer = Writer.of(tokenizer, fmt, augment)
    data = data or examples(crystals, labels, tokenizer, fmt.paper_compat)
    key, longest = jax.random.key(seed), int(writer.bounds(data)[1].max())
    write = jax.jit(lambda e: (d := writer.draw(key, e), writer.lengths(e, d), writer.write(e, d, longest)))
    count = 0
    for start in range(0, len(crystals), chunk):
        part = jax.tree.map(lambda x: x[start : start + chunk, None], data)  # noqa: B023
        draws, lengths, rows = jax.device_get(write(part))
        for i in range(len(part.index)):
            at = start + i
            text = drawn_text(crystals[at], labels[at], draws[i, 0], fmt)
            expected = [*tokenizer.begin, *tokenizer.encode(text), tokenizer.eos_id]
            n = int(lengths[i, 0])
            assert rows.tokens[i, :n].tolist() == expected, f"crystal {at}: {text!r}"
            assert (rows.segments[i, :n] == 1).all() and (rows.segments[i, n:] == 0).all()
            assert (rows.positions[i, :n] == np.arange(n)).all()
            assert not rows.loss_mask[i, n:].any() and (rows.tokens[i, n:] == tokenizer.pad_id).all()
            count += 1
    return count


@pytest.mark.parametrize("decimals", range(1, 7))
@pytest.mark.parametrize("permute", [False, True])
def test_random_crystals(tokenizer, decimals, permute):
    crystals = random_crystals(300, seed=decimals)
    fmt = TextFormat(coord_decimals=decimals, length_decimals=1 + decimals % 4, angle_decimals=decimals % 3)
    augment = Augment(permute=permute, infill=0.5)
    assert assert_written_as_encoded(tokenizer, crystals, random_labels(crystals, 1), fmt, augment, decimals) == 300


@pytest.mark.parametrize("translate", [False, True])
@pytest.mark.parametrize("angle_decimals", [0, 1])
def test_paper_compat(tokenizer, translate, angle_decimals):
    crystals = random_crystals(200, seed=7)
    crystals += [
        Crystal(c.lengths, [119.9999999, 90, 90], c.species, c.frac_coords * 0 + 0.9999) for c in crystals[:50]
    ]
    fmt = TextFormat(paper_compat=True, angle_decimals=angle_decimals)
    labels = random_labels(crystals, 2)
    assert_written_as_encoded(tokenizer, crystals, labels, fmt, Augment(translate=translate), 3)


@pytest.mark.slow
def test_all_of_mp20_train(tokenizer, shared):
    crystals, labels = mp20_train(shared)
    data, augment = examples(crystals, labels, tokenizer), Augment(permute=True)
    assert assert_written_as_encoded(tokenizer, crystals, labels, TextFormat(), augment, 2, data=data) == 27108
    # Digits one by one are as those of random crystals; in groups they are cut otherwise at each number of decimals.
    for decimals in (1, 3, 4, 5, 6) if build(tokenizer).group > 1 else ():
        some = jax.tree.map(lambda x: x[decimals::20], data)  # noqa: B023
        parts, fmt = (crystals[decimals::20], labels[decimals::20]), TextFormat(coord_decimals=decimals)
        assert assert_written_as_encoded(tokenizer, *parts, fmt, augment, decimals, data=some) >= 1355


@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.sampled_from([CELL_BITS, COORD_BITS]))
@settings(max_examples=500, deadline=None)
def test_decimal_is_pythons_format(x, decimals, bits):
    whole, digits = jax.jit(decimal, static_argnums=(1, 2))(np.uint32(x), bits, decimals)
    text = f"{int(whole)}.{int(digits):0{decimals}d}" if decimals else f"{int(whole)}"
    assert text == f"{x / 2**bits:.{decimals}f}"


@pytest.mark.parametrize(("group", "expected"), [(1, "1 2 0"), (2, "12 0"), (3, "120")])
def test_whole_numbers_in_groups_from_the_left(group, expected):
    """All below 1000, against the host's own spelling."""
    digits = np.arange(sum(10**width for width in range(1, group + 1)))
    shown = [f"{value:0{width}}" for width in range(1, group + 1) for value in range(10**width)]
    tables = dataclasses.replace(build(load_tokenizer("compact")), digits=digits)
    assert tables.group == group and " ".join(shown[t] for t in tables.digit_tokens("120")) == expected
    tokens, unused = jax.jit(lambda x: whole_number(tables, x, 3))(np.arange(1000))
    for x, (row, start) in enumerate(zip(np.stack(tokens, axis=1), unused, strict=True)):
        assert row[start:].tolist() == tables.digit_tokens(str(x))


@pytest.mark.parametrize("bits", [CELL_BITS, COORD_BITS])
def test_decimal_at_every_tie(bits):
    """All numbers that two binary decimals can hold exactly halfway, and their neighbours on the grid."""
    ties = np.arange(0, 2**10, dtype=np.uint64) << (22 if bits == 32 else 14)
    x = np.concatenate([ties - 1, ties, ties + 1]).astype(np.uint32)
    for decimals in range(7):
        whole, digits = jax.jit(partial(decimal, bits=bits, decimals=decimals))(x)
        for value, w, d in zip(x, whole.tolist(), digits.tolist(), strict=True):
            text = f"{w}.{d:0{decimals}d}" if decimals else f"{w}"
            assert text == f"{int(value) / 2**bits:.{decimals}f}"


def test_a_row_holds_several_crystals(tokenizer):
    crystals = random_crystals(12, seed=5)
    data = examples(crystals, random_labels(crystals, 5), tokenizer)
    writer, key = Writer.of(tokenizer, TextFormat(), Augment()), jax.random.key(0)
    draw, write = jax.jit(writer.draw), jax.jit(lambda e, d: writer.write(e, d, 2048))
    draws = draw(key, data)
    lengths = jax.jit(writer.lengths)(data, draws)
    alone = write(jax.tree.map(lambda x: x[:, None], data), draws[:, None])
    grid = np.array([[3, 1, -1], [0, 7, 2]])  # 3 crystals a row; -1 leaves a place empty
    packed = jax.tree.map(lambda x: x[grid], data).replace(index=grid)
    rows = write(packed, draw(key, packed))
    for r in range(2):
        start = 0
        for slot, i in enumerate(grid[r]):
            n = int(lengths[i]) if i >= 0 else 0
            here = slice(start, start + n)
            np.testing.assert_array_equal(rows.tokens[r, here], alone.tokens[i, :n])
            np.testing.assert_array_equal(rows.positions[r, here], np.arange(n))
            assert (np.asarray(rows.segments[r, here]) == slot + 1).all()
            start += n
        assert not np.asarray(rows.segments[r, start:]).any()


def test_every_setting_of_augment_shows(tokenizer):
    crystals = random_crystals(400, seed=3)
    labels = random_labels(crystals, 3)
    data, form, key = examples(crystals, labels, tokenizer), form_of(TextFormat()), jax.random.key(1)
    tables = form.tables(tokenizer)

    def draw(**changes) -> Draws:
        return jax.jit(Writer(form, tables, Augment(**changes)).draw)(key, data)

    draws = draw()
    assert not draw(infill=0.0).infill.any() and draw(infill=1.0).infill.all()
    assert 0.26 < draws.infill.mean() < 0.42
    assert not draw(translate=False).body.translation.any() and draws.body.translation.any()
    in_order = np.arange(MAX_ATOMS)
    assert (draws.body.order == in_order).all() and not (draw(permute=True).body.order == in_order).all()
    stated = draw(attributes=("band_gap",), attribute_probability=1.0).stated
    known = np.array(["band_gap" in label for label in labels])
    np.testing.assert_array_equal((stated == ATTRIBUTES.index("band_gap")).sum(-1), known)
    assert not (draw(attribute_probability=0.0).stated != EMPTY).any()
    rows = {
        loss_on: jax.jit(partial(Writer(form, tables, Augment(loss_on=loss_on)).write, length=1024))(
            jax.tree.map(lambda x: x[:, None], data), draws[:, None]
        )
        for loss_on in ("all", "response")
    }
    assert (rows["all"].loss_mask == (rows["all"].segments > 0)).all()
    for i in range(50):
        answer = np.asarray(rows["response"].tokens[i])[np.asarray(rows["response"].loss_mask[i])]
        text = drawn_text(crystals[i], labels[i], jax.device_get(draws)[i], TextFormat())
        expected = text.rsplit("\n", 1)[1] if draws.infill[i] else text.split("lattice:\n")[1]
        assert answer[-1] == tokenizer.eos_id and tokenizer.decode(answer[:-1]).strip() == expected.strip()


def test_compat_states_the_formula_with_any_other(tokenizer):
    crystals = random_crystals(500, seed=9)
    labels = [dict(zip(ATTRIBUTES, ("X", ["H"], 1, -1.0, 1.0, 0.0), strict=True)) for _ in crystals]
    data = examples(crystals, labels, tokenizer, paper_compat=True)
    writer = Writer.of(tokenizer, TextFormat(paper_compat=True), Augment())
    stated = np.asarray(jax.jit(writer.draw)(jax.random.key(0), data).stated)
    count = (stated != EMPTY).sum(-1)
    assert set(count.tolist()) == {0, 2, 3, 4, 5}  # formula and 1 to 4 others, or nothing
    assert (stated[count > 0, 0] == 0).all() and not (stated == ATTRIBUTES.index("elements")).any()
    assert set(stated[:, 1].tolist()) == {EMPTY, 2, 3, 4, 5}
    silent = Writer.of(tokenizer, TextFormat(paper_compat=True), Augment(attribute_probability=0.0, infill=0.0))
    draws = jax.jit(silent.draw)(jax.random.key(0), data)
    assert (np.asarray(draws.stated) == EMPTY).all()
    assert (np.asarray(silent.lengths(data, draws)) <= silent.bounds(data)[1]).all()


def test_draws_depend_on_key_and_index_alone(tokenizer):
    crystals = random_crystals(10, seed=2)
    data = examples(crystals, random_labels(crystals, 2), tokenizer)
    writer, key = Writer.of(tokenizer, TextFormat(), Augment(permute=True)), jax.random.key(4)
    draw = jax.jit(writer.draw)
    whole = draw(key, data)
    some = draw(key, jax.tree.map(lambda x: x[[7, 2]], data))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: x[np.array([7, 2])], whole), some)
    roomy = draw(key, data.replace(crystals=CrystalBatch.from_crystals(crystals, MAX_ATOMS + 13)))
    for name in ("infill", "stated", "body.translation", "body.masked"):
        np.testing.assert_array_equal(attrgetter(name)(roomy), attrgetter(name)(whole))
    other = draw(jax.random.key(5), data)
    assert not (other.body.translation == whole.body.translation).any()


def test_a_tokenizer_that_joins_a_space_to_a_digit_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"the tokens of .* change beside ' '"):
        build(byte_pair_tokenizers.load("gpt2", tmp_path))


@pytest.mark.parametrize(
    "pairs, shown",
    [
        ([("N", "a"), ("Na", "Ċ")], r"it has .* \| 'Na\\n' \| .* where the device would write .* \| 'Na' \| '\\n' \|"),
        ([("5", "Ċ"), ("5Ċ", "H")], r"it has .* \| '5\\n' \| "),  # a digit and, behind its line feed, a letter
        ([(":", "Ċ"), (":Ċ", "5")], r"it has .* \| ':\\n5' \| "),
        ([("0", ".")], r"change beside '\.'"),
        ([("Ċ", "0")], "change beside '0'"),
        ([("Ċ", "H")], "change beside 'H'"),
        ([("]", "Ċ"), ("]Ċ", "0")], r"change beside '\[MASK\]\\n'"),
    ],
)
def test_what_joins_pieces_is_refused(tmp_path, pairs, shown):
    """Patterns keep them apart; without one, merges may join anything."""
    path = byte_pair_tokenizers.write(tmp_path, "smollm", extra=tuple(pairs))
    data = json.loads(path.read_text())
    data["pre_tokenizer"]["pretokenizers"] = data["pre_tokenizer"]["pretokenizers"][-1:]
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=shown):
        build(load_tokenizer(path))


@pytest.mark.parametrize(
    "lost, shown",
    [
        ("N", r"cannot write 'N': its tokens of .*\\nN\\n.* say .*; use a tokenizer that has every digit and letter"),
        ("7", "writes '7' as 0 tokens; the device needs one: use"),
        ("Ċ", r"writes '\\n' as 0 tokens"),
        ("Ġ", "writes ' ' as 0 tokens"),
    ],
)
def test_a_tokenizer_that_lacks_a_piece_is_refused(tmp_path, lost, shown):
    path = byte_pair_tokenizers.write(tmp_path, "smollm")
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["unused"] = vocabulary.pop(lost)
    data["model"]["merges"] = [m for m in data["model"]["merges"] if {*m, "".join(m)} <= vocabulary.keys()]
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=shown):
        build(load_tokenizer(path))


def test_pieces_that_share_the_unknown_token_are_refused(tmp_path):
    """7 and 8 would be one to the model."""
    path = byte_pair_tokenizers.write(tmp_path, "smollm")
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    for i, digit in enumerate("78"):
        vocabulary[f"unused{i}"] = vocabulary.pop(digit)
    data["model"]["unk_token"] = "<|begin|>"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="cannot write '7'"):
        build(load_tokenizer(path))


def test_a_grouping_tokenizer_that_lacks_a_number_is_refused(tmp_path):
    path = byte_pair_tokenizers.write(tmp_path, "llama3")
    data = json.loads(path.read_text())
    data["model"]["merges"] = [pair for pair in data["model"]["merges"] if "".join(pair) != "457"]
    data["model"]["vocab"]["unused"] = data["model"]["vocab"].pop("457")
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="'457' as 2 tokens; the device needs one"):
        build(load_tokenizer(path))


def test_a_tokenizer_that_joins_digits_is_refused(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["0.25 0.25 0.25 90 90 90 material"] * 50),
        model_prefix=str(tmp_path / "joins"),
        model_type="bpe",
        vocab_size=280,
        byte_fallback=True,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="writes '1' as 2 tokens; the device needs one"):
        build(load_tokenizer(tmp_path / "joins.model"))
