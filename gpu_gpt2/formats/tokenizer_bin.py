"""llm.c's tokenizer file: what to print for each token id.

After the header (magic, version, count of tokens, id of <|endoftext|>) every token in the order of
ids: its length in one byte, then its bytes. Version 1, before llm.c wrote the id into the header,
is always GPT-2's vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from gpu_gpt2.config import GPT2_VOCAB_SIZE
from gpu_gpt2.errors import DataError
from gpu_gpt2.formats.files import whole
from gpu_gpt2.formats.llmc_header import HEADER_BYTES, header_bytes, read_header

MAGIC: Final = 20240328
VERSIONS: Final = (1, 2)
LONGEST: Final = 255  # bytes of a token: what one byte can count


def read_tokenizer_bin(path: Path) -> tuple[list[bytes], int]:
    """The bytes of every token and the id of <|endoftext|>; DataError says what is wrong."""
    header = read_header(path, "tokenizer file")
    header.expect(0, "magic number", (MAGIC,))
    version = header.expect(1, "version", VERSIONS)
    known = version == 1
    count = header.expect(2, "count of tokens", (GPT2_VOCAB_SIZE,) if known else range(1, 2**31))
    eot = GPT2_VOCAB_SIZE - 1 if known else header.expect(3, "id of <|endoftext|>", range(count))
    least, most = HEADER_BYTES + 2 * count, HEADER_BYTES + (1 + LONGEST) * count
    if not least <= header.file_bytes <= most:
        raise DataError(
            f"{path}: {count} tokens at offset 8 would make {least} to {most} bytes, but the file "
            f"holds {header.file_bytes}; it was cut off or damaged, so write it again"
        )
    try:
        content = path.read_bytes()
    except OSError as e:
        raise DataError(f"cannot read the tokenizer file {path}: {e.strerror}") from e
    tokens = []
    offset = HEADER_BYTES
    for i in range(count):
        length = content[offset] if offset < len(content) else 0
        end = offset + 1 + length
        if length == 0 or end > len(content):
            raise DataError(
                f"{path}: token {i} of {count} at offset {offset}: expected a length of 1 to "
                f"{LONGEST} and so many bytes, found "
                f"{f'length {length} and ' if offset < len(content) else ''}"
                f"{max(0, len(content) - offset - 1)} bytes to the end; it was cut off or damaged, "
                f"so write it again"
            )
        tokens.append(content[offset + 1 : end])
        offset = end
    if offset != len(content):
        raise DataError(
            f"{path}: {len(content) - offset} bytes follow the last of {count} tokens at offset "
            f"{offset}, expected none; the file is damaged, so write it again"
        )
    return tokens, eot


def write_tokenizer_bin(path: Path, tokens: Sequence[bytes], eot: int, version: int = 2) -> None:
    """Writes the bytes of every token, so that `path` is complete or untouched; DataError.

    Version 2 is what llm.c reads today; version 1 can hold GPT-2's vocabulary only.
    """
    if version not in VERSIONS:
        raise DataError(f"{path}: there is no version {version} of tokenizer files; write 2")
    if version == 1 and (len(tokens), eot) != (GPT2_VOCAB_SIZE, GPT2_VOCAB_SIZE - 1):
        raise DataError(
            f"{path}: version 1 holds GPT-2's {GPT2_VOCAB_SIZE} tokens with <|endoftext|> last, "
            f"not {len(tokens)} with id {eot}; write version 2"
        )
    for i, token in enumerate(tokens):
        if not 1 <= len(token) <= LONGEST:
            raise DataError(
                f"{path}: token {i} has {len(token)} bytes, and the file can hold 1 to {LONGEST}; "
                f"use another vocabulary"
            )
    header = header_bytes(MAGIC, version, len(tokens), *([eot] if version > 1 else []))
    try:
        with whole(path) as temporary:
            temporary.write_bytes(
                header + b"".join(bytes([len(token)]) + token for token in tokens)
            )
    except OSError as e:
        raise DataError(
            f"cannot write {path}: {e.strerror}; make room or choose another folder"
        ) from e
