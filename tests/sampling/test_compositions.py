"""What can be asked of a composition that comes first: a temperature of its own, and a formula that training lacks."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pandas as pd
import pytest

from jaxcrystal.config import LlamaConfig, MeshConfig, TextFormat
from jaxcrystal.crystals import known_formulas
from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, formula_of
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh, replicated
from jaxcrystal.model.llama import Llama, initialize
from jaxcrystal.sampling import decoding
from jaxcrystal.sampling.engine import Draw, Ending, Engine
from jaxcrystal.sampling.formula_table import FormulaTable
from jaxcrystal.sampling.methods import Greedy, Guidance, Temperature
from jaxcrystal.sampling.sampler import SamplerSettings
from jaxcrystal.sampling.sampling import sample
from jaxcrystal.texts.constraints import Constraints
from jaxcrystal.texts.forms import form_of
from jaxcrystal.texts.symmetry.text import parse
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.weights.saved import SavedModel, describe

TOKENIZER = load_tokenizer("compact-symmetry")
PROMPT = [*TOKENIZER.begin, *TOKENIZER.encode("Below:\n")]
LIMIT = 160
TEXT = TextFormat(form="symmetry", length_decimals=2)
#: Elements among which random weights do not find a new formula every time.
FEW = Constraints(allowed=("Na", "Cl"), num_atoms=(1, 6))


@pytest.fixture(scope="module")
def model() -> SavedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=TOKENIZER.vocab_size, num_key_value_heads=2, head_dim=16, max_position_embeddings=256, **sizes
    )
    params = initialize(Llama(config), jax.random.key(0), make_mesh(MeshConfig(1, 1, 1)))["params"]
    return SavedModel(config, None, TEXT, params, None, TOKENIZER, 0)


def engine_of(model: SavedModel, **options) -> Engine:
    form = form_of(TEXT)
    grammar = form.grammar(form.tables(TOKENIZER), LIMIT)
    defaults = {"methods": (Temperature(1.0),), "slots": 8, "max_new_tokens": LIMIT, "end_id": TOKENIZER.eos_id}
    return Engine(model, grammar=grammar, **{**defaults, **options})


def drawn(engine: Engine, number: int, constraints: Constraints = FEW) -> list[Draw]:
    limits = form_of(TEXT).grammar(form_of(TEXT).tables(TOKENIZER), LIMIT).limits(constraints)
    return list(engine.draw(PROMPT, 0, range(number), limits))


def text_of(draw: Draw) -> str:
    assert draw.ending is Ending.FINISHED
    return TOKENIZER.decode(draw.tokens[:-1])


def drawn_formula(draw: Draw) -> str:
    return formula_of(parse(text_of(draw)).composition)


def test_a_formula_is_found_among_known_ones():
    rng = np.random.default_rng(0)
    symbols = np.array(["H", "Li", "O", "Fe", "Og"])

    def composition() -> dict[str, int]:
        chosen = rng.choice(symbols, rng.integers(1, 5), replace=False)
        return {str(symbol): int(rng.integers(1, 17)) for symbol in chosen}

    formulas = {formula_of(composition()) for _ in range(3000)}
    asked = [composition() for _ in range(3000)]
    elements, atoms = np.zeros((2, len(asked), 10), np.int32)
    for row, counts in enumerate(asked):
        elements[row, : len(counts)] = [ATOMIC_NUMBER[symbol] for symbol in counts]
        atoms[row, : len(counts)] = list(counts.values())
    found = jax.jit(FormulaTable.of(sorted(formulas)).contains)(jnp.asarray(elements), jnp.asarray(atoms))
    expected = [formula_of(counts) in formulas for counts in asked]
    assert 300 < sum(expected) < 2700
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_only_what_is_known_is_drawn_again(model):
    plain = drawn(engine_of(model), 40)
    formulas = sorted({drawn_formula(draw) for draw in plain})
    assert len(formulas) > 4
    old = formulas[::2]
    found = drawn(engine_of(model, known=FormulaTable.of(old)), 40)
    other_slots = drawn(engine_of(model, known=FormulaTable.of(old), slots=3, jump=1), 40)
    assert any(draw.redraws > 1 for draw in found)
    for draw, before, other in zip(found, plain, other_slots, strict=True):
        assert drawn_formula(draw) not in old and (draw.redraws > 0) == (drawn_formula(before) in old)
        assert text_of(draw) == text_of(other) and draw.redraws == other.redraws
        if not draw.redraws:
            np.testing.assert_array_equal(draw.tokens, before.tokens)
            assert draw.log_probability == pytest.approx(before.log_probability, rel=1e-5)
    again = [draw for draw in found if draw.redraws]
    assert len({text_of(draw) for draw in again}) > len(again) // 2  # each by its own key


def test_redraws_on_devices_and_with_guidance(model):
    """Each on its own slots; and with two rows of the cache a slot, of weight 1, which changes nothing."""
    formulas = sorted({drawn_formula(draw) for draw in drawn(engine_of(model), 16)})[::2]
    options = {"known": FormulaTable.of(formulas)}
    expected = drawn(engine_of(model, **options), 16)
    assert any(draw.redraws for draw in expected)
    mesh = make_mesh(MeshConfig(2, 2, 1))
    divided = SavedModel(**vars(model) | {"params": jax.device_put(model.params, replicated(mesh))})
    for other in (
        drawn(engine_of(divided, **options, mesh=mesh), 16),
        drawn(engine_of(model, **options, guidance=Guidance(1.0), unconditional=PROMPT[:-1]), 16),
    ):
        assert [text_of(draw) for draw in other] == [text_of(draw) for draw in expected]
        assert [draw.redraws for draw in other] == [draw.redraws for draw in expected]


def test_log_probabilities_are_those_of_the_text_that_is_left(model):
    """Of a crystal that was drawn again, against the model's own of its text."""
    old = sorted({drawn_formula(draw) for draw in drawn(engine_of(model), 16)})[::2]
    draw = next(draw for draw in drawn(engine_of(model, known=FormulaTable.of(old)), 16) if draw.redraws)
    tokens = jnp.asarray([[*PROMPT, *draw.tokens]])
    logits = model.module.apply(model.variables, tokens[:, :-1], jnp.arange(tokens.shape[1] - 1)[None], None)[0]
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits[0, :, : TOKENIZER.vocab_size]), tokens[0, 1:, None], axis=1)
    assert draw.log_probability == pytest.approx(float(log_p[len(PROMPT) - 1 :].sum()), rel=1e-4)


