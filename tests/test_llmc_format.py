"""llm.c's model files: byte for byte as the format says, and damage gets one clear line."""

from __future__ import annotations

import errno
import math
import os
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_gpt2.config import GPT2Config, ModelConfig
from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.formats import files, llmc
from gpu_gpt2.formats.llmc_header import HEADER_BYTES, header_bytes
from gpu_gpt2.models.families import parameter_count
from gpu_gpt2.models.weights import Arena, FloatArray, load_arena, named

CONFIG = GPT2Config(vocab_size=301, n_positions=7, n_embd=24, n_layer=3, n_head=3)
WORDS = (20240326, 3, 7, 301, 3, 3, 24, 384)

# Where each tensor of d12 starts, in elements, and the shape of a layer: from the contract.
D12_OFFSETS = {
    "wte": 0, "wpe": 38633472, "ln1w": 39419904, "ln1b": 39429120, "qkvw": 39438336,
    "qkvb": 60672000, "attprojw": 60699648, "attprojb": 67777536, "ln2w": 67786752,
    "ln2b": 67795968, "fcw": 67805184, "fcb": 96116736, "fcprojw": 96153600,
    "fcprojb": 124465152, "lnfw": 124474368, "lnfb": 124475136,
}  # fmt: skip


def random_arena(config: ModelConfig = CONFIG, seed: int = 0) -> FloatArray:
    arena = np.random.default_rng(seed).standard_normal(parameter_count(config), np.float32)
    named(config, arena)["wte"][config.vocab_size :] = 0
    return arena


def in_file_order(config: ModelConfig, arena: FloatArray) -> FloatArray:
    """The arena's tensors one after the other as llm.c's order has it, spelled out again."""
    ours = named(config, arena)
    return np.concatenate([ours[name].ravel() for name in D12_OFFSETS])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.bin"
    llmc.write_model(path, Arena(CONFIG, random_arena()), "fp32")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_arena(llmc.open_model(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, index: int, word: int) -> None:
    """Sets one int32 of the header."""
    with path.open("rb+") as file:
        file.seek(4 * index)
        file.write(word.to_bytes(4, "little", signed=True))


def test_sizes_and_offsets_of_gpt2() -> None:
    config = GPT2Config()
    starts, count = llmc._layout(config, 50304)
    assert starts == D12_OFFSETS
    assert HEADER_BYTES + 4 * count == 497_904_640
    assert HEADER_BYTES + 2 * count == 248_952_832
    assert list(D12_OFFSETS) == list(llmc.TENSORS)


def test_every_byte_of_a_float32_file(path: Path) -> None:
    arena = random_arena()
    content = path.read_bytes()
    assert content[:32] == np.array(WORDS, "<i4").tobytes()
    assert not any(content[32:1024])
    assert content[1024:] == in_file_order(CONFIG, arena).tobytes()


def test_every_byte_of_a_bfloat16_file(tmp_path: Path) -> None:
    """Rounded to the nearest bfloat16, ties to even, on a value in the middle as well."""
    arena = random_arena()
    ours = named(CONFIG, arena)
    middle = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF807FFF], np.uint32)
    ours["lnfw"][:4] = middle.view(np.float32)
    llmc.write_model(tmp_path / "a.bin", Arena(CONFIG, arena), "bf16")
    content = (tmp_path / "a.bin").read_bytes()
    assert content[:32] == np.array((20240326, 5, *WORDS[2:]), "<i4").tobytes()
    bits = in_file_order(CONFIG, arena).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    assert content[1024:] == rounded.astype("<u2").tobytes()
    tail = np.frombuffer(content[-4 * CONFIG.n_embd :], "<u2")
    assert tail[:4].tolist() == [0x3F80, 0x3F82, 0x3F81, 0xBF80]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_round_trip(dtype: str, tmp_path: Path) -> None:
    arena = random_arena()
    arena[:3] = [-0.0, np.inf, np.nan]
    first, again = tmp_path / "first.bin", tmp_path / "again.bin"
    llmc.write_model(first, Arena(CONFIG, arena), dtype)
    source = llmc.open_model(first)
    assert (source.config, source.dtype) == (CONFIG, llmc.DTYPES[dtype])
    expected = arena.astype(llmc.DTYPES[dtype]).astype(np.float32)
    assert load_arena(source).tobytes() == expected.tobytes()
    llmc.write_model(again, source, dtype)
    assert again.read_bytes() == first.read_bytes()


def test_signalling_nans_are_written_without_a_warning(tmp_path: Path) -> None:
    arena = random_arena()
    arena.view(np.uint32)[:1] = 0x7F800001
    with np.errstate(all="raise"):
        llmc.write_model(tmp_path / "a.bin", Arena(CONFIG, arena), "bf16")
    assert np.isnan(load_arena(llmc.open_model(tmp_path / "a.bin"))[0])


