"""Text in, batches out: the split, the token files, the cache, the loader, and what they refuse."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_gpt2.data import corpus as corpus_module
from gpu_gpt2.data import dataset as dataset_module
from gpu_gpt2.data.corpus import hold_out, paragraphs, python_docs, text_file, without_paragraphs
from gpu_gpt2.data.dataset import Dataset, prepare
from gpu_gpt2.data.loader import Batch, BatchLoader, sequential_batches
from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.formats.tokens import is_token_file, read_tokens, write_tokens

TEXT = "".join(f"Line {i} says naïvely: {i * i} is the square of {i}.\n" for i in range(400))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "gpu-gpt2" / "data"


@pytest.fixture
def text_path(tmp_path: Path) -> Path:
    path = tmp_path / "squares.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


# --- the built-in corpus ---


def test_python_docs_hold_out_the_last_tenth() -> None:
    corpus = python_docs()
    train, val = (sum(len(d.encode()) for d in side) for side in (corpus.train, corpus.val))
    assert train > 250_000
    assert 0.08 < val / (train + val) < 0.12
    assert corpus == python_docs()


def test_held_out_python_docs_are_not_in_the_training_text() -> None:
    corpus = python_docs()
    trained = {" ".join(p.split()) for text in corpus.train for p in paragraphs(text)}
    held_out = {" ".join(p.split()) for text in corpus.val for p in paragraphs(text)}
    assert len(held_out) > 100
    assert not trained & held_out
    # Nor do long passages stand there under other line breaks.
    train = " ".join(" ".join(text.split()) for text in corpus.train)
    windows = [
        text[i : i + 100]
        for text in (" ".join(text.split()) for text in corpus.val)
        for i in range(0, len(text) - 100, 25)
    ]
    assert sum(window in train for window in windows) < 0.01 * len(windows)


def test_the_border_document_is_cut_at_a_blank_line() -> None:
    last = "y" * 12 + "\n\n" + "z" * 6
    train, val = hold_out(["x" * 80, "", last])
    assert train == ("x" * 80, "", "y" * 12 + "\n")
    assert val == ("z" * 6,)
    assert hold_out(["x" * 90, "y" * 10]) == (("x" * 90,), ("y" * 10,))
    assert hold_out(["x" * 50]) == (("x" * 50,), ())


def test_held_out_paragraphs_are_taken_out_whatever_their_line_breaks() -> None:
    text = "One.\n\nTwo  or\nmore.\n \nThree.\n"
    assert without_paragraphs(text, {"Two or more."}) == "One.\n\nThree.\n"
    assert without_paragraphs(text, {"Four."}) == text


def test_python_without_its_help_texts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"pydoc_data.*--data FILE"):
        prepare("python-docs", "bytes")


# --- text files ---


def test_a_text_file_is_split_at_a_line_end(text_path: Path) -> None:
    corpus = text_file(text_path)
    assert corpus.train + corpus.val == (corpus.train[0], corpus.val[0])
    assert corpus.train[0] + corpus.val[0] == TEXT
    assert corpus.train[0].endswith(".\n")
    assert 0.05 < len(corpus.val[0]) / len(TEXT) <= 0.1
    assert corpus.name == "squares"


@pytest.mark.parametrize("text", ["x" * 1000, "\n" + "x" * 999, "x" * 999 + "\n", "ab"])
def test_a_text_without_lines_is_split_all_the_same(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    corpus = text_file(path)
    assert (len(corpus.train[0]), corpus.train[0] + corpus.val[0]) == (int(len(text) * 0.9), text)


def test_a_byte_order_mark_is_no_text_and_line_ends_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"line\r\n" * 20)
    corpus = text_file(path)
    assert corpus.train[0] + corpus.val[0] == "line\r\n" * 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"x", "too few"),
        (b"caf\xe9 noir", "byte 0xe9 at offset 3; convert it first, as in: iconv"),
        (b"\xef\xbb\xbfcaf\xe9", "byte 0xe9 at offset 6"),
        ("text".encode("utf-16"), "byte 0xff at offset 0"),
    ],
    ids=["empty", "blank", "one", "latin-1", "latin-1 after a mark", "utf-16"],
)
def test_bad_text_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        prepare(str(path), "bytes")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file python-dosc; give .*: python-docs"):
        prepare("python-dosc", "bytes")
    with pytest.raises(DataError, match=r"cannot read .*: Is a directory"):
        prepare(str(tmp_path), "bytes")
    with pytest.raises(DataError, match=r"cannot read the token file .*no\.bin: No such file"):
        prepare(str(tmp_path / "no.bin"), "gpt2")


# --- token files ---


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
        (b"", "holds 0 bytes, less than the 1024"),
        (_header()[:1023], "holds 1023 bytes, less than the 1024"),
        (_header(magic=20240801) + bytes(8), "magic number 20240801 at offset 0, expected 2024052"),
        (b"some text" * 500, "plain text must not be named .bin"),
        (_header(version=2) + bytes(8), "version 2 at offset 4, expected 1"),
        (_header() + bytes(7), "4 tokens at offset 8 would make 1032 bytes, .* holds 1031"),
        (_header() + bytes(9), "4 tokens at offset 8 would make 1032 bytes, .* holds 1033"),
        (_header(count=-1), "-1 tokens at offset 8"),
        (_header(count=2**31 - 1), "2147483647 tokens at offset 8 would make 4294968318 bytes"),
    ],
)
def test_damaged_token_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        prepare(str(path), "gpt2")
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
    with suppress(DataError):
        assert len(read_tokens(path)) == 4
        assert path.stat().st_size == len(content)


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
    with pytest.raises(ValueError, match="do not fit in 16 bits"):
        write_tokens(tmp_path / "a.bin", np.array([0, value]))


def test_a_token_file_is_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "some.bin"
    write_tokens(path, np.arange(1000))
    dataset = prepare(str(path), "gpt2")
    assert dataset.train.tolist() == list(range(900))
    assert dataset.val.tolist() == list(range(900, 1000))
    assert dataset.val_bytes == len(dataset.tokenizer.decode_bytes(np.arange(901, 1000)))
    assert dataset.name == "some"


def test_a_validation_file_beside_the_training_file_is_used(tmp_path: Path) -> None:
    write_tokens(tmp_path / "x_train.bin", np.arange(1000))
    write_tokens(tmp_path / "x_val.bin", np.arange(50))
    dataset = prepare(str(tmp_path / "x_train.bin"), "gpt2")
    assert (len(dataset.train), len(dataset.val)) == (1000, 50)
    assert len(prepare(str(tmp_path / "x_val.bin"), "gpt2").val) == 5


def test_tokens_outside_the_vocabulary_are_named(tmp_path: Path) -> None:
    tokens = np.arange(1000)
    tokens[123] = 50257
    write_tokens(tmp_path / "x_train.bin", tokens)
    with pytest.raises(DataError, match=r"x_train\.bin: token 50257 at position 123 .* of 50257"):
        prepare(str(tmp_path / "x_train.bin"), "gpt2")
    write_tokens(tmp_path / "x_train.bin", np.arange(1000))
    write_tokens(tmp_path / "x_val.bin", tokens)
    with pytest.raises(DataError, match=r"x_val\.bin: token 50257 at position 123"):
        prepare(str(tmp_path / "x_train.bin"), "gpt2")
    with pytest.raises(DataError, match=r"token 257 at position 257 is outside .* of 257"):
        prepare(str(tmp_path / "x_train.bin"), "bytes")


def test_a_token_file_has_no_text_to_train_a_vocabulary_on(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin", np.arange(100))
    with pytest.raises(ConfigError, match="use --tokenizer gpt2, or bytes"):
        prepare(str(tmp_path / "a.bin"), "bpe:300")


@pytest.mark.parametrize("tokens", [[], [1], [50256] * 100])
def test_token_files_without_text_to_validate_on_are_refused(
    tokens: list[int], tmp_path: Path
) -> None:
    write_tokens(tmp_path / "a.bin", np.array(tokens, np.int64))
    with pytest.raises(DataError, match="no text is left for validation"):
        prepare(str(tmp_path / "a.bin"), "gpt2")


# --- prepare and its cache ---


@pytest.mark.parametrize("spec", ["bytes", "gpt2", "bpe:300"])
def test_a_text_becomes_tokens_with_a_mark_in_front(spec: str, text_path: Path) -> None:
    dataset = prepare(str(text_path), spec)
    tokenizer = dataset.tokenizer
    assert tokenizer.name == spec
    assert (dataset.train[0], dataset.val[0]) == (tokenizer.eot, tokenizer.eot)
    assert tokenizer.decode(dataset.train[1:]) + tokenizer.decode(dataset.val[1:]) == TEXT
    assert dataset.val_bytes == len(tokenizer.decode_bytes(dataset.val[1:]))


def test_bits_per_byte(text_path: Path) -> None:
    dataset = prepare(str(text_path), "bytes")
    # A model that knows nothing: log2(256) = 8 bits for each byte.
    assert dataset.val_bits_per_byte(math.log(256)) == pytest.approx(8)
    dataset = prepare("python-docs", "bytes")
    marks = int((dataset.val == 256).sum())
    assert dataset.val_tokens_per_byte == (dataset.val_bytes + marks - 1) / dataset.val_bytes


def _same(a: Dataset, b: Dataset) -> None:
    assert (a.name, a.val_bytes, a.tokenizer.name) == (b.name, b.val_bytes, b.tokenizer.name)
    np.testing.assert_array_equal(a.train, b.train)
    np.testing.assert_array_equal(a.val, b.val)
    assert a.tokenizer.encode(TEXT).tolist() == b.tokenizer.encode(TEXT).tolist()


def _forbid_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object) -> None:
        raise AssertionError("the tokens were made again")

    monkeypatch.setattr(dataset_module, "make_tokenizer", work)
    monkeypatch.setattr(dataset_module, "_encode", work)


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_the_second_time_tokens_come_from_the_cache(
    spec: str, text_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(str(text_path), spec)
    assert [p.name.split("-")[0] for p in cache.iterdir()] == ["squares"]
    _forbid_work(monkeypatch)
    _same(prepare(str(text_path), spec), first)


def test_another_text_or_tokenizer_is_another_entry(text_path: Path, cache: Path) -> None:
    prepare(str(text_path), "bytes")
    prepare(str(text_path), "bpe:300")
    text_path.write_text(TEXT + "One more line.\n", encoding="utf-8")
    assert len(prepare(str(text_path), "bytes").train) > 0.9 * len(TEXT)
    assert len(list(cache.iterdir())) == 3


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, _cut, _flip])
@pytest.mark.parametrize(
    "file", ["train.bin", "val.bin", "tokenizer.json", "tokenizer_config.json", "meta.json"]
)
def test_a_damaged_cache_is_made_anew(
    damage: Callable[[Path], None],
    file: str,
    text_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = prepare(str(text_path), "bpe:300")
    kept = {"train": np.array(first.train), "val": np.array(first.val)}  # not of the file below
    (entry,) = cache.iterdir()
    damage(entry / file)
    again = prepare(str(text_path), "bpe:300")
    np.testing.assert_array_equal(again.train, kept["train"])
    np.testing.assert_array_equal(again.val, kept["val"])
    assert list(cache.iterdir()) == [entry]
    _forbid_work(monkeypatch)
    _same(prepare(str(text_path), "bpe:300"), again)


@pytest.mark.parametrize("content", ["[]", "{}", '{"train.bin": 1}', "null", "\0"])
def test_a_cache_without_sums_is_made_anew(content: str, text_path: Path, cache: Path) -> None:
    first = prepare(str(text_path), "bytes")
    (entry,) = cache.iterdir()
    sums = (entry / "meta.json").read_text()
    (entry / "meta.json").write_text(content)
    _same(prepare(str(text_path), "bytes"), first)
    assert (entry / "meta.json").read_text() == sums
    assert set(json.loads(sums)) == {
        "train.bin",
        "val.bin",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_where_the_cache_cannot_be_written_training_goes_on(
    text_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(str(text_path), "bytes")
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    _same(prepare(str(text_path), "bytes"), first)


def test_a_disk_that_fills_up_leaves_no_half_cache(
    text_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise DataError("No space left on device")

    monkeypatch.setattr(dataset_module, "write_tokens", full)
    prepare(str(text_path), "bytes")
    assert list(cache.iterdir()) == []


def test_the_cache_is_at_home_unless_told_otherwise(
    text_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/paths/do/not/count")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    first = prepare(str(text_path), "bytes")
    assert (tmp_path / "home" / ".cache" / "gpu-gpt2" / "data").is_dir()

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    _same(prepare(str(text_path), "bytes"), first)


def test_an_unknown_tokenizer_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="unknown tokenizer 'words'"):
        prepare("/no/such/file", "words")


def test_python_docs_are_prepared() -> None:
    dataset = prepare("python-docs", "bpe:1024")
    assert dataset.tokenizer.vocab_size == 1024
    assert max(dataset.train) == dataset.tokenizer.eot
    assert (dataset.train == dataset.tokenizer.eot).sum() == len(corpus_module.python_docs().train)
    assert 0.3 < dataset.val_tokens_per_byte < 0.5


# --- batches ---


def _rows(batch: Batch) -> np.ndarray:
    """(B, T + 1) tokens, after checking that the batch fits together."""
    assert batch.tokens.dtype == batch.targets.dtype == batch.order.dtype == np.int32
    assert batch.tokens.flags.c_contiguous
    assert batch.targets.flags.c_contiguous
    np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    expected = sorted(range(batch.tokens.size), key=lambda i: (batch.tokens.flat[i], i))
    np.testing.assert_array_equal(batch.order, expected)
    return np.hstack([batch.tokens, batch.targets[:, -1:]])


@pytest.mark.parametrize(("count", "B", "T"), [(1000, 4, 16), (97, 1, 7), (65, 3, 1), (130, 2, 64)])
def test_each_epoch_takes_every_row_once(count: int, B: int, T: int) -> None:
    tokens = np.arange(count, dtype=np.uint16)
    loader = BatchLoader(tokens, B, T, seed=3)
    epochs: dict[int, list[int]] = {}
    for _ in range(math.ceil(3 * ((count - 1) // T) / B)):  # enough for three epochs
        ahead = BatchLoader(tokens, 1, T, seed=3)  # one row at a time tells the epochs apart
        ahead.restore(loader.state())
        for row in _rows(loader.next_batch()):
            seen = epochs.setdefault(ahead.state()["epoch"], [])
            np.testing.assert_array_equal(row, _rows(ahead.next_batch())[0])
            np.testing.assert_array_equal(row, np.arange(row[0], row[0] + T + 1))
            seen.append(int(row[0]))
    offsets = set()
    orders = set()
    for epoch in range(3):
        starts = epochs[epoch]
        offset = min(starts)
        offsets.add(offset)
        orders.add(tuple(starts))
        # Every token once, but for fewer than T at the start and at the end.
        assert offset < T
        assert sorted(starts) == list(range(offset, count - T, T))
    assert len(orders) == 3
    assert T == 1 or len(offsets) > 1


def test_the_order_follows_from_the_seed() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    first, same, other = (BatchLoader(tokens, 4, 16, seed=s).next_batch() for s in (1, 1, 2))
    np.testing.assert_array_equal(first.tokens, same.tokens)
    assert not np.array_equal(first.tokens, other.tokens)


@given(st.integers(0, 40), st.integers(2, 60), st.integers(1, 9), st.integers(1, 12))
@settings(deadline=None, max_examples=60)
def test_a_restored_loader_gives_the_same_batches(done: int, count: int, B: int, T: int) -> None:
    T = min(T, count - 1)
    tokens = np.random.default_rng(0).integers(0, 300, count).astype(np.uint16)
    loader = BatchLoader(tokens, B, T, seed=7)
    for _ in range(done):
        loader.next_batch()
    saved = json.loads(json.dumps(loader.state()))
    restored = BatchLoader(tokens, B, T, seed=7)
    restored.restore(saved)
    for _ in range(5):
        expected, got = loader.next_batch(), restored.next_batch()
        np.testing.assert_array_equal(got.tokens, expected.tokens)
        np.testing.assert_array_equal(got.targets, expected.targets)
        np.testing.assert_array_equal(got.order, expected.order)
    assert restored.state() == loader.state()


@pytest.mark.parametrize(
    "change",
    [{"position": 100}, {"position": -1}, {"epoch": -1}, {"crc32": 0}, {"epoch": "x"}],
)
def test_a_place_that_is_not_there_is_refused(change: dict[str, int]) -> None:
    loader = BatchLoader(np.arange(1000, dtype=np.uint16), 4, 10)
    with pytest.raises(DataError, match="cannot go on"):
        loader.restore({**loader.state(), **change})
    with pytest.raises(DataError, match="the saved place in the data is damaged"):
        loader.restore({})


def test_another_text_is_not_gone_on_with() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    saved = BatchLoader(tokens, 4, 10).state()
    longer, other = np.append(tokens, tokens[:1]), tokens + 1
    for changed in (longer, other):
        with pytest.raises(DataError, match="not those of the saved run"):
            BatchLoader(changed, 4, 10).restore(saved)


def test_the_smallest_text_fills_any_batch() -> None:
    batch = BatchLoader(np.arange(9, dtype=np.uint16), 5, 8).next_batch()
    np.testing.assert_array_equal(_rows(batch), [np.arange(9)] * 5)
    with pytest.raises(DataError, match=r"8 tokens .* are too few: .* need 9; .* --seq-len"):
        BatchLoader(np.arange(8, dtype=np.uint16), 5, 8)


@given(st.integers(2, 200), st.integers(1, 8), st.integers(1, 20))
@settings(deadline=None)
def test_validation_predicts_every_token_but_the_first_once(count: int, B: int, T: int) -> None:
    tokens = np.random.default_rng(count).integers(0, 60000, count).astype(np.uint16)
    batches = list(sequential_batches(tokens, B, T))
    for batch in batches:
        _rows(batch)
        b, t = batch.tokens.shape
        assert (b <= B and t == T) or (b == 1 and t < T)
    np.testing.assert_array_equal(np.concatenate([b.targets.ravel() for b in batches]), tokens[1:])
    np.testing.assert_array_equal(np.concatenate([b.tokens.ravel() for b in batches]), tokens[:-1])
    assert sum(b.tokens.shape != (B, T) for b in batches) <= 2


@pytest.mark.parametrize("count", [0, 1])
def test_validation_needs_two_tokens(count: int) -> None:
    with pytest.raises(DataError, match="a prediction needs 2"):
        next(sequential_batches(np.zeros(count, np.uint16), 2, 4))
