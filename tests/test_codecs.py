"""Slots in fewer bits: what a codec does to numbers, compared with NumPy and with the figures of bitsandbytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from keras import ops

from keras_optkit.optimizers.engine.codecs import CODECS, Corrected, Signed, Unsigned, book
from keras_optkit.optimizers.engine.packing import Bucket
from keras_optkit.optimizers.groups import Treatment
from keras_optkit.testing.twins import codecs

#: XLA and TensorFlow take subnormal numbers for zeros.
SMALLEST = 2.0**-126
SIZES = st.sampled_from([0, 1, 2, 255, 256, 257, 600])


def bucket(shape, count=1):
    form = "bare" if count == 1 else "stacked"
    return Bucket(tuple(range(count)), (shape,) * count, "float32", Treatment(), form)


def stored(codec, x, noise=None):
    x = np.asarray(x, "float32")
    return codec.encode(bucket(x.shape), ops.convert_to_tensor(x), noise)


def after(codec, x, noise=None):
    return np.asarray(ops.convert_to_numpy(stored(codec, x, noise).decode(bucket(np.shape(x)))))


def same(a, b):
    return all(
        np.array_equal(*(np.asarray(ops.convert_to_numpy(ops.cast(x, "float32"))) for x in pair), equal_nan=True)
        for pair in zip(a, b, strict=True)
    )


@st.composite
def slots(draw, signed=True):
    """Elements of similar size, or of very different ones, some of them 0."""
    size = draw(SIZES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread, center = draw(st.sampled_from([0.0, 1.0, 5.0, 20.0])), draw(st.floats(-15, 15))
    x = rng.normal(size=size) * 10 ** (center + rng.uniform(-spread, spread, size))
    x[rng.uniform(size=size) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 0
    x = np.where(np.abs(x) < SMALLEST, 0, x).astype("float32")
    return x if signed else np.abs(x)


def in_blocks(x):
    return [x[i : i + 256] for i in range(0, len(x), 256)]


@given(slots())
def test_signed_blocks(x):
    got = after(Signed, x)
    for block, y in zip(in_blocks(x), in_blocks(got), strict=True):
        largest = np.abs(block).max(initial=0)
        # half of the largest distance of two figures, 0.9 / 64; the first one below 1 is farther for a second -1
        assert np.all(np.abs(y - block) <= 0.5001 * largest * 0.9 / 64)
        assert np.abs(y).max(initial=0) == largest
        # half of the smallest figure is the last that becomes 0
        tiny = np.abs(block) < 2.7e-7 * largest
        assert np.all(y[tiny] == 0)
        assert np.array_equal(np.sign(y[~tiny]), np.sign(block[~tiny])) or np.any(
            np.abs(block[~tiny]) < 2.8e-7 * largest
        )
    assert np.all(got[x == 0] == 0)
    assert same(stored(Signed, x), stored(Signed, got))


@given(slots(signed=False))
def test_unsigned_blocks(x):
    got = after(Unsigned, x)
    for block, y in zip(in_blocks(x), in_blocks(got), strict=True):
        largest = block.max(initial=0)
        assert np.all(np.abs(y - block) <= 0.5001 * largest * 0.9 / 128)
        normal = block * 3e-7 > SMALLEST  # what is decoded may be subnormal
        assert np.all(y[normal] > 0)
        assert np.all(y >= 0)
    assert np.all(got[x == 0] == 0)
    if x.max(initial=0) * 3e-7 > SMALLEST or not x.any():
        assert same(stored(Unsigned, x), stored(Unsigned, got))


def test_a_moment_above_0_stays_above_0_also_where_its_share_underflows():
    assert np.all(after(Unsigned, [1e20, 1e-20, 1e-25]) > 0)


@given(arrays("float32", SIZES, elements=st.floats(width=32)))
def test_bfloat16_with_a_correction(x):
    got = after(Corrected, x)
    np.testing.assert_array_equal(got, codecs.corrected(x))
    assert same(stored(Corrected, x), stored(Corrected, got))
    finite = np.isfinite(x) & (np.abs(x) < 3.4e38)
    assert np.all(
        np.abs(got[finite].astype("float64") - x[finite]) <= np.maximum(2.0**-16 * np.abs(x[finite]), 2.0**-142)
    )
    np.testing.assert_array_equal(np.isnan(got), np.isnan(x))
    np.testing.assert_array_equal(np.signbit(got[~np.isnan(x)]), np.signbit(x[~np.isnan(x)]))


@given(slots(), st.sampled_from(sorted(CODECS)), st.integers(0, 2**32))
def test_what_was_decoded_is_not_rounded_at_random(x, name, seed):
    codec = CODECS[name]
    x = after(codec, np.abs(x) if codec is Unsigned else x)
    if x.size and np.abs(x).max() * 3e-7 <= SMALLEST:
        return
    noise = np.random.default_rng(seed).integers(-(2**31), 2**31, x.shape).astype("int32")
    assert same(stored(codec, x), stored(codec, x, noise))


@given(slots(), st.booleans())
def test_blocks_equal_the_twin(x, signed):
    x = x if signed else np.abs(x)
    got, expected = after(Signed if signed else Unsigned, x), codecs.quantised(x, signed=signed)
    different = ~np.isclose(got, expected, rtol=1e-6, atol=1e-37)
    assert different.sum() <= 1 + 1e-3 * x.size  # in the middle of two figures the last bit of a quotient decides


@pytest.mark.parametrize("codec", [Signed, Unsigned])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 3e38])
def test_a_block_that_is_not_finite_is_nan_and_the_next_one_is_not(codec, bad):
    if codec is Unsigned and bad < 0:
        bad = np.inf
    x = np.ones(400, "float32")
    x[3] = bad
    got = after(codec, x)
    assert np.isnan(got[:256]).all()
    np.testing.assert_array_equal(got[256:], 1.0)


@pytest.mark.parametrize("codec", [Signed, Unsigned, Corrected])
def test_rounding_at_random_is_right_on_average(codec):
    x = np.full(2**16, 0.3217, "float32")
    x[::256] = 1.0
    noise = np.random.default_rng(0).integers(-(2**31), 2**31, x.shape).astype("int32")
    got = after(codec, x, noise)
    assert len(np.unique(got)) == 3
    rest = got[got < 0.9].astype("float64")
    gap = np.ptp(rest)
    # a mean of as many throws of a coin is off by less than four of its standard deviations
    assert abs(rest.mean() - x[1]) < 4 * 0.5 * gap / np.sqrt(rest.size) + gap * 2.0**-14


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_book_is_that_of_the_paper(signed):
    ours = book(signed=signed)
    np.testing.assert_allclose(ours, codecs.code_book(signed=signed), rtol=3e-7)
    assert ours.shape == (256,)
    # as `bitsandbytes.functional.create_dynamic_map` 0.50.2 prints them
    first = [-0.99296874, -0.9789063, -0.96484375] if signed else [0.0, 3.2500002e-07, 7.7499999e-07, 2.1249998e-06]
    last = [0.96484375, 0.9789063, 0.99296874, 1.0] if signed else [0.9824219, 0.9894531, 0.9964844, 1.0]
    middle = [-5.5000004e-07, 0.0, 5.5000004e-07, 3.2500002e-06] if signed else [0.09929688, 0.10351562, 0.11054687]
    place = 126
    np.testing.assert_allclose(ours[: len(first)], first, rtol=3e-7)
    np.testing.assert_allclose(ours[-4:], last, rtol=3e-7)
    np.testing.assert_allclose(ours[place : place + len(middle)], middle, rtol=3e-7)


def test_a_codec_takes_the_bytes_it_says_and_blocks_are_those_of_one_parameter():
    x = np.random.default_rng(0).normal(size=(3, 50, 100)).astype("float32")
    stack = bucket((50, 100), 3)
    for codec in CODECS.values():
        parts = codec.encode(stack, np.abs(x))
        sizes = [
            np.prod(p.shape) * {"bfloat16": 2, "float32": 4}.get(dtype, 1)
            for p, dtype in zip(parts, codec.dtypes(), strict=True)
        ]
        assert sum(sizes) == 3 * codec.bytes_of(5000)
        for i, each in enumerate(x):
            alone = codec.encode(bucket((50, 100)), np.abs(each))
            assert same([part[i] for part in parts], alone)
