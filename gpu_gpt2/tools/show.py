"""Describes a binary file of llm.c: its header, its sizes and the beginning of its text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.errors import DataError
from gpu_gpt2.formats import debug_state, llmc, multiple_choice, tokenizer_bin, tokens
from gpu_gpt2.formats.llmc_header import (
    DEBUG_STATE_MAGIC,
    GPT2_SHARD_MAGIC,
    HEADER_BYTES,
    LLAMA3_SHARD_MAGIC,
    MODEL_MAGIC,
    MULTIPLE_CHOICE_MAGIC,
    OPTIMIZER_STATE_MAGIC,
    TOKENIZER_MAGIC,
    Header,
    magic_of,
    read_header,
)
from gpu_gpt2.models.families import parameters
from gpu_gpt2.tokenizer import Tokenizer

SHOWN_TOKENS: Final = 64  # about five lines of text


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """The content of a file, for people."""

    rows: tuple[tuple[str, str], ...]  # names and values
    text: str  # the beginning of the text; empty for a file without text


def describe(path: Path, tokenizer: Tokenizer) -> Description:
    """Describes a file of llm.c, whose tokens `tokenizer` decodes; DataError for other files."""
    magic = magic_of(path)
    if magic not in _KINDS:
        return _headerless_tokens(path, magic, tokenizer)
    kind, describe_kind = _KINDS[magic]
    header = read_header(path, kind)
    description = describe_kind(path, header, tokenizer)
    first = (
        ("kind", kind),
        ("magic number", str(magic)),
        ("version", str(header.version)),
        ("bytes", f"{header.file_bytes:,}"),
    )
    return Description(rows=(*first, *description.rows), text=description.text)


def _headerless_tokens(path: Path, magic: int, tokenizer: Tokenizer) -> Description:
    """Describes a file of int32 tokens, which has no header; DataError if it is no such file."""
    try:
        values = tokens.read_tokens(path)
    except DataError as e:
        raise DataError(
            f"{path}: magic number {magic} at offset 0 is none of llm.c's; name a file of tokens, "
            f"examples, a tokenizer, a model or a debug state"
        ) from e
    return Description(
        rows=(("kind", "tokens without a header"), ("tokens", f"{len(values):,} as int32")),
        text=_text(values[:SHOWN_TOKENS], tokenizer),
    )


def _tokens(path: Path, header: Header, tokenizer: Tokenizer) -> Description:
    values = tokens.read_tokens(path)
    first = values[:SHOWN_TOKENS]
    llama = header.magic == LLAMA3_SHARD_MAGIC  # whose vocabulary gpu-gpt2 does not have
    return Description(
        rows=(("tokens", f"{len(values):,} as {values.dtype}"),),
        text=_ids(first) if llama else _text(first, tokenizer),
    )


def _examples(path: Path, header: Header, tokenizer: Tokenizer) -> Description:
    examples = multiple_choice.read_choices(path)
    first = examples[0]
    lines = [_text(first.context, tokenizer)]
    for i, completion in enumerate(first.completions):
        mark = "*" if i == first.label else " "
        lines.append(f"{mark} {i}:{_text(completion, tokenizer)}")
    return Description(
        rows=(
            ("examples", f"{len(examples):,} with {multiple_choice.COMPLETIONS} completions"),
            ("longest", f"{header.words[3]:,} bytes"),
        ),
        text="\n".join(lines),
    )


def _vocabulary(path: Path, header: Header, tokenizer: Tokenizer) -> Description:
    words, eot = tokenizer_bin.read_tokenizer_bin(path)
    return Description(
        rows=(("tokens", f"{len(words):,}"), ("<|endoftext|>", str(eot))),
        text=" ".join(repr(word)[1:] for word in words[:SHOWN_TOKENS]),
    )


def _model(path: Path, header: Header, tokenizer: Tokenizer) -> Description:
    model = llmc.open_model(path)
    c = model.config
    count = sum(math.prod(p.shape) for p in parameters(c))
    return Description(
        rows=(
            ("dtype", str(model.dtype)),
            ("context", f"{c.n_positions:,}"),
            ("vocabulary", f"{c.vocab_size:,}, {header.words[7] or c.vocab_size:,} rows"),
            ("layers", str(c.n_layer)),
            ("heads", str(c.n_head)),
            ("channels", f"{c.n_embd:,}"),
            ("parameters", f"{count:,}"),
        ),
        text="",
    )


def _debug_state(path: Path, header: Header, tokenizer: Tokenizer) -> Description:
    B, T = debug_state.batch_shape(debug_state.read_debug_header(path))
    if header.file_bytes < HEADER_BYTES + 8 * B * T:
        raise DataError(
            f"{path}: a batch of {B} x {T} at offset 8 needs {HEADER_BYTES + 8 * B * T} bytes and "
            f"more, but the file holds {header.file_bytes}; it was cut off or damaged"
        )
    inputs = np.fromfile(path, "<i4", count=min(B * T, SHOWN_TOKENS), offset=HEADER_BYTES)
    return Description(
        rows=(("batch", f"{B} x {T}"),),
        text=_text(inputs, tokenizer),
    )


def _optimizer_state(path: Path, header: Header, tokenizer: Tokenizer) -> Description:
    return Description(
        rows=(
            ("processes", f"{header.words[2]}, of which number {header.words[3]}"),
            ("master weights", "yes" if header.words[4] else "no"),
            ("shuffled data", "yes" if header.words[5] else "no"),
            ("step", str(header.words[10])),
        ),
        text="",
    )


_KINDS: Final[Mapping[int, tuple[str, Callable[[Path, Header, Tokenizer], Description]]]] = {
    GPT2_SHARD_MAGIC: ("tokens of GPT-2", _tokens),
    LLAMA3_SHARD_MAGIC: ("tokens of Llama 3", _tokens),
    MULTIPLE_CHOICE_MAGIC: ("multiple-choice file", _examples),
    TOKENIZER_MAGIC: ("tokenizer file", _vocabulary),
    MODEL_MAGIC: ("model", _model),
    DEBUG_STATE_MAGIC: ("debug state", _debug_state),
    OPTIMIZER_STATE_MAGIC: ("optimizer state", _optimizer_state),
}


def _text(ids: npt.NDArray[Any], tokenizer: Tokenizer) -> str:
    """The text of tokens, safe to print; their ids if some of them are not in the vocabulary."""
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
        return _ids(ids)
    text = tokenizer.decode(ids)
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _ids(ids: npt.NDArray[Any]) -> str:
    return " ".join(map(str, ids.tolist()))
