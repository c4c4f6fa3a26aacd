"""llm.c's tokenizer file: the bytes of text that each token id stands for.

A header (magic, version, count of tokens, id of <|endoftext|>), then every token in the order of
ids: its length in one byte, and its bytes. Version 1 has no id of <|endoftext|> in its header and
always holds GPT-2's vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from gpu_gpt2.config import GPT2_VOCAB_SIZE
from gpu_gpt2.errors import DataError
from gpu_gpt2.formats.files import new_file, reading, unexpected
from gpu_gpt2.formats.llmc_header import (
    HEADER_BYTES,
    INT32_MAX,
    TOKENIZER_MAGIC,
    Header,
    header_bytes,
    read_header,
)

TOKENIZER_BIN: Final = "gpt2_tokenizer.bin"  # llm.c's programs look for this name beside the model
MAX_TOKEN_BYTES: Final = 255  # a token's length is stored in one byte
GPT2_VERSION: Final = 1  # whose header has no id of <|endoftext|>
VERSION: Final = 2


def read_token_count(path: Path) -> int:
    """The count of tokens in a tokenizer file, of which only the header is read; DataError."""
    return _token_count(read_header(path, "tokenizer file"))


def read_tokenizer_bin(path: Path) -> tuple[list[bytes], int]:
    """The bytes of every token and the id of <|endoftext|>; DataError says what is wrong."""
    header = read_header(path, "tokenizer file")
    count = _token_count(header)
    if header.version == GPT2_VERSION:
        eot = GPT2_VOCAB_SIZE - 1
    else:
        eot = header.expect(3, "id of <|endoftext|>", range(count))
    sizes = range(HEADER_BYTES + 2 * count, HEADER_BYTES + (1 + MAX_TOKEN_BYTES) * count + 1)
    header.expect_size(sizes, f"{count} tokens at offset 8")
    with reading(path, "tokenizer file"):
        content = path.read_bytes()
    tokens = []
    offset = HEADER_BYTES
    for i in range(count):
        length = content[offset] if offset < len(content) else 0
        end = offset + 1 + length
        if length == 0 or end > len(content):
            raise unexpected(
                path,
                f"token {i} of {count} of length {length} and {max(0, len(content) - offset - 1)} "
                f"bytes to the end",
                offset,
                f"a length of 1 to {MAX_TOKEN_BYTES} and so many bytes",
                "it was cut off or damaged, so write it again",
            )
        tokens.append(content[offset + 1 : end])
        offset = end
    if offset != len(content):
        found = f"{len(content) - offset} bytes follow the last of {count} tokens"
        raise unexpected(path, found, offset, "none")
    return tokens, eot


def _token_count(header: Header) -> int:
    """The count of tokens that a tokenizer file's header states; DataError if it cannot be."""
    header.expect_magic(TOKENIZER_MAGIC)
    version = header.expect(1, "version", (GPT2_VERSION, VERSION))
    known = (GPT2_VOCAB_SIZE,) if version == GPT2_VERSION else range(1, INT32_MAX + 1)
    return header.expect(2, "count of tokens", known)


def write_tokenizer_bin(
    path: Path, tokens: Sequence[bytes], eot: int, version: int = VERSION
) -> None:
    """Writes the bytes of every token, so that `path` is complete or untouched; DataError.

    llm.c reads version 2 today; version 1 can hold GPT-2's vocabulary only.
    """
    if version not in (GPT2_VERSION, VERSION):
        raise DataError(
            f"{path}: there is no version {version} of tokenizer files; write {VERSION}"
        )
    if version == GPT2_VERSION and (len(tokens), eot) != (GPT2_VOCAB_SIZE, GPT2_VOCAB_SIZE - 1):
        raise DataError(
            f"{path}: version {version} holds GPT-2's {GPT2_VOCAB_SIZE} tokens with <|endoftext|> "
            f"last, not {len(tokens)} with id {eot}; write version {VERSION}"
        )
    for i, token in enumerate(tokens):
        if not 1 <= len(token) <= MAX_TOKEN_BYTES:
            raise DataError(
                f"{path}: token {i} has {len(token)} bytes, and the file can hold 1 to "
                f"{MAX_TOKEN_BYTES}; use another vocabulary"
            )
    sizes = (len(tokens),) if version == GPT2_VERSION else (len(tokens), eot)
    with new_file(path) as file:
        file.write(header_bytes(TOKENIZER_MAGIC, version, *sizes))
        file.write(b"".join(bytes([len(token)]) + token for token in tokens))
