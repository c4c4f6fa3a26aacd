"""`gpu-gpt2 generate`: continues a prompt with a model and prints the text as it comes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import typer

from gpu_gpt2.cli.common import INTERRUPTED, Device, Dtype, overflow_is_silent
from gpu_gpt2.cli.text import (
    DEFAULT,
    LLAMA2C,
    LLMC,
    MODEL_HELP,
    SAMPLERS,
    Seed,
    Stopwatch,
    Temperature,
    TokenizerName,
    TopK,
    TopP,
    decoder_of,
    sampling_of,
    show,
    vocabulary,
)
from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.formats.llama2c_tokenizer import BOS
from gpu_gpt2.generate import generate as generate_tokens
from gpu_gpt2.models.weights import WeightSource
from gpu_gpt2.open_model import open_model
from gpu_gpt2.text import TextStream, printed_by_llama2c
from gpu_gpt2.tokenizer import Tokenizer
from gpu_gpt2.training.checkpoint import trained_seq_len

TEXT: Final = "text"
IDS: Final = "ids"
JSON: Final = "json"
OUTPUTS: Final = (TEXT, IDS, JSON)
STANDARD_INPUT: Final = "-"

# Reasons why a sample ended, in --output json.
STOP_TOKEN: Final = "stop token"
MAX_TOKENS: Final = "max tokens"
CONTEXT: Final = "context"
CTRL_C: Final = "interrupted"


def generate(
    model: Annotated[str, typer.Argument(help=f"Model to generate with: {MODEL_HELP}")],
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Text for the model to continue; - reads it from standard input.", metavar="TEXT"
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="UTF-8 file with the text to continue.", metavar="FILE"),
    ] = None,
    prompt_ids: Annotated[
        str | None,
        typer.Option(
            help="Token ids to continue, separated by blanks, such as '1 5 9'. Nothing is put in "
            "front of them. With --output ids the model needs no tokenizer.",
            metavar="IDS",
        ),
    ] = None,
    truncate_prompt: Annotated[
        bool,
        typer.Option(
            "--truncate-prompt",
            help="Let the model read only the end of a prompt that is longer than its context, "
            "instead of refusing it.",
        ),
    ] = False,
    max_tokens: Annotated[
        int,
        typer.Option(
            help="Most tokens to generate, the prompt's not counted; a token that ends the text "
            "ends it earlier. When the context is full the model reads its last half again and "
            "continues."
        ),
    ] = 200,
    num_samples: Annotated[
        int,
        typer.Option(
            help="Texts to generate at the same time. Each is printed when it is complete; text "
            "has a line with its number in front."
        ),
    ] = 1,
    sampler: Annotated[
        str,
        typer.Option(
            help=f"Program whose choice of tokens to repeat. {LLMC}: that of llm.c's samples, "
            f"without temperature; --seed is 1337 if not given. {LLAMA2C}: that of llama2.c's run, "
            f"whose output it prints; temperature 1, top-p 0.9 and seed 1 if not given. The "
            f"text then ends at BOS or where the context is full, and -n of llama2.c is "
            f"--max-tokens and the prompt's tokens without BOS.",
            metavar="|".join(SAMPLERS),
        ),
    ] = DEFAULT,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    output: Annotated[
        str,
        typer.Option(
            help="Form of the output. text: prompt and continuation; ids: their token ids, one "
            "line for a sample; json: one object a line for a sample.",
            metavar="|".join(OUTPUTS),
        ),
    ] = TEXT,
    tokenizer: TokenizerName = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Generate text that continues a prompt, and print it as it comes."""
    if output not in OUTPUTS:
        raise ConfigError(f"--output must be one of {', '.join(OUTPUTS)}, not {output!r}")
    if max_tokens < 0:
        raise ConfigError(f"--max-tokens must be a whole number >= 0, not {max_tokens}")
    if num_samples < 1:
        raise ConfigError(f"--num-samples must be a whole number >= 1, not {num_samples}")
    sampling = sampling_of(
        sampler, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, samples=num_samples
    )
    text = _prompt_text(prompt, prompt_file, prompt_ids)
    source = open_model(model)
    words = _vocabulary_or_none(source, tokenizer, needed=text is not None or output != IDS)
    ids = _parsed_ids(prompt_ids, source.config.vocab_size) if prompt_ids is not None else []
    if text is not None:
        assert words is not None  # it is needed for a text
        ids = words.prompt_ids(text)
    context = trained_seq_len(source.folder, source.config)
    read = _that_fit(ids, context, truncate=truncate_prompt)
    stop = _stop_ids(words, as_llama2c=sampler == LLAMA2C)
    most, reason = max_tokens, MAX_TOKENS
    if sampler == LLAMA2C and most > context - len(read) + 1:  # the last token is not read
        most, reason = context - len(read) + 1, CONTEXT
    decoder = decoder_of(
        source, device, dtype, batch=num_samples, length=min(context, len(read) + max(1, most))
    )
    printed_as_c = sampler == LLAMA2C and output == TEXT
    samples = [Sample(ids, words, stop, printed_as_c=printed_as_c) for _ in range(num_samples)]
    watch = Stopwatch()
    drawn = generate_tokens(
        decoder,
        [np.array(read, np.int32)] * num_samples,
        max_tokens=most,
        sampling=sampling,
        stop=stop,
    )
    interrupted = _print_samples(samples, Printer(samples, output), watch, drawn, reason)
    typer.echo(f"prompt {len(read):,} tokens, {watch.report()}", err=True)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _print_samples(
    samples: Sequence[Sample],
    printer: Printer,
    watch: Stopwatch,
    drawn: Iterator[list[int | None]],
    reason: str,
) -> bool:
    """Prints the samples while their tokens are drawn; returns True if Ctrl-C ended that.

    drawn: the tokens, as `generate` yields them. reason: why a sample ends that no token ends.
    """
    interrupted = False
    printer.show()
    try:
        with overflow_is_silent():
            for tokens in drawn:
                watch.count(sum(token is not None for token in tokens))
                for sample, token in zip(samples, tokens, strict=True):
                    if token is not None:
                        sample.add(token)
                printer.show()
    except KeyboardInterrupt:
        interrupted = True
    for sample in samples:
        sample.end(CTRL_C if interrupted else reason)
    printer.finish()
    return interrupted


