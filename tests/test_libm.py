"""logf, sinf and cosf as glibc rounds them, and as float64 finds them."""

import hashlib
from collections.abc import Callable

import numpy as np
import pytest

from gpu_gpt2.rng.libm import logf, sinf_cosf

# One argument in 64 of those that a uniform draw of 24 bits leads to, and the largest.
UNIFORM = np.append(np.arange(0, 1 << 24, 64), (1 << 24) - 1).astype(np.float32) / (1 << 24)
SMALL = np.float32(1e-12)
ANGLES = (2 * np.pi * UNIFORM.astype(np.float64)).astype(np.float32)


def check_ulp(x: np.ndarray, got: np.ndarray, exact: Callable[[np.ndarray], np.ndarray]) -> None:
    assert got.dtype == np.float32
    expected = exact(x.astype(np.float64))
    ulp = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    assert (np.abs(got - expected) / ulp).max() < 1


def test_within_one_ulp_of_float64() -> None:
    octaves = np.exp2(np.arange(-126, 128, dtype=np.float32))
    positive = np.concatenate([UNIFORM[1:], octaves, np.nextafter(octaves, np.float32(0))[1:]])
    check_ulp(positive, logf(positive), np.log)
    sine, cosine = sinf_cosf(ANGLES)
    check_ulp(ANGLES, sine, np.sin)
    check_ulp(ANGLES, cosine, np.cos)


@pytest.mark.parametrize(
    ("values", "sha256"),
    [
        (
            lambda: logf((1 - UNIFORM) + SMALL),
            "87f3bc8d41a26f1872e5520599711819b691ae4e9e4e32bd245ca1617f860daf",
        ),
        (
            lambda: sinf_cosf(ANGLES)[0],
            "a827046178dd154f2d58112b693a3f5ead0a7ea7812da0cac1619a529c525c59",
        ),
        (
            lambda: sinf_cosf(ANGLES)[1],
            "5ae044db468879f8416a3bfdecbe4bf14da0a7ea55c35812c108703439de0782",
        ),
    ],
    ids=["logf", "sinf", "cosf"],
)
def test_every_bit_is_glibcs(values: Callable[[], np.ndarray], sha256: str) -> None:
    """Sums of what a C program linked to glibc 2.36 gives for the same arguments."""
    assert hashlib.sha256(values().astype("<f4").tobytes()).hexdigest() == sha256


def test_where_the_logarithm_ends() -> None:
    ends = np.array([1.0, 1e-12, 2.0**-126], np.float32)
    np.testing.assert_array_equal(
        logf(ends).view(np.uint32), np.array([0, 0xC1DD0C55, 0xC2AEAC50], np.uint32)
    )
    assert [value.item() for value in sinf_cosf(np.zeros(1, np.float32))] == [0.0, 1.0]
