"""The slot engine against transformers and the uncached model, and its independence of all but the index."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig as TorchLlamaConfig
from transformers import LlamaForCausalLM

from jaxcrystal.config import MeshConfig, TextFormat
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.sampling.decoding import STEPS_PER_CALL
from jaxcrystal.sampling.engine import Ending, Engine, Task
from jaxcrystal.sampling.methods import Greedy, Guidance, Temperature, TopP
from jaxcrystal.weights.checkpoint_map import load_hf
from jaxcrystal.weights.saved import SavedModel

END = 2
VOCAB = 48
LIMIT = 40


def tiny_llama(seed: int, kv_heads: int, tied: bool) -> LlamaForCausalLM:
    """A LLaMA whose random weights are wide enough that every token leaves its mark on what follows."""
    torch.manual_seed(seed)
    config = TorchLlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=END,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def saved(torch_model: LlamaForCausalLM, directory, mesh=None) -> SavedModel:
    torch_model.save_pretrained(directory)
    config, params = load_hf(directory, mesh or make_mesh(MeshConfig(1, 1, 1)))
    return SavedModel(config, None, TextFormat(), params, None, None, 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> SavedModel:
    return saved(tiny_llama(0, kv_heads=2, tied=False), tmp_path_factory.mktemp("model"))


def prompt_of(length: int) -> list[int]:
    return [1, *np.random.default_rng(length).integers(3, VOCAB, length - 1).tolist()]


def drawn(engine: Engine, prompt, seed, indices):
    """What was drawn; log-probabilities may differ in the last bit where batches differ."""
    return [
        (d.index, d.tokens.tolist(), d.ending, pytest.approx(d.log_probability, abs=1e-3))
        for d in engine.draw(prompt, seed, indices)
    ]


def engine_of(model: SavedModel, **options) -> Engine:
    return Engine(
        model, **{"end_id": END, "methods": (Temperature(0.9), TopP(0.9)), "max_new_tokens": LIMIT, **options}
    )


@pytest.mark.parametrize(("seed", "kv_heads", "tied"), [(1, 4, False), (2, 2, True), (3, 1, False)])
def test_greedy_is_transformers_greedy(tmp_path, seed, kv_heads, tied):
    """64 prompts of 1 to 127 tokens, with and without a block's end before, at and behind theirs, in one run."""
    torch_model = tiny_llama(seed, kv_heads, tied)
    engine = engine_of(saved(torch_model, tmp_path), methods=(Greedy(),), slots=7)
    all_prompts = [prompt_of(length) for length in range(1, 129, 2)]
    all_prompts[31], all_prompts[33] = prompt_of(64), prompt_of(128)
    longest = max(map(len, all_prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in all_prompts])
    options = {"do_sample": False, "max_new_tokens": LIMIT}
    together = torch_model.generate(padded, attention_mask=(padded > 0).long(), **options)[:, longest:].tolist()
    for prompt, expected in zip(all_prompts[::21], together[::21], strict=True):  # padding left no trace
        alone = torch_model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        assert alone == expected[: len(alone)]
    for draw, expected in zip(engine.draw_all(all_prompts, 0, [Task(p, 0) for p in range(64)]), together, strict=True):
        ended = END in expected
        assert draw.tokens.tolist() == (expected[: expected.index(END) + 1] if ended else expected)
        assert draw.ending == (Ending.FINISHED if ended else Ending.TRUNCATED)


def test_log_probability_is_that_of_the_uncached_model_without_methods(model):
    prompt = prompt_of(10)
    draws = list(engine_of(model, slots=4).draw(prompt, 5, range(12)))
    assert {Ending.FINISHED, Ending.TRUNCATED} == {draw.ending for draw in draws}
    tokens = np.zeros((12, len(prompt) + LIMIT), np.int32)
    for row, draw in zip(tokens, draws, strict=True):
        row[: len(prompt) + len(draw.tokens)] = [*prompt, *draw.tokens]
    logits, _ = model.module.apply(model.variables, tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
    each = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits))[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]
    for row, draw in zip(each[:, len(prompt) - 1 :], draws, strict=True):
        assert draw.log_probability == pytest.approx(float(row[: len(draw.tokens)].sum()), abs=1e-4)


