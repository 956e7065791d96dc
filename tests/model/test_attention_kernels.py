"""Each kernel against the reference where it can run, and the choice between them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcrystal.config import LlamaConfig, MeshConfig
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model import attention_kernels
from jaxcrystal.model.attention import View, attend
from jaxcrystal.model.llama import Llama, initialize

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8,
)  # fmt: skip


def inputs(rows: int = 2, time: int = 256, heads: int = 4, kv_heads: int = 2, width: int = 8, dtype=jnp.float32):
    """Queries, keys, values, and segments whose borders differ between rows and end in padding."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(rows, time, count, width) for count in (heads, kv_heads, kv_heads)]
    at, row = np.arange(time), np.arange(rows)[:, None]
    segments = np.where(at < 90 + row, 1, np.where(at < 200 - 5 * row, 2, 0)).astype(np.int32)
    return *(2 * jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)), jnp.asarray(segments)


def outputs(implementation: str, queries, keys, values, segments):
    """The result of `attend`, and the gradients of queries, keys and values for random cotangents."""
    weights = jax.random.normal(jax.random.key(1), queries.shape)

    def loss(queries, keys, values):
        y = attend(queries, keys, values, View.of(implementation, queries.shape[1], segments))
        return jnp.sum(y * weights), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(queries, keys, values)
    return y, *gradients


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("segmented", [True, False], ids=["segments", "one segment"])
@pytest.mark.parametrize(("kernel", "time"), [("splash", 256), ("blocks", 256), ("blocks", 300), ("blocks", 50)])
def test_every_kernel_equals_the_reference(kernel, time, kv_heads, segmented):
    """300 is no multiple of a block, 50 is less than one."""
    *qkv, segments = inputs(time=time, kv_heads=kv_heads)
    segments = segments if segmented else None
    for found, wanted in zip(outputs(kernel, *qkv, segments), outputs("xla", *qkv, segments), strict=True):
        assert float(jnp.abs(wanted).max()) > 1
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * jnp.abs(wanted).max())


def test_blocks_of_other_segments_are_not_read_and_those_of_unordered_ones_are():
    """Keys and values of crystals whose blocks hold none of a query's are nan: products with them would show."""
    *qkv, _ = inputs(rows=2, time=512)
    segments = jnp.repeat(jnp.arange(1, 5), 128)[None].repeat(2, 0)
    wanted = outputs("blocks", *qkv, segments)
    queries, keys, values = qkv
    broken = outputs("blocks", queries, *(x.at[:, :128].set(jnp.nan) for x in (keys, values)), segments)
    for found, theirs in zip(broken, wanted, strict=True):
        assert np.isnan(found[:, :128]).any()
        np.testing.assert_array_equal(found[:, 128:], theirs[:, 128:])
    mixed = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 512)))
    for found, theirs in zip(outputs("blocks", *qkv, mixed), outputs("xla", *qkv, mixed), strict=True):
        np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-5 * jnp.abs(theirs).max())


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU")
@pytest.mark.parametrize("segmented", [True, False], ids=["segments", "one segment"])
def test_cudnn_equals_the_reference(segmented):
    *qkv, segments = inputs(width=64, dtype=jnp.bfloat16)
    segments = segments if segmented else None
    wide = [x.astype(jnp.float32) for x in qkv]
    for found, wanted in zip(outputs("cudnn", *qkv, segments), outputs("xla", *wide, segments), strict=True):
        error = np.abs(np.asarray(found, np.float32) - wanted).max()
        assert error < 0.02 * np.abs(wanted).max()


def test_blocks_of_bfloat16_err_less_than_twice_what_the_reference_errs():
    """The output is kept rounded, and what backward takes from it with it, as in FlashAttention."""
    *qkv, segments = inputs(time=300, width=64, dtype=jnp.bfloat16)
    exact = outputs("xla", *(x.astype(jnp.float32) for x in qkv), segments)
    error = lambda found, wanted: np.sqrt(np.mean((np.asarray(found, np.float32) - wanted) ** 2))  # noqa: E731
    for found, theirs, wanted in zip(
        outputs("blocks", *qkv, segments), outputs("xla", *qkv, segments), exact, strict=True
    ):
        assert 0 < error(found, wanted) < 2 * error(theirs, wanted)


