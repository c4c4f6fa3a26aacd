"""A conversation with a chat model of Llama 2's format, whose turns share one KV cache.

Source: H. Touvron et al., "Llama 2: Open foundation and fine-tuned chat models", 2023, and the
program llama2.c, whose chat mode reads the same format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from gpu_gpt2.errors import CheckpointError
from gpu_gpt2.formats.llama2c_tokenizer import EOS
from gpu_gpt2.models.decoder import Decoder, Sampling


def turn_text(message: str, system: str = "") -> str:
    """Returns the text of a turn of the user; the first turn may have a system prompt."""
    if system:
        message = f"<<SYS>>\n{system}\n<</SYS>>\n\n{message}"
    return f"[INST] {message} [/INST]"


class Conversation:
    """The turns of a user and a model, whose tokens are in the KV cache of a decoder."""

    def __init__(self, decoder: Decoder, sampling: Sampling) -> None:
        """decoder: of one sequence; it forgets what it has read before."""
        self._decoder, self._sampling = decoder, sampling
        self._tokens = 0  # number of tokens of all turns and answers so far
        self._newest = EOS  # the newest token of the answers; EOS if there is none

    @property
    def left(self) -> int:
        """The number of tokens that another turn may have."""
        return max(0, self._decoder.length - self._tokens - (self._newest != EOS))

    def answer(self, turn: Sequence[int]) -> Iterator[int]:
        """Yields the tokens that follow a turn of the user, which has 1 to `left` tokens.

        The last token is EOS, unless the context is full. The caller may close the iterator earlier
        and continue with another turn; EOS then ends the answer. Raises CheckpointError if the
        logits are not finite numbers.
        """
        decoder = self._decoder
        if self._tokens:
            decoder.decode()  # the newest token was sampled, but not read
            self._feed(turn if self._newest == EOS else [EOS, *turn])
        else:
            decoder.prefill([np.array(turn, np.int32)])
            self._tokens = len(turn)
        while True:
            decoder.sample(self._sampling)
            self._newest = int(decoder.read_tokens().result()[0, 0])
            self._tokens += 1
            if self._newest < 0:
                raise CheckpointError(
                    "the model's weights are damaged: its logits are not finite numbers"
                )
            yield self._newest
            if self._newest == EOS or decoder.full:
                return
            decoder.decode()

    def _feed(self, tokens: Sequence[int]) -> None:
        """Reads tokens, one after the other."""
        for token in tokens:
            self._decoder.feed(np.array([token], np.int32))
            self._decoder.decode()
        self._tokens += len(tokens)