def test_first_tokens_follow_the_models_probabilities(model):
    prompt = prompt_of(5)
    logits, _ = model.module.apply(model.variables, jnp.array([prompt]), jnp.arange(5)[None])
    expected = 20_000 * np.asarray(jax.nn.softmax(logits[0, -1]), np.float64)
    first = engine_of(model, methods=(), slots=500, max_new_tokens=1).draw(prompt, 0, range(20_000))
    counts = np.bincount([draw.tokens[0] for draw in first], minlength=VOCAB)
    assert (((counts - expected) ** 2 / expected).sum() - VOCAB) / np.sqrt(2 * VOCAB) < 4


@pytest.fixture(scope="module")
def alone(model):
    """What each index gives by itself, in an engine of one slot."""
    engine = engine_of(model, slots=1)
    return {index: drawn(engine, prompt_of(9), 7, [index])[0] for index in range(30)}


def test_crystals_differ_by_index_and_by_seed(model, alone):
    assert len({tuple(tokens) for _, tokens, _, _ in alone.values()}) == 30
    assert drawn(engine_of(model, slots=1), prompt_of(9), 8, [0])[0] != alone[0]


@pytest.mark.parametrize("slots", [1, 7, 64])
def test_a_crystal_does_not_depend_on_slots_or_neighbours(model, alone, slots):
    engine = engine_of(model, slots=slots)
    assert drawn(engine, prompt_of(9), 7, range(30)) == list(alone.values())
    order = np.random.default_rng(0).permutation(30).tolist()
    assert drawn(engine, prompt_of(9), 7, order) == [alone[index] for index in order]


@pytest.mark.parametrize("axes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_a_crystal_does_not_depend_on_devices(tmp_path, alone, axes):
    mesh = make_mesh(MeshConfig(*axes))
    engine = engine_of(saved(tiny_llama(0, kv_heads=2, tied=False), tmp_path, mesh), slots=16, mesh=mesh)
    assert drawn(engine, prompt_of(9), 7, range(30)) == list(alone.values())


def test_slots_are_rounded_up_to_the_mesh(tmp_path):
    mesh = make_mesh(MeshConfig(8, 1, 1))
    model = saved(tiny_llama(0, kv_heads=2, tied=False), tmp_path, mesh)
    assert engine_of(model, slots=9, mesh=mesh).slots == 16


def test_texts_are_the_same_to_the_bit_in_whatever_order_they_are_drawn(model):
    """A run that goes on after a kill fills its slots differently: its ledger must not show it."""
    engine = engine_of(model, slots=7)
    inorder, rest = (list(engine.draw(prompt_of(9), 7, range(start, 30))) for start in (0, 13))
    assert [d.log_probability for d in inorder[13:]] == [d.log_probability for d in rest]


def several() -> tuple[list[list[int]], list[Task]]:
    """Nine prompts of different lengths, one of them twice, and tasks for them in no order."""
    prompts = [prompt_of(length) for length in (3, 9, 40, 64, 65, 90, 9, 30, 7)]
    tasks = [Task(prompt, index) for prompt in range(len(prompts)) for index in range(6)]
    return prompts, [tasks[i] for i in np.random.default_rng(0).permutation(len(tasks))]


@pytest.mark.parametrize("slots", [1, 7, 64])
def test_a_crystal_does_not_depend_on_other_prompts(model, slots):
    prompts, tasks = several()
    found = list(engine_of(model, slots=slots).draw_all(prompts, 7, tasks))
    assert [Task(draw.prompt, draw.index) for draw in found] == tasks
    engine = engine_of(model, slots=3)
    alone = [{draw.index: draw for draw in engine.draw(prompt, 7, range(6))} for prompt in prompts]
    for draw in found:
        expected = alone[draw.prompt][draw.index]
        assert draw.tokens.tolist() == expected.tokens.tolist() and draw.ending == expected.ending
        assert draw.log_probability == pytest.approx(expected.log_probability, abs=1e-3)
    assert len({tuple(draw.tokens) for draw in found if draw.index == 0}) == 8  # prompts 1 and 6 are the same


def test_each_prompt_is_read_once(model, monkeypatch):
    prompts = [*several()[0][:6], prompt_of(4), prompt_of(90)]  # the last is that of number 5
    engine = engine_of(model, slots=7)
    read, read_prompt = [], engine._read_prompt
    monkeypatch.setattr(engine, "_read_prompt", lambda *a: read.append(a[3].flat[: a[4]].tolist()) or read_prompt(*a))
    list(engine.draw_all(prompts, 7, [Task(prompt, index) for prompt in range(8) for index in range(6)]))
    assert read == prompts[:-1]


def logits_behind(model: SavedModel, prompt: list[int], draws) -> np.ndarray:
    """Of the uncached model, before each drawn token: [draws, LIMIT, vocab]."""
    tokens = np.zeros((len(draws), len(prompt) + LIMIT), np.int32)
    for row, draw in zip(tokens, draws, strict=True):
        row[: len(prompt) + len(draw.tokens)] = [*prompt, *draw.tokens]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits, _ = jax.jit(model.module.apply)(model.variables, tokens, positions)
    return np.asarray(logits)[:, len(prompt) - 1 : -1]


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 2.5])
def test_guidance_weighs_what_the_uncached_model_says_behind_both_prompts(model, w):
    asked, plain = prompt_of(9), prompt_of(5)
    engine = engine_of(model, methods=(Greedy(),), guidance=Guidance(w), unconditional=plain, slots=3)
    prompts = [asked, prompt_of(70), prompt_of(12), prompt_of(31)]
    draws = list(engine.draw_all(prompts, 0, [Task(p, 0) for p in range(4)]))
    for prompt, draw in zip(prompts, draws, strict=True):
        ours, theirs = (logits_behind(model, p, [draw])[0, : len(draw.tokens)] for p in (prompt, plain))
        guided = theirs + w * (ours - theirs)
        assert draw.tokens.tolist() == guided.argmax(-1).tolist()
        each = np.asarray(jax.nn.log_softmax(ours))  # what is told is the model's own
        own = each[np.arange(len(draw.tokens)), draw.tokens].sum()
        assert draw.log_probability == pytest.approx(own, abs=1e-3)