def test_what_blocks_keep_for_backward_grows_with_time_and_not_with_its_square():
    def kept(implementation: str, time: int) -> int:
        *qkv, segments = inputs(rows=1, time=time)
        attention = lambda *qkv: attend(*qkv, View.of(implementation, time, segments))  # noqa: E731
        backward = jax.eval_shape(lambda *qkv: jax.vjp(attention, *qkv)[1], *qkv)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))

    assert kept("blocks", 1024) < 2.1 * kept("blocks", 512) < 4 * 512 * 512 * 4
    assert kept("xla", 1024) > 3.5 * kept("xla", 512)


@pytest.mark.parametrize("kernel", ["splash", "blocks"])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)], ids=str)
def test_a_model_with_a_kernel_equals_the_reference_on_every_mesh(sizes, kernel):
    mesh, segments = make_mesh(MeshConfig(*sizes)), inputs(rows=8, time=128)[-1]
    model = Llama(CONFIG)
    variables = initialize(model, jax.random.key(0), mesh)
    tokens = jax.random.randint(jax.random.key(1), segments.shape, 0, CONFIG.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(128), segments.shape)

    def gradient(implementation: str, remat: str):
        model = Llama(replace(CONFIG, attention=implementation, remat=remat))

        def loss(variables):
            logits, _ = model.apply(variables, tokens, positions, segments)
            return jnp.sum(jnp.where(segments[..., None] > 0, jnp.sin(logits), 0))

        with jax.set_mesh(mesh):
            return jax.jit(jax.value_and_grad(loss))(variables)

    (found, ours), (wanted, theirs) = gradient(kernel, "full"), gradient("xla", "none")
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_kernels_that_know_segments_need_no_mask():
    *_, segments = inputs()
    assert all(View.of(kernel, 256, segments).mask is None for kernel in ("splash", "blocks"))
    assert View.of("cudnn", 256).mask is None


HALF = replace(CONFIG, dtype="bfloat16", head_dim=64)


@pytest.mark.parametrize(
    ("platform", "config", "time", "mesh", "chosen", "why"),
    [
        ("cpu", CONFIG, 256, (1, 1, 1), "blocks", "cpu has no kernel"),
        ("tpu", CONFIG, 256, (2, 2, 2), "splash", "the kernel of tpu"),
        ("tpu", CONFIG, 200, (1, 1, 1), "blocks", "not splash, because rows of 200 tokens are no multiple of 128"),
        (
            "tpu",
            CONFIG,
            256,
            (1, 1, 4),
            "blocks",
            "kv_heads of size 2 cannot be divided over the mesh axis tensor of 4",
        ),
        ("tpu", replace(CONFIG, attention="xla"), 256, (1, 1, 1), "xla", "names it"),
        ("gpu", HALF, 256, (2, 2, 2), "cudnn", "the kernel of gpu"),
        ("gpu", CONFIG, 256, (1, 1, 1), "blocks", "model.dtype is float32"),
        ("gpu", replace(HALF, head_dim=256), 256, (1, 1, 1), "blocks", "model.head_dim is 256"),
        ("gpu", replace(HALF, head_dim=20), 256, (1, 1, 1), "blocks", "model.head_dim is 20"),
        ("gpu", HALF, 255, (1, 1, 1), "blocks", "rows of 255"),
    ],
)
def test_auto_takes_what_can_run_and_says_why(platform, config, time, mesh, chosen, why, monkeypatch):
    monkeypatch.setattr(attention_kernels, "platform", lambda: platform)
    with jax.set_mesh(make_mesh(MeshConfig(*mesh))):
        implementation, reason = attention_kernels.choose(config, 8, time)
    assert implementation == chosen and why in reason


def test_the_platform_is_that_of_the_mesh():
    assert attention_kernels.platform() == jax.default_backend()
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        assert attention_kernels.platform() == jax.devices()[0].platform


@pytest.mark.parametrize(
    ("attention", "time", "message"),
    [("cudnn", 128, "model.attention is 'cudnn', but cudnn runs on gpu"), ("splash", 100, "rows of 100 tokens")],
)
def test_a_kernel_that_is_named_and_cannot_run_is_refused(attention, time, message):
    if attention == "cudnn" and jax.default_backend() == "gpu":
        pytest.skip("cudnn runs here")
    model = Llama(replace(CONFIG, attention=attention))
    variables = initialize(model, jax.random.key(0), make_mesh(MeshConfig(1, 1, 1)))
    tokens = np.zeros((1, time), np.int32)
    with pytest.raises(UserError, match=message):
        model.apply(variables, tokens, tokens)
