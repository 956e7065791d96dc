"""One step: the same on every mesh, and it moves what it should and nothing else."""

import math
import re
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import SMALL, Numbers, RandomRows, crystal_set

from jaxcrystal.aot.hlo import Program
from jaxcrystal.aot.work import Work
from jaxcrystal.config import LoraConfig, MeshConfig, OptimizerConfig
from jaxcrystal.mesh import batch_sharding, make_mesh
from jaxcrystal.model.llama import Llama, initialize, param_shardings
from jaxcrystal.training import speed
from jaxcrystal.training import step as step_file
from jaxcrystal.training.loss import next_token_loss
from jaxcrystal.training.packing import Feed
from jaxcrystal.training.step import UNROLLED, Trainer, make_optimizer, unrolls

LENGTH = 384
DRY, WET = LoraConfig(rank=4, dropout=0.0), LoraConfig(rank=4, dropout=0.5)


def run(mesh_config, lora, tokenizer, writer, steps=4, learning_rate=1e-2):
    """Losses and the final state of a few steps on a mesh."""
    mesh = make_mesh(mesh_config)
    model = Llama(SMALL, lora)
    feed = Feed.of(crystal_set(60), tokenizer, writer, LENGTH, rows_per_batch=8, seed=0)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=learning_rate, warmup_steps=1), steps)
    trainer = Trainer(model, writer, optimizer, mesh, LENGTH)
    state = trainer.start(initialize(model, jax.random.key(7), mesh))
    before = jax.device_get(state)
    table = feed.epoch(0)
    place = lambda i: jax.device_put(feed.batch(table[i % len(table)]), batch_sharding(mesh))  # noqa: E731
    step, evaluate = trainer.compile_train(state, place(0)), trainer.compile_eval(state, place(0))
    losses = []
    for i in range(steps):
        state, metrics = step(state, place(i), feed.key(0))
        losses.append(float(metrics.loss))
    return losses, before, jax.device_get(state), float(evaluate(state, place(0), feed.key(0)).loss)


@pytest.fixture(scope="module")
def one_device(tokenizer, writer):
    """`run` on one device, once for each setting of adapters."""
    return cache(lambda lora: run(MeshConfig(1, 1, 1), lora, tokenizer, writer))


@pytest.mark.parametrize(
    ("mesh", "lora"),
    [
        pytest.param(MeshConfig(2, 2, 2), None, marks=pytest.mark.slow),
        (MeshConfig(2, 2, 2), DRY),
    ],
    ids=["2x2x2 full", "2x2x2 lora"],
)
def test_a_mesh_gives_the_same_losses(mesh, lora, one_device, tokenizer, writer):
    one, _, state_one, eval_one = one_device(lora)
    many, _, state_many, eval_many = run(mesh, lora, tokenizer, writer)
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-5)
    assert eval_many == pytest.approx(eval_one, abs=1e-5)
    assert one[-1] < one[0] - 0.1 or lora  # it learns; adapters on random weights do so slowly
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state_one.trained, state_many.trained)


@pytest.mark.parametrize("mesh", [(1, 8, 1), (8, 1, 1)], ids=str)
def test_a_mesh_that_divides_one_axis_alone_gives_the_same_losses(mesh):
    """On random rows; with those of the writer in test_hosts.py."""
    (one, many), (trained_one, trained_many) = zip(
        *(random_run(lora=DRY, steps=4, mesh=shape, evaluated=True)[:2] for shape in ((1, 1, 1), mesh)), strict=True
    )
    for ours, theirs in zip(many, one, strict=True):  # four steps, then a validation
        assert ours.loss == pytest.approx(theirs.loss, rel=0, abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), trained_one, trained_many)


def test_adapters_move_and_the_base_does_not(one_device):
    _, before, after, _ = one_device(DRY)
    jax.tree.map(np.testing.assert_array_equal, before.frozen, after.frozen)
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (before.trained, after.trained)), strict=True))
    moments = [x.shape for x in jax.tree.leaves(after.optimizer) if x.ndim]
    assert sorted(moments) == sorted(2 * [x.shape for x in jax.tree.leaves(after.trained)])


