"""The built-in corpus and the user's text file, split into training and held-out documents."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpu_gpt2.errors import DataError

VAL_FRACTION: Final = 0.1  # held out of a text: enough of a small one to evaluate


@dataclass(frozen=True, slots=True)
class Corpus:
    """The documents of a text; those of `val` are held out and never trained on."""

    name: str
    train: tuple[str, ...]
    val: tuple[str, ...]


def python_docs() -> Corpus:
    """The Python language reference that CPython ships for its help(): pydoc_data.topics.

    Each topic is a document, in alphabetical order. The last tenth of the text is held out, and
    its paragraphs are removed from the training text: see data/python_docs/README.md. DataError if
    this Python comes without the texts.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as e:
        raise DataError(
            "this Python comes without the texts of its help() (pydoc_data), which python-docs "
            "is made from; train on a text of your own with --data FILE"
        ) from e
    train, val = hold_out([topics[name] for name in sorted(topics)])
    held_out = {_with_single_spaces(p) for text in val for p in paragraphs(text)}
    kept = (without_paragraphs(text, held_out) for text in train)
    return Corpus("python-docs", tuple(text for text in kept if text), val)


BUILT_IN: Final[Mapping[str, Callable[[], Corpus]]] = {"python-docs": python_docs}


def hold_out(documents: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The (training, held-out) documents: the last tenth of all characters is held out.

    The document across the border is cut at its next blank line.
    """
    border = int(sum(map(len, documents)) * (1 - VAL_FRACTION))
    train, val = [], []
    before = 0
    for text in documents:
        if before + len(text) <= border:
            train.append(text)
        elif before >= border:
            val.append(text)
        else:
            cut = text.find("\n\n", border - before) + 1 or len(text)
            train.append(text[:cut])
            val.append(text[cut:].lstrip("\n"))
        before += len(text)
    return tuple(train), tuple(filter(None, val))


def paragraphs(text: str) -> list[str]:
    """The paragraphs of `text`, without the blank lines between them."""
    return [p for p in re.split(r"\n\s*\n", text) if p.strip()]


def without_paragraphs(text: str, unwanted: Set[str]) -> str:
    """`text` without the paragraphs that are `unwanted`; white space is not compared.

    The reference repeats itself: the topic "with" is a section of "compound". A paragraph that is
    held out in one topic must not be learnt from another.
    """
    found = paragraphs(text)
    kept = [p for p in found if _with_single_spaces(p) not in unwanted]
    return text if len(kept) == len(found) else "\n\n".join(kept)


def _with_single_spaces(text: str) -> str:
    return " ".join(text.split())


def text_file(path: Path) -> Corpus:
    """A UTF-8 text file as one document, whose last tenth, from a line's end on, is held out.

    DataError if the file cannot be read, is empty or is not UTF-8.
    """
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
    # Without a line's end in the next twentieth of the text, the text is cut inside a line.
    cut = text.find("\n", cut, cut + len(text) // 20) + 1 or cut
    if cut == 0:
        raise DataError(f"{path} holds {len(text)} characters, too few to train on")
    return Corpus(path.stem, (text[:cut],), (text[cut:],))
