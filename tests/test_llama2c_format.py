"""llama2.c's model files: byte for byte as its programs read them, and damage gets one line."""

from __future__ import annotations

import hashlib
import math
import os
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama2c_models import A, B, model, model_file

from gpu_gpt2.config import MODELS, GPT2Config, LlamaConfig
from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.formats import files, llama2c
from gpu_gpt2.models.families import parameter_count
from gpu_gpt2.models.init import InitialWeights
from gpu_gpt2.models.weights import Arena, Piece, load_arena, named

# A model whose two widths have no common factor above 4, with a head of its own.
ODD = LlamaConfig(
    vocab_size=31, n_positions=7, n_embd=24, n_layer=3, n_head=3, n_kv_head=3, n_inner=20,
    tie_word_embeddings=False,
)  # fmt: skip


def random_model(config: LlamaConfig = ODD) -> Arena:
    arena = np.random.default_rng(0).standard_normal(parameter_count(config), np.float32)
    tensors = named(config, arena)
    for name in tensors.keys() & {"wte", "head"}:
        tensors[name][config.vocab_size :] = 0
    return Arena(config, arena)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_arena(llama2c.open_model(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "version", "group_size", "count", "digest"),
    [
        (A, 1, 64, 370_176, "2b11c9affee5aab586daf56693d0bbe1dd645cfedc3c2bf7c103c9142991c165"),
        (B, 1, 64, 319_552, "3e70670bb0f35d714ff9897028729f87b27ed4d7072321de53ad8146771f7d39"),
        (A, 2, 64, 99_456, "421220651467faeef0a7f4531063df2fd80fbb2f2661287849b971b896ef6b62"),
        (A, 2, 32, 105_216, "eacd93907c670b2f28500d370367612fb6ed02501c9c36c35845950259e942f4"),
        (B, 2, 16, 100_960, "0f9928aff1d1e464a408c9347248fb71a2fa93031dc671b621db4c0a9cd0c47d"),
        (B, 2, 64, 100_960, "0f9928aff1d1e464a408c9347248fb71a2fa93031dc671b621db4c0a9cd0c47d"),
    ],
)
def test_known_files_of_versions_1_and_2(
    config: LlamaConfig, version: int, group_size: int, count: int, digest: str, tmp_path: Path
) -> None:
    content = model_file(tmp_path / "m.bin", config, version, group_size).read_bytes()
    assert (len(content), sha256(content)) == (count, digest)


def test_known_files_of_version_0(tmp_path: Path) -> None:
    """The tables of angles are not hashed: their last bit depends on the mathematical library."""
    a = model_file(tmp_path / "a.bin", A).read_bytes()
    assert len(a) == 371_996
    assert a[:28].hex() == "40000000800000000200000004000000020000002001000020000000"
    weights = "bd6b1bebe3416f35211d8bd87502144f77926316a479e64c3c485c3a706c76bb"
    assert sha256(a[28 : 28 + 369_920]) == weights
    b = model_file(tmp_path / "b.bin", B).read_bytes()
    assert (len(b), b[20:24].hex()) == (320_476, "e0feffff")
    weights = "d6ba7a6b52212d5d7519733130cc5f82c42a7d8d602d8f4c963bf52bf57e92c2"
    assert sha256(b[28 : 28 + 264_000]) == weights
    head = "056d9f03330e3278d938230a0f7c9f573adbcf21b10d1dba85c726c096678d76"
    assert sha256(b[-55_296:]) == head


def test_version_0_has_the_angles_of_every_position(tmp_path: Path) -> None:
    content = model_file(tmp_path / "a.bin", A).read_bytes()
    cos, sin = np.frombuffer(content[28 + 369_920 :], "<f4").reshape(2, 32, 8)
    angles = np.outer(np.arange(32), 10000.0 ** (-np.arange(8) / 8))
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-6)
    expected = [-0.9899925, 0.5827536, 0.9553365, 0.9955034, 0.9995500, 0.9999550, 0.9999955,
                0.9999995]  # fmt: skip
    np.testing.assert_allclose(cos[3], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "tied", "sizes"),
    [
        ("llama:260k", True, (1_056_540, 1_040_384, None)),
        ("llama:15m", True, (60_816_028, 60_767_104, 17_101_696)),
        ("llama:42m", True, (167_020_572, 166_758_656, None)),
        ("llama:110m", True, (438_381_596, 438_119_680, 116_432_128)),
        ("7B", False, (26_954_711_068, None, 7_160_348_928)),
    ],
)
def test_sizes_of_published_models(name: str, tied: bool, sizes: tuple[int | None, ...]) -> None:
    """None where llama2.c's own choice of groups is one that its program computes wrongly."""
    config = LlamaConfig(
        vocab_size=32000, n_positions=2048, n_embd=4096, n_layer=32, n_head=32, n_kv_head=32,
        n_inner=11008, tie_word_embeddings=False,
    ) if name == "7B" else MODELS[name]  # fmt: skip
    assert isinstance(config, LlamaConfig)
    assert config.tie_word_embeddings == tied
    for version, size in enumerate(sizes):
        if size is not None:
            assert llama2c.layout_of(config, version).file_bytes == size


