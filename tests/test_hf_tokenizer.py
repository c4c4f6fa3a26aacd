"""Tokenizers of Hugging Face folders: the ids of transformers, the bytes of every token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from gpu_gpt2.data.corpus import python_docs
from gpu_gpt2.errors import DataError
from gpu_gpt2.tokenizer import GPT2Tokenizer, HFTokenizer, Tokenizer, open_tokenizer

# Llama 3's rule for cutting text, as far as this library's regular expressions have it.
LLAMA3_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = ("llama2", "llama2 metaspace", "smollm", "llama3", "eot first")
TEXTS = [
    "", " ", "a", "the and", "  two  spaces ",
    "I'm 1234567 years\n\n\told. ", "naïve café 日本語 👩‍👩",
    "    if x:\n        return 'll  \n", "x" * 300, "\x00\x7f\u2028",
]  # fmt: skip


def train(kind: str) -> tokenizers.Tokenizer:
    """A small tokenizer of a kind that Llama models have, trained on the Python documents."""
    special: list[Any]
    if kind.startswith("llama2"):
        library = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        if kind == "llama2":
            library.normalizer = normalizers.Sequence(
                [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
            )
        else:
            library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        library.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        alphabet = list("\u2581abcdefghijklmnopqrstuvwxyz")
    else:
        library = tokenizers.Tokenizer(models.BPE())
        byte_level = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=kind not in ("llama3",)
        )
        first = {
            "smollm": [pre_tokenizers.Digits(individual_digits=True)],
            "llama3": [pre_tokenizers.Split(Regex(LLAMA3_PIECES), "isolated")],
            "eot first": [],
        }[kind]
        library.pre_tokenizer = (
            pre_tokenizers.Sequence([*first, byte_level]) if first else byte_level
        )
        library.decoder = decoders.ByteLevel()
        special = ["<|endoftext|>"]
        if kind != "eot first":
            special += ["<|im_start|>", "<|im_end|>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=special, initial_alphabet=alphabet, show_progress=False,
        max_token_length=8,
    )  # fmt: skip
    library.train_from_iterator(python_docs().train[:3], trainer)
    if not kind.startswith("llama2"):
        return library
    # Bytes are ordinary tokens of the model there, and only three tokens are special.
    content = json.loads(library.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    library.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return library


def save(folder: Path, kind: str, library: tokenizers.Tokenizer) -> None:
    library.save(str(folder / "tokenizer.json"))
    llama2 = kind.startswith("llama2")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>" if llama2 else {"content": "<|endoftext|>"},
        "eos_token": "</s>" if llama2 else "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    if kind != "eot first":
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "bos_token_id": 0, "eos_token_id": 0})
        if kind == "eot first"
        else "{}"
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for kind in KINDS:
        folders[kind] = tmp_path_factory.mktemp(kind.replace(" ", "_"))
        save(folders[kind], kind, train(kind))
    return folders


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: open_tokenizer(folder) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(
    kind: str, folders: dict[str, Path], opened: dict[str, Tokenizer]
) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = opened[kind]
    assert isinstance(tokenizer, HFTokenizer)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folders[kind] / "tokenizer.json"))
    assert len(theirs) == tokenizer.vocab_size
    for text in (*TEXTS, python_docs().val[0][:20_000]):
        ids = tokenizer.encode(text).tolist()
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert tokenizer.prompt_ids(text) == [tokenizer.eot, *ids]
        if kind == "llama2":
            assert theirs(text)["input_ids"] == tokenizer.prompt_ids(text)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text())
@settings(max_examples=100, deadline=None)
def test_bytes_are_those_of_the_text(kind: str, opened: dict[str, Tokenizer], text: str) -> None:
    tokenizer = opened[kind]
    llama2 = kind.startswith("llama2")
    if llama2:
        text = text.replace("\u2581", "")  # it stands for a space in these vocabularies
    ids = tokenizer.encode(text)
    prefix = " " if llama2 and text and not (kind != "llama2" and text[0] == " ") else ""
    assert tokenizer.decode_bytes(ids) == (prefix + text).encode()
    assert tokenizer.token_bytes()[ids].sum() == len((prefix + text).encode())
    pieces, previous = [], tokenizer.eot
    for token in ids.tolist():
        pieces.append(tokenizer.piece(token, previous))
        previous = token
    if prefix or not llama2:
        assert b"".join(pieces) == text.encode()


def test_special_tokens(opened: dict[str, Tokenizer]) -> None:
    llama2, smollm = opened["llama2"], opened["smollm"]
    assert (llama2.eot, llama2.stop_ids) == (1, {1, 2})
    assert (smollm.eot, smollm.stop_ids) == (0, {0})
    assert (opened["eot first"].eot, opened["eot first"].stop_ids) == (0, {0})
    text = "<|im_start|>user"
    assert smollm.decode(smollm.encode(text)) == text
    assert smollm.encode(text)[0] != 1  # text of a corpus is text
    assert smollm.prompt_ids(text)[:2] == [0, 1]  # a prompt may be that of a chat model
    assert smollm.encode(text)[0] != 1
    assert smollm.token_bytes()[:4].tolist() == [0, 0, 0, 1]
    assert smollm.tokens()[1] == b"<|im_start|>"
    assert llama2.tokens()[3 + 65] == b"A"
    assert smollm.encode("a\ud800").tolist() == smollm.encode("a\ufffd").tolist()


def test_every_file_that_names_special_tokens_counts(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    content = (folders["smollm"] / "tokenizer.json").read_bytes()
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"neither BOS nor EOS is known; name bos_token or eos_to"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": 7}')
    with pytest.raises(DataError, match="neither BOS nor EOS is known"):
        open_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 1, 5000, null]}')
    found = open_tokenizer(tmp_path)
    assert (found.eot, found.stop_ids) == (2, {1, 2})
    (tmp_path / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": 1}')
    found = open_tokenizer(tmp_path)
    assert (found.eot, found.stop_ids) == (0, {0, 1, 2})
    digest = found.digest()
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<|im_end|>"}')
    found = open_tokenizer(path)
    assert (found.eot, found.stop_ids) == (2, {0, 1, 2} - {0})
    assert found.digest() != digest
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(DataError, match=r"config\.json: expected a JSON object"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_opened(
    kind: str, folders: dict[str, Path], opened: dict[str, Tokenizer], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    opened[kind].save(tmp_path)
    again = open_tokenizer(tmp_path)
    assert again.digest() == opened[kind].digest()
    assert (again.eot, again.stop_ids) == (opened[kind].eot, opened[kind].stop_ids)
    assert (again.name, again.tokens()) == (opened[kind].name, opened[kind].tokens())
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.bos_token_id == again.eot
    assert theirs("I'm 12 é", add_special_tokens=False)["input_ids"] == (
        again.encode("I'm 12 é").tolist()
    )


def change(folder: Path, **changes: Any) -> None:
    """Writes GPT-2's kind of tokenizer with other settings."""
    GPT2Tokenizer.of_bytes().save(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    for name, value in changes.items():
        content[name] = value if name != "added" else content[name]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "text", "decoded"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "Ab", "ab"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True,
                           "trim_offsets": True}},
         "Ab", " Ab"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False,
                           "trim_offsets": True}},
         "A b", "A b"),
    ],
)  # fmt: skip
def test_what_differs_from_gpt2_is_left_to_the_library(
    changes: dict[str, Any], text: str, decoded: str, tmp_path: Path
) -> None:
    change(tmp_path, **changes)
    found = open_tokenizer(tmp_path)
    assert isinstance(found, HFTokenizer)
    assert (found.eot, found.stop_ids) == (256, {256})
    assert found.decode(found.encode(text)) == decoded


def test_an_added_token_makes_it_the_librarys(tmp_path: Path) -> None:
    change(tmp_path)
    path = tmp_path / "tokenizer.json"
    library = tokenizers.Tokenizer.from_file(str(path))
    library.add_special_tokens([AddedToken("<|pad|>", special=True)])
    library.save(str(path))
    found = open_tokenizer(path)
    assert (type(found), found.vocab_size, found.eot) == (HFTokenizer, 258, 256)
    assert found.tokens()[257] == b"<|pad|>"


@pytest.mark.parametrize(
    ("part", "value"), [("merges", [["a", "zz"]]), ("vocab", {"a": 0}), ("vocab", None)]
)
def test_a_damaged_file_is_refused(
    part: str, value: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    content = json.loads((folders["smollm"] / "tokenizer.json").read_text("utf-8"))
    content["model"][part] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"tokenizer\.json.*is damaged or|cannot read it: "):
        open_tokenizer(tmp_path)
