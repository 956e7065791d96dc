"""Stored kernels against a reference in numpy: exact codes, exact packing, errors within half a step."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import norm

from jaxcrystal.config import MeshConfig
from jaxcrystal.mesh import batch_sharding, make_mesh, sharding
from jaxcrystal.model.kernels import LEVELS, _pack, _unpack, count_weights, decode, encode, multiply

AXES = ("embed", "mlp")
CODES = st.integers(0, 15)
store = jax.jit(encode, static_argnums=1)
restore = jax.jit(decode, static_argnums=1)


def normal_float() -> np.ndarray:
    """NF4 as QLoRA makes it: quantiles of N(0, 1), 8 negative ones (0 the last) and 9 positive ones (0 the first)."""
    tail = (1 / 32 + 1 / 30) / 2  # left out at either end, where a quantile would be infinite
    positive, negative = norm.ppf(np.linspace(0.5, 1 - tail, 9)), norm.ppf(np.linspace(tail, 0.5, 8))
    return np.concatenate([negative[:-1], positive]) / positive[-1]


def nearest_level(relative: np.ndarray) -> np.ndarray:
    """Which level is nearest to each float32, computed without rounding; the lower one of two as near."""
    distance = np.abs(relative.astype(np.float64)[..., None] - LEVELS.astype(np.float64))
    return distance.argmin(axis=-1)


def inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale for every weight that it scales; 0 where there is none but zeros."""
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)[..., None, :]


