"""Tokenizers: GPT-2's vocabulary, plain bytes, a vocabulary trained on text or one from a file.

All of them are byte-level byte-pair vocabularies, and tiktoken does the encoding. Ids 0 to V - 2
are byte strings, in the order in which their pairs merge. The last id, V - 1, is <|endoftext|>,
which precedes every document. The characters "<|endoftext|>" in a text are ordinary text.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import tiktoken

from gpu_gpt2.config import GPT2_VOCAB_SIZE
from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.formats.tokenizer_bin import write_tokenizer_bin
from gpu_gpt2.formats.vocabulary import (
    BYTE_VALUES,
    END_OF_TEXT,
    MAX_TOKEN_BYTES,
    MAX_VOCAB_SIZE,
    bytes_of,
    gpt2_ranks,
    merges,
    read_vocabulary,
    word_of,
)

BYTES_VOCAB_SIZE: Final = BYTE_VALUES + 1  # the bytes and <|endoftext|>
MIN_VOCAB_SIZE: Final = BYTES_VOCAB_SIZE + 1  # a trained vocabulary has at least one merge

# The pattern that cuts text into pieces, inside which pairs are merged (Radford et al. 2019,
# section 2.2): letters, digits or other marks with one space in front, and runs of white space.
# The possessive "++" are from tiktoken; they give the same pieces without backtracking.
_PIECES: Final = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_TRAINED: Final = re.compile(r"bpe:([0-9]{1,9})")


def vocab_size_of(spec: str) -> int:
    """The size of the vocabulary that `spec` names; UserError.

    spec: "gpt2", "bytes", "bpe:N", or the path of a tokenizer: see Tokenizer.open.
    """
    if spec == "gpt2":
        return GPT2_VOCAB_SIZE
    if spec == "bytes":
        return BYTES_VOCAB_SIZE
    match = _TRAINED.fullmatch(spec)
    if not match:
        return _open_named(spec).vocab_size
    size = int(match[1])
    if not MIN_VOCAB_SIZE <= size <= MAX_VOCAB_SIZE:
        raise ConfigError(
            f"tokenizer {spec}: N must be from {MIN_VOCAB_SIZE} ({BYTE_VALUES} bytes, one merge "
            f"and {END_OF_TEXT}) to {MAX_VOCAB_SIZE} (ids are stored in 16 bits)"
        )
    return size


class Tokenizer:
    """A vocabulary that encodes text to ids, decodes ids to text, and can be saved."""

    def __init__(self, name: str, ranks: Mapping[bytes, int]) -> None:
        """ranks: the id of every byte string; ids 0 to len(ranks) - 1 in the order of merging."""
        self.name = name
        self.eot = len(ranks)
        self.vocab_size = len(ranks) + 1
        self._ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
        self._encoding = tiktoken.Encoding(
            name,
            pat_str=_PIECES,
            mergeable_ranks=self._ranks,
            special_tokens={END_OF_TEXT: self.eot},
            explicit_n_vocab=self.vocab_size,
        )

    @classmethod
    def gpt2(cls) -> Tokenizer:
        """GPT-2's own vocabulary, which is installed with gpu-gpt2; DataError if it is damaged."""
        return cls("gpt2", gpt2_ranks())

    @classmethod
    def open(cls, path: Path) -> Tokenizer:
        """The tokenizer in a file or folder; DataError.

        `path` is a tokenizer.json, a vocab.json or merges.txt with the other one beside it, llm.c's
        gpt2_tokenizer.bin, or a folder with one of these, such as one that `save` wrote.
        """
        ranks = read_vocabulary(path)
        return cls(_name_of(ranks), ranks)

    @classmethod
    def of_bytes(cls) -> Tokenizer:
        """A vocabulary of one token per byte, whose id is the byte's value."""
        return cls("bytes", {bytes([b]): b for b in range(BYTE_VALUES)})

    @classmethod
    def train(cls, documents: Sequence[str], vocab_size: int) -> Tokenizer:
        """Trains a byte-pair vocabulary of `vocab_size` tokens on `documents`; deterministic.

        ConfigError if the text is too short.
        """
        # Imported here because only training needs it and it is slow to load.
        from tokenizers import Tokenizer as Trained
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel
        from tokenizers.trainers import BpeTrainer

        trained = Trained(BPE())
        trained.pre_tokenizer = ByteLevel(add_prefix_space=False)
        trained.train_from_iterator(
            [_without_lone_surrogates(text) for text in documents],
            BpeTrainer(
                vocab_size=vocab_size - 1,
                initial_alphabet=ByteLevel.alphabet(),
                max_token_length=MAX_TOKEN_BYTES,
                show_progress=False,
            ),
        )
        vocab = trained.get_vocab()
        if len(vocab) < vocab_size - 1:
            raise ConfigError(
                f"the text is too short for a vocabulary of {vocab_size} tokens: it has pairs for "
                f"{len(vocab) + 1}; use a smaller N in --tokenizer bpe:N, or --tokenizer bytes"
            )
        return cls(f"bpe:{vocab_size}", {bytes_of(word): rank for word, rank in vocab.items()})

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """The ids (tokens,) int32 of `text`; lone surrogates become U+FFFD, as UTF-8 has none.

        DataError for a text that tiktoken cannot cut into pieces.
        """
        try:
            ids = self._encoding.encode_to_numpy(
                _without_lone_surrogates(text), disallowed_special=()
            )
        except ValueError as e:
            raise DataError(
                "the text has too many blanks in a row to be cut into words, about a million; "
                "take some of them out"
            ) from e
        return ids.astype(np.int32)

    def decode(self, tokens: npt.NDArray[Any] | Sequence[int]) -> str:
        """The text of `tokens`; bytes that are not UTF-8, as of half a character, become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def decode_bytes(self, tokens: npt.NDArray[Any] | Sequence[int]) -> bytes:
        """The bytes of `tokens`, each in 0 to V - 1."""
        return self._encoding.decode_bytes(np.asarray(tokens, np.int64).tolist())

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """The bytes of text that each token stands for, (V,) int32; 0 for <|endoftext|>."""
        return np.array([*map(len, self._ranks), 0], np.int32)

    def tokens(self) -> list[bytes]:
        """The bytes of every id, 0 to V - 1; the last are the characters "<|endoftext|>"."""
        return [*self._ranks, END_OF_TEXT.encode()]

    def save_bin(self, path: Path, version: int = 2) -> None:
        """Writes llm.c's gpt2_tokenizer.bin; version 1 holds only GPT-2's vocabulary. DataError."""
        write_tokenizer_bin(path, self.tokens(), self.eot, version)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which transformers reads.

        transformers gives the same ids, except that it takes the characters "<|endoftext|>" in a
        text for the token. Raises OSError if `folder` cannot be written.
        """
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        }
        tokenizer = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": self.eot,
                    "content": END_OF_TEXT,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
            ],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": {word_of(token): rank for token, rank in self._ranks.items()}
                | {END_OF_TEXT: self.eot},
                "merges": [f"{word_of(a)} {word_of(b)}" for a, b in merges(self._ranks)],
            },
        }
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
        }
        for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
            text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
            (Path(folder) / name).write_text(text, encoding="utf-8")


