"""From what --data names to tokens: the split, token files, the cache, and what they refuse."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpu_gpt2.data import corpus as corpus_module
from gpu_gpt2.data import dataset as dataset_module
from gpu_gpt2.data.corpus import hold_out, paragraphs, python_docs, text_file, without_paragraphs
from gpu_gpt2.data.dataset import Dataset, prepare
from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.formats.tokens import LLAMA3, write_tokens

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
    with pytest.raises(DataError, match=r"holds no token files such as NAME_train\.bin"):
        prepare(str(tmp_path), "bytes")
    with pytest.raises(DataError, match=r"cannot read the token file .*no\.bin: No such file"):
        prepare(str(tmp_path / "no.bin"), "gpt2")


# --- token files as data ---


def test_a_token_file_is_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "some.bin"
    write_tokens(path, np.arange(1000))
    dataset = prepare(str(path), "gpt2")
    assert [shard.tolist() for shard in dataset.train] == [list(range(900))]
    assert dataset.val.tolist() == list(range(900, 1000))
    assert dataset.val_bytes == len(dataset.tokenizer.decode_bytes(np.arange(901, 1000)))
    assert dataset.name == "some"


def test_a_validation_file_beside_the_training_file_is_used(tmp_path: Path) -> None:
    write_tokens(tmp_path / "x_train.bin", np.arange(1000))
    write_tokens(tmp_path / "x_val.bin", np.arange(50))
    dataset = prepare(str(tmp_path / "x_train.bin"), "gpt2")
    assert (len(dataset.train[0]), len(dataset.val)) == (1000, 50)
    assert len(prepare(str(tmp_path / "x_val.bin"), "gpt2").val) == 5


def test_tokens_outside_the_vocabulary_are_named(tmp_path: Path) -> None:
    tokens = np.arange(1000)
    tokens[123] = 50257
    write_tokens(tmp_path / "x_train.bin", tokens)
    write_tokens(tmp_path / "x_train.bin", np.arange(1000))
    write_tokens(tmp_path / "x_val.bin", tokens)
    with pytest.raises(DataError, match=r"x_val\.bin: token 50257 at position 123"):
        prepare(str(tmp_path / "x_train.bin"), "gpt2")
    write_tokens(tmp_path / "x_val.bin", np.arange(258))
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
    (train,) = dataset.train
    assert (train[0], dataset.val[0]) == (tokenizer.eot, tokenizer.eot)
    assert tokenizer.decode(train[1:]) + tokenizer.decode(dataset.val[1:]) == TEXT
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
    assert len(prepare(str(text_path), "bytes").train[0]) > 0.9 * len(TEXT)
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
    (train,) = dataset.train
    assert max(train) == dataset.tokenizer.eot
    assert (train == dataset.tokenizer.eot).sum() == len(corpus_module.python_docs().train)
    assert 0.3 < dataset.val_tokens_per_byte < 0.5


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder as llm.c makes it: three training shards, two of validation, and something else."""
    for number in (1, 2, 10):
        write_tokens(tmp_path / f"web_train_{number:06d}.bin", np.arange(100) + number)
    for number in (0, 1):
        write_tokens(tmp_path / f"web_val_{number:06d}.bin", np.arange(40) + 1000 * number)
    write_tokens(tmp_path / "other_val.bin", np.arange(40))
    (tmp_path / "README.md").write_text("text")
    return tmp_path


@pytest.mark.parametrize("data", ["", "web_train_*.bin", "web_train_0000[01]?.bin"])
def test_a_folder_or_a_pattern_names_many_shards(shards: Path, data: str) -> None:
    dataset = prepare(str(shards / data), "gpt2")
    assert [int(shard[0]) for shard in dataset.train] == [1, 2, 10]
    assert dataset.val.tolist() == [*range(40), *range(1000, 1040)]
    assert dataset.name == "web_train_000001"


def test_validation_reads_no_more_than_it_says(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "MAX_VAL_TOKENS", 50)
    dataset = prepare(str(shards), "gpt2")
    assert dataset.val.tolist() == [*range(40), *range(1000, 1010)]
    predicted = dataset.tokenizer.decode_bytes(dataset.val[1:])
    assert dataset.val_bytes == len(predicted)


def test_validation_of_a_text_and_of_a_last_tenth_is_no_longer(
    shards: Path, text_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "MAX_VAL_TOKENS", 5)
    (shards / "README.md").unlink()
    for data in (text_path, shards / "other_val.bin"):
        if data.suffix == ".bin":
            write_tokens(data, np.arange(400))
        dataset = prepare(str(data), "gpt2")
        assert len(dataset.val) == 5
        assert dataset.val_bytes == len(dataset.tokenizer.decode_bytes(dataset.val[1:]))


def test_a_number_of_validation_tokens_may_be_above_the_usual_limit(
    shards: Path, text_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "MAX_VAL_TOKENS", 5)
    for data in (shards, text_path):
        for count in (3, 5, 30):
            assert len(prepare(str(data), "gpt2", val_tokens=count).val) == count
        assert len(prepare(str(data), "gpt2").val) == 5


def test_validation_stops_at_the_file_that_fills_it(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third file, damaged, is not even opened."""
    monkeypatch.setattr(dataset_module, "MAX_VAL_TOKENS", 80)
    (shards / "web_val_000002.bin").write_bytes(b"damaged")
    assert len(prepare(str(shards), "gpt2").val) == 80


def test_a_pattern_that_names_validation_files_trains_on_them_alone(shards: Path) -> None:
    """What is trained on is not held out: then the last tenth of the last file is."""
    dataset = prepare(str(shards / "web_*.bin"), "gpt2")
    assert [len(shard) for shard in dataset.train] == [100, 100, 100, 40, 36]
    assert dataset.val.tolist() == list(range(1036, 1040))


def test_without_validation_shards_the_last_tenth_is_held_out(shards: Path) -> None:
    for path in shards.glob("*_val*.bin"):
        path.unlink()
    dataset = prepare(str(shards), "gpt2")
    assert [len(shard) for shard in dataset.train] == [100, 100, 90]
    assert dataset.val.tolist() == list(range(100, 110))


def test_llama_shards_are_found_to_be_of_another_vocabulary(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin", np.full(100, 128000), LLAMA3)
    with pytest.raises(DataError, match=r"a\.bin: token 128000 .* outside the vocabulary of 50257"):
        prepare(str(tmp_path / "a.bin"), "gpt2")


@pytest.mark.parametrize("data", ["", "web_*.bin"])
def test_where_there_are_no_shards_it_says_so(tmp_path: Path, data: str) -> None:
    with pytest.raises(DataError, match=r"make (some|token files) with gpu-gpt2 data prepare"):
        prepare(str(tmp_path / data), "gpt2")
