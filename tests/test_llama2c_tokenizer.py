"""llama2.c's tokenizer: its ids, its bytes, its file, and every way a file can be broken."""

from __future__ import annotations

import hashlib
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama2c_models import TOKENIZER_SHA256, tokenizer_entries, tokenizer_file

from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.formats.llama2c_tokenizer import BOS, FIRST_PIECE
from gpu_gpt2.tokenizer import (
    GPT2Tokenizer,
    Llama2cTokenizer,
    cache_key,
    make_tokenizer,
    open_tokenizer,
    vocab_size_of,
)

WORDS, SCORES = map(list, zip(*tokenizer_entries(), strict=True))


@pytest.fixture(scope="module")
def tokenizer() -> Llama2cTokenizer:
    return Llama2cTokenizer(WORDS, SCORES)


def naive_ids(text: bytes, words: list[bytes], scores: list[float]) -> list[int]:
    """The definition: scans all pairs before each merge."""
    ids = [words.index(b" ")] if text else []
    start = 0
    while start < len(text):
        end = start + 1
        while end < len(text) and text[end] & 0xC0 == 0x80 and end - start < 4:
            end += 1
        character = text[start:end]
        ids += [words.index(character)] if character in words else [b + 3 for b in character]
        start = end
    while True:
        best = (-1e10, -1, -1)
        for i in range(len(ids) - 1):
            union = words[ids[i]] + words[ids[i + 1]]
            if union in words and scores[found := words.index(union)] > best[0]:
                best = (scores[found], i, found)
        if best[1] < 0:
            return ids
        ids[best[1] : best[1] + 2] = [best[2]]


def test_the_file_is_the_known_one(tmp_path: Path) -> None:
    content = tokenizer_file(tmp_path / "tok288.bin").read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (3913, TOKENIZER_SHA256)
    opened = open_tokenizer(tmp_path / "tok288.bin")
    assert isinstance(opened, Llama2cTokenizer)
    assert (opened.vocab_size, opened.eot, opened.stop_ids) == (288, 1, {1})
    opened.save_bin(tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == content


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (b"", []),
        (b"the", [263]),
        (b"the and", [263, 268]),
        (b" the", [272, 263]),
        (b"  the", [271, 263]),
        (b"the  and", [263, 272, 268]),
        ("hé".encode(), [272, 274, 279]),
        ("日本".encode(), [272, 287, 233, 159, 175]),
        (b"xxxxx", [272, 269, 270]),
        (b"a\nb", [266, 13, 101]),
        ("😀".encode(), [272, 243, 162, 155, 131]),
        (b"T", [272, 87]),
        (b"<0x41>", [272, 63, 51, 285, 55, 52, 65]),
        (b"\x80" * 5, [272, 131, 131, 131, 131, 131]),
        (b"a\xc3", [266, 198]),
        (b"\xf0\x9f\x98\x80\x80", [272, 243, 162, 155, 131, 131]),
    ],
)
def test_known_ids(text: bytes, ids: list[int], tokenizer: Llama2cTokenizer) -> None:
    assert tokenizer.encode_bytes(text).tolist() == ids
    assert naive_ids(text, WORDS, SCORES) == ids
    try:
        assert tokenizer.prompt_ids(text.decode()) == [1, *ids]
    except UnicodeDecodeError:
        return
    assert tokenizer.encode(text.decode()).dtype == np.int32
    assert tokenizer.decode(tokenizer.prompt_ids(text.decode())[1:]) == (
        " " * bool(text) + text.decode()
    )


@pytest.mark.parametrize(
    ("previous", "token", "piece"),
    [
        (1, 263, b"the"), (263, 263, b" the"), (1, 271, b" "), (1, 272, b""), (1, 13, b"\n"),
        (5, 68, b"A"), (5, 2, b"\n</s>\n"), (1, 279, "é".encode()), (None, 263, b" the"),
    ],
)  # fmt: skip
def test_known_pieces(
    previous: int | None, token: int, piece: bytes, tokenizer: Llama2cTokenizer
) -> None:
    assert tokenizer.piece(token, previous) == piece
    if previous is not None:
        both = tokenizer.decode_bytes([previous, token])
        assert both == tokenizer.piece(previous, None) + piece


TEXTS = st.text("the and  xxx.,éo日\n<0x41>", max_size=60)


@given(text=TEXTS.map(str.encode) | st.binary(max_size=30))
@settings(max_examples=300, deadline=None)
def test_ids_are_those_of_the_definition(text: bytes) -> None:
    ids = Llama2cTokenizer(WORDS, SCORES).encode_bytes(text).tolist()
    assert ids == naive_ids(text, WORDS, SCORES)