def is_path(spec: str) -> bool:
    """True if `spec` is the path of a tokenizer: anything but "gpt2", "bytes" and "bpe:N"."""
    return spec not in ("gpt2", "bytes") and not _TRAINED.fullmatch(spec)


def make_tokenizer(spec: str, documents: Sequence[str]) -> Tokenizer:
    """The tokenizer that `spec` names; "bpe:N" is trained on `documents`. UserError."""
    if is_path(spec):
        return _open_named(spec)
    if spec == "gpt2":
        return Tokenizer.gpt2()
    if spec == "bytes":
        return Tokenizer.of_bytes()
    return Tokenizer.train(documents, vocab_size_of(spec))


def cache_key(spec: str) -> str:
    """A name for the vocabulary of `spec` in a cache: for a path, the SHA-256 of its tokens."""
    if not is_path(spec):
        return spec
    tokens = _open_named(spec).tokens()
    return hashlib.sha256(b"".join(bytes([len(token)]) + token for token in tokens)).hexdigest()


def _open_named(spec: str) -> Tokenizer:
    if not os.path.exists(spec):
        raise ConfigError(
            f"unknown tokenizer {spec!r}; choose gpt2, bytes or bpe:N, as in bpe:1024, or name a "
            f"tokenizer file or folder that is there"
        )
    return Tokenizer.open(Path(spec))


def _name_of(ranks: Mapping[bytes, int]) -> str:
    """The spec of a vocabulary; GPT-2's is recognised by its size and its last merge."""
    if len(ranks) == BYTE_VALUES:
        return "bytes"
    if len(ranks) == GPT2_VOCAB_SIZE - 1 and ranks.get(b" gazed") == GPT2_VOCAB_SIZE - 2:
        return "gpt2"
    return f"bpe:{len(ranks) + 1}"


def _without_lone_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