def test_a_packed_row_has_the_loss_of_its_crystals_alone(tokenizer, writer):
    """Neighbours in a row do not see each other, nor does one predict another's first token."""
    feed = Feed.of(crystal_set(30), tokenizer, writer, 512, rows_per_batch=4, seed=0)
    mesh = make_mesh(MeshConfig(1, 1, 1))
    model, key = Llama(SMALL), feed.key(0)
    variables = initialize(model, jax.random.key(0), mesh)

    @jax.jit
    def loss(examples):
        rows = writer.write(examples, writer.draw(key, examples), 512)
        hidden, _ = model.apply(variables, rows.tokens, rows.positions, rows.segments, method="hidden")
        head = model.apply(variables, method="head")
        return next_token_loss(hidden, head, rows, 256, model.config.vocab_size)

    packed = [loss(feed.batch(batch)) for batch in feed.epoch(0)]
    alone = [loss(feed.batch(np.array([[i]]))) for i in range(30)]
    packed, alone = (jax.tree.map(lambda *x: sum(map(float, x)), *sums) for sums in (packed, alone))
    assert packed.nats == pytest.approx(alone.nats, rel=1e-5)
    assert (packed.targets, packed.tokens, packed.crystals) == (alone.targets, alone.tokens, alone.crystals)
    assert packed.crystals == 30 and packed.tokens == packed.targets + 30


@cache
def start_values(config, lora):
    """Variables on the host; b of the adapters is not zero, so that dropout shows in the first loss."""
    variables = jax.device_get(initialize(Llama(config, lora), jax.random.key(7), make_mesh(MeshConfig(1, 1, 1))))
    return variables | {"lora": jax.tree.map(lambda x: x + 0.05, variables["lora"])} if lora else variables


def random_trainer(config=SMALL, lora=None, mesh=(1, 1, 1), index=range(16), length=128, optimizer="adamw", **options):
    """A trainer on random rows, its first state, and a batch."""
    mesh = make_mesh(MeshConfig(*mesh))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=1, name=optimizer), 4)
    model = Llama(config, lora)
    trainer = Trainer(model, RandomRows(), optimizer, mesh, length, **options)
    variables = jax.device_put(start_values(replace(config, remat="none"), lora), param_shardings(model, mesh))
    examples = jax.device_put(Numbers(jnp.array(index)[:, None]), batch_sharding(mesh))
    return trainer, trainer.start(variables), examples


@cache
def random_run(steps=2, evaluated=False, **options):
    """Metrics of a few steps and perhaps of a validation, what was trained, the compiled step and the first state."""
    trainer, first, examples = random_trainer(**options)
    state, step, told = first, trainer.compile_train(first, examples), []
    for _ in range(steps):
        state, metrics = step(state, examples, jax.random.key(0))
        told.append(jax.device_get(metrics))
    if evaluated:
        told.append(jax.device_get(trainer.compile_eval(state, examples)(state, examples, jax.random.key(0))))
    return told, jax.device_get(state.trained), step, first


def test_adapters_are_whole_on_every_device():
    """Of them, a step over fsdp sends their gradients and nothing else, each once; the base's kernels are gathered."""
    rank = 5  # no other array has an axis of this size
    adapters = LoraConfig(rank=rank, dropout=0.0, targets=("q_proj", "o_proj", "up_proj", "down_proj"))
    _, trained, step, _ = random_run(lora=adapters, mesh=(1, 8, 1))
    sent = Work.of(Program.parse(step.as_text())).collectives
    kinds = {collective.kind for collective in sent if re.search(rf"\b{rank}\b", collective.shape)}
    assert kinds == {"all-reduce"}
    assert "all-gather" in {collective.kind for collective in sent}
    _, alone, *_ = random_run(lora=adapters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), trained, alone)