def test_guidance_changes_what_is_drawn_and_not_what_it_depends_on(model, alone):
    def guided(w: float, **options):
        engine = engine_of(model, guidance=Guidance(w), unconditional=prompt_of(5), **options)
        return drawn(engine, prompt_of(9), 7, range(30))

    assert guided(1.0, slots=4) == list(alone.values())
    pressed = guided(3.0, slots=4)
    assert pressed != list(alone.values()) and guided(3.0, slots=13) == pressed


def test_a_cache_of_int8_is_near_to_the_models_own_and_as_independent(model):
    prompt = prompt_of(30)
    engine = engine_of(model, cache_dtype="int8", methods=(Temperature(0.9),), slots=5)
    draws = list(engine.draw(prompt, 7, range(30)))
    logits = jax.nn.log_softmax(logits_behind(model, prompt, draws))
    exact = [
        np.take_along_axis(row[: len(draw.tokens)], draw.tokens[:, None], 1).sum()
        for row, draw in zip(np.asarray(logits), draws, strict=True)
    ]
    error = np.array([draw.log_probability for draw in draws]) - exact
    assert 1e-4 < np.abs(error).max() and np.sqrt((error**2).mean()) < 0.3
    again = engine_of(model, cache_dtype="int8", methods=(Temperature(0.9),), slots=16).draw(prompt, 7, range(30))
    assert [draw.tokens.tolist() for draw in again] == [draw.tokens.tolist() for draw in draws]


def test_bfloat16_is_the_same_wherever_batches_are_the_same_size(model):
    """There a product's last bit may depend on the number of rows, not on what the others hold."""
    config = dataclasses.replace(model.config, dtype="bfloat16")
    engine = engine_of(dataclasses.replace(model, config=config), slots=7)
    first = {draw.index: draw.tokens.tolist() for draw in engine.draw(prompt_of(9), 7, range(30))}
    order = np.random.default_rng(0).permutation(30).tolist()
    assert {draw.index: draw.tokens.tolist() for draw in engine.draw(prompt_of(9), 7, order)} == first


def test_nothing_is_compiled_after_the_first_call(model):
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compilations.append(event) if "backend_compile" in event else None
    )
    engine = engine_of(model, slots=3)
    list(engine.draw(prompt_of(9), 0, range(5)))
    assert compilations  # the listener hears them
    compilations.clear()
    list(engine.draw(prompt_of(9), 1, range(40)))
    list(engine.draw(prompt_of(20), 2, [4]))
    assert not compilations
    prompts, tasks = several()
    list(engine.draw_all(prompts, 0, tasks))
    assert len(compilations) <= 3  # for more prompts at once: opening, reading, decoding
    compilations.clear()
    list(engine.draw_all(prompts[::-1], 1, tasks[::-1]))
    list(engine.draw_all([prompt_of(length) for length in range(66, 76)], 2, tasks))
    assert not compilations


