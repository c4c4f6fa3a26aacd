"""kernels/sample.cu and the NumPy op, on every device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from devices import assert_case, every_device, kernel_devices, make_ops, op_cases, upload

from gpu_gpt2.device.base import INT32, X_DTYPES
from gpu_gpt2.device.source import kernel_source, kernels_dir
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.ops import reference
from gpu_gpt2.ops.cases import Case
from gpu_gpt2.ops.table import MAX_VOCABULARY, Ops, sample_scalars

KEY = (123, -456)
KERNELS = kernels_dir()  # kernel_folder replaces it in a test


@op_cases("sample")
def test_draws_the_same_token_everywhere(case: Case, dtype: str, device: str) -> None:
    assert_case(case, dtype, device)


def draw(
    ops: Ops,
    logits: npt.ArrayLike,
    *,
    starts: npt.ArrayLike | None = None,
    key: tuple[int, int] = KEY,
    vocab_size: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
) -> npt.NDArray[Any]:
    """Returns the drawn token of each row of logits; `vocab_size` is by default all columns."""
    device = ops.device
    rows = upload(device, logits, X_DTYPES[ops.dtype])
    B, V = rows.shape
    tokens = device.empty((B,), INT32)
    positions = upload(device, np.zeros(B) if starts is None else starts, INT32)
    before = device.download(positions)
    words = upload(device, np.array(key), INT32)
    ops.sample(tokens, positions, rows, words, vocab_size or V, temperature, top_k, top_p)
    np.testing.assert_array_equal(device.download(positions), before + 1)
    return device.download(tokens)


def kept(logits: npt.NDArray[Any], temperature: float, top_k: int, top_p: float) -> set[int]:
    """Returns the tokens that top_k and top_p keep, in float64 and token by token."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        order = [i for i in order if logits[i] >= logits[order[min(top_k, len(order)) - 1]]]
    weights = {i: np.exp((logits[i] - logits.max()) / temperature) for i in order}
    if not 0 < top_p < 1:
        return {i for i in order if weights[i] > 0}
    share, last = 0.0, order[0]
    for last in order:
        share += weights[last] / sum(weights.values())
        if share >= top_p:
            break
    return {i for i in order if logits[i] >= logits[last]}


def chi_square(tokens: npt.NDArray[Any], p: npt.NDArray[np.float64]) -> float:
    """Returns the chi-square statistic of the tokens' frequencies, in standard deviations."""
    counts = np.bincount(tokens, minlength=len(p))
    expected = len(tokens) * p
    degrees = len(p) - 1
    return float((((counts - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees))


# --- frequencies ---

ROW = np.array([0.0, 1.0, -1.0, 2.0, 0.5, 0.5, -0.25, 1.5, -0.0, 0.75, -2.0, 0.125])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_are_those_of_the_softmax(temperature: float) -> None:
    """Between positions of one sequence, between sequences, and between keys."""
    ops = make_ops("cpu", "fp32")
    p = np.exp(ROW / temperature) / np.exp(ROW / temperature).sum()
    n = 4_000
    sequences = draw(ops, np.tile(ROW, (n, 1)), temperature=temperature)
    assert abs(chi_square(sequences, p)) < 4
    for one in (
        [draw(ops, [ROW], starts=[i], temperature=temperature)[0] for i in range(n)],
        [draw(ops, [ROW], key=(i, 0), temperature=temperature)[0] for i in range(n)],
        [draw(ops, [ROW], key=(0, i), temperature=temperature)[0] for i in range(n)],
    ):
        assert abs(chi_square(np.array(one), p)) < 4


def test_the_frequency_test_sees_another_temperature() -> None:
    tokens = draw(make_ops("cpu", "fp32"), np.tile(ROW, (4_000, 1)), temperature=1.25)
    assert chi_square(tokens, np.exp(ROW) / np.exp(ROW).sum()) > 6


@every_device
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (4, 0.0), (5, 0.6), (0, 0.7)])
def test_frequencies_among_the_kept_tokens(
    top_k: int, top_p: float, dtype: str, device: str
) -> None:
    ops = make_ops(device, dtype)
    tokens = draw(ops, np.tile(ROW, (600, 1)), top_k=top_k, top_p=top_p)
    inside = sorted(kept(ROW, 1.0, top_k, top_p))
    p = np.exp(ROW[inside])
    assert set(tokens.tolist()) <= set(inside)
    assert abs(chi_square(np.searchsorted(inside, tokens), p / p.sum())) < 4


