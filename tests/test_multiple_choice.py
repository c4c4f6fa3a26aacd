"""Multiple-choice files: golden bytes, round trips, and every way one can be broken."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_gpt2.errors import DataError, UserError
from gpu_gpt2.formats.multiple_choice import COMPLETIONS, Example, read_choices, write_choices

tokens = st.lists(st.integers(0, 65534), min_size=1, max_size=9).map(np.array)
examples = st.lists(
    st.builds(
        lambda context, completions, label: Example(
            context=context, completions=completions, label=label
        ),
        tokens,
        st.tuples(tokens, tokens, tokens, tokens),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=7,
)


def example(context: int = 2, completion: int = 1, label: int = 0, token: int = 7) -> Example:
    return Example(
        context=np.full(context, token),
        completions=tuple(np.full(completion, token) for _ in range(COMPLETIONS)),
        label=label,
    )


# Two examples, word by word: mark, bytes, index, label, completions, context, four completions.
FIRST = [65535, 38, 0, 3, 4, 2, 464, 3290, 1, 11, 2, 12, 13, 3, 14, 15, 16, 1, 65534]
SECOND = [65535, 30, 1, 0, 4, 1, 0, 1, 0, 1, 1, 1, 2, 1, 3]


def golden() -> bytearray:
    header = struct.pack("<256i", 20240522, 1, 2, 38, *[0] * 252)
    return bytearray(header + struct.pack(f"<{len(FIRST + SECOND)}H", *FIRST, *SECOND))


def same(a: Example, b: Example) -> bool:
    pairs = zip((a.context, *a.completions), (b.context, *b.completions), strict=True)
    return a.label == b.label and all(np.array_equal(x, y) for x, y in pairs)


def test_golden_bytes(tmp_path: Path) -> None:
    path = tmp_path / "two.bin"
    path.write_bytes(golden())
    first, second = read_choices(path)
    assert first.context.tolist() == [464, 3290]
    assert [row.tolist() for row in first.completions] == [[11], [12, 13], [14, 15, 16], [65534]]
    assert [row.tolist() for row in second.completions] == [[0], [1], [2], [3]]
    assert (first.label, second.label) == (3, 0)
    assert first.context.dtype == np.uint16
    write_choices(tmp_path / "again.bin", [first, second])
    assert (tmp_path / "again.bin").read_bytes() == golden()


@given(made=examples)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(made: list[Example], tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.getbasetemp() / "choices.bin"
    write_choices(path, made)
    assert all(map(same, read_choices(path), made))
    content = path.read_bytes()
    write_choices(path, read_choices(path))
    assert path.read_bytes() == content


START = 1024


@pytest.mark.parametrize(
    ("offset", "word", "message"),
    [
        (START, 65534, r"example 0: word 65534 at offset 1024, expected the start mark 65535"),
        (START + 2, 39, r"example 0: size 39 at offset 1026, expected an even number"),
        (START + 2, 36, r"example 0: size 36 at offset 1026, expected 38|3 tokens|1 tokens"),
        (START + 2, 40, r"example 0: size 40 at offset 1026, expected 38"),
        (START + 2, 70, r"example 0: size 70 at offset 1026, expected an even number .* to 68"),
        (START + 4, 1, r"example 0: index 1 at offset 1028, expected 0"),
        (START + 6, 4, r"example 0: label 4 at offset 1030, expected 0 to 3"),
        (START + 8, 5, r"example 0: 5 completions at offset 1032, expected 4"),
        (START + 10, 0, r"example 0: 0 tokens at offset 1034, expected 1 or more"),
        (START + 10, 14, r"example 0: 14 tokens at offset 1034"),
        (START + 12, 65535, r"example 0: token 65535 at offset 1036, expected one below 65535"),
        (START + 16, 0, r"example 0: 0 tokens at offset 1040"),
        (START + 38, 0, r"example 1: word 0 at offset 1062"),
        (START + 42, 0, r"example 1: index 0 at offset 1066, expected 1"),
        (START + 40, 32, r"example 1: size 32 at offset 1064, expected an even number .* to 30"),
    ],
)
def test_a_wrong_word_is_named(offset: int, word: int, message: str, tmp_path: Path) -> None:
    content = golden()
    struct.pack_into("<H", content, offset, word)
    path = tmp_path / "bad.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.bin: .*({message}).*write it again"):
        read_choices(path)


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        (0, 20240520, "magic number 20240520 at offset 0, expected 20240522"),
        (1, 2, "version 2 at offset 4, expected 1"),
        (2, 0, "count of examples 0 at offset 8"),
        (2, -1, "count of examples -1 at offset 8"),
        (2, 65536, "count of examples 65536 at offset 8"),
        (2, 65535, "65535 examples at offset 8 would make"),
        (2, 1, "1 examples at offset 8 would make"),
        (2, 3, "3 examples at offset 8 would make"),
        (3, 2**31 - 1, "size of the longest example 2147483647 at offset 12"),
        (3, 40, "size of the longest example 40 at offset 12, expected 38"),
        (3, 36, "size of the longest example 36 at offset 12, expected 38"),
    ],
)
def test_a_wrong_header_is_named(word: int, value: int, message: str, tmp_path: Path) -> None:
    content = golden()
    struct.pack_into("<i", content, 4 * word, value)
    path = tmp_path / "bad.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.bin: .*{message}"):
        read_choices(path)


@pytest.mark.parametrize("change", [-2, -1, 1, 2])
def test_a_file_of_another_length_is_refused(change: int, tmp_path: Path) -> None:
    content = golden()
    struct.pack_into("<i", content, 12, 40)  # so that the total alone cannot tell
    path = tmp_path / "bad.bin"
    path.write_bytes(content[:change] if change < 0 else content + b"\1" * change)
    with pytest.raises(DataError, match=r"bad\.bin.*(offset|follow)"):
        read_choices(path)


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
        found = read_choices(path)
    except UserError as error:
        message = str(error)
    else:
        write_choices(path, found)
        message = ""
        assert path.read_bytes() == content
    assert "\n" not in message
    assert not message or "fuzz.bin" in message


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (example(label=4), "example 1 has label 4; it must be 0 to 3"),
        (example(label=-1), "example 1 has label -1"),
        (example(context=0), "example 1 has no tokens in its context"),
        (example(completion=0), "example 1 has no tokens in its context or in a completion"),
        (example(token=65535), "example 1 has a token outside 0 to 65534"),
        (example(token=-1), "example 1 has a token outside 0 to 65534"),
        (example(token=70000), "example 1 has a token outside 0 to 65534"),
        (example(context=32754), "example 1 makes 65536 bytes; the file holds at most 65535"),
        (Example(context=np.ones(1), completions=(np.ones(1),) * 3, label=0), "has 3 completions"),
    ],
)
def test_what_the_file_cannot_hold_is_refused(bad: Example, message: str, tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    with pytest.raises(DataError, match=rf"out\.bin: .*{message}"):
        write_choices(path, [example(), bad])
    assert list(tmp_path.iterdir()) == []


def test_the_largest_example_fits(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    write_choices(path, [example(context=32753)])
    assert len(read_choices(path)[0].context) == 32753
    assert path.stat().st_size == 1024 + 65534


@pytest.mark.parametrize("count", [0, 65536])
def test_too_few_or_too_many_examples_are_refused(count: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{count} examples; a multiple-choice file holds 1 to"):
        write_choices(tmp_path / "out.bin", [example()] * count)


def test_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the multiple-choice file .*none\.bin"):
        read_choices(tmp_path / "none.bin")
    with pytest.raises(DataError, match=r"cannot write .*out\.bin: No such file"):
        write_choices(tmp_path / "no" / "out.bin", [example()])
    (tmp_path / "old.bin").mkdir()
    (tmp_path / "old.bin" / "kept").touch()
    with pytest.raises(DataError, match=r"cannot write .*old\.bin: "):
        write_choices(tmp_path / "old.bin", [example()])
    assert [path.name for path in tmp_path.iterdir()] == ["old.bin"]
