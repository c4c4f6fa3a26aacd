"""Encodes pieces of documents to tokens on all cores, in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from gpu_gpt2.data.prepare.documents import Piece
from gpu_gpt2.errors import DataError
from gpu_gpt2.tokenizer import Tokenizer, make_tokenizer

CHUNK_CHARS: Final = 1 << 19  # given to a process at once: a tenth of a second's work
BYTES_PER_PROCESS: Final = 4 << 20  # less text is encoded before another process has started


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoded:
    """The tokens of a chunk of pieces."""

    tokens: npt.NDArray[np.uint16]  # (count,)
    ends: npt.NDArray[np.int64]  # (pieces,): the end of each piece's tokens
    text_bytes: int  # bytes of the text in UTF-8


class Place(NamedTuple):
    """The place of a piece in the sources of a stream."""

    source: int  # index of the source
    piece: int  # index of the piece in that source
    read: int  # bytes of that source read so far


def cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def encode_pieces(
    pieces: Iterable[tuple[Place, Piece]], tokenizer: str, text_bytes: int
) -> Generator[tuple[list[Place], Encoded], None, None]:
    """Yields the places and tokens of `pieces`, chunk by chunk, in order on any number of cores.

    tokenizer: a spec of make_tokenizer that needs no text to train on. text_bytes: an estimate of
    the whole text. Must be called in the main thread.
    """
    processes = min(cores(), text_bytes // BYTES_PER_PROCESS)
    chunks = _chunks(pieces)
    if processes < 2:
        encoder = make_tokenizer(tokenizer, ())
        for places, texts in chunks:
            yield places, _encode(encoder, texts)
        return
    waiting: deque[tuple[list[Place], Future[Encoded]]] = deque()
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), _open_tokenizer, (tokenizer,)
    )
    try:
        for places, texts in chunks:
            with _sigint_ignored():
                waiting.append((places, pool.submit(_encode_in_process, texts)))
            if len(waiting) > 2 * processes:  # keeps the memory bounded
                places, future = waiting.popleft()
                yield places, future.result()
        while waiting:
            places, future = waiting.popleft()
            yield places, future.result()
    except BrokenProcessPool as e:
        raise DataError(
            "a process that encodes text was killed, perhaps for want of memory; make room and "
            "give the same command again: it resumes after the last complete file"
        ) from e
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(
    pieces: Iterable[tuple[Place, Piece]],
) -> Iterator[tuple[list[Place], list[tuple[str, bool]]]]:
    places: list[Place] = []
    texts: list[tuple[str, bool]] = []
    chars = 0
    for place, piece in pieces:
        places.append(place)
        texts.append((piece.text, piece.begins))
        chars += len(piece.text) + 1  # 1 for <|endoftext|>, so that empty documents count too
        if chars >= CHUNK_CHARS:
            yield places, texts
            places, texts, chars = [], [], 0
    if places:
        yield places, texts


def _encode(tokenizer: Tokenizer, texts: list[tuple[str, bool]]) -> Encoded:
    mark = np.array([tokenizer.eot], np.uint16)
    parts = []
    ends = []
    count = text_bytes = 0
    for text, begins in texts:
        if begins:
            parts.append(mark)
        parts.append(tokenizer.encode(text).astype(np.uint16))
        count += begins + len(parts[-1])
        ends.append(count)
        text_bytes += len(text.encode("utf-8", "surrogatepass"))
    return Encoded(tokens=np.concatenate(parts), ends=np.array(ends), text_bytes=text_bytes)


_tokenizer: Tokenizer  # of this worker process


def _open_tokenizer(spec: str) -> None:
    global _tokenizer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer = make_tokenizer(spec, ())


def _end_with_parent() -> None:
    """Ends this worker when its parent ends, because a killed parent cannot tell it to stop."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _encode_in_process(texts: list[tuple[str, bool]]) -> Encoded:
    return _encode(_tokenizer, texts)


@contextmanager
def _sigint_ignored() -> Iterator[None]:
    """Ignores Ctrl-C in the processes started meanwhile; the parent stops them on Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