# --- sets ---

FLAT = np.zeros(40)
STEPS = np.repeat([2.0, 1.5, 1.0, 0.5], [1, 3, 2, 4])  # ties at every step


@every_device
@pytest.mark.parametrize(
    ("logits", "temperature", "top_k", "top_p"),
    [
        *((STEPS, 1.0, k, 0.0) for k in (1, 2, 3, 4, 5, 6, 7, 9, 10, 11)),
        *((STEPS, 1.0, 0, p) for p in (1e-30, 0.05, 0.2, 0.25, 0.6, 0.8, 0.95, 0.999, 1.0, 2.0)),
        *((STEPS, 0.7, 5, p) for p in (0.1, 0.5, 0.9)),
        (-STEPS - 7, 1.3, 6, 0.55),  # negative logits
        (np.array([1.0, -0.0, 0.0, -1.0]), 1.0, 2, 0.0),  # 0 and -0 are equal
        (np.array([0.0, 1.0, -0.0, -1.0]), 1.0, 0, 0.6),
        (np.array([-1e-3, 1e-3, 0.0, -1e-3]), 1.0, 2, 0.0),
        *((FLAT, 1.0, k, p) for k, p in ((0, 0.0), (3, 0.0), (0, 0.5), (40, 0.01))),
        (np.array([0.0, -np.inf, 1.0, -np.inf]), 1.0, 0, 0.0),
        (np.array([0.0, -np.inf, 1.0, -np.inf]), 1.0, 3, 0.0),
        (np.array([0.0, -np.inf, 1.0, -np.inf]), 1.0, 0, 0.99),
        (np.array([60.0, 0.0, 0.0, 1.0]), 1.0, 0, 0.0),  # weights below 2^-40 are 0
        (np.array([60.0, 0.0, 0.0, 1.0]), 1.0, 2, 0.9999),
        (np.array([1.0]), 1.0, 1, 0.5),
        (np.array([1.0, 1.0, 0.5]), 1e-300, 0, 0.0),  # temperatures beyond float32
        (np.array([100.0, -100.0, 0.5]), 1e300, 0, 0.0),
    ],
)
def test_the_kept_tokens_are_exactly_those_of_the_definition(
    logits: npt.NDArray[Any], temperature: float, top_k: int, top_p: float, dtype: str, device: str
) -> None:
    """Each kept token has a probability above 2 %, so 400 draws show all of them."""
    stored = logits.astype(X_DTYPES[dtype]).astype(np.float64)
    weights = np.exp((stored - stored.max()) / temperature)
    expected = {i for i in kept(stored, temperature, top_k, top_p) if weights[i] > 2.0**-40}
    assert min(weights[list(expected)]) / sum(weights[list(expected)]) > 0.02
    tokens = draw(
        make_ops(device, dtype),
        np.tile(logits, (400, 1)),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    assert set(tokens.tolist()) == expected


@every_device
def test_a_share_that_is_reached_exactly_needs_no_more_tokens(dtype: str, device: str) -> None:
    """Weights 2, 1, 1 times 2^39: a share of 1/2 is one token, and slightly more is all three."""
    logits = np.tile([1.0, 0.0, 0.0], (200, 1))
    ops = make_ops(device, dtype)
    temperature = 1 / np.log(2.0)  # a logit of 1 doubles the weight
    at_half = draw(ops, logits, temperature=temperature, top_p=0.5)
    above = draw(ops, logits, temperature=temperature, top_p=np.nextafter(0.5, 1.0))
    assert set(at_half.tolist()) == {0}
    assert set(above.tolist()) == {0, 1, 2}


# --- temperature 0, single tokens, damaged rows ---


@every_device
def test_temperature_zero_is_the_argmax_and_of_equal_ones_the_lowest_id(
    dtype: str, device: str
) -> None:
    rng = np.random.default_rng(0)
    logits = np.round(4 * rng.standard_normal((5, 1500)))
    logits[1] = -3.0
    logits[2, :] = -np.inf
    logits[2, 77] = -5.0
    logits[3, :7] = -0.0
    logits[3, 7:] = -1.0
    logits[3, 9] = 0.0
    tokens = draw(make_ops(device, dtype), logits, temperature=0.0, top_k=3, top_p=0.5)
    assert tokens.tolist() == logits.argmax(axis=1).tolist()


@every_device
def test_one_token(dtype: str, device: str) -> None:
    ops = make_ops(device, dtype)
    logits = [[-3.5, np.nan], [0.0, np.nan]]
    for settings in ({}, {"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.1}):
        assert draw(ops, logits, vocab_size=1, **settings).tolist() == [0, 0]


@every_device
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_a_nan_or_an_infinite_maximum_gives_no_token(
    temperature: float, dtype: str, device: str
) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((8, 300))
    logits[0, 299] = np.nan
    logits[1, 0] = -np.nan  # its sign bit is set
    logits[2, 150] = np.inf
    logits[3] = -np.inf
    logits[4, :299] = -np.inf
    logits[5, 299:] = np.inf
    logits[6] = np.nan
    tokens = draw(make_ops(device, dtype), logits, temperature=temperature, top_k=7, top_p=0.9)
    assert (tokens == -1).tolist() == [True, True, True, True, False, True, True, False]
    assert tokens[4] == 299


# --- the random number ---


@every_device
def test_a_draw_depends_on_index_position_and_key_and_not_on_other_sequences(
    dtype: str, device: str
) -> None:
    ops = make_ops(device, dtype)
    logits = np.random.default_rng(0).standard_normal((6, 1000))
    starts = np.array([3, 3, 9, 100, 0, 7])
    tokens = draw(ops, logits, starts=starts)
    others = np.random.default_rng(1).standard_normal((6, 1000))
    for b in range(6):
        changed = others.copy()
        changed[b] = logits[b]
        positions = np.full(6, 55)
        positions[b] = starts[b]
        assert draw(ops, changed, starts=positions)[b] == tokens[b]
    same = np.tile(logits[:1], (6, 1))
    assert len(set(draw(ops, same, starts=np.full(6, 3)).tolist())) > 3
    assert len({draw(ops, logits[:1], starts=[start])[0] for start in range(6)}) > 3
    assert len({draw(ops, logits[:1], key=(n, 0))[0] for n in range(6)}) > 3
    assert len({draw(ops, logits[:1], key=(0, -n))[0] for n in range(6)}) > 3


@every_device
def test_the_drawn_token_is_where_the_running_sum_passes_the_random_number(
    dtype: str, device: str
) -> None:
    """With 1000 equal weights the token is 1000 u rounded down; u is Philox's, by position."""
    published = 0xE169C58D6627E8D5  # the first two words of counter 0 and key 0
    tokens = draw(
        make_ops(device, dtype), np.zeros((1, 1000)), starts=[-1], key=(0, 0), temperature=2.0
    )
    assert tokens[0] == published * 1000 >> 64


WEIGHTS = """
extern "C" __global__ void weights(int* halves, const floatX* logits, float max, float scale) {
    Row row;
    row.max = max;
    row.scale = scale;
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    uint64 weight = weight_of(to_float(logits[i]), row);
    halves[2 * i] = (int)weight;
    halves[2 * i + 1] = (int)(weight >> 32);
}
"""


@kernel_devices
def test_weights_are_the_same_integers_as_in_numpy(
    kernel_folder: Path, dtype: str, device: str
) -> None:
    (kernel_folder / "weights.cu").write_text((KERNELS / "sample.cu").read_text() + WEIGHTS)
    on = make_ops(device, dtype).device
    logits = 6 * np.random.default_rng(0).standard_normal(1024) - 20
    logits[:4] = 0.0, -1000.0, -np.inf, -1e-3
    stored = upload(on, logits, X_DTYPES[dtype])
    row = on.download(stored).astype(np.float32)
    for scale in (1 / np.log(2.0), 0.1, 5.0, 3e38, 1.2e-38):
        halves = on.empty((1024, 2), INT32)
        args = (halves, stored, float(row.max()), float(np.float32(scale)))
        on.launch(kernel_source("weights.cu", dtype), "weights", (4,), (256,), args)
        found = on.download(halves).copy().view(np.int64).reshape(-1)
        expected = reference._integer_weights(row, row.max(), scale)
        np.testing.assert_array_equal(found, expected)
        exact = 2.0**40 * np.exp2((row.astype(np.float64) - row.max()) * np.float32(scale))
        np.testing.assert_allclose(found, exact, rtol=4e-6, atol=1.0)


def test_weights_do_not_depend_on_numbers_that_gpus_take_for_zero() -> None:
    """Below 2^-126 a GPU takes inputs and results for 0 (CuPy compiles with -ftz=true)."""

    def flushed(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)

    rng = np.random.default_rng(0)
    scale = sample_scalars(4000, 1e-300, 0, 0.0).scale
    for exponent in range(-149, -90):  # of the largest logit
        exponents = rng.integers(-149, exponent + 1, 4000)
        row = np.ldexp(rng.choice([-1.0, 1.0], 4000) * rng.uniform(1, 2, 4000), exponents)
        row = row.astype(np.float32)
        exact = reference._integer_weights(row, row.max(), scale)
        differences = flushed(flushed(row) - flushed(row.max()))
        on_gpu = reference._integer_weights(differences, np.float32(0), scale)
        np.testing.assert_array_equal(on_gpu, exact)


TOKENS_AT = """
// tokens[i] = the token at the running sum drawn[i], given as a number of weights plus `offset`.
extern "C" __global__ void tokens_at(int* tokens, const floatX* logits, const int* drawn, int V,
                                     int offset) {
    Row row;
    row.logits = logits;
    row.V = V;
    row.begin = threadIdx.x * WIDTH;
    row.end = V;
    row.max = 0.0f;
    row.scale = 1.0f;
    uint64 at = ((uint64)drawn[blockIdx.x] << ONE_LOG2) + (long long)offset;
    int token = token_in_segment(row, key_of(0.0f), at);
    if (token >= 0) {
        tokens[blockIdx.x] = token;
    }
}
"""


@kernel_devices
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_boundaries_between_tokens(
    offset: int, kernel_folder: Path, dtype: str, device: str
) -> None:
    """Of 300 tokens every third is kept, and all kept ones have the weight 2^40."""
    (kernel_folder / "tokens_at.cu").write_text((KERNELS / "sample.cu").read_text() + TOKENS_AT)
    on = make_ops(device, dtype).device
    logits = np.full(300, -1.0)
    logits[::3] = 0.0
    stored = upload(on, logits, X_DTYPES[dtype])
    drawn = np.arange(100) + (offset < 0)
    drawn = drawn[drawn < 100]
    tokens = on.empty(drawn.shape, INT32)
    width = 16 // stored.dtype.itemsize
    args = (tokens, stored, upload(on, drawn, INT32), 300, offset)
    kernel = kernel_source("tokens_at.cu", dtype, WIDTH=width)
    on.launch(kernel, "tokens_at", drawn.shape, (32,), args)
    np.testing.assert_array_equal(on.download(tokens), 3 * (drawn - (offset < 0)))


# --- what is refused ---


@pytest.mark.parametrize("device", ["cpu", "emulator"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "sample: temperature = -0.1 must be a finite number >= 0"),
        ({"temperature": np.inf}, "sample: temperature = inf must be a finite number >= 0"),
        ({"temperature": np.nan}, "sample: temperature = nan must be a finite number >= 0"),
        ({"top_k": -1}, "sample: top_k = -1 must be a finite number >= 0"),
        ({"top_p": -0.5}, "sample: top_p = -0.5 must be a finite number >= 0"),
        ({"top_p": np.nan}, "sample: top_p = nan must be a finite number >= 0"),
    ],
)
def test_refuses_settings_without_a_meaning(
    settings: dict[str, Any], message: str, device: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        draw(make_ops(device, "fp32"), np.zeros((1, 8)), **settings)


def test_refuses_a_vocabulary_that_the_logits_or_the_sums_do_not_hold() -> None:
    ops = make_ops("emulator", "fp32")
    with pytest.raises(ValueError, match="vocab_size 9 is not within 1 to 8 columns"):
        draw(ops, np.zeros((1, 8)), vocab_size=9)
    with pytest.raises(ConfigError, match=f"vocab_size = {MAX_VOCABULARY + 1} must be 1 to"):
        draw(ops, np.zeros((1, MAX_VOCABULARY + 1)))
