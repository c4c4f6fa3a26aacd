"""Token files: read and written byte for byte, and refused in one line when they are damaged."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_gpt2.errors import DataError
from gpu_gpt2.formats import tokens as tokens_module
from gpu_gpt2.formats.tokens import (
    LLAMA3,
    check_tokens,
    is_token_file,
    read_tokens,
    token_writer,
    write_tokens,
)


@given(st.lists(st.integers(0, 65535)))
@settings(deadline=None)
def test_token_files_round_trip(
    tmp_path_factory: pytest.TempPathFactory, values: list[int]
) -> None:
    path = tmp_path_factory.mktemp("tokens") / "a.bin"
    write_tokens(path, np.array(values, np.int64))
    assert read_tokens(path).tolist() == values
    assert read_tokens(path).dtype == np.uint16
    assert os.listdir(path.parent) == ["a.bin"]


def test_the_bytes_of_a_token_file_are_llm_cs(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_tokens(path, np.array([50256, 1, 258], np.int32))
    content = path.read_bytes()
    assert content[:12].hex() == "88d83401" + "01000000" + "03000000"
    assert content[12:1024] == bytes(1012)
    assert content[1024:].hex() == "50c401000201"


def test_token_files_are_known_by_their_magic_number(tmp_path: Path) -> None:
    write_tokens(tmp_path / "plain", np.arange(3))
    (tmp_path / "text").write_text("text")
    assert is_token_file(tmp_path / "plain")
    assert not is_token_file(tmp_path / "text")
    assert is_token_file(tmp_path / "missing.bin")
    assert not is_token_file(tmp_path / "missing")


def _header(magic: int = 20240520, version: int = 1, count: int = 4) -> bytes:
    return np.array([magic, version, count] + [0] * 253, "<i4").tobytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds 0 bytes and no known magic number"),
        (_header()[:1023], "holds 1023 bytes, less than the 1024"),
        (
            _header(magic=20240326) + bytes(8),
            "this file of llm.c is a GPT-2 model; name a file of tokens",
        ),
        (
            _header(magic=20240527) + bytes(8),
            "is the optimizer state of a run .*; name a file of tokens",
        ),
        (_header(magic=1 << 30) + bytes(8), "1073741824 at offset 0, expected a shard .magic"),
        (b"PK\3\4" + bytes(40), "is a zip file, perhaps PyTorch's"),
        (b"\x80\4\x95" + bytes(41), "is a pickle, perhaps PyTorch's"),
        (np.array([5, -1], "<i4").tobytes(), "-1 at offset 4, expected a shard"),
        (bytes(7), "holds 7 bytes and no known magic number"),
        (
            _header(magic=20240801),
            "version of a Llama-3 shard 1 at offset 4, expected 7",
        ),
        (_header(magic=20240801, version=7) + bytes(8), "4 tokens, .* make 1040 bytes, .* 1032"),
        (b"some text" * 500, "plain text must not be named .bin"),
        (_header(version=2) + bytes(8), "version of a GPT-2 shard 2 at offset 4, expected 1"),
        (_header() + bytes(7), "4 tokens, as offset 8 says, would make 1032 bytes, .* 1031"),
        (_header() + bytes(9), "4 tokens, as offset 8 says, would make 1032 bytes, .* 1033"),
        (_header(count=-1), "count of tokens -1 at offset 8, expected 0 to 2147483647"),
        (
            _header(count=2**31 - 1),
            "2147483647 tokens, as offset 8 says, would make 4294968318 bytes",
        ),
    ],
)
def test_damaged_token_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_tokens(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=40), st.integers(0, 1040))
@settings(deadline=None)
def test_any_damage_is_one_data_error_or_none(
    tmp_path_factory: pytest.TempPathFactory, damage: bytes, offset: int
) -> None:
    path = tmp_path_factory.mktemp("tokens") / "a.bin"
    content = _header() + bytes(8)
    path.write_bytes(content[:offset] + damage + content[offset + len(damage) :])
    try:
        tokens = read_tokens(path)
    except DataError:
        pass
    else:  # as the shard that it was, or, with its header gone, as int32 alone
        expected = 4 if tokens.dtype == np.uint16 else path.stat().st_size // tokens.itemsize
        assert len(tokens) == expected


def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bin"
    write_tokens(path, np.arange(5))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(DataError, match=r"cannot write .*a\.bin: No space left on device; make"):
        write_tokens(path, np.arange(9))
    assert os.listdir(tmp_path) == ["a.bin"]
    assert read_tokens(path).tolist() == [0, 1, 2, 3, 4]


def test_writing_where_no_folder_is_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot write .*: No such file"):
        write_tokens(tmp_path / "no" / "a.bin", np.arange(5))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write .*: Not a directory"):
        write_tokens(tmp_path / "file" / "a.bin", np.arange(5))


@pytest.mark.parametrize("value", [-1, 65536])
def test_tokens_beyond_16_bits_are_a_bug(value: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not fit the file"):
        write_tokens(tmp_path / "a.bin", np.array([0, value]))


def test_llama_shards_hold_four_bytes_a_token(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_tokens(path, np.array([128000, 1]), LLAMA3)
    content = path.read_bytes()
    assert content[:12].hex() == "a1d93401" + "07000000" + "02000000"
    assert content[1024:].hex() == "00f40100" + "01000000"
    assert read_tokens(path).dtype == np.uint32
    assert read_tokens(path).tolist() == [128000, 1]


def test_files_without_a_header_hold_int32(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    np.array([50256, 0, 7], "<i4").tofile(path)
    assert read_tokens(path).dtype == np.int32
    assert read_tokens(path).tolist() == [50256, 0, 7]


def test_a_writer_takes_chunks_and_leaves_nothing_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with token_writer(path) as writer:
        for start in range(0, 10, 3):
            writer.write(np.arange(start, min(start + 3, 10)))
        assert writer.count == 10
        assert not path.exists()
    assert read_tokens(path).tolist() == list(range(10))
    with pytest.raises(ValueError, match="do not fit"), token_writer(path) as writer:
        writer.write(np.array([3, -1]))
    assert os.listdir(tmp_path) == ["a.bin"]
    assert len(read_tokens(path)) == 10


def test_a_file_has_no_more_tokens_than_its_header_can_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_module, "MAX_TOKENS", 5)
    with pytest.raises(ValueError, match="at most 5 tokens"):
        write_tokens(tmp_path / "a.bin", np.arange(6))


@pytest.mark.parametrize(("value", "dtype"), [(300, np.uint16), (300, np.uint32), (-1, np.int32)])
def test_the_first_token_outside_the_vocabulary_is_named(
    value: int, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_module, "CHECK_BLOCK", 16)
    tokens = np.full(50, 299, dtype)
    check_tokens(tokens, 300, "here")
    check_tokens(tokens[:0], 300, "here")
    tokens[[37, 45]] = value
    with pytest.raises(DataError, match=f"here: token {value} at position 37 is outside"):
        check_tokens(tokens, 300, "here")