def test_remat_takes_less_memory_and_computes_the_same():
    """On 8 layers, dropout included: what is computed again is drawn again."""
    deep = replace(SMALL, num_hidden_layers=8)
    runs = {
        remat: random_run(config=replace(deep, remat=remat), lora=LoraConfig(rank=4, dropout=0.3), length=96)
        for remat in ("none", "dots", "full")
    }
    temporary = {remat: step.memory_analysis().temp_size_in_bytes for remat, (_, _, step, _) in runs.items()}
    assert temporary["full"] < 0.9 * temporary["dots"] < 0.8 * temporary["none"]
    told, trained, _, _ = runs["none"]
    for other, after, _, _ in (runs["dots"], runs["full"]):
        np.testing.assert_allclose([m.loss for m in other], [m.loss for m in told], rtol=1e-6)
        np.testing.assert_allclose([m.grad_norm for m in other], [m.grad_norm for m in told], rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), after, trained)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, dropout=0.3)], ids=["full", "lora"])
def test_unrolled_layers_compute_what_scanned_ones_do(lora, monkeypatch):
    """On one CPU device few layers are no loop: another program, with the same losses, dropout and gradients."""
    unrolled, after, program, _ = random_run(lora=lora, evaluated=True)
    monkeypatch.setattr(step_file, "UNROLLED", 0)
    scanned, expected, loop, _ = random_run.__wrapped__(lora=lora, evaluated=True)
    # Without the loop over layers, each of them has its own loops over attention's blocks.
    assert program.as_text().count(" while(") > loop.as_text().count(" while(")
    for ours, theirs in zip(unrolled, scanned, strict=True):  # two steps, then a validation
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
    # Where a gradient is rounding, Adam's step is too: one of 14,336 was seen to differ by 4e-5.
    pairs = zip(*map(jax.tree.leaves, (after, expected)), strict=True)
    away = np.concatenate([np.abs(ours - theirs).ravel() for ours, theirs in pairs])
    assert away.max() < 1e-4 and (away > 1e-5).mean() < 1e-4


@pytest.mark.parametrize(
    ("changes", "mesh", "expected"),
    [
        ({}, (1, 1, 1), True),
        ({"num_hidden_layers": UNROLLED}, (1, 1, 1), True),
        ({"num_hidden_layers": UNROLLED + 1}, (1, 1, 1), False),
        ({}, (1, 8, 1), False),
        ({"remat": "dots"}, (1, 1, 1), False),
        ({"weights": "int8"}, (1, 1, 1), False),
        ({"num_hidden_layers": UNROLLED + 1, "remat": "full", "scan_layers": False}, (1, 8, 1), True),
    ],
    ids=str,
)
def test_which_steps_unroll_their_layers(changes, mesh, expected):
    assert unrolls(replace(SMALL, **changes), make_mesh(MeshConfig(*mesh))) is expected


def test_a_step_on_another_platform_scans_its_layers():
    chip = SimpleNamespace(platform="tpu")
    assert not unrolls(SMALL, SimpleNamespace(size=1, devices=np.array([[[chip]]])))


def test_what_is_computed_again_is_not_counted_as_useful():
    variables = start_values(SMALL, DRY)
    configs = [replace(SMALL, remat=remat) for remat in ("none", "dots", "full")]
    flops = {speed.Multiplied.of(config, variables, "lora").flops_per_token(context=100) for config in configs}
    assert len(flops) == 1


@pytest.mark.parametrize(
    ("mesh", "parts", "lora"),
    [((1, 1, 1), 4, None), ((1, 1, 1), 4, DRY), ((2, 2, 2), 4, DRY), ((1, 8, 1), 2, None)],
    ids=lambda value: "full" if value is None else "lora" if value is DRY else str(value),
)
def test_micro_batches_add_up_to_the_batch(mesh, parts, lora):
    """Rows count from 20 to 126 tokens, so that a mean of means would be another number."""
    whole, trained, step, _ = random_run(lora=lora)
    told, after, in_parts, _ = random_run(accumulate=parts, mesh=mesh, lora=lora)
    for ours, theirs in zip(told, whole, strict=True):
        assert (ours.tokens, ours.written, ours.crystals) == (theirs.tokens, theirs.written, theirs.crystals)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), after, trained)
    if mesh == (1, 1, 1):
        used, whole_used = (s.memory_analysis().temp_size_in_bytes for s in (in_parts, step))
        assert used < whole_used / 2


