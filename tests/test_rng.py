"""Random numbers are llm.c's, bit for bit: what its llmc/rand.h gives when gcc compiles it.

The comment in that file lists PyTorch's numbers, of which some differ in the last bit.
"""

import hashlib

import numpy as np
import pytest

from gpu_gpt2.rng.mersenne import CHUNK, MersenneTwister

EIGHT_OF_137 = [
    0.794766486, 1.43693173, -0.229219183, 0.475563288,
    -0.633441091, -0.579195499, -0.0925704017, -0.865919709,
]  # fmt: skip
SIXTEEN_OF_137 = [
    -1.28138781, -2.64639568, -0.0656950399, 0.21808295,
    -0.465362161, -0.331084102, 2.54854822, 0.104253836,
    0.846065938, 0.946244836, -0.291376501, 0.343138069,
    -1.11867034, -0.1830533, -2.31531596, 0.396198779,
]  # fmt: skip


def normal(twister: MersenneTwister, n: int, std: float = 1.0) -> np.ndarray:
    out = np.full(n, np.nan, np.float32)
    twister.fill_normal(out, std)
    return out


def same(values: np.ndarray, expected: list[float]) -> None:
    np.testing.assert_array_equal(values, np.array(expected, np.float32))


def test_draws() -> None:
    first = [1608637542, 3421126067, 4083286876, 787846414, 3143890026, 3348747335]
    assert MersenneTwister(42).draw(6).tolist() == first
    first = [494155588, 2134003008, 2615920895, 442015537, 572909845, 638974010]
    assert MersenneTwister(43).draw(6).tolist() == first


def test_uniform() -> None:
    values = MersenneTwister(42).uniform(4)
    same(values, [0.882269263, 0.915003955, 0.38286376, 0.959305644])


def test_llmc_s_own_check() -> None:
    twister = MersenneTwister(137)
    draws = [4053805790, 2173880614, 380293709, 1237255315, 2986595568]
    assert twister.draw(5).tolist() == draws
    same(normal(twister, 8), EIGHT_OF_137)
    assert twister.draw(1) == 2186503452
    same(normal(twister, 16), SIXTEEN_OF_137)
    assert twister.draw(1) == 2756748748


def test_few_normals() -> None:
    eight = [0.336690456, 0.128809437, 0.234462395, 0.230333045, -1.12285638, -0.186328575,
             2.20820165, -0.637996733]  # fmt: skip
    same(normal(MersenneTwister(42), 8), eight)
    # An odd last one takes its pair's draws all the same.
    twister = MersenneTwister(42)
    same(normal(twister, 7), eight[:7])
    assert twister.state()[1] == 16


def test_every_count_below_sixteen() -> None:
    values = [normal(MersenneTwister(n), n, 0.02) for n in range(1, 16)]
    digest = hashlib.sha256(np.concatenate(values).astype("<f4").tobytes()).hexdigest()
    assert digest == "96b2bceda0ba3c318cc1911ca1595c1dfe5cb39d2e221aef95b09d58fe702af6"


def test_normals_with_a_tail() -> None:
    values = normal(MersenneTwister(42), 20)
    same(values[:4], [1.92691505, 1.48728418, 0.900717199, -2.10552144])
    same(values[-4:], [-0.309726924, -0.395710498, 0.803409338, -0.621595383])


@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 48, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 40])
def test_chunks_do_not_show(n: int) -> None:
    """As if all were drawn at once, and the last sixteen once more."""
    twister, again = MersenneTwister(7), MersenneTwister(7)
    values = normal(twister, n, 0.02)
    assert np.isfinite(values).all()
    whole = n // 16 * 16
    if n < 16:
        again.draw(4 * ((n + 1) // 2))
    else:
        kept = whole if n == whole else n - 16
        alone = [normal(again, 16, 0.02) for _ in range(whole // 16)]
        np.testing.assert_array_equal(values[:kept], np.concatenate(alone)[:kept])
        if n != whole:
            again.draw(n - whole)
            np.testing.assert_array_equal(values[-16:], normal(again, 16, 0.02))
    assert twister.draw(1) == again.draw(1)


def test_normals_look_normal() -> None:
    values = normal(MersenneTwister(1), 1 << 16, 3.0)
    assert abs(values.mean()) < 0.05
    assert abs(values.std() - 3.0) < 0.05
    assert abs((np.abs(values) < 3.0).mean() - 0.6827) < 0.01


def test_zero_has_no_sign() -> None:
    """A uniform 0 makes the radius -0; llm.c adds the mean, 0, to the product."""
    values = normal(MersenneTwister(1), 1 << 16, 0.0)
    assert not values.any()
    assert not np.signbit(values).any()


def test_permutation() -> None:
    assert MersenneTwister(42).permutation(10).tolist() == [1, 3, 9, 7, 6, 0, 8, 4, 5, 2]
    assert MersenneTwister(43).permutation(10).tolist() == [2, 6, 9, 4, 0, 1, 5, 7, 3, 8]
    first = [29, 58, 10, 4, 11, 25, 63, 56, 72, 65, 16, 21]
    assert MersenneTwister(42).permutation(74)[:12].tolist() == first


def test_one_element_takes_no_draw() -> None:
    twister = MersenneTwister(42)
    assert twister.permutation(1).tolist() == [0]
    assert twister.draw(1) == 1608637542


def test_goes_on_from_a_state() -> None:
    twister = MersenneTwister(5)
    twister.draw(700)
    words, drawn = twister.state()
    expected = twister.draw(1000)
    other = MersenneTwister(6)
    other.restore(words, drawn)
    np.testing.assert_array_equal(other.draw(1000), expected)
