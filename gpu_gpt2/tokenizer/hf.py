"""Tokenizers of Hugging Face folders that are not GPT-2's kind, through the tokenizers library.

Two kinds can spell every text: byte-level vocabularies that cut text by another rule than GPT-2's,
such as Llama 3's, and SentencePiece's vocabularies with a token for each byte, such as Llama 2's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.errors import DataError
from gpu_gpt2.formats.hf import CONFIG_FILE, read_json
from gpu_gpt2.formats.llama2c_tokenizer import byte_word
from gpu_gpt2.formats.vocabulary import TOKENIZER_CONFIG, TOKENIZER_JSON, bytes_of, no_tokenizer
from gpu_gpt2.tokenizer.base import Tokenizer, without_lone_surrogates

_SPACE: Final = "\u2581"  # stands for a space in SentencePiece's vocabularies
_BYTE_WORDS: Final = {byte_word(byte).decode(): bytes([byte]) for byte in range(256)}
# Files beside tokenizer.json that name the special tokens, by their text or by their id.
_NAMING: Final = (
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    CONFIG_FILE,
    "generation_config.json",
)
# Settings of a BPE model that these two kinds do not have, with their values where they are off.
_OFF: Final[Mapping[str, tuple[Any, ...]]] = {
    "dropout": (None, 0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
}


class HFTokenizer(Tokenizer):
    """A tokenizer.json, with the special tokens that the files beside it name."""

    def __init__(self, path: Path, content: bytes) -> None:
        """content: the bytes of the tokenizer.json at `path`. DataError says what is wrong."""
        # Imported here because few tokenizers need it and it is slow to load.
        from tokenizers import Tokenizer as Library

        self._content = content
        try:
            settings = json.loads(content)
            byte_level = _is_byte_level(path, settings)
            added = {token["id"]: token for token in settings["added_tokens"]}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise no_tokenizer(path) from e
        try:
            library = Library.from_str(content.decode("utf-8"))
        except Exception as e:  # the library raises Exception itself
            raise DataError(
                f"{path}: the package tokenizers cannot read it: {str(e).splitlines()[0]}; the "
                f"file is damaged, or made for a newer version: pip install -U tokenizers"
            ) from e
        if any(library.token_to_id(token["content"]) != i for i, token in added.items()):
            raise no_tokenizer(path)
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True  # their characters in a text are ordinary text
        self._library = library
        vocab = library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.name = f"hf:{self.vocab_size}"
        self._pieces = [b""] * self.vocab_size
        for word, i in vocab.items():
            self._pieces[i] = word.encode() if i in added else _spelled(word, byte_level)
        self._special = [i for i, token in added.items() if token["special"]]
        named = _named_tokens(path.parent, vocab, self.vocab_size)
        ends = named["eos_token"]
        begins = named["bos_token"] or ends
        if not begins:
            raise DataError(
                f"{path}: neither BOS nor EOS is known; name bos_token or eos_token in a "
                f"{TOKENIZER_CONFIG} beside it"
            )
        self.eot = begins[0]
        self._end = (ends or begins)[0]
        self.stop_ids = frozenset({self.eot, *ends})
        # A space that is put in front of each text is dropped again behind BOS.
        self._adds_space = self.decode_bytes(self.encode("a")) == b" a"

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Returns the ids (tokens,) int32 of `text`, without special tokens: see Tokenizer."""
        encoding = self._library.encode(without_lone_surrogates(text), add_special_tokens=False)
        return np.array(encoding.ids, np.int32)

    def prompt_ids(self, text: str) -> list[int]:
        """Returns BOS and the ids of `text`; the characters of a special token mean the token.

        So a prompt can be formatted for a chat model. Without a BOS, EOS is in front of the text.
        """
        self._library.encode_special_tokens = False
        try:
            return super().prompt_ids(text)
        finally:
            self._library.encode_special_tokens = True

    def piece(self, token: int, previous: int | None) -> bytes:
        """Returns the bytes of a token; straight after BOS, without a space that was put there."""
        word = self._pieces[token]
        return word[1:] if self._drops_space(previous) and word.startswith(b" ") else word

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """Returns the bytes of text that each token stands for, (V,) int32; 0 for special ones."""
        counts = np.array([*map(len, self._pieces)], np.int32)
        counts[self._special] = 0
        return counts

    def tokens(self) -> list[bytes]:
        """Returns the bytes of every id; those of a special token are its name."""
        return list(self._pieces)

    def digest(self) -> str:
        """Returns the SHA-256 of the tokenizer.json and of the token between documents."""
        return hashlib.sha256(self._content + b"\0%d" % self.eot).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes the same tokenizer.json, and a tokenizer_config.json with BOS and EOS."""
        (folder / TOKENIZER_JSON).write_bytes(self._content)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._library.id_to_token(self.eot),
            "eos_token": self._library.id_to_token(self._end),
            "clean_up_tokenization_spaces": False,
        }
        text = json.dumps(config, ensure_ascii=False, indent=1) + "\n"
        (folder / TOKENIZER_CONFIG).write_text(text, encoding="utf-8")

    def _drops_space(self, previous: int | None) -> bool:
        return previous == self.eot and self._adds_space


def _is_byte_level(path: Path, settings: Mapping[str, Any]) -> bool:
    """True for a byte-level vocabulary, False for one with byte fallback; DataError for others."""
    model = settings["model"]
    if model.get("type", "BPE") != "BPE":
        raise DataError(
            f"{path}: model.type is {model['type']!r}; only byte-pair encodings, BPE, can be read"
        )
    for name, allowed in _OFF.items():
        if (value := model.get(name)) not in allowed:
            raise DataError(
                f"{path}: model.{name} is {value!r}, expected {allowed[0]!r}; such tokenizers "
                f"cannot be read"
            )
    if any(part.get("type") == "ByteLevel" for part in _parts(settings["pre_tokenizer"])):
        return True
    if model.get("byte_fallback") and _BYTE_WORDS.keys() <= model["vocab"].keys():
        return False
    raise DataError(
        f"{path}: its tokens cannot spell every text, as it is neither byte-level nor has a token "
        f"for each byte; use another tokenizer"
    )


def _parts(step: Any) -> Iterator[Any]:
    """The pre-tokenizers that a pre-tokenizer consists of."""
    if step is None:
        return
    yield step
    for part in step.get("pretokenizers", ()):
        yield from _parts(part)


def _spelled(word: str, byte_level: bool) -> bytes:
    """The bytes of text that a word of the vocabulary stands for."""
    if byte_level:
        try:
            return bytes_of(word)
        except KeyError:  # a token that is no text, such as a marker that is not listed as special
            return word.encode()
    return _BYTE_WORDS.get(word) or word.replace(_SPACE, " ").encode()


def _named_tokens(folder: Path, vocab: Mapping[str, int], size: int) -> dict[str, list[int]]:
    """The ids that the files in `folder` name as "bos_token" and "eos_token", in their order."""
    files = [read_json(folder / name) for name in _NAMING if (folder / name).is_file()]
    found: dict[str, list[int]] = {"bos_token": [], "eos_token": []}
    for role, ids in found.items():
        for values in files:
            word = values.get(role)
            if isinstance(word, dict):
                word = word.get("content")
            given = values.get(f"{role}_id")
            given = given if isinstance(given, list) else [given]
            for i in [vocab.get(word) if isinstance(word, str) else None, *given]:
                if type(i) is int and 0 <= i < size and i not in ids:
                    ids.append(i)
    return found
