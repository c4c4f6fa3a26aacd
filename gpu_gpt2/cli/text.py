"""Shared by `generate` and `chat`: their options, the tokenizer, the decoder and the output."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from gpu_gpt2.cli.common import model_on_device
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.generate import HostSampler
from gpu_gpt2.models.decoder import Decoder, Sampling
from gpu_gpt2.models.weights import WeightSource
from gpu_gpt2.open_model import tokenizer_of
from gpu_gpt2.samplers import Llama2cSampler, LlmcSampler
from gpu_gpt2.tokenizer import GPT2Tokenizer, Tokenizer, open_tokenizer

DEFAULT: Final = "default"
LLMC: Final = "llmc"
LLAMA2C: Final = "llama2c"
SAMPLERS: Final = (DEFAULT, LLMC, LLAMA2C)
# The options that the sampler of another program does not know.
_UNKNOWN: Final = {
    DEFAULT: (),
    LLMC: ("--temperature", "--top-k", "--top-p"),
    LLAMA2C: ("--top-k",),
}
# Where these samplers start if --seed is not given. llm.c starts every sample with 1337. llama2.c
# takes the time, which would give another text at every call.
_SEEDS: Final = {LLMC: 1337, LLAMA2C: 1}
_LLAMA2C_TEMPERATURE: Final = 1.0  # default of llama2.c's run
_LLAMA2C_TOP_P: Final = 0.9  # default of llama2.c's run
MAX_TOP_K: Final = 2**31 - 1  # an int32 on the device; above the vocabulary it changes nothing
MAX_SEED: Final = 2**63 - 1  # leaves room for the seeds of further samples, which count up
_DEFAULTS: Final = Sampling()

MODEL_HELP: Final = (
    "a run, a checkpoint, a Hugging Face folder of GPT-2 or Llama, a .safetensors file, or a .bin "
    "file of llm.c or llama2.c."
)
Temperature = Annotated[
    float | None,
    typer.Option(
        help="Divisor of the logits before sampling: higher gives more varied text, 0 always "
        f"takes the likeliest token. {_DEFAULTS.temperature} if not given.",
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        help=f"Sample among this many of the likeliest tokens, {_DEFAULTS.top_k} if not given; 0 "
        f"means among all.",
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Sample among the likeliest tokens whose probabilities together reach this number; "
        "1, or no number, means among all.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help=f"Seed of the sampling, {_DEFAULTS.seed} if not given; another seed gives another "
        f"text.",
    ),
]
TokenizerName = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        help="Tokenizer to use instead of the model's own: a file, a folder, or gpt2.",
        metavar="PATH|gpt2",
    ),
]


def sampling_of(
    sampler: str,
    *,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    samples: int,
) -> Sampling | Sequence[HostSampler]:
    """Returns the sampler that the options describe, None for one not given; ConfigError.

    The samplers of llm.c and llama2.c are one object per sample, with seeds that count up.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"--sampler must be one of {', '.join(SAMPLERS)}, not {sampler!r}")
    given = {"--temperature": temperature, "--top-k": top_k, "--top-p": top_p}
    for flag in _UNKNOWN[sampler]:
        if given[flag] is not None:
            raise ConfigError(
                f"--sampler {sampler} has no {flag}, as the program that it stands for has none; "
                f"leave it out"
            )
    if sampler == DEFAULT:
        return device_sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    _check(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if seed == 0:
        raise ConfigError(f"--seed 0 gives only zeros with --sampler {sampler}; use 1 or more")
    first = _SEEDS[sampler] if seed is None else seed
    seeds = range(first, first + samples)
    if sampler == LLMC:
        return [LlmcSampler(seed) for seed in seeds]
    temperature = _LLAMA2C_TEMPERATURE if temperature is None else temperature
    top_p = _LLAMA2C_TOP_P if top_p is None else top_p
    return [Llama2cSampler(temperature=temperature, top_p=top_p, seed=seed) for seed in seeds]


def device_sampling(
    *, temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None
) -> Sampling:
    """Returns the settings of the default sampler, None for an option not given; ConfigError."""
    _check(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    return Sampling(
        temperature=_DEFAULTS.temperature if temperature is None else temperature,
        top_k=_DEFAULTS.top_k if top_k is None else top_k,
        top_p=_DEFAULTS.top_p if top_p is None else top_p,
        seed=_DEFAULTS.seed if seed is None else seed,
    )


def _check(
    *, temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None
) -> None:
    """Raises ConfigError, which names the option, for a value out of its range."""
    if temperature is not None and not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(f"--temperature must be a finite number >= 0, not {temperature:g}")
    if top_k is not None and not 0 <= top_k <= MAX_TOP_K:
        raise ConfigError(f"--top-k must be a whole number from 0 to {MAX_TOP_K:,}, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"--top-p must be a number > 0 and <= 1, not {top_p:g}")
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"--seed must be a whole number from 0 to 2^63 - 1, not {seed}")


def vocabulary(source: WeightSource, named: str | None) -> Tokenizer:
    """Returns the tokenizer that --tokenizer names, or the model's own if it is None; UserError."""
    if named is None:
        return tokenizer_of(source)
    tokenizer = GPT2Tokenizer.gpt2() if named == "gpt2" else open_tokenizer(Path(named))
    if tokenizer.vocab_size != source.config.vocab_size:
        raise ConfigError(
            f"--tokenizer {named} has {tokenizer.vocab_size} tokens and the model "
            f"{source.config.vocab_size}; give the tokenizer that the model was trained with"
        )
    return tokenizer


def decoder_of(
    source: WeightSource, device_name: str, dtype: str, *, batch: int, length: int
) -> Decoder:
    """Returns a decoder of the loaded model for `batch` sequences of up to `length` tokens."""
    model = model_on_device(source, device_name, dtype, batch, length, with_logits=False)
    return Decoder(model, batch=batch, length=length)


def show(text: str) -> None:
    """Writes `text` to standard output at once, as it is, also where that is a pipe."""
    sys.stdout.write(text)
    sys.stdout.flush()


class Stopwatch:
    """Measures the speed of decoding: tokens after the first of each sequence."""

    def __init__(self) -> None:
        self.tokens = 0  # number of generated tokens, all sequences together
        self._first = 0  # tokens that the prefill gave
        self._begin = self._end = 0.0

    def count(self, tokens: int) -> None:
        """Counts `tokens` that came at once."""
        self._end = time.perf_counter()
        if not self.tokens:
            self._begin, self._first = self._end, tokens
        self.tokens += tokens

    def report(self) -> str:
        """Returns the number of tokens, and tokens per second without the prefill if known."""
        seconds = self._end - self._begin
        counted = f"generated {self.tokens:,} tokens"
        if seconds <= 0:
            return counted
        return f"{counted}, {(self.tokens - self._first) / seconds:,.1f} tokens/s"
