"""Text to train on: the built-in corpus and the user's own file, each split once and for all.

A corpus is a list of training documents and a list of held-out ones, never mixed afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpu_gpt2.errors import DataError

VAL_FRACTION: Final = 0.1  # of the text that is held out


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text in documents; those of `val` are never trained on."""

    name: str
    train: tuple[str, ...]
    val: tuple[str, ...]


def python_docs() -> Corpus:
    """The Python language reference that CPython ships for its help(): pydoc_data.topics.

    Each topic is a document, in alphabetical order, and its last tenth is held out; see
    data/python_docs/README.md. DataError where this Python comes without the texts.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as e:
        raise DataError(
            "this Python comes without the texts of its help() (pydoc_data), which python-docs "
            "is made from; train on a text of your own with --data FILE"
        ) from e
    kept = without_repeats(topics)
    halves = [split_at_paragraph(kept[name]) for name in sorted(kept)]
    return Corpus(
        "python-docs",
        tuple(train for train, _ in halves),
        tuple(val for _, val in halves if val),
    )


BUILT_IN: Final[Mapping[str, Callable[[], Corpus]]] = {"python-docs": python_docs}


def paragraphs(text: str) -> list[str]:
    """The paragraphs of `text` with white space evened out, to compare them by."""
    return [" ".join(p.split()) for p in re.split(r"\n\s*\n", text) if not p.isspace()]


def without_repeats(documents: Mapping[str, str]) -> dict[str, str]:
    """`documents` less those whose text stands for more than half in longer ones.

    The reference repeats itself: "try" is a section of "compound". What stands in two documents
    could be trained on in one and be held out in the other.
    """
    kept: dict[str, str] = {}
    seen: set[str] = set()
    for name, text in sorted(documents.items(), key=lambda item: (-len(item[1]), item[0])):
        parts = paragraphs(text)
        if sum(len(p) for p in parts if p in seen) <= sum(map(len, parts)) / 2:
            kept[name] = text
            seen.update(parts)
    return kept


def split_at_paragraph(text: str) -> tuple[str, str]:
    """(training, held-out) text, cut at the first blank line in the last tenth, if any."""
    cut = text.find("\n\n", int(len(text) * (1 - VAL_FRACTION)))
    return (text, "") if cut < 0 else (text[: cut + 1], text[cut + 2 :])


def text_file(path: Path) -> Corpus:
    """A UTF-8 text file as one document whose last tenth is held out, cut at a line's end."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as e:
        raise DataError(
            f"no file {path}; give a text file, a token file or one of: {', '.join(BUILT_IN)}"
        ) from e
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}; give one readable text file") from e
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as e:
        raise DataError(
            f"{path} is not UTF-8 text: byte 0x{content[e.start]:02x} at offset {e.start}; "
            f"convert it first, as in: iconv -f LATIN1 -t UTF-8"
        ) from e
    if not text.strip():
        raise DataError(f"{path} is empty; put some text into it")
    cut = int(len(text) * (1 - VAL_FRACTION))
    # A line much longer than the rest (or the whole text) is cut inside.
    cut = text.find("\n", cut, cut + len(text) // 20) + 1 or cut
    if cut == 0:
        raise DataError(f"{path} holds {len(text)} characters, too few to train on")
    return Corpus(path.stem, (text[:cut],), (text[cut:],))
