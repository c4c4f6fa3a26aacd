"""A new model has llm.c's weights, to the last bit."""

import hashlib
import tracemalloc

import numpy as np
import pytest

from gpu_gpt2.config import GPT2Config, ModelConfig, model_config
from gpu_gpt2.formats.llmc_header import header_bytes
from gpu_gpt2.models.families import parameter_count, parameters
from gpu_gpt2.models.init import InitialWeights, initial_weights
from gpu_gpt2.models.weights import BFLOAT16, FloatArray, named, part_of, pieces
from gpu_gpt2.rng.mersenne import MersenneTwister

ODD = GPT2Config(vocab_size=257, n_positions=11, n_embd=12, n_layer=3, n_head=2)
SIZES = {
    "vocabulary of 257": ODD,
    "tensors below 16": GPT2Config(vocab_size=5, n_positions=3, n_embd=2, n_layer=2, n_head=1),
    "no multiple of 16": GPT2Config(vocab_size=7, n_positions=5, n_embd=5, n_layer=2, n_head=5),
}
FILE_ORDER = (
    "wte wpe ln1w ln1b qkvw qkvb attprojw attprojb ln2w ln2b fcw fcb fcprojw fcprojb lnfw lnfb"
)


def file_sum(c: ModelConfig, arena: FloatArray, version: int, dtype: np.dtype) -> str:
    """The SHA-256 of llm.c's model file with these weights."""
    sizes = (c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd, c.padded_vocab_size)
    digest = hashlib.sha256(header_bytes(20240326, version, *sizes))
    tensors = named(c, arena)
    for name in FILE_ORDER.split():
        digest.update(tensors[name].astype(dtype, copy=False).view(np.uint8).data)
    return digest.hexdigest()


def same(values: np.ndarray, expected: list[float]) -> None:
    np.testing.assert_array_equal(values, np.array(expected, np.float32))


def test_d6_is_llmc_s_file() -> None:
    config = model_config("d6")
    arena = initial_weights(config, 42)
    fp32 = "53019e4fce4e850519f83da72059bfd27d165879963898998fa5b1779015fd6b"
    bf16 = "359075523da4177c543723c6407d99fe533f3e6dd1b0e8b1f3221ec2b3d981c1"
    assert file_sum(config, arena, 3, np.dtype(np.float32)) == fp32
    assert file_sum(config, arena, 5, BFLOAT16) == bf16


def test_d12_is_llmc_s_file(monkeypatch: pytest.MonkeyPatch) -> None:
    twister = MersenneTwister(42)
    monkeypatch.setattr("gpu_gpt2.models.init.MersenneTwister", lambda seed: twister)
    config = model_config("d12")
    arena = initial_weights(config, 42)
    assert twister.state()[1] == 192  # of its 624 words
    t = named(config, arena)
    same(t["wte"][0, :3], [0.0385382995, 0.0297456831, 0.0180143435])
    same(t["wte"][[config.vocab_size - 1], -1], [0.00170378527])
    ends = {
        "wpe": (-0.00916235521, 0.016040463),
        "qkvw": (-0.0045566773, 0.027016582),
        "attprojw": (0.00113274355, 0.00653724466),
        "fcw": (-0.0111787794, -0.0088486718),
        "fcprojw": (0.00437752157, 0.00131772947),
    }
    for name, (first, last) in ends.items():
        layer = t[name] if name == "wpe" else t[name][0]
        same(layer.reshape(-1)[[0, -1]], [first, last])
    same(t["fcprojw"][-1].reshape(-1)[[0, -1]], [0.00174368825, -0.00280294404])
    fp32 = "b0fc46f8be6749ebc8afe317be4e904497475ede13b8703dff800e22044c149b"
    bf16 = "2c7996f638f83fe0ada6db4c794fce70edbf16c75b9fd10c6c07f1ad33049bf9"
    assert file_sum(config, arena, 3, np.dtype(np.float32)) == fp32
    assert file_sum(config, arena, 5, BFLOAT16) == bf16


@pytest.mark.parametrize("name", SIZES)
def test_the_table_is_followed(name: str) -> None:
    config = SIZES[name]
    arena = initial_weights(config, 7)
    np.testing.assert_array_equal(arena, initial_weights(config, 7))
    assert not np.array_equal(arena, initial_weights(config, 8))
    tensors = named(config, arena)
    assert not tensors["wte"][config.vocab_size :].any()
    for spec in parameters(config):
        values = tensors[spec.name]
        if spec.init == "ones":
            assert (values == 1).all(), spec.name
        elif spec.init == "zeros":
            assert not values.any(), spec.name


def test_spread() -> None:
    config = GPT2Config(vocab_size=257, n_positions=64, n_embd=96, n_layer=3, n_head=4)
    tensors = named(config, initial_weights(config, 7))
    for name in ("wte", "wpe", "qkvw", "fcw"):
        values = tensors[name][: config.vocab_size] if name == "wte" else tensors[name]
        assert abs(values.std() - 0.02) < 0.0005, name
        assert abs(values.mean()) < 0.001, name
    for name in ("attprojw", "fcprojw"):
        assert abs(tensors[name].std() - 0.02 / np.sqrt(6)) < 0.0002, name


def test_matrices_are_drawn_layer_by_layer() -> None:
    twister = MersenneTwister(3)
    small = np.float32(0.02) * (np.float32(1) / np.sqrt(np.float32(6)))
    tensors = named(ODD, initial_weights(ODD, 3))
    order = [(tensors["wte"][:257], 0.02), (tensors["wpe"], 0.02)]
    for layer in range(3):
        for name, std in (("qkvw", 0.02), ("attprojw", small), ("fcw", 0.02), ("fcprojw", small)):
            order.append((tensors[name][layer], std))
    for tensor, std in order:
        expected = np.empty(tensor.size, np.float32)
        twister.fill_normal(expected, std)
        np.testing.assert_array_equal(tensor.reshape(-1), expected)


def test_padding_of_the_vocabulary_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = named(ODD, initial_weights(ODD, 42))
    rows = usual["wte"].shape[0]
    monkeypatch.setattr("gpu_gpt2.config.model.VOCAB_PADDING", 1000)
    padded = named(ODD, initial_weights(ODD, 42))
    assert padded["wte"].shape[0] == 1000 > rows
    np.testing.assert_array_equal(padded["wte"][:rows], usual["wte"])
    assert not padded["wte"][rows:].any()
    for name in usual.keys() - {"wte"}:
        np.testing.assert_array_equal(padded[name], usual[name])


@pytest.mark.parametrize("name", SIZES)
def test_pieces_are_the_arena(name: str) -> None:
    config = SIZES[name]
    source = InitialWeights(config=config, seed=9)
    tensors = named(config, initial_weights(config, 9))
    left = set(pieces(config))
    for piece, values in source.read():
        left.remove(piece)
        assert values.dtype == source.dtype == np.float32
        assert values.shape == piece.shape
        np.testing.assert_array_equal(values, part_of(piece, tensors))
    assert not left


def test_memory_is_one_piece() -> None:
    config = GPT2Config(vocab_size=4096, n_positions=64, n_embd=256, n_layer=4, n_head=4)
    largest = 4 * config.vocab_size * config.n_embd
    tracemalloc.start()
    try:
        for _ in InitialWeights(config=config, seed=1).read():
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < largest + (2 << 20)
    assert 4 * parameter_count(config) > 3 * largest
