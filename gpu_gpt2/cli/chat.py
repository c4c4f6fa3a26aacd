"""`gpu-gpt2 chat`: a conversation with a chat model on the terminal."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Final

import typer

from gpu_gpt2.chat import Conversation, turn_text
from gpu_gpt2.cli.common import INTERRUPTED, Device, Dtype, overflow_is_silent
from gpu_gpt2.cli.text import (
    Seed,
    Temperature,
    TokenizerName,
    TopK,
    TopP,
    decoder_of,
    device_sampling,
    show,
    vocabulary,
)
from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.formats.llama2c_tokenizer import BOS, EOS
from gpu_gpt2.open_model import open_model
from gpu_gpt2.text import TextStream
from gpu_gpt2.tokenizer import Tokenizer
from gpu_gpt2.training.checkpoint import trained_seq_len

LLAMA2_MARKS: Final = ("[INST]", "<<SYS>>")  # only Llama 2's chat template contains both


def chat(
    model: Annotated[
        str,
        typer.Argument(
            help="Chat model of Llama 2's format: a Hugging Face folder, or a .bin file of "
            "llama2.c with its tokenizer.bin beside it."
        ),
    ],
    system: Annotated[
        str,
        typer.Option(
            help="Instructions that the model reads in front of the first message.", metavar="TEXT"
        ),
    ] = "",
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    tokenizer: TokenizerName = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Talk with a chat model of Llama 2's format. An empty line or Ctrl-D ends the chat.

    Ctrl-C stops an answer. The model reads all turns until its context is full.
    """
    sampling = device_sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    source = open_model(model)
    words = vocabulary(source, tokenizer)
    _check_format(model, source.folder, words)
    context = trained_seq_len(source.folder, source.config)
    decoder = decoder_of(source, device, dtype, batch=1, length=context)
    conversation = Conversation(decoder, sampling)
    while conversation.left:
        message = _message()
        if not message:
            return
        turn = words.prompt_ids(turn_text(message, system))
        if len(turn) > conversation.left:
            show(
                f"(This message has {len(turn):,} tokens, and the context has room for "
                f"{conversation.left:,}. Shorten it, or start a new chat.)\n"
            )
            continue
        system = ""  # it belongs to the first turn only
        _show_answer(conversation, turn, words)
    show(f"(The context of {context:,} tokens is full. Start a new chat.)\n")


def _message() -> str:
    """Returns a line of the user, or "" if there are no more; UserError."""
    try:
        return input("User: ").strip()
    except EOFError:
        show("\n")
        return ""
    except KeyboardInterrupt:
        show("\n")
        raise typer.Exit(INTERRUPTED) from None
    except UnicodeDecodeError as e:
        raise DataError("standard input is not UTF-8 text; convert it first with iconv") from e


def _show_answer(conversation: Conversation, turn: list[int], words: Tokenizer) -> None:
    """Prints the answer to a turn as it comes, until it ends or Ctrl-C stops it."""
    show("Assistant: ")
    stream = TextStream(words, turn[-1])
    with _ctrl_c() as pressed, overflow_is_silent():
        for token in conversation.answer(turn):
            if token != EOS:
                show(stream.add([token]))
            if pressed:
                break
    show(stream.finish() + "\n")


@contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """Collects the Ctrl-C signals that come inside, so that none breaks off a step of the model."""
    pressed: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        pressed.append(number)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _check_format(model: str, folder: Path | None, words: Tokenizer) -> None:
    """Raises ConfigError unless the model's chat format is that of Llama 2."""
    template = _chat_template(folder)
    if template and not all(mark in template for mark in LLAMA2_MARKS):
        raise ConfigError(
            f"{model} has a chat template of its own, and chat knows only that of Llama 2; format "
            f"the conversation yourself and use: gpu-gpt2 generate --prompt-file"
        )
    if words.prompt_ids("") != [BOS]:
        raise ConfigError(
            f"{model} has no vocabulary of Llama 2, whose format chat uses; continue a text with: "
            f"gpu-gpt2 generate"
        )


def _chat_template(folder: Path | None) -> str:
    """Returns the chat template in a Hugging Face folder, "" if there is none; DataError."""
    if folder is None:
        return ""
    alone, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    try:
        if alone.is_file():
            return alone.read_text("utf-8")
        settings = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    except (OSError, ValueError) as e:
        raise DataError(f"cannot read the chat template of {folder}: {e}") from e
    template = settings.get("chat_template", "") if isinstance(settings, dict) else ""
    # A model with several templates has a list of them.
    return template if isinstance(template, str) else json.dumps(template)
