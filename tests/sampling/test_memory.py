"""How many slots fit: what an engine says it takes against what the compiler says, and what is made of it."""

import math
from types import SimpleNamespace

import jax
import pytest

from jaxcrystal.config import LlamaConfig, MeshConfig, TextFormat
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.llama import Llama, abstract_variables
from jaxcrystal.sampling.engine import Engine
from jaxcrystal.sampling.memory import DEFAULT, MOST, SHARE, fitting, memory_left
from jaxcrystal.sampling.methods import Guidance, Temperature, TopP
from jaxcrystal.texts.forms import form_of
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.weights.saved import SavedModel

CONFIG = LlamaConfig(
    vocab_size=4096,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
)

P1 = form_of(TextFormat())
GRAMMAR = P1.grammar(P1.tables(load_tokenizer("compact")), limit=256)


def engine_of(slots: int, mesh=None, **options) -> Engine:
    """Of a model whose arrays are not there: nothing is computed."""
    mesh = mesh or make_mesh(MeshConfig(1, 1, 1))
    params = abstract_variables(Llama(CONFIG), mesh)["params"]
    model = SavedModel(CONFIG, None, TextFormat(), params, None, load_tokenizer("compact"), 0)
    methods = (Temperature(0.9), TopP(0.9))
    return Engine(
        model, **{"end_id": 2, "methods": methods, "slots": slots, "max_new_tokens": 256, "mesh": mesh, **options}
    )


@pytest.mark.parametrize("mesh", [(1, 1, 1), (4, 1, 2)])
@pytest.mark.parametrize(
    "options",
    [{}, {"cache_dtype": "int8"}, {"guidance": Guidance(2.0), "unconditional": (1, 5, 6)}, {"grammar": GRAMMAR}],
    ids=["plain", "int8", "guidance", "grammar"],
)
def test_what_an_engine_takes_is_what_the_compiler_says(mesh, options):
    mesh = make_mesh(MeshConfig(*mesh))
    engine = engine_of(64, mesh, **options)
    told = engine.compile_decode(70).memory_analysis()
    weights = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(abstract_variables(Llama(CONFIG), mesh))
    )
    compiled = told.argument_size_in_bytes - weights + told.temp_size_in_bytes
    assert compiled / 1.1 < engine.memory(70) < 1.6 * compiled


def made(slots: int | None, most: int, left: int | None) -> Engine:
    return fitting(engine_of, slots, most, lambda engine: engine.memory(70), left)


def test_with_the_grammar_a_step_grows_by_whole_rows_and_slots_fit_all_the_same():
    def grammatical(slots: int) -> Engine:
        return engine_of(slots, grammar=GRAMMAR)

    for slots in (1, 3, 4, 5, 17, 18, 19, 101):
        for room in (grammatical(slots).memory(70), grammatical(slots + 1).memory(70) - 1):
            chosen = fitting(grammatical, None, 10_000, lambda engine: engine.memory(70), room)
            assert chosen.slots == slots and chosen.memory(70) <= room


def test_as_many_slots_as_fit_and_not_one_more():
    each = engine_of(2).memory(70) - engine_of(1).memory(70)
    for slots in (1, 2, 17, 100):
        exactly = engine_of(slots).memory(70)
        for room in (exactly, exactly + each - 1):
            engine = made(None, 10_000, room)
            assert engine.slots == slots and engine.memory(70) <= room < engine_of(slots + 1).memory(70)
        assert made(slots, 10_000, exactly).slots == slots
        with pytest.raises(UserError, match=rf"^{slots + 1} slots take .* GiB .*: {slots} would fit; a cache of int8"):
            made(slots + 1, 10_000, exactly)


def test_slots_are_counted_for_each_copy():
    mesh = make_mesh(MeshConfig(4, 1, 2))

    def make(slots: int) -> Engine:
        return engine_of(4 * slots, mesh)

    room = make(10).memory(70)
    assert fitting(make, None, 10_000, lambda engine: engine.memory(70), room).slots == 40
    with pytest.raises(UserError, match=r"^11 slots take .*: 10 would fit"):
        fitting(make, 11, 10_000, lambda engine: engine.memory(70), room)


def test_a_model_beside_which_not_even_one_fits():
    for slots in (None, 4):
        with pytest.raises(UserError, match="share a copy of the model among more devices"):
            made(slots, 100, engine_of(1).memory(70) - 1)


def test_no_more_slots_than_crystals_nor_than_are_of_use():
    assert made(None, 5, 1 << 40).slots == 5
    assert made(None, 10_000, 1 << 40).slots == MOST
    assert made(2 * MOST, 10_000, 1 << 40).slots == 2 * MOST
    assert made(None, 10_000, None).slots == DEFAULT
    assert made(7, 10_000, None).slots == 7
    with pytest.raises(UserError, match="slots is 0"):
        made(0, 10_000, None)


def test_int8_has_room_for_more():
    room = engine_of(10).memory(70)
    small = fitting(
        lambda slots: engine_of(slots, cache_dtype="int8"), None, 999, lambda engine: engine.memory(70), room
    )
    assert small.slots > 10


def test_what_is_left_is_told_by_the_fullest_device():
    def device(**told):
        return SimpleNamespace(memory_stats=lambda: told or None)

    devices = [device(bytes_limit=1000, bytes_in_use=100), device(bytes_limit=1000, bytes_in_use=300)]
    assert memory_left(SimpleNamespace(local_devices=devices)) == int(1000 * SHARE) - 300
    assert memory_left(SimpleNamespace(local_devices=[*devices, device()])) is None
    assert memory_left(make_mesh(MeshConfig(1, 1, 1))) is None  # CPUs do not tell
