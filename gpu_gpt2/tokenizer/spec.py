"""Names of tokenizers, as --tokenizer takes them, and tokenizers from any kind of file."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from gpu_gpt2.config import GPT2_VOCAB_SIZE
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.formats.llama2c_tokenizer import FIRST_PIECE, parse_tokenizer
from gpu_gpt2.formats.vocabulary import (
    BYTE_VALUES,
    END_OF_TEXT,
    MAX_VOCAB_SIZE,
    Kind,
    kind_of,
    parse_vocabulary,
    read_file,
)
from gpu_gpt2.tokenizer.base import Tokenizer
from gpu_gpt2.tokenizer.gpt2 import BYTES_VOCAB_SIZE, MIN_VOCAB_SIZE, GPT2Tokenizer
from gpu_gpt2.tokenizer.hf import HFTokenizer
from gpu_gpt2.tokenizer.llama2c import Llama2cTokenizer

_TRAINED: Final = re.compile(r"(bpe|llama2c):([0-9]{1,9})")

# The fewest tokens of a trained vocabulary, and what they are.
_SMALLEST: Final = {
    "bpe": (MIN_VOCAB_SIZE, f"{BYTE_VALUES} bytes, one merge and {END_OF_TEXT}"),
    "llama2c": (FIRST_PIECE + 4, f"3 special tokens, {BYTE_VALUES} bytes, four learned ones"),
}


def open_tokenizer(path: Path) -> Tokenizer:
    """Returns the tokenizer in a file or folder. Raises DataError.

    `path` is llama2.c's tokenizer.bin, a tokenizer.json, a vocab.json or merges.txt with the other
    one beside it, llm.c's gpt2_tokenizer.bin, or a folder with one of these, such as one that
    `save` wrote. The content tells the kind of file, not the name.
    """
    file, content = read_file(path)
    kind = kind_of(file, content)
    if kind is Kind.LLAMA2C:
        return Llama2cTokenizer(*parse_tokenizer(file, content))
    if kind is Kind.HF:
        return HFTokenizer(file, content)
    return GPT2Tokenizer.of_ranks(parse_vocabulary(file, content))


def vocab_size_of(spec: str) -> int:
    """Returns the size of the vocabulary that `spec` names. Raises UserError.

    spec: "gpt2", "bytes", "bpe:N", "llama2c:N", or the path of a tokenizer: see open_tokenizer.
    """
    if spec == "gpt2":
        return GPT2_VOCAB_SIZE
    if spec == "bytes":
        return BYTES_VOCAB_SIZE
    match = _TRAINED.fullmatch(spec)
    if not match:
        return _open_named(spec).vocab_size
    size = int(match[2])
    smallest, tokens = _SMALLEST[match[1]]
    if not smallest <= size <= MAX_VOCAB_SIZE:
        raise ConfigError(
            f"tokenizer {spec}: N must be from {smallest} ({tokens}) to {MAX_VOCAB_SIZE} (ids are "
            f"stored in 16 bits)"
        )
    return size


def is_path(spec: str) -> bool:
    """True if `spec` is the path of a tokenizer, and not one of the other names."""
    return spec not in ("gpt2", "bytes") and not _TRAINED.fullmatch(spec)


def make_tokenizer(spec: str, documents: Sequence[str]) -> Tokenizer:
    """The tokenizer that `spec` names; "bpe:N" and "llama2c:N" are trained on `documents`.

    Raises UserError.
    """
    if is_path(spec):
        return _open_named(spec)
    if spec == "gpt2":
        return GPT2Tokenizer.gpt2()
    if spec == "bytes":
        return GPT2Tokenizer.of_bytes()
    trained = Llama2cTokenizer if spec.startswith("llama2c:") else GPT2Tokenizer
    return trained.train(documents, vocab_size_of(spec))


def cache_key(spec: str) -> str:
    """A name for the vocabulary of `spec` in a cache: for a path, a SHA-256."""
    return _open_named(spec).digest() if is_path(spec) else spec


def _open_named(spec: str) -> Tokenizer:
    """The tokenizer at a path, for text that is stored as tokens. Raises UserError."""
    if not os.path.exists(spec):
        raise ConfigError(
            f"unknown tokenizer {spec!r}; choose gpt2, bytes, bpe:N or llama2c:N, as in "
            f"bpe:1024, or name a tokenizer file or folder that is there"
        )
    tokenizer = open_tokenizer(Path(spec))
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise ConfigError(
            f"{spec}: {tokenizer.vocab_size} tokens; ids are stored in 16 bits, so use a "
            f"vocabulary of at most {MAX_VOCAB_SIZE}"
        )
    return tokenizer