def test_it_gives_up_where_nothing_new_can_be(model, monkeypatch):
    monkeypatch.setattr(decoding, "MOST_REDRAWS", 5)
    (draw,) = drawn(engine_of(model, known=FormulaTable.of(["Na"])), 1, Constraints(allowed=("Na",), num_atoms=(1, 3)))
    assert draw.ending is Ending.KNOWN_FORMULA and draw.redraws == 5
    assert not len(draw.tokens) and np.isnan([draw.log_probability, draw.grammar_log_probability]).all()


def test_a_composition_has_methods_of_its_own(model):
    one = drawn(engine_of(model, composition_methods=(Greedy(),)), 12, Constraints())
    assert len({text_of(draw).split("\n")[0] for draw in one}) == 1
    assert len({text_of(draw) for draw in one}) == 12
    rest = [text_of(draw) for draw in drawn(engine_of(model, methods=(Greedy(),), composition_methods=()), 12)]
    by_composition = {text.split("\n")[0]: text for text in rest}
    assert 1 < len(by_composition) < 12 and all(by_composition[text.split("\n")[0]] == text for text in rest)


@pytest.fixture
def model_dir(model, tmp_path):
    directory = tmp_path / "model"
    describe(directory, model.config, None, TEXT, TOKENIZER)
    with ocp.CheckpointManager((directory / "checkpoints").resolve()) as checkpoints:
        checkpoints.save(0, args=ocp.args.Composite(weights=ocp.args.StandardSave({"params": model.params})))
    return directory


def test_new_crystals_in_a_ledger(model_dir, tmp_path):
    options = {"constraints": FEW, "temperature": 1.0, "top_p": 1.0, "slots": 4, "max_new_tokens": LIMIT}
    with pytest.raises(UserError, match=r"does not say which formulas it was trained on: it has no formulas\.txt"):
        sample(model_dir, 2, tmp_path / "x.parquet", new=True, **options)
    sample(model_dir, 20, tmp_path / "plain.parquet", **options)
    plain = pd.read_parquet(tmp_path / "plain.parquet")
    assert plain["redraws"].isna().all()
    old = sorted(set(plain["formula"]))[::2]
    known_formulas.store(old, model_dir)
    report = sample(model_dir, 20, tmp_path / "new.parquet", new=True, **options)
    table = pd.read_parquet(tmp_path / "new.parquet")
    assert not set(table["formula"]) & set(old) and report.redraws == table["redraws"].sum() > 0
    assert ((table["redraws"] > 0) == plain["formula"].isin(old)).all()
    with pytest.raises(UserError, match="new"):  # a ledger of another request
        sample(model_dir, 30, tmp_path / "new.parquet", **options)
    more = sample(model_dir, 30, tmp_path / "new.parquet", new=True, **options)
    assert more.resumed == 20 and more.redraws >= report.redraws
    with pytest.raises(UserError, match=f"{old[0]} is a formula of the training set"):
        sample(model_dir, 2, tmp_path / "y.parquet", new=True, conditions={"pretty_formula": old[0]})
    known_formulas.store(["Na"], model_dir)
    with pytest.raises(UserError, match="Na is a formula of the training set"):
        sample(model_dir, 2, tmp_path / "y.parquet", new=True, constraints=Constraints(allowed=("Na",)))
    for content, message in ((b"", r"formulas\.txt is empty"), (b"\xff", "cannot read .*formulas"), (b"Nq2", "'Nq'")):
        (model_dir / "formulas.txt").write_bytes(content)
        with pytest.raises(UserError, match=message):
            sample(model_dir, 2, tmp_path / "y.parquet", new=True, **options)


@pytest.mark.parametrize("option", [{"new": True}, {"composition_temperature": 0.5}])
def test_texts_that_do_not_begin_with_their_composition(model_dir, tmp_path, option):
    (name,) = option
    with pytest.raises(UserError, match=f"{name} needs the grammar"):
        SamplerSettings(grammar=False, **option)
    path = model_dir / "model.json"
    path.write_text(path.read_text().replace('"symmetry"', '"p1"'))
    with pytest.raises(UserError, match=f"{name} is for texts that begin with their composition"):
        sample(model_dir, 2, tmp_path / "x.parquet", **option)