def codes_of(kernel) -> np.ndarray:
    """NF4's codes, [in, out], read from the bytes without the package."""
    packed = np.asarray(kernel["nf4"])
    blocks = packed.reshape(*packed.shape[:-2], -1, 32, packed.shape[-1])
    return np.concatenate([blocks % 16, blocks // 16], axis=-2).reshape(*packed.shape[:-2], -1, packed.shape[-1])


def random_kernel(shape, seed=0) -> np.ndarray:
    """Weights whose outputs and layers differ in size, some of them all zero."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=shape).astype(np.float32) * rng.lognormal(size=(*shape[:-2], 1, shape[-1]))
    kernel[..., 3] = 0
    kernel[..., :64, 4] = 0
    return kernel.astype(np.float32)


def test_levels_are_the_quantiles_of_the_paper():
    np.testing.assert_allclose(LEVELS, normal_float(), atol=3e-7)
    assert LEVELS.dtype == np.float32 and (LEVELS[0], LEVELS[7], LEVELS[15]) == (-1, 0, 1)


@pytest.mark.parametrize("shape", [(64, 8), (3, 192, 40)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_is_numpys_int8(shape, dtype):
    kernel = jnp.asarray(random_kernel(shape), dtype)
    stored = store(kernel, "int8")
    wide = np.asarray(kernel, np.float32)
    scale = np.abs(wide).max(axis=-2) * np.float32(1 / 127)
    codes = np.rint(wide * inverse(scale))
    assert stored["int8"].dtype == jnp.int8 and stored["scale"].dtype == jnp.float32
    np.testing.assert_array_equal(stored["scale"], scale)
    np.testing.assert_array_equal(stored["int8"], codes)
    assert np.abs(codes).max(axis=-2)[scale > 0].min() == 127
    restored = restore(stored, jnp.float32)
    np.testing.assert_array_equal(restored, codes.astype(np.float32) * scale[..., None, :])
    assert (np.abs(restored - wide) <= scale[..., None, :] / 2 * (1 + 1e-5)).all()


def test_int8_ties_go_to_the_even_code():
    column = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.5]) / 64
    stored = store(jnp.asarray(column[:, None], jnp.float32), "int8")
    assert float(stored["scale"][0]) == 1 / 64
    np.testing.assert_array_equal(stored["int8"][:, 0], [127, 0, 2, 2, 0, -2, 126, -126])


@pytest.mark.parametrize("shape", [(64, 8), (3, 192, 40)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nf4_is_numpys_nf4(shape, dtype):
    kernel = jnp.asarray(random_kernel(shape), dtype)
    stored = store(kernel, "nf4")
    wide = np.asarray(kernel, np.float32)
    blocks = wide.reshape(*shape[:-2], -1, 64, shape[-1])
    scale = np.abs(blocks).max(axis=-2).astype(ml_dtypes.bfloat16)
    assert stored["nf4"].shape == (*shape[:-2], shape[-2] // 2, shape[-1]) and stored["nf4"].dtype == jnp.uint8
    np.testing.assert_array_equal(stored["scale"], scale)
    step = scale.astype(np.float32)
    codes = nearest_level(blocks * inverse(step)).reshape(shape)
    np.testing.assert_array_equal(codes_of(stored), codes)
    assert set(np.unique(codes)) == set(range(16))
    restored = np.asarray(restore(stored, jnp.float32))
    np.testing.assert_array_equal(restored, (LEVELS[codes].reshape(blocks.shape) * step[..., None, :]).reshape(shape))
    error, absmax = np.abs(restored - wide).reshape(blocks.shape), np.abs(blocks).max(axis=-2, keepdims=True)
    # Half the widest gap of the levels, 0.152; a scale's rounding to bfloat16 adds at most 2⁻⁸ of that.
    assert (error <= np.diff(LEVELS).max() / 2 * absmax * (1 + 2**-8)).all()
    assert not restored[..., 3].any() and not restored[..., :64, 4].any()


def test_nf4_between_two_levels_takes_the_nearer_one_to_the_last_bit():
    exact = (LEVELS[1:].astype(np.float64) + LEVELS[:-1]) / 2
    middle = exact.astype(np.float32)
    around = np.concatenate([np.nextafter(middle, np.float32(-2)), middle, np.nextafter(middle, np.float32(2)), LEVELS])
    assert (middle == exact).any()  # a tie that is one
    kernel = np.ones((64, 1), np.float32)  # so that the scale is 1
    kernel[: len(around), 0] = around
    codes = codes_of(store(jnp.asarray(kernel), "nf4"))[: len(around), 0]
    np.testing.assert_array_equal(codes, nearest_level(around))
    np.testing.assert_array_equal(codes[:15], range(15))
    np.testing.assert_array_equal(codes[30:45], range(1, 16))


def test_a_broken_weight_stays_visible():
    for weights in ("int8", "nf4"):
        kernel = np.ones((128, 3), np.float32)
        kernel[5, 1] = np.nan
        restored = np.asarray(restore(store(jnp.asarray(kernel), weights), jnp.float32))
        assert np.isnan(restored[5, 1]) and np.isfinite(restored[:, [0, 2]]).all()


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([(2, 1), (64, 3), (2, 3, 4, 5)]).flatmap(lambda shape: arrays(np.uint8, shape, elements=CODES)))
def test_packing_loses_nothing(codes):
    packed = np.asarray(jax.jit(_pack)(codes))
    half = codes.shape[-2] // 2
    assert packed.shape == (*codes.shape[:-2], half, codes.shape[-1]) and packed.dtype == np.uint8
    np.testing.assert_array_equal(packed, codes[..., :half, :] + 16 * codes[..., half:, :])
    np.testing.assert_array_equal(jax.jit(_unpack)(packed), codes)


@pytest.mark.parametrize("weights", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_is_that_of_the_decoded_kernel_and_so_is_its_gradient(weights, dtype):
    stored = store(jnp.asarray(random_kernel((128, 24))), weights)
    x = jax.random.normal(jax.random.key(0), (5, 128), dtype)

    @jax.jit
    def both(x):
        y, backward = jax.vjp(lambda x: multiply(x, stored, AXES), x)
        return y, *backward(jnp.ones_like(y))

    y, slope = both(x)
    decoded = np.asarray(restore(stored, jnp.float32), np.float64)
    assert y.dtype == x.dtype
    for ours, theirs in ((y, np.asarray(x, np.float64) @ decoded), (slope, np.ones((5, 24)) @ decoded.T)):
        tolerance = 1e-6 if dtype == "float32" else 0.01
        assert np.abs(np.asarray(ours, np.float64) - theirs).max() < tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("axes", [("embed", "mlp"), ("mlp", "embed"), ("embed", "rank")], ids=str)
def test_a_float_kernels_product_and_gradients_are_numpys_and_lie_as_the_kernel(sizes, axes):
    """float32, to 1e-5 of the largest; the gradient has the layout of the kernel on every mesh."""
    mesh = make_mesh(MeshConfig(*sizes))
    x, w, dy = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(8, 6, 32), (32, 16), (8, 6, 16)]))
    exact = [np.asarray(z, np.float64) for z in (x, w, dy)]
    place = sharding(mesh, axes, w.shape, "w")
    x, dy, w = *jax.device_put((x, dy), batch_sharding(mesh)), jax.device_put(w, place)

    @jax.jit
    def both(x, w, dy):
        y, backward = jax.vjp(lambda x, w: multiply(x, w, axes), x, w)
        return y, *backward(dy)

    with jax.set_mesh(mesh):
        y, dx, dw = both(x, w, dy)
    assert dw.sharding.is_equivalent_to(place, 2)
    wanted = exact[0] @ exact[1], exact[2] @ exact[1].T, np.einsum("bti,bto->io", exact[0], exact[2])
    for found, theirs in zip((y, dx, dw), wanted, strict=True):
        assert np.abs(np.asarray(found) - theirs).max() < 1e-5 * np.abs(theirs).max()


def test_a_kernels_gradient_is_reduce_scattered(tmp_path):
    """As the partitioner leaves it: every sum of a whole gradient is cut at once to each device's own part.

    That pair is what backends turn into a reduce-scatter. CPUs have none, so the program after partitioning is read.
    """
    mesh, axes = make_mesh(MeshConfig(1, 8, 1)), ("embed", "mlp")
    place = sharding(mesh, axes, (32, 16), "w")
    x = jax.ShapeDtypeStruct((8, 6, 32), jnp.bfloat16, sharding=batch_sharding(mesh))
    w = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=place)
    gradient = jax.grad(lambda w, x: jnp.sum(jnp.sin(multiply(x, w, axes).astype(jnp.float32))))
    with jax.set_mesh(mesh):
        lowered = jax.jit(gradient, out_shardings=place).lower(w, x)
    lowered.compile({"xla_dump_to": str(tmp_path), "xla_dump_hlo_pass_re": "spmd.*"})
    (program,) = (path.read_text() for path in tmp_path.glob("*after_spmd-partitioning*"))
    (name,) = re.findall(r"(%\S+) = f32\[32,16\]\S* all-reduce\(", program)
    (user,) = re.findall(rf"= (\S+?)\{{\S* ([\w-]+)\([^\n]*{re.escape(name)}[,)]", program)
    assert user == ("f32[4,16]", "dynamic-slice")


def test_float_kernels_are_stored_as_they_are():
    kernel = jnp.ones((2, 3), jnp.bfloat16)
    assert encode(kernel, "float") is kernel
    assert decode(kernel, jnp.float32).dtype == jnp.float32


def test_weights_are_counted_however_they_are_stored():
    for weights in ("float", "int8", "nf4"):
        kernel = jax.eval_shape(lambda: encode(jnp.ones((128, 5)), weights))  # noqa: B023
        tree = {"norm": {"scale": jnp.ones(7)}, "up_proj": {"kernel": kernel}}
        assert count_weights(tree) == 7 + 128 * 5
