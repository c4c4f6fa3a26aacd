"""The methods that every tokenizer has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


class Tokenizer(ABC):
    """A vocabulary that encodes text to ids, decodes ids to text, and can be saved.

    eot is the token in front of every document of the training data: <|endoftext|>, or BOS in the
    vocabulary of a Llama. stop_ids are the tokens that end a text when a model generates one.
    """

    name: str
    vocab_size: int
    eot: int
    stop_ids: frozenset[int]

    @abstractmethod
    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Returns the ids (tokens,) int32 of `text`, without the token that begins a document.

        Lone surrogates become U+FFFD, as UTF-8 has none. The characters of a special token, such as
        "<|endoftext|>", are ordinary text. Raises DataError for a text that cannot be encoded.
        """

    @abstractmethod
    def piece(self, token: int, previous: int | None) -> bytes:
        """Returns the bytes of a token, which may depend on the token before it.

        The pieces of a text, one after the other, are its bytes. `previous` is None at the start.
        """

    @abstractmethod
    def token_bytes(self) -> npt.NDArray[np.int32]:
        """Returns the bytes of text that each token stands for, (V,) int32; 0 for special ones."""

    @abstractmethod
    def tokens(self) -> list[bytes]:
        """Returns the bytes of every id, 0 to V - 1; those of a special token are its name."""

    @abstractmethod
    def digest(self) -> str:
        """Returns a SHA-256 that differs between vocabularies that give different ids."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes files from which `open_tokenizer(folder)` makes the same tokenizer.

        Raises OSError if `folder` cannot be written.
        """

    def prompt_ids(self, text: str) -> list[int]:
        """Returns the ids of a text that a model is to continue: a document begins with it."""
        return [self.eot, *self.encode(text).tolist()]

    def decode_bytes(self, tokens: npt.NDArray[Any] | Sequence[int]) -> bytes:
        """Returns the bytes of `tokens`, each in 0 to V - 1."""
        ids = np.asarray(tokens, np.int64).tolist()
        return b"".join(map(self.piece, ids, [None, *ids[:-1]]))

    def decode(self, tokens: npt.NDArray[Any] | Sequence[int]) -> str:
        """Returns the text of `tokens`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")


def without_lone_surrogates(text: str) -> str:
    """Returns the text with U+FFFD in place of surrogates, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