class Sample:
    """One continuation of the prompt: its tokens, its text, and why it ended."""

    def __init__(
        self,
        prompt: list[int],
        words: Tokenizer | None,
        stop: frozenset[int],
        *,
        printed_as_c: bool,
    ) -> None:
        """prompt: token ids; words: the tokenizer, or None if there is no text."""
        self.ids = list(prompt)
        self.prompt_tokens = len(prompt)
        self.ended = ""  # the reason, when it has ended
        self._stop = stop
        self._stream: TextStream | None = None
        self.texts = [""]  # the prompt, then the continuation as it came
        if words is not None:
            hidden = prompt[:1] == [words.eot]  # the token that begins a document has no text
            change = printed_by_llama2c if printed_as_c else None
            self._stream = TextStream(words, words.eot if hidden else None, change)
            self.texts = [self._stream.add(prompt[hidden:])]

    def add(self, token: int) -> None:
        """Adds a token; one that ends the text has no text itself."""
        self.ids.append(token)
        if token in self._stop:
            self.end(STOP_TOKEN)
        elif self._stream:
            self.texts.append(self._stream.add([token]))

    def end(self, reason: str) -> None:
        """Ends the sample, unless it has ended before."""
        if not self.ended:
            self.ended = reason
            if self._stream:
                self.texts.append(self._stream.finish())

    def to_json(self) -> str:
        """Returns the sample as one line of JSON."""
        return json.dumps(
            {
                "prompt": self.texts[0],
                "text": "".join(self.texts[1:]),
                "ids": self.ids,
                "prompt_tokens": self.prompt_tokens,
                "ended": self.ended,
            }
        )