def test_dropout_is_applied_in_training_and_not_in_validation():
    losses = {}
    for kind in (DRY, WET, "layers"):
        dropped = kind == "layers"
        trainer, state, examples = random_trainer(
            config=replace(SMALL, dropout=0.3 * dropped), lora=DRY if dropped else kind
        )
        told = trainer.compile_eval(state, examples)(state, examples, jax.random.key(0))
        step = trainer.compile_train(state, examples)
        state, first = step(state, examples, jax.random.key(0))
        _, second = step(state, examples, jax.random.key(0))  # the rate of the first step was 0
        losses[kind] = [float(m.loss) for m in (told, first, second)]
    dry, wet, layers = losses.values()
    assert layers[0] == wet[0] == dry[0] == pytest.approx(dry[1], rel=1e-6)
    assert len({dry[1], wet[1], wet[2], layers[1], layers[2]}) == 5 and dry[1] == dry[2]


def test_micro_batches_draw_dropout_of_their_own():
    """Two micro-batches hold the same rows: dropped alike, their mean would be the loss of these rows alone."""
    twice = (0, 0, 1, 1, 2, 2, 3, 3)  # row i of micro-batch m is row 2 i + m
    (alone,), *_ = random_run(lora=WET, index=range(4), steps=1)
    (both,), *_ = random_run(lora=WET, index=twice, steps=1, accumulate=2)
    assert both.tokens == 2 * alone.tokens and abs(both.loss - alone.loss) > 1e-4


def test_a_step_consumes_its_state():
    _, _, step, first = random_run(accumulate=4, mesh=(1, 1, 1), lora=None)
    assert all(x.is_deleted() for x in jax.tree.leaves(first))
    held = sum(x.nbytes for x in jax.tree.leaves((first.trained, first.optimizer)))
    assert step.memory_analysis().alias_size_in_bytes >= held


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_a_step_never_holds_all_logits(mesh):
    """At LLaMA-2's vocabulary, compiled; every weight is trained, and all is so narrow that logits are what counts."""
    narrow = replace(SMALL, vocab_size=32000, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    rows, length = 8, 256
    used, whole = (
        random_run(config=narrow, mesh=mesh, index=range(rows), length=length, steps=0, loss_block=block)[2]
        .memory_analysis()
        .temp_size_in_bytes
        for block in (16, length)
    )
    share = rows * length * 32000 * 4 // math.prod(mesh)  # of one device, in float32
    assert used < share / 2 < share < whole


def test_every_setting_of_the_optimizer_shows():
    base = OptimizerConfig(learning_rate=0.1, warmup_steps=2, clip_norm=1.0)
    start = {"norm": {"scale": jnp.ones(4)}, "layers": {"kernel": jnp.ones((1, 2, 2))}}

    def path(config, steps=10):
        # Gradients that turn and whose size varies: Adam sees neither moment nor clipping of one that does not.
        optimizer = make_optimizer(config, steps)
        state, w, values = optimizer.init(start), start, []
        for i in range(steps):
            gradient = jnp.sin(jnp.arange(4.0) + i) * (0.2 + i % 3)
            gradients = {"norm": {"scale": gradient}, "layers": {"kernel": gradient.reshape(1, 2, 2)}}
            updates, state = optimizer.update(gradients, state, w)
            w = optax.apply_updates(w, updates)
            values.append([w["norm"]["scale"], w["layers"]["kernel"].ravel()])
        return np.array(values)

    reference = path(base)
    assert (reference[0] == 1).all()  # the first step of the warm-up has rate 0
    muon = replace(base, name="muon")
    by_muon = path(muon)
    np.testing.assert_array_equal(by_muon[:, 0], reference[:, 0])  # a norm is AdamW's in both
    for change in ({"muon_beta": 0.5}, {"muon_rms": 0.1}, {"name": "adamw"}, {"weight_decay": 0.1}):
        assert not np.allclose(path(replace(muon, **change))[:, 1], by_muon[:, 1], atol=1e-6), change
    for change in (
        {"learning_rate": 0.05}, {"warmup_steps": 4}, {"final_fraction": 0.5}, {"weight_decay": 0.1}, {"beta1": 0.5},
        {"beta2": 0.9}, {"clip_norm": 0.1},
    ):  # fmt: skip
        assert not np.allclose(path(replace(base, **change)), reference, atol=1e-6), change
