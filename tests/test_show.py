"""`data show`: every kind of llm.c's files in words, and one line for all others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from gpu_gpt2.cli.app import app
from gpu_gpt2.errors import DataError, UserError
from gpu_gpt2.formats.llmc_header import header_bytes
from gpu_gpt2.formats.multiple_choice import Example, write_choices
from gpu_gpt2.formats.tokens import LLAMA3, write_tokens
from gpu_gpt2.tokenizer import GPT2Tokenizer
from gpu_gpt2.tools.show import describe

BYTES = GPT2Tokenizer.of_bytes()


def made(kind: str, folder: Path) -> Path:
    """A small file of every kind."""
    path = folder / f"{kind}.bin"
    if kind == "tokens":
        write_tokens(path, np.array([256, *b"Hark! \x1b[31m"], np.uint16))
    elif kind == "choices":
        row = np.frombuffer(b"so", np.uint8).astype(np.int32)
        write_choices(path, [Example(context=row, completions=(row,) * 4, label=2)])
    elif kind == "tokenizer":
        BYTES.save_bin(path)
    elif kind == "model":
        # maxT 4, V 5, 1 layer, 1 head, 8 channels, 5 rows
        C, V, T = 8, 5, 4
        count = V * C + T * C + 4 * C + 3 * C * C + 3 * C + C * C + C + 8 * C * C + 5 * C + 2 * C
        path.write_bytes(header_bytes(20240326, 1, T, V, 1, 1, C) + bytes(4 * count))
    elif kind == "debug state":
        x = np.frombuffer(b"Hark", np.uint8).astype("<i4")
        path.write_bytes(header_bytes(20240327, 2, 2, 2) + x.tobytes() + bytes(99))
    else:
        path.write_bytes(header_bytes(20240527, 1, 2, 1, 1, 0, 0, 0, 0, 0, 77) + bytes(99))
    return path


KINDS = ["tokens", "choices", "tokenizer", "model", "debug state", "state"]


@pytest.mark.parametrize(
    ("kind", "rows", "text"),
    [
        ("tokens", {"tokens": "12 as uint16", "bytes": "1,048"}, "<|endoftext|>Hark! \ufffd[31m"),
        ("choices", {"examples": "1 with 4 completions", "longest": "40 bytes"}, "* 2:so"),
        ("tokenizer", {"tokens": "257", "<|endoftext|>": "256"}, "'\\x00' '\\x01'"),
        (
            "model",
            {"dtype": "float32", "context": "4", "layers": "1", "heads": "1", "channels": "8"},
            "",
        ),
        ("debug state", {"batch": "2 x 2"}, "Hark"),
        ("state", {"processes": "2, of which number 1", "step": "77"}, ""),
    ],
)
def test_kinds(kind: str, rows: dict[str, str], text: str, tmp_path: Path) -> None:
    description = describe(made(kind, tmp_path), BYTES)
    assert text in description.text
    assert rows.items() <= dict(description.rows).items()


def test_tokens_outside_the_vocabulary_are_shown_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_tokens(path, np.array([50256, 7], np.uint16))
    assert describe(path, BYTES).text == "50256 7"


def test_the_command(tmp_path: Path) -> None:
    path = made("tokens", tmp_path)
    result = CliRunner().invoke(app, ["data", "show", str(path), "--tokenizer", "bytes"])
    assert result.exit_code == 0
    assert "12 as uint16" in result.output
    assert "<|endoftext|>Hark! \ufffd[31m" in result.output


def test_tokens_of_llama_and_of_the_first_llmc(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    write_tokens(path, np.array([128000, 7], np.uint32), LLAMA3)
    description = describe(path, BYTES)
    assert ("tokens", "2 as uint32") in description.rows
    assert description.text == "128000 7"
    path.write_bytes(np.frombuffer(b"Hark", np.uint8).astype("<i4").tobytes())
    description = describe(path, BYTES)
    assert ("tokens", "4 as int32") in description.rows
    assert description.text == "Hark"


def test_a_debug_state_without_its_batch(tmp_path: Path) -> None:
    path = made("debug state", tmp_path)
    path.write_bytes(path.read_bytes()[:1028])
    with pytest.raises(DataError, match=r"2 x 2 at offset 8 needs 1056 bytes.* holds 1028"):
        describe(path, BYTES)


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 2000, b"PK\3\4" + b"\0" * 1020])
def test_other_files_are_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(DataError, match="other"):
        describe(path, BYTES)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_files_are_one_line(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = made(data.draw(st.sampled_from(KINDS)), tmp_path_factory.getbasetemp())
    content = bytearray(path.read_bytes())
    match data.draw(st.sampled_from(["cut", "longer", "bit", "word"])):
        case "cut":
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        case "longer":
            content += data.draw(st.binary(min_size=1, max_size=9))
        case "bit":
            content[data.draw(st.integers(0, 60))] ^= 1 << data.draw(st.integers(0, 7))
        case "word":
            word = data.draw(st.sampled_from([-1, -(2**31), 2**31 - 1, 0]))
            start = 4 * data.draw(st.integers(0, 7))
            content[start : start + 4] = word.to_bytes(4, "little", signed=True)
    path.write_bytes(content)
    message = ""
    try:
        describe(path, BYTES)
    except UserError as error:
        message = str(error)
    assert "\n" not in message