class Printer:
    """Prints samples in their order: one text as it grows, and otherwise each when complete."""

    def __init__(self, samples: Sequence[Sample], output: str) -> None:
        self._samples, self._output = samples, output
        self._grows = output == TEXT and len(samples) == 1
        self._shown = 0  # pieces of the one text, or else samples

    def show(self) -> None:
        """Prints what has come since the last call."""
        if self._grows:
            texts = self._samples[0].texts
            show("".join(texts[self._shown :]))
            self._shown = len(texts)
            return
        while self._shown < len(self._samples) and self._samples[self._shown].ended:
            self._shown += 1
            show(self._complete(self._samples[self._shown - 1]))

    def finish(self) -> None:
        """Prints the rest; all samples have ended."""
        self.show()
        if self._grows:
            show("\n")

    def _complete(self, sample: Sample) -> str:
        """Returns the output for a sample that has ended."""
        if self._output == IDS:
            return " ".join(map(str, sample.ids)) + "\n"
        if self._output == JSON:
            return sample.to_json() + "\n"
        return f"--- sample {self._shown} of {len(self._samples)} ---\n{''.join(sample.texts)}\n"


def _prompt_text(prompt: str | None, file: Path | None, ids: str | None) -> str | None:
    """Returns the text to continue, or None if ids are given instead; UserError."""
    given = [
        flag
        for flag, value in (("--prompt", prompt), ("--prompt-file", file), ("--prompt-ids", ids))
        if value is not None
    ]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are both prompts; give one of them")
    if ids is not None:
        return None
    if file is not None:
        try:
            return _decoded(file.read_bytes(), str(file))
        except OSError as e:
            raise DataError(f"--prompt-file: cannot read {file}: {e.strerror}") from e
    if prompt == STANDARD_INPUT:
        return _decoded(sys.stdin.buffer.read(), "standard input")
    return prompt or ""


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as e:
        raise DataError(
            f"{name} is not UTF-8 text: byte 0x{content[e.start]:02x} at offset {e.start}; convert "
            f"it first, as in: iconv -f LATIN1 -t UTF-8"
        ) from e


def _parsed_ids(text: str, vocab_size: int) -> list[int]:
    """Returns the token ids of --prompt-ids; ConfigError."""
    ids = []
    for word in text.split():
        if not (word.isascii() and word.isdecimal()):
            raise ConfigError(f"--prompt-ids takes whole numbers such as '1 5 9', not {word!r}")
        if len(word) > len(str(vocab_size)) or int(word) >= vocab_size:
            raise ConfigError(
                f"--prompt-ids: the model has no token {word}; its ids are 0 to {vocab_size - 1}"
            )
        ids.append(int(word))
    if not ids:
        raise ConfigError("--prompt-ids is empty; give at least one token id")
    return ids


def _vocabulary_or_none(
    source: WeightSource, named: str | None, *, needed: bool
) -> Tokenizer | None:
    """Returns the tokenizer, or None if the model has none and it is not needed; UserError."""
    try:
        return vocabulary(source, named)
    except DataError as error:
        if named is not None or source.tokenizer_path is not None:
            raise
        if needed:
            raise DataError(
                f"{error}, or name one with --tokenizer, or use --prompt-ids with --output ids"
            ) from error
        return None


def _that_fit(ids: list[int], context: int, *, truncate: bool) -> list[int]:
    """Returns the end of the prompt that fits into the context; ConfigError if it does not fit."""
    if len(ids) > context and not truncate:
        raise ConfigError(
            f"the prompt has {len(ids):,} tokens and the model's context {context:,}; shorten the "
            f"prompt, or let the model read only its end with --truncate-prompt"
        )
    return ids[-context:]


def _stop_ids(words: Tokenizer | None, *, as_llama2c: bool) -> frozenset[int]:
    """Returns the tokens that end a text; llama2.c's run ends only at BOS."""
    if as_llama2c:
        return frozenset((words.eot if words else BOS,))
    return words.stop_ids if words else frozenset()