def test_version_1_has_no_padding_rows(path: Path) -> None:
    header = header_bytes(20240326, 1, 7, 301, 3, 3, 24)
    ours = named(CONFIG, random_arena())
    unpadded = [ours["wte"][:301], *(ours[name] for name in list(D12_OFFSETS)[1:])]
    path.write_bytes(header + b"".join(tensor.tobytes() for tensor in unpadded))
    source = llmc.open_model(path)
    assert (source.config, source.dtype) == (CONFIG, np.dtype(np.float32))
    assert load_arena(source).tobytes() == random_arena().tobytes()
    edit(path, 7, 384)
    assert "padded vocabulary size 384 at offset 28, expected 0;" in refusal(path)


def test_blocks_do_not_show(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written in parts of three rows, and the padding rows looked at in such parts."""
    for module in (llmc, files):
        monkeypatch.setattr(module, "BLOCK_BYTES", 3 * 4 * 24)
    again = path.with_name("again.bin")
    llmc.write_model(again, llmc.open_model(path), "fp32")
    assert again.read_bytes() == path.read_bytes()
    with path.open("rb+") as file:
        file.seek(HEADER_BYTES + 4 * 24 * 384 - 4)
        file.write(np.float32(1).tobytes())
    assert f"from offset {HEADER_BYTES + 4 * 24 * 382} on" in refusal(path)


@pytest.mark.parametrize("dtype", llmc.DTYPES.values())
def test_an_array_is_written_in_little_memory(dtype: np.dtype[Any], tmp_path: Path) -> None:
    values = np.zeros((1000, 10_000), np.float32).T
    with (tmp_path / "a").open("wb") as file:
        tracemalloc.start()
        try:
            files.write_array(file, 7, values, dtype)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert (tmp_path / "a").stat().st_size == 7 + 10**7 * dtype.itemsize
    assert peak < 10_000_000  # two blocks; the array has 40 MB


@pytest.mark.parametrize("rows", [301, 302, 512])
def test_any_padding_of_the_vocabulary_is_read(rows: int, path: Path) -> None:
    ours = named(CONFIG, random_arena())
    wte = np.zeros((rows, 24), np.float32)
    wte[:301] = ours["wte"][:301]
    rest = b"".join(ours[name].tobytes() for name in list(D12_OFFSETS)[1:])
    path.write_bytes(header_bytes(*WORDS[:7], rows) + wte.tobytes() + rest)
    assert load_arena(llmc.open_model(path)).tobytes() == random_arena().tobytes()


@pytest.mark.parametrize("row", [301, 383])
@pytest.mark.parametrize("value", [1.0, np.nan])
def test_padding_rows_that_are_not_zero_are_refused(row: int, value: float, path: Path) -> None:
    start = HEADER_BYTES + 4 * 24 * row
    with path.open("rb+") as file:
        file.seek(start + 4 * 23)
        file.write(np.float32(value).tobytes())
    assert refusal(path) == (
        f"{path}: wte has values other than zero from offset {HEADER_BYTES + 4 * 24 * 301} on, in "
        f"the padding rows 301 to 383; the file is damaged, so write it again"
    )


@pytest.mark.parametrize(
    ("index", "word", "message"),
    [
        (0, 7, "magic number 7 at offset 0, expected 20240326; the file is damaged or of another"),
        (0, 20240803, "this file of llm.c is a Llama 3 model; name a GPT-2 model (magic number"),
        (0, 20240327, "this file of llm.c is a debug state, the values that gpu-gpt2 verify"),
        (0, 20240527, "this file of llm.c is the optimizer state of a run (its model is a"),
        (0, 20240520, "this file of llm.c is text as tokens of GPT-2;"),
        (0, 20240328, "this file of llm.c is a tokenizer;"),
        (1, 2, "version 2 at offset 4 stood for several byte layouts that cannot be told apart; "
               "export the model again with a current llm.c, which writes versions 3 and 5"),
        (1, 4, "version 4 at offset 4 mixes bfloat16 with float32; export the model again with"),
        (1, 6, "version 6 at offset 4, expected 1 or 3 or 5;"),
        (1, -3, "version -3 at offset 4"),
        (1, 5, "a GPT-2 of 3 layers of 24, vocabulary 384, context 7 in bfloat16 would make "),
        (2, 0, "context length 0 at offset 8, expected 1 to 2147483647;"),
        (2, 8, "a GPT-2 of 3 layers of 24, vocabulary 384, context 8 in float32 would make "),
        (2, 2**31 - 1, "a GPT-2 of 3 layers of 24, vocabulary 384, context 2147483647 in float32"),
        (3, -1, "vocabulary size -1 at offset 12"),
        (3, 385, "padded vocabulary size 384 at offset 28, expected 385 to 2147483647;"),
        (4, 0, "number of layers 0 at offset 16"),
        (4, 2**31 - 1, "a GPT-2 of 2147483647 layers of 24"),
        (5, -(2**31), "number of heads -2147483648 at offset 20"),
        (5, 5, "n_embd 24 does not divide into n_head 5 equal heads"),
        (6, 0, "number of channels 0 at offset 24"),
        (6, 2**31 - 2, "head size 715827882 (n_embd / n_head) is above 256"),
        (7, 300, "padded vocabulary size 300 at offset 28, expected 301 to"),
        (7, 2**31 - 1, "a GPT-2 of 3 layers of 24, vocabulary 2147483647, context 7"),
    ],
)  # fmt: skip
def test_wrong_headers_are_refused(index: int, word: int, message: str, path: Path) -> None:
    edit(path, index, word)
    assert refusal(path).startswith(f"{path}: {message}")


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 100_000])
def test_a_cut_file_is_refused(size: int, path: Path) -> None:
    os.truncate(path, size)
    message = refusal(path)
    assert str(path) in message
    assert f"holds {size}" in message


def test_an_epsilon_that_the_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = Arena(replace(CONFIG, layer_norm_epsilon=1e-6), random_arena())
    with pytest.raises(ConfigError, match="layer_norm_epsilon is 1e-06, and llm"):
        llmc.write_model(tmp_path / "model.bin", source, "fp32")
    assert not list(tmp_path.iterdir())


def test_an_extended_file_is_refused(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)
    assert "it was cut off or damaged, so write it again" in refusal(path)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(path: Path) -> None:
    source = llmc.open_model(path)
    os.truncate(path, 50_000)
    with pytest.raises(DataError, match="became shorter while it was read"):
        load_arena(source)


@pytest.mark.parametrize("kind", ["missing", "folder", "unreadable"])
def test_a_file_that_cannot_be_read_is_named(kind: str, tmp_path: Path, path: Path) -> None:
    source = llmc.open_model(path)
    path.unlink()
    if kind == "folder":
        path.mkdir()
    if kind == "unreadable":
        path.symlink_to(path)
    assert refusal(path).startswith(f"cannot read the model file of llm.c {path}: ")
    with pytest.raises(DataError, match="cannot be read at offset 1024: "):
        next(source.read())


fuzz = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
words = st.integers(-(2**31), 2**31 - 1) | st.sampled_from([*WORDS, 1, 2, 4, 5])


def read_or_refuse(path: Path) -> tuple[ModelConfig, FloatArray] | None:
    try:
        source = llmc.open_model(path)
    except DataError as error:
        message = str(error)
    else:
        return source.config, load_arena(source)
    assert str(path) in message
    assert "\n" not in message
    return None


@fuzz
@given(bit=st.integers(0, 8 * 40 - 1))
def test_a_flipped_bit_is_refused_or_harmless(bit: int, path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    flipped = path.with_name("flipped.bin")
    flipped.write_bytes(content)
    if found := read_or_refuse(flipped):  # another number of heads, or a word that is not used
        assert asdict(found[0]) | {"n_head": 3} == asdict(CONFIG) | {
            "vocab_size": found[0].vocab_size  # smaller, if the rows above happen to be zero
        }
        assert found[1].tobytes() == random_arena().tobytes()


@fuzz
@given(header=st.lists(words, min_size=8, max_size=8), size=st.integers(0, 4096))
def test_any_header_is_refused_without_a_large_allocation(
    header: list[int], size: int, tmp_path: Path
) -> None:
    path = tmp_path / "any.bin"
    path.write_bytes((header_bytes(20240326, *header[1:]) + bytes(4096))[:size])
    assert read_or_refuse(path) is None


def test_the_smallest_model(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=1, n_positions=1, n_embd=1, n_layer=1, n_head=1)
    arena = random_arena(config)
    llmc.write_model(tmp_path / "a.bin", Arena(config, arena), "fp32")
    assert (tmp_path / "a.bin").stat().st_size == 1024 + 4 * (128 + 1 + 12 + 13 + 2)
    assert load_arena(llmc.open_model(tmp_path / "a.bin")).tobytes() == arena.tobytes()


class Failing(Arena):
    """A source that fails after some pieces."""

    def read(self) -> Any:
        for i, piece in enumerate(super().read()):
            if i == 9:
                raise self.error
            yield piece

    error: BaseException


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), DataError("the source is bad")]
)
@pytest.mark.parametrize("before", [b"precious", None])
def test_a_failure_leaves_what_was_there(
    before: bytes | None, error: BaseException, tmp_path: Path
) -> None:
    path = tmp_path / "a.bin"
    if before:
        path.write_bytes(before)
    source = Failing(CONFIG, random_arena())
    Failing.error = error
    with pytest.raises(type(error)):
        llmc.write_model(path, source, "fp32")
    assert os.listdir(tmp_path) == (["a.bin"] if before else [])
    assert not before or path.read_bytes() == before


def test_sizes_are_python_numbers() -> None:
    """No overflow at sizes whose bytes need more than 64 bits."""
    config = GPT2Config(
        vocab_size=2**31 - 1, n_positions=2**31 - 1, n_embd=2**31 - 256, n_layer=2**31 - 1,
        n_head=2**31 - 256,
    )  # fmt: skip
    C, L, V = config.n_embd, config.n_layer, 2**31
    count = V * C + (2**31 - 1) * C + L * (12 * C**2 + 13 * C) + 2 * C
    assert llmc._layout(config, V)[1] == count
    assert math.log2(count) > 96
