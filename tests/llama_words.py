"""A vocabulary with the ids of Llama 2: <unk>, BOS, EOS, one token per byte, and a few words."""

from __future__ import annotations

UNKNOWN, BOS, EOS, FIRST_BYTE = range(4)
WORDS = [b"th", b" the", b" ", b"\xc3\xa9", b" a"]


class LlamaWords:
    """Encodes each byte as a token, except that a text begins with the token of a space."""

    vocab_size = FIRST_BYTE + 256 + len(WORDS)
    eot = BOS
    stop_ids = frozenset({BOS})

    def prompt_ids(self, text: str) -> list[int]:
        space = [FIRST_BYTE + 256 + WORDS.index(b" ")] if text else []
        return [BOS, *space, *(FIRST_BYTE + byte for byte in text.encode())]

    def piece(self, token: int, previous: int | None) -> bytes:
        if token < FIRST_BYTE:
            return (b"<unk>", b"\n<s>\n", b"\n</s>\n")[token]
        if token < FIRST_BYTE + 256:
            return bytes([token - FIRST_BYTE])
        word = WORDS[token - FIRST_BYTE - 256]
        return word.removeprefix(b" ") if previous == BOS else word


def byte_ids(text: str) -> list[int]:
    """The byte tokens of a text."""
    return [FIRST_BYTE + byte for byte in text.encode()]