def test_a_slot_is_free_again_after_logits_that_are_no_numbers(model, alone):
    prompt = prompt_of(9)
    poison = next(token for token in alone[1][1] if token not in prompt)
    params = jax.tree.map(lambda x: x, model.params)
    params["embed_tokens"]["embedding"] = params["embed_tokens"]["embedding"].at[poison].set(jnp.nan)
    engine = engine_of(dataclasses.replace(model, params=params), slots=2)
    endings = []
    for draw in engine.draw(prompt, 7, range(30)):
        tokens = alone[draw.index][1]
        met = poison in tokens[:-1]
        endings.append(draw.ending)
        assert (draw.ending is Ending.NAN_LOGITS) == met
        assert draw.tokens.tolist() == (tokens[: tokens.index(poison) + 1] if met else tokens)
        assert np.isnan(draw.log_probability) == met
    assert len(set(endings)) > 1


def test_texts_longer_than_one_call_of_the_device(model):
    engine = engine_of(model, slots=2, methods=(Greedy(),), end_id=-1, max_new_tokens=2 * STEPS_PER_CALL + 5)
    draws = list(engine.draw(prompt_of(3), 0, [0]))
    assert len(draws[0].tokens) == 2 * STEPS_PER_CALL + 5
    short = list(engine_of(model, slots=2, methods=(Greedy(),), end_id=-1).draw(prompt_of(3), 0, [0]))
    assert draws[0].tokens[:LIMIT].tolist() == short[0].tokens.tolist()


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(model):
    with pytest.raises(UserError, match=r"prompt has 217 tokens and 40 may follow.*context holds 256.*at most 39"):
        engine_of(model).draw(prompt_of(217), 0, [0])
    assert list(engine_of(model, slots=1).draw(prompt_of(216), 0, [0]))


@pytest.mark.parametrize(
    ("option", "match"), [({"slots": 0}, "slots is 0"), ({"max_new_tokens": 0}, "max_new_tokens is 0")]
)
def test_impossible_sizes_are_refused(model, option, match):
    with pytest.raises(UserError, match=match):
        engine_of(model, **option)


def test_seeds_and_indices_outside_32_bits_are_refused(model):
    with pytest.raises(UserError, match="seed -1"):
        engine_of(model).draw([1], -1, [0])
    with pytest.raises(UserError, match="index 4294967296"):
        engine_of(model).draw([1], 0, [2**32])


def test_one_program_reads_and_one_draws_whatever_prompts_come(model):
    """Of 1 to 3 pages, more than the pool holds at a time; each draw is that of its prompt alone, to the bit."""
    engine = engine_of(model, slots=7)
    prompts = [prompt_of(int(length)) for length in np.linspace(2, 190, 40)]
    alone = [draw for prompt in prompts for draw in engine.draw(prompt, 7, range(3))]
    together = list(engine.draw_all(prompts, 7, [Task(p, index) for p in range(40) for index in range(3)]))
    assert engine._run._cache_size() == engine._read_prompt._cache_size() == 1
    for one, other in zip(together, alone, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist() and one.log_probability == other.log_probability


def test_an_abandoned_iterator_gives_memory_back_and_leaves_the_engine_usable(model):
    engine = engine_of(model, slots=7)
    tasks = [Task(0, index) for index in range(30)]
    whole = [draw.tokens.tolist() for draw in engine.draw_all([prompt_of(9)], 7, tasks)]
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    waiting = engine.draw_all([prompt_of(9)], 7, tasks)
    next(waiting)
    assert sum(array.nbytes for array in jax.live_arrays()) > before
    with pytest.raises(KeyboardInterrupt):
        waiting.throw(KeyboardInterrupt)
    del waiting
    gc.collect()
    assert sum(array.nbytes for array in jax.live_arrays()) == before
    assert [draw.tokens.tolist() for draw in engine.draw_all([prompt_of(9)], 7, tasks)] == whole