@given(
    text=st.text("ab ", max_size=40),
    learned=st.lists(st.text("ab ", min_size=2, max_size=5), max_size=12, unique=True),
    scores=st.lists(st.sampled_from([-1e11, -1e9, -3.0, -2.0, 0.0]), min_size=12, max_size=12),
)
@settings(max_examples=300, deadline=None)
def test_ties_and_spaces_inside_tokens(text: str, learned: list[str], scores: list[float]) -> None:
    """Equal scores merge from the left; a score of -1e11 never merges, as below the limit."""
    words = WORDS[:259] + [b" ", b"a", b"b"] + [word.encode() for word in learned]
    values = [0.0] * 262 + scores[: len(learned)]
    ids = Llama2cTokenizer(words, values).encode_bytes(text.encode()).tolist()
    assert ids == naive_ids(text.encode(), words, values)


def test_a_long_word_takes_no_quadratic_time(tokenizer: Llama2cTokenizer) -> None:
    start = time.perf_counter()
    count = len(tokenizer.encode("xthe" * 50_000))
    assert count == 1 + 100_000
    assert time.perf_counter() - start < 20  # about 1 s; the definition would take an hour


def test_lengths_and_words(tokenizer: Llama2cTokenizer) -> None:
    assert tokenizer.token_bytes()[:5].tolist() == [0, 0, 0, 1, 1]
    assert tokenizer.token_bytes()[259:264].tolist() == [2, 2, 2, 3, 4]
    assert tokenizer.tokens()[:4] == [b"<unk>", b"\n<s>\n", b"\n</s>\n", b"\0"]
    assert tokenizer.tokens()[263] == b" the"
    ids = tokenizer.encode("the é 日本")
    assert tokenizer.token_bytes()[ids].sum() == len(" the é 日本".encode())
    assert tokenizer.encode("a\ud800").tolist() == tokenizer.encode("a\ufffd").tolist()


