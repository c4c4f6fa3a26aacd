"""llm.c's gpt2_tokenizer.bin: golden bytes, round trips, and every way one can be broken."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_gpt2.errors import DataError, UserError
from gpu_gpt2.formats.tokenizer_bin import read_tokenizer_bin, write_tokenizer_bin
from gpu_gpt2.tokenizer import GPT2Tokenizer

TOKENS = [b"!", b"\x00\xff", b"end"]


def header(*words: int) -> bytes:
    return struct.pack("<256i", *words, *[0] * (256 - len(words)))


def golden() -> bytearray:
    return bytearray(header(20240328, 2, 3, 2) + b"\x01!" + b"\x02\x00\xff" + b"\x03end")


def test_golden_bytes(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    write_tokenizer_bin(path, TOKENS, 2)
    assert path.read_bytes() == golden()
    assert read_tokenizer_bin(path) == (TOKENS, 2)


@pytest.mark.parametrize("version", [1, 2])
def test_both_versions_of_gpt2s(version: int, tmp_path: Path) -> None:
    gpt2 = GPT2Tokenizer.gpt2()
    path = tmp_path / "gpt2_tokenizer.bin"
    gpt2.save_bin(path, version)
    content = path.read_bytes()
    assert content[:1024] == header(20240328, version, 50257, *([50256] if version == 2 else []))
    records = b"".join(
        bytes([len(token)]) + token
        for token in (gpt2.decode_bytes([i]) for i in range(gpt2.vocab_size))
    )
    assert content[1024:] == records
    assert records.endswith(b"\x06 gazed" + b"\x0d<|endoftext|>")
    tokens, eot = read_tokenizer_bin(path)
    assert (len(tokens), eot, tokens[-1]) == (50257, 50256, b"<|endoftext|>")
    write_tokenizer_bin(tmp_path / "again.bin", tokens, eot, version)
    assert (tmp_path / "again.bin").read_bytes() == content


@given(tokens=st.lists(st.binary(min_size=1, max_size=255), min_size=1, max_size=9), data=st.data())
@settings(max_examples=50, deadline=None)
def test_what_is_written_is_read(
    tokens: list[bytes], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    eot = data.draw(st.integers(0, len(tokens) - 1))
    path = tmp_path_factory.getbasetemp() / "t.bin"
    write_tokenizer_bin(path, tokens, eot)
    assert read_tokenizer_bin(path) == (tokens, eot)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((20240326, 2, 3, 2), "magic number 20240326 at offset 0, expected 20240328"),
        ((20240328, 0, 3, 2), "version 0 at offset 4, expected 1 or 2"),
        ((20240328, 3, 3, 2), "version 3 at offset 4, expected 1 or 2"),
        ((20240328, 1, 3, 2), "count of tokens 3 at offset 8, expected 50257"),
        ((20240328, 2, 0, 0), "count of tokens 0 at offset 8"),
        ((20240328, 2, -1, 0), "count of tokens -1 at offset 8"),
        ((20240328, 2, 2**31 - 1, 2), "2147483647 tokens at offset 8 would make"),
        ((20240328, 2, 3, 3), r"id of <\|endoftext\|> 3 at offset 12, expected 0 to 2"),
        ((20240328, 2, 3, -1), r"id of <\|endoftext\|> -1 at offset 12"),
        ((20240328, 2, 2, 1), "4 bytes follow the last of 2 tokens at offset 1029, expected none"),
        (
            (20240328, 2, 4, 1),
            "token 3 of 4 .* and 0 bytes to the end at offset 1033, expected a length",
        ),
    ],
)
def test_a_wrong_header_is_named(words: tuple[int, ...], message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.bin"
    path.write_bytes(header(*words) + golden()[1024:])
    with pytest.raises(DataError, match=rf"bad\.bin: .*{message}"):
        read_tokenizer_bin(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content: content[:-1],
            "token 2 of 3 of length 3 and 2 bytes to the end at offset 1029",
        ),
        (
            lambda content: content[:1026] + b"\0" + content[1027:],
            "token 1 of 3 of length 0 .* at offset 1026",
        ),
        (lambda content: content[:1029], "3 tokens at offset 8 would make|token 2 of 3"),
        (lambda content: content + b"x", "1 bytes follow the last of 3 tokens at offset 1033"),
        (lambda content: content[:1000], "1000 bytes, less than the 1024 of a tokenizer file"),
        (lambda content: content + b"x" * 999, "3 tokens at offset 8 would make 1030 to 1792"),
    ],
)
def test_a_file_of_another_length_is_refused(change, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "bad.bin"
    path.write_bytes(change(bytes(golden())))
    with pytest.raises(DataError, match=message):
        read_tokenizer_bin(path)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_is_a_user_error_or_harmless(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = golden()
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, 15) | st.integers(1024, len(content) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    content = content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]
    content += data.draw(st.binary(max_size=6) | st.just(b""))
    path = tmp_path_factory.getbasetemp() / "fuzz.bin"
    path.write_bytes(content)
    try:
        tokens, eot = read_tokenizer_bin(path)
    except UserError as error:
        message = str(error)
    else:
        write_tokenizer_bin(path, tokens, eot)
        message = ""
        assert path.read_bytes() == content
    assert "\n" not in message
    assert not message or "fuzz.bin" in message


@pytest.mark.parametrize(
    ("tokens", "version", "message"),
    [
        ([b"a", b""], 2, "token 1 has 0 bytes"),
        ([b"a" * 256, b"b"], 2, "token 0 has 256 bytes, and the file can hold 1 to 255"),
        ([b"a", b"b"], 1, r"version 1 holds GPT-2's 50257 tokens .*, not 2 with id 1"),
        ([b"a", b"b"], 3, "there is no version 3"),
    ],
)
def test_what_the_file_cannot_hold_is_refused(
    tokens: list[bytes], version: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=rf"out\.bin: .*{message}"):
        write_tokenizer_bin(tmp_path / "out.bin", tokens, 1, version)
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the tokenizer file .*none\.bin"):
        read_tokenizer_bin(tmp_path / "none.bin")
    with pytest.raises(DataError, match=r"cannot write .*out\.bin: No such file"):
        write_tokenizer_bin(tmp_path / "no" / "out.bin", TOKENS, 2)