@pytest.mark.parametrize(
    ("n_embd", "n_inner", "asked", "group_size"),
    [(64, 172, 64, 4), (288, 768, 64, 32), (512, 1376, 64, 32), (768, 2048, 64, 64),
     (64, 128, 32, 32), (64, 171, 64, 1)],
)  # fmt: skip
def test_groups_divide_both_widths(n_embd: int, n_inner: int, asked: int, group_size: int) -> None:
    config = replace(A, n_embd=n_embd, n_inner=n_inner, n_head=n_embd // 16, n_kv_head=1)
    assert llama2c.layout_of(config, 2, asked).group_size == group_size


@pytest.mark.parametrize("config", [A, B, ODD], ids=["A", "B", "odd"])
@pytest.mark.parametrize("version", [0, 1])
def test_round_trip(config: LlamaConfig, version: int, tmp_path: Path) -> None:
    source = random_model(config)
    source.weights[:3] = [-0.0, np.inf, np.nan]
    llama2c.write_model(tmp_path / "a.bin", source, version)
    opened = llama2c.open_model(tmp_path / "a.bin")
    assert (opened.config, opened.version, opened.eot) == (config, version, 1)
    assert load_arena(opened).tobytes() == source.weights.tobytes()
    llama2c.write_model(tmp_path / "b.bin", opened, version)
    assert (tmp_path / "b.bin").read_bytes() == (tmp_path / "a.bin").read_bytes()
    with pytest.raises(ConfigError, match="whose weights are float32; convert it to llama2c-v2"):
        next(opened.read_int8())


def test_the_tables_of_angles_are_skipped(tmp_path: Path) -> None:
    path = model_file(tmp_path / "b.bin", B)
    content = bytearray(path.read_bytes())
    content[28 + 264_000 : -55_296] = b"\xff" * (24 * 12 * 4)  # all NaN
    path.write_bytes(content)
    assert load_arena(llama2c.open_model(path)).tobytes() == model(B).weights.tobytes()


@pytest.mark.parametrize("config", [A, B, ODD], ids=["A", "B", "odd"])
def test_int8_is_read_in_two_ways(config: LlamaConfig, tmp_path: Path) -> None:
    source = random_model(config)
    llama2c.write_model(tmp_path / "a.bin", source, 2)
    opened = llama2c.open_model(tmp_path / "a.bin")
    gs = opened.group_size
    assert gs == {A: 64, B: 16, ODD: 4}[config]
    original = dict(source.read())
    dequantized = dict(opened.read())
    assert dequantized.keys() == original.keys()
    matrices = set()
    for piece, q, scales in opened.read_int8():
        matrices.add(piece)
        O, I = piece.shape
        assert (q.shape, q.dtype) == ((O, I), np.int8)
        assert (scales.shape, scales.dtype) == ((O, I // gs), np.float32)
        assert dequantized[piece].tobytes() == (q * scales.repeat(gs, axis=1)).tobytes()
        error = np.abs(dequantized[piece] - original[piece])
        assert (error <= scales.repeat(gs, axis=1) * 0.5001).all()
        assert error.max() > 0
    assert {piece for piece in original if len(piece.shape) == 2} == matrices
    for piece in original.keys() - matrices:
        assert opened.read_piece(piece).tobytes() == original[piece].tobytes()


def test_first_bytes_of_version_2(tmp_path: Path) -> None:
    content = model_file(tmp_path / "a.bin", A, 2).read_bytes()
    assert content[:4] == b"24ka"
    assert struct.unpack_from("<i7iBi", content, 4) == (2, 64, 128, 2, 4, 2, 288, 32, 1, 64)
    assert not any(content[41:256])
    first = np.frombuffer(content, np.int8, 8, 1536)
    assert first.tolist() == [24, 64, -108, 60, -97, -74, 127, 8]
    scales = np.frombuffer(content, "<f4", 3, 1536 + 288 * 64)
    np.testing.assert_allclose(scales, [0.00786994, 0.00786255, 0.00759882], rtol=1e-6)


def test_groups_that_extend_over_rows_are_read_by_flat_index(tmp_path: Path) -> None:
    """As llama2.c's exporter makes them if hidden_dim is not a multiple of the group size."""
    config = replace(ODD, n_embd=32, n_head=2, n_kv_head=2, n_inner=24)
    path = tmp_path / "a.bin"
    llama2c.write_model(path, random_model(config), 2)
    assert llama2c.open_model(path).group_size == 8
    layout = llama2c._Layout(config, 2, 32)  # groups of w2 extend over its rows of 24
    rng = np.random.default_rng(1)
    content = bytearray(rng.integers(-127, 128, layout.file_bytes, np.int8).tobytes())
    content[:256] = llama2c._header(layout)
    offset = layout.offset("w2", 1)
    scales = rng.random(24, np.float32)
    content[offset + 32 * 24 : offset + 32 * 24 + 96] = scales.tobytes()
    path.write_bytes(content)
    opened = llama2c.open_model(path)
    q = np.frombuffer(content, np.int8, 32 * 24, offset)
    expected = (q * scales[np.arange(32 * 24) // 32]).reshape(32, 24)
    found = opened.read_piece(Piece("fcprojw", 1, (32, 24)))
    assert found.tobytes() == expected.tobytes()
    with pytest.raises(ConfigError, match="groups of 32 elements extend over the rows of 24 of fc"):
        next(opened.read_int8())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_int8_cannot_hold_weights_that_are_not_finite(value: float, tmp_path: Path) -> None:
    source = random_model()
    named(ODD, source.weights)["fcw"][1, 5, 5] = value
    with pytest.raises(DataError, match="fcw of layer 1 has values that are not finite"):
        llama2c.write_model(tmp_path / "a.bin", source, 2)
    assert os.listdir(tmp_path) == []


def test_blocks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (llama2c, files):
        monkeypatch.setattr(module, "BLOCK_BYTES", 3 * 4 * 64)
    content = model_file(tmp_path / "a.bin", A, 2).read_bytes()
    assert sha256(content).startswith("421220651467faee")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": 500000.0}, "rope_theta is 500000, and llama2.c's files have no place"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06, and llama2.c's files have no place"),
    ],
)
@pytest.mark.parametrize("version", [0, 1, 2])
def test_what_llama2c_computes_otherwise_is_refused(
    change: dict[str, float], message: str, version: int, tmp_path: Path
) -> None:
    config = replace(ODD, **change)
    with pytest.raises(ConfigError, match=message):
        llama2c.write_model(tmp_path / "a.bin", InitialWeights(config=config, seed=1), version)
    assert os.listdir(tmp_path) == []


def test_gpt2_is_refused(tmp_path: Path) -> None:
    source = InitialWeights(config=GPT2Config(n_embd=8, n_layer=1, n_head=1), seed=1)
    with pytest.raises(ConfigError, match="hold Llama models only, and this model is a GPT-2"):
        llama2c.write_model(tmp_path / "a.bin", source, 0)


def edit(path: Path, offset: int, form: str, value: int) -> None:
    with path.open("rb+") as file:
        file.seek(offset)
        file.write(struct.pack("<" + form, value))


@pytest.mark.parametrize(
    ("version", "offset", "form", "value", "message"),
    [
        (0, 0, "i", 66, "n_embd 66 does not divide into n_head 4 equal heads; choose a multiple"),
        (0, 0, "i", 0, "n_embd must be a whole number >= 1, not 0"),
        (0, 4, "i", -1, "n_inner must be a whole number >= 1, not -1"),
        (0, 8, "i", 2**31 - 1, "version 0 of a Llama of 2147483647 layers of 64, vocabulary 288"),
        (0, 12, "i", 64, "head size 1 (n_embd / n_head) is odd"),
        (0, 16, "i", 3, "n_head 4 is not a multiple of n_kv_head 3"),
        (0, 20, "i", -288, "version 0 of a Llama of 2 layers of 64, vocabulary 288, context 32 "
                           "would make 445724 bytes, but the file holds 371996; it was cut off,"),
        (0, 20, "i", 0, "vocab_size must be a whole number >= 1, not 0"),
        (0, 24, "i", 33, "version 0 of a Llama of 2 layers of 64, vocabulary 288, context 33 wo"),
        (1, 4, "i", 3, "version 3 at offset 4, expected 1 or 2;"),
        (1, 4, "i", 0, "version 0 at offset 4, expected 1 or 2;"),
        (1, 28, "i", -288, "vocabulary size -288 at offset 28, expected 1 or more;"),
        (1, 36, "B", 2, "shared classifier 2 at offset 36, expected 0 or 1;"),
        (1, 36, "B", 0, "version 1 of a Llama of 2 layers of 64, vocabulary 288, context 32"),
        (2, 37, "i", 0, "group size 0 at offset 37, expected 1 or more;"),
        (2, 37, "i", 48, "group size 48 at offset 37, expected a divisor of the 4096 elements of"),
        (2, 37, "i", 32, "version 2 of a Llama of 2 layers of 64, vocabulary 288, context 32 in "
                         "groups of 32 would make 105216 bytes, but the file holds 99456;"),
    ],
)  # fmt: skip
def test_wrong_headers_are_refused(
    version: int, offset: int, form: str, value: int, message: str, tmp_path: Path
) -> None:
    path = model_file(tmp_path / "a.bin", A, version)
    edit(path, offset, form, value)
    assert refusal(path).startswith(f"{path}: {message}")


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("size", [0, 1, 27, 28, 255, 256, 90_000])
def test_a_cut_or_extended_file_is_refused(version: int, size: int, tmp_path: Path) -> None:
    path = model_file(tmp_path / "a.bin", A, version)
    whole = path.stat().st_size
    os.truncate(path, whole + 1)
    assert f"would make {whole} bytes, but the file holds {whole + 1}" in refusal(path)
    os.truncate(path, size)
    assert f"holds {size}" in refusal(path)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    for version in llama2c.VERSIONS:
        path = model_file(tmp_path / "a.bin", A, version)
        source = llama2c.open_model(path)
        os.truncate(path, 50_000)
        with pytest.raises(DataError, match="became shorter while it was read"):
            load_arena(source)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the model file of llama2\.c .*: No such"):
        llama2c.open_model(tmp_path / "none.bin")


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    words=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(1, 64), min_size=7, max_size=7),
    magic=st.booleans(),
    version=st.integers(1, 2),
    size=st.integers(0, 4096),
)
def test_any_header_is_refused_without_a_large_allocation(
    words: list[int], magic: bool, version: int, size: int, tmp_path: Path
) -> None:
    path = tmp_path / "any.bin"
    prefix = struct.pack("<Ii", llama2c.MAGIC, version) if magic else b""
    path.write_bytes((prefix + struct.pack("<7iBi", *words, 1, 1) + bytes(4096))[:size])
    tracemalloc.start()
    try:
        assert str(path) in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("version", [0, 1, 2])
def test_memory_does_not_grow_with_the_model(version: int, tmp_path: Path) -> None:
    """A model of 52 MB whose largest piece has 2.1 MB, from a file of zeros to another."""
    config = replace(A, n_embd=256, n_inner=1024, n_layer=12)
    layout = llama2c.layout_of(config, version)
    with (tmp_path / "a.bin").open("wb") as file:
        file.write(llama2c._header(layout))
        file.truncate(layout.file_bytes)
    source = llama2c.open_model(tmp_path / "a.bin")
    tracemalloc.start()
    try:
        llama2c.write_model(tmp_path / "b.bin", source, version)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "b.bin").stat().st_size == layout.file_bytes
    assert peak < 16_000_000


@pytest.mark.parametrize("version", [0, 1, 2])
def test_sizes_are_python_numbers(version: int) -> None:
    """No overflow at sizes whose bytes need more than 64 bits."""
    n = 2**31 - 256
    config = LlamaConfig(
        vocab_size=n, n_positions=n, n_embd=n, n_layer=n, n_head=n // 2, n_kv_head=1, n_inner=n
    )
    layout = llama2c.layout_of(config, version)
    assert math.log2(layout.file_bytes) > 93
    assert math.log2(layout.offset("w3", n - 1)) > 93
