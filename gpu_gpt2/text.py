"""Text from tokens that come one at a time: a character may be spread over several tokens."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable
from typing import Final, Protocol

# Single bytes that llama2.c prints: those for which C's isprint or isspace is true.
_PRINTED_BYTES: Final = frozenset((*range(0x20, 0x7F), *range(0x09, 0x0E)))


class Pieces(Protocol):
    """A tokenizer that decodes one token at a time."""

    def piece(self, token: int, previous: int | None) -> bytes:
        """Returns the bytes of `token`, which may depend on the token in front of it."""
        ...


class TextStream:
    """Decodes the tokens of one sequence to text as they come.

    A character whose bytes belong to several tokens appears with the last of them. Bytes that are
    not UTF-8 become U+FFFD.
    """

    def __init__(
        self,
        tokenizer: Pieces,
        previous: int | None,
        change: Callable[[bytes], bytes] | None = None,
    ) -> None:
        """previous: the token in front of the first, if any; change: is applied to every piece."""
        self._tokenizer, self._previous, self._change = tokenizer, previous, change
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, tokens: Iterable[int]) -> str:
        """Returns the characters that `tokens` complete."""
        pieces = []
        for token in tokens:
            piece = self._tokenizer.piece(token, self._previous)
            pieces.append(self._change(piece) if self._change else piece)
            self._previous = token
        return self._decoder.decode(b"".join(pieces))

    def finish(self) -> str:
        """Returns U+FFFD if the last character lacks some of its bytes, else ""."""
        return self._decoder.decode(b"", final=True)


def printed_by_llama2c(piece: bytes) -> bytes:
    """Returns what llama2.c prints of a piece: nothing of a single byte that is not printable.

    A character outside the vocabulary, which is one token per byte, is therefore left out.
    """
    return b"" if len(piece) == 1 and piece[0] not in _PRINTED_BYTES else piece