def test_what_is_saved_is_opened(tokenizer: Llama2cTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    opened = open_tokenizer(tmp_path)
    assert isinstance(opened, Llama2cTokenizer)
    assert opened.digest() == tokenizer.digest()
    assert (tmp_path / "tokenizer.bin").read_bytes() == (
        tokenizer_file(tmp_path / "t.bin").read_bytes()
    )


def test_transformers_opens_what_is_saved(tokenizer: Llama2cTokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert (len(opened), opened.bos_token_id, opened.unk_token_id) == (288, 1, 0)
    for text in ("the and", " the", "  the", "the  and", "hé", "日本", "xxxxx", "a\nb", "😀 T", ""):
        ids = tokenizer.prompt_ids(text)
        assert opened(text)["input_ids"] == ids
        assert opened.decode(ids, skip_special_tokens=True) == text
    ours = open_tokenizer(tmp_path / "tokenizer.json")  # through the library, without the scores
    assert ours.prompt_ids("the and 日本") == tokenizer.prompt_ids("the and 日本")
    assert ours.tokens()[3:] == tokenizer.tokens()[3:]


def test_a_folder_that_cannot_be_written_is_an_os_error(tokenizer: Llama2cTokenizer) -> None:
    with pytest.raises(OSError, match="No such file"):
        tokenizer.save(Path("/nowhere"))
    with pytest.raises(DataError, match=r"cannot write /nowhere/t\.bin: No such file"):
        tokenizer.save_bin(Path("/nowhere/t.bin"))


def test_words_that_are_not_utf8_are_saved(tmp_path: Path) -> None:
    Llama2cTokenizer([*WORDS, b"\xff\xfe"], [*SCORES, -9.0]).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.bin"]
    assert open_tokenizer(tmp_path).vocab_size == 289


def test_a_path_is_a_spec(tokenizer: Llama2cTokenizer, tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "tok288.bin")
    assert vocab_size_of(str(path)) == 288
    assert make_tokenizer(str(path), ()).prompt_ids("the") == [1, 263]
    assert cache_key(str(path)) == tokenizer.digest()
    other = Llama2cTokenizer(WORDS, [score - 1 for score in SCORES])
    assert other.digest() != tokenizer.digest()
    assert GPT2Tokenizer.of_bytes().prompt_ids("a") == [256, 97]
    assert GPT2Tokenizer.of_bytes().stop_ids == {256}
    assert GPT2Tokenizer.of_bytes().piece(97, None) == b"a"
    words = [*WORDS, *(b"%06d" % i for i in range(65_536))]
    Llama2cTokenizer(words, [0.0] * len(words)).save_bin(tmp_path / "large.bin")
    assert open_tokenizer(tmp_path / "large.bin").vocab_size == 65_824
    with pytest.raises(ConfigError, match="65824 tokens; ids are stored in 16 bits, so use a"):
        vocab_size_of(str(tmp_path / "large.bin"))


def content_of(entries: list[tuple[bytes, float]], longest: int = 9) -> bytes:
    return struct.pack("<I", longest) + b"".join(
        struct.pack("<fi", score, len(word)) + word for word, score in entries
    )


ENTRIES = tokenizer_entries()
GOOD = content_of(ENTRIES)
SEED = struct.pack("<i", 5) + b"<unk>" + struct.pack("<i", 5) + b"\n<s>\n"
CHARACTERS = [*ENTRIES[:3], *((chr(byte).encode(), 0.0) for byte in range(256)), *ENTRIES[259:]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (SEED, "this tokenizer.bin of July 2023 has no scores, so it cannot encode text; export"),
        (content_of(CHARACTERS), "this tokenizer.bin of early August 2023 spells bytes as char"),
        (GOOD[:-1], "token 287 of length 3 and 2 bytes to the end at offset 3902, expected a"),
        (GOOD + b"\0", "1 bytes behind 288 tokens at offset 3913, expected the end or another"),
        (GOOD[:4], "0 tokens, expected at least 259: <unk>, BOS, EOS and 256 bytes; the file"),
        (GOOD[:1000], "bytes behind 71 tokens at offset "),
        (content_of([*ENTRIES, (b"", 0.0)]), "token 288 of length 0 and 0 bytes to the end at off"),
        (content_of(ENTRIES[:258]), "258 tokens, expected at least 259"),
        (content_of([*ENTRIES[:4], *ENTRIES[5:]]), "token 4 is b'<0x02>', expected b'<0x01>'; the"),
        (content_of([*ENTRIES, (b"q", float("nan"))]), "a score is not a finite number; the file"),
        (content_of(ENTRIES, 5), "a longest token of 5 bytes at offset 0, expected 6 or more;"),
    ],
)  # fmt: skip
def test_broken_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(content)
    for name in (path, tmp_path):
        with pytest.raises(DataError) as caught:
            open_tokenizer(name)
        assert str(caught.value).startswith(f"{path}: ")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


@given(cut=st.integers(0, len(GOOD)), bit=st.integers(0, 8 * len(GOOD) - 1))
@settings(max_examples=100, deadline=None)
def test_any_damage_is_an_error_or_harmless(
    cut: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    content = bytearray(GOOD)
    content[bit // 8] ^= 1 << bit % 8
    for damaged in (content, content[:cut]):
        path.write_bytes(damaged)
        try:
            opened = open_tokenizer(path)
        except DataError as error:
            message = str(error)
        else:
            message = ""
            assert len(opened.encode("the and xxx")) >= 1
        assert "\n" not in message


# --- training ---


def spoken(rng: np.random.Generator, words: int) -> str:
    """A text of random words, numbers and characters of several bytes."""
    chosen = rng.choice(["the", "cat", "cats", "sat", "é", "日本", "2024", "hat\n", "hats,"], words)
    return " ".join(chosen)


def test_a_vocabulary_is_trained_on_a_text(tmp_path: Path) -> None:
    """Ids as in llama2.c's own vocabularies, and the text comes back, after a file too."""
    text = spoken(np.random.default_rng(0), 400)
    trained = Llama2cTokenizer.train([text], 284)
    assert trained.vocab_size == vocab_size_of("llama2c:284") == 284
    assert (trained.eot, trained.name) == (BOS, "llama2c:284")
    words = trained.tokens()[FIRST_PIECE:]
    lengths = [len(word.decode()) for word in words]
    singles = lengths.index(1)
    assert min(lengths[:singles]) > 1 == max(lengths[singles:])  # merges, then characters
    assert b" the" in words
    assert not [w for w in words if b"\n" in w or b" " in w[1:] or (len(w) > 1 and b"2" in w)]
    ids = trained.encode(text)
    assert trained.decode_bytes([BOS, *ids]).removeprefix(trained.tokens()[BOS]) == text.encode()
    assert len(ids) < len(text) / 1.5
    trained.save(tmp_path)
    assert np.array_equal(open_tokenizer(tmp_path).encode(text), ids)
    for _ in range(5):
        assert Llama2cTokenizer.train([text], 284).digest() == trained.digest()


def test_rare_characters_are_left_to_the_bytes() -> None:
    text = spoken(np.random.default_rng(0), 400) + " Ω"
    trained = Llama2cTokenizer.train([text], 267)
    assert "Ω".encode() not in trained.tokens()[FIRST_PIECE:]
    assert trained.decode(trained.encode(text)) == " " + text


@pytest.mark.parametrize(("size", "message"), [(262, "N must be from 263"), (65536, "to 65535")])
def test_impossible_sizes_are_refused(size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vocab_size_of(f"llama2c:{size}")


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"too short for a vocabulary of 500 .* llama2c:N"):
        make_tokenizer("llama2c:500", ["the cat"])
