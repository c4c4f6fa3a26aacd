"""llama2.c's tokenizer.bin: the bytes and the merge score of every token of a Llama.

The file is the length of the longest token in bytes (uint32), then for each id its score
(float32), its length (int32) and its bytes. It does not state the count of tokens. Ids 0, 1 and 2
are <unk>, BOS and EOS; ids 3 to 258 stand for the bytes 0 to 255 and are spelled <0x00> to <0xFF>.
Source: llama2.c's tokenizer.py and run.c.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from gpu_gpt2.errors import DataError
from gpu_gpt2.formats.files import unexpected

UNKNOWN: Final = 0
BOS: Final = 1  # begins every text
EOS: Final = 2
FIRST_BYTE: Final = 3  # the id of byte 0
FIRST_PIECE: Final = FIRST_BYTE + 256  # the first id that is not a special token or a byte
SPACE_SCORE: Final = -1e9  # score of a token made only of spaces, so low that it merges last
TOKENIZER_BIN: Final = "tokenizer.bin"  # llama2.c's programs look for this name

_HEADER: Final = struct.Struct("<I")
_ENTRY: Final = struct.Struct("<fi")
_ADVICE: Final = "it was cut off, or is damaged or of another kind"


def tokenizer_beside(model: Path, vocab_size: int) -> Path | None:
    """The tokenizer file beside a model file, by the names that llama2.c gives such files."""
    for name in (f"tok{vocab_size}.bin", TOKENIZER_BIN):
        if (path := model.parent / name).is_file():
            return path
    return None


def parse_tokenizer(path: Path, content: bytes) -> tuple[list[bytes], list[float]]:
    """The bytes and the score of every token in the `content` of a file, up to its end.

    DataError says what is wrong, also for the layouts that llama2.c wrote before August 2023.
    """
    if content[:9] == _HEADER.pack(5) + b"<unk>":
        raise DataError(
            f"{path}: this tokenizer.bin of July 2023 has no scores, so it cannot encode text; "
            f"export it again with a current llama2.c"
        )
    words: list[bytes] = []
    scores: list[float] = []
    offset = _HEADER.size
    while offset < len(content):
        start = offset + _ENTRY.size
        if start > len(content):
            found = f"{len(content) - offset} bytes behind {len(words)} tokens"
            raise unexpected(path, found, offset, "the end or another token", _ADVICE)
        score, length = _ENTRY.unpack_from(content, offset)
        if not 1 <= length <= len(content) - start:
            raise unexpected(
                path,
                f"token {len(words)} of length {length} and {len(content) - start} bytes to the "
                f"end",
                offset,
                "a length of 1 or more and so many bytes",
                _ADVICE,
            )
        words.append(content[start : start + length])
        scores.append(score)
        offset = start + length
    _check(path, content, words, scores)
    return words, scores


def tokenizer_content(words: Sequence[bytes], scores: Sequence[float]) -> bytes:
    """The content of a file with these tokens and their scores."""
    entries = (_ENTRY.pack(score, len(w)) + w for w, score in zip(words, scores, strict=True))
    return _HEADER.pack(max(map(len, words))) + b"".join(entries)


def byte_word(byte: int) -> bytes:
    """The word that stands for a byte in the file."""
    return b"<0x%02X>" % byte


def _check(path: Path, content: bytes, words: Sequence[bytes], scores: Sequence[float]) -> None:
    """Raises DataError unless the tokens are those of a vocabulary of llama2.c."""
    if len(words) > FIRST_BYTE and words[FIRST_BYTE] == b"\0":
        raise DataError(
            f"{path}: this tokenizer.bin of early August 2023 spells bytes as characters, so the "
            f"bytes from 128 on are wrong; export it again with a current llama2.c"
        )
    if len(words) < FIRST_PIECE:
        raise DataError(
            f"{path}: {len(words)} tokens, expected at least {FIRST_PIECE}: <unk>, BOS, EOS and "
            f"256 bytes; the file is damaged or of another kind"
        )
    for byte in range(256):
        if (word := words[FIRST_BYTE + byte]) != byte_word(byte):
            raise DataError(
                f"{path}: token {FIRST_BYTE + byte} is {word!r}, expected {byte_word(byte)!r}; the "
                f"file is damaged or of another kind"
            )
    if not all(math.isfinite(score) for score in scores):
        raise DataError(f"{path}: a score is not a finite number; the file is damaged")
    longest = max(map(len, words))
    if (stated := _HEADER.unpack_from(content)[0]) < longest:
        raise unexpected(path, f"a longest token of {stated} bytes", 0, f"{longest} or more")
