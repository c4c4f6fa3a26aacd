"""Tokenizers of GPT-2's kind: its vocabulary, plain bytes, or a vocabulary trained on text.

All of them are byte-level byte-pair vocabularies, and tiktoken does the encoding. Ids 0 to V - 2
are byte strings, in the order in which their pairs merge. The last id, V - 1, is <|endoftext|>,
which precedes every document. The characters "<|endoftext|>" in a text are ordinary text.
"""

from __future__ import annotations

import hashlib
import json
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
    bytes_of,
    gpt2_ranks,
    merges,
    word_of,
)
from gpu_gpt2.tokenizer.base import Tokenizer, without_lone_surrogates

BYTES_VOCAB_SIZE: Final = BYTE_VALUES + 1  # the bytes and <|endoftext|>
MIN_VOCAB_SIZE: Final = BYTES_VOCAB_SIZE + 1  # a trained vocabulary has at least one merge

# The pattern that cuts text into pieces, inside which pairs are merged (Radford et al. 2019,
# section 2.2): letters, digits or other marks with one space in front, and runs of white space.
# The possessive "++" are from tiktoken; they give the same pieces without backtracking.
_PIECES: Final = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class GPT2Tokenizer(Tokenizer):
    """A byte-level vocabulary with <|endoftext|>, cut into words as GPT-2 does."""

    def __init__(self, name: str, ranks: Mapping[bytes, int]) -> None:
        """ranks: the id of every byte string; ids 0 to len(ranks) - 1 in the order of merging."""
        self.name = name
        self.eot = len(ranks)
        self.vocab_size = len(ranks) + 1
        self.stop_ids = frozenset({self.eot})
        self._ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
        self._encoding = tiktoken.Encoding(
            name,
            pat_str=_PIECES,
            mergeable_ranks=self._ranks,
            special_tokens={END_OF_TEXT: self.eot},
            explicit_n_vocab=self.vocab_size,
        )

    @classmethod
    def gpt2(cls) -> GPT2Tokenizer:
        """GPT-2's own vocabulary, which is installed with gpu-gpt2; DataError if it is damaged."""
        return cls("gpt2", gpt2_ranks())

    @classmethod
    def of_ranks(cls, ranks: Mapping[bytes, int]) -> GPT2Tokenizer:
        """Returns the vocabulary of ranks from a file, under the name that tells what it is."""
        return cls(_name_of(ranks), ranks)

    @classmethod
    def of_bytes(cls) -> GPT2Tokenizer:
        """A vocabulary of one token per byte, whose id is the byte's value."""
        return cls("bytes", {bytes([b]): b for b in range(BYTE_VALUES)})

    @classmethod
    def train(cls, documents: Sequence[str], vocab_size: int) -> GPT2Tokenizer:
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
            [without_lone_surrogates(text) for text in documents],
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
                without_lone_surrogates(text), disallowed_special=()
            )
        except ValueError as e:
            raise DataError(
                "the text has too many blanks in a row to be cut into words, about a million; "
                "take some of them out"
            ) from e
        return ids.astype(np.int32)

    def decode_bytes(self, tokens: npt.NDArray[Any] | Sequence[int]) -> bytes:
        """Returns the bytes of `tokens`, each in 0 to V - 1."""
        return self._encoding.decode_bytes(np.asarray(tokens, np.int64).tolist())

    def piece(self, token: int, previous: int | None) -> bytes:
        """Returns the bytes of a token, which do not depend on the token before it."""
        return self._encoding.decode_single_token_bytes(token)

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """The bytes of text that each token stands for, (V,) int32; 0 for <|endoftext|>."""
        return np.array([*map(len, self._ranks), 0], np.int32)

    def tokens(self) -> list[bytes]:
        """The bytes of every id, 0 to V - 1; the last are the characters "<|endoftext|>"."""
        return [*self._ranks, END_OF_TEXT.encode()]

    def digest(self) -> str:
        """Returns the SHA-256 of all tokens."""
        entries = b"".join(bytes([len(token)]) + token for token in self.tokens())
        return hashlib.sha256(entries).hexdigest()

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


def _name_of(ranks: Mapping[bytes, int]) -> str:
    """The spec of a vocabulary; GPT-2's is recognised by its size and its last merge."""
    if len(ranks) == BYTE_VALUES:
        return "bytes"
    if len(ranks) == GPT2_VOCAB_SIZE - 1 and ranks.get(b" gazed") == GPT2_VOCAB_SIZE - 2:
        return "gpt2"
    return f"bpe:{len(ranks) + 1}"
