"""`bench generate`: times text generation of gpu-gpt2 and of transformers, both with a KV cache.

The two programs and a measurement of the memory bandwidth take turns, a few tokens each, so that
all three see the same machine.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from rich.table import Table

from gpu_gpt2.config import GPT2Config, LlamaConfig, ModelConfig, model_config
from gpu_gpt2.device.base import FLOAT32, X_DTYPES, Device
from gpu_gpt2.errors import ConfigError, DeviceError
from gpu_gpt2.generate import generate
from gpu_gpt2.models.decoder import Decoder, Sampling
from gpu_gpt2.models.families import new_model, parameter_count, parameters
from gpu_gpt2.models.init import initial_weights
from gpu_gpt2.models.kv_cache import cache_bytes
from gpu_gpt2.ops import ops_for
from gpu_gpt2.tools.bench.kernels import COPY_BYTES
from gpu_gpt2.tools.bench.step import OURS, free_memory

Prompts: TypeAlias = npt.NDArray[np.int32]  # (B, T)
# Reads the prompts; yields once when their next tokens are known, and again after each later token.
Generator: TypeAlias = Callable[[], Iterator[object]]

PEER: Final = "transformers"
COLUMNS: Final = ("prompt ms", "ms/token", "fastest", "tokens/s", "of the bound", "speed-up")
MODELS: Final = ("d12", "llama:15m", "llama:110m")  # timed by default
BATCH_SIZES: Final = (1, 32)  # timed by default
BLOCK: Final = 8  # timed tokens of each sequence before the other program takes its turn
# Tokens of a turn: the first is not timed, because the caches hold what the other program used.
TURN: Final = BLOCK + 1
MIN_TOKENS: Final = 1 + 2 * TURN  # that of the prompt, an untimed turn, and a timed one
READS: Final = 3  # measurements of the bandwidth in a turn
READ_COLUMNS: Final = 8192  # columns of the matrix that is read on a CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateTime:
    """The time of one token of each sequence of a batch, or the reason why there is none."""

    name: str  # OURS or PEER
    size: str  # model and batch size: "d12, batch 1"
    prompt_ms: float = 0.0  # time to read the prompts and to choose the first new tokens
    token_ms: float = 0.0  # median
    fastest_ms: float = 0.0  # minimum
    tokens_per_s: float = 0.0  # new tokens of all sequences per second, at the median
    weight_bytes: int = 0  # bytes of the weights that every token reads
    read_gb_s: float = 0.0  # bandwidth measured in the same turns, median
    share: float = 0.0  # time to read weight_bytes at that bandwidth, over the median
    problem: str = ""  # the reason


@dataclass(slots=True, eq=False)
class _Program:
    """A program that is being timed."""

    name: str
    tokens: Iterator[object] | None = None
    prompt_ms: float = 0.0
    token_ms: list[float] = field(default_factory=list)
    problem: str = ""

    def start(self, make: Callable[[], Generator]) -> None:
        """Makes the model, and times the prompts after an untimed pass over them."""
        generator = make()
        next(generator())
        started = time.perf_counter()
        self.tokens = generator()
        next(self.tokens)
        self.prompt_ms = (time.perf_counter() - started) * 1000

    def take_turn(self, *, timed: bool) -> None:
        assert self.tokens is not None
        next(self.tokens)
        for _ in range(BLOCK):
            started = time.perf_counter()
            next(self.tokens)
            if timed:
                self.token_ms.append((time.perf_counter() - started) * 1000)

    def attempt(self, work: Callable[[], None]) -> None:
        """Runs `work` unless something failed before; a failure becomes the problem."""
        if self.problem:
            return
        try:
            work()
        except Exception as error:  # a program may fail in any way; the other still counts
            self.problem = (str(error) or type(error).__name__).splitlines()[0][:200]
            self.tokens = None


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Returns the bytes of the weights that every step of decoding reads as a whole.

    Of an embedding that is not also the head, a step reads no more than the rows of its tokens.
    """
    sizes = {spec.name: spec.size for spec in parameters(config)}
    looked_up = ("wpe", "wte") if "head" in sizes else ("wpe",)
    itemsize: int = X_DTYPES[dtype].itemsize
    return itemsize * sum(size for name, size in sizes.items() if name not in looked_up)


def check_length(model: str, prompt_tokens: int, tokens: int) -> None:
    """Raises ConfigError for an unknown model, or if the text is longer than its context."""
    context = model_config(model).n_positions
    if prompt_tokens + tokens > context:
        raise ConfigError(
            f"{prompt_tokens} tokens of a prompt and {tokens} new ones do not fit into the context "
            f"of {model}, {context} tokens; use fewer --prompt-tokens or --tokens"
        )


def measure(
    device: Device,
    dtype: str,
    models: Sequence[str],
    batch_sizes: Sequence[int],
    *,
    prompt_tokens: int,
    tokens: int,
) -> Iterator[GenerateTime]:
    """Yields the rows of OURS and of PEER for every model and batch size.

    Each sequence has a prompt of `prompt_tokens` random tokens, and gets about `tokens` new ones,
    always the likeliest. A program that fails yields a row with the problem.
    """
    for model, batch_size in itertools.product(models, batch_sizes):
        yield from _measure_size(device, dtype, model, batch_size, prompt_tokens, tokens)
        free_memory(device)


def _measure_size(
    device: Device, dtype: str, model: str, batch_size: int, prompt_tokens: int, tokens: int
) -> Iterator[GenerateTime]:
    config = model_config(model)
    shape = (batch_size, prompt_tokens)
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
    ours, peer = programs = _Program(OURS), _Program(PEER)
    ours.attempt(lambda: ours.start(lambda: _ours(device, dtype, config, prompts, tokens)))
    peer.attempt(lambda: peer.start(lambda: _transformers(device, dtype, config, prompts)))
    read = _reader(device)
    read_gb_s: list[float] = []
    for turn in range((tokens - 1) // TURN):
        read_gb_s += read()
        for program in programs:
            program.attempt(functools.partial(program.take_turn, timed=turn > 0))
    for program in programs:
        size = f"{model}, batch {batch_size}"
        if program.problem:
            yield GenerateTime(name=program.name, size=size, problem=program.problem)
            continue
        token_ms, gb_s = statistics.median(program.token_ms), statistics.median(read_gb_s)
        moved = weight_bytes(config, dtype)
        yield GenerateTime(
            name=program.name,
            size=size,
            prompt_ms=program.prompt_ms,
            token_ms=token_ms,
            fastest_ms=min(program.token_ms),
            tokens_per_s=1000 * batch_size / token_ms,
            weight_bytes=moved,
            read_gb_s=gb_s,
            share=moved / gb_s / 1e6 / token_ms,
        )


def _ours(
    device: Device, dtype: str, config: ModelConfig, prompts: Prompts, tokens: int
) -> Generator:
    """Returns our generation. Raises ConfigError if weights and cache exceed the free memory."""
    B, T = prompts.shape
    length, X = T + tokens, X_DTYPES[dtype]
    needed = parameter_count(config) * X.itemsize
    needed += cache_bytes(config, X, batch=B, length=length)
    if needed > device.free_memory:
        raise ConfigError(
            f"the weights and the KV cache need {needed / 1e9:.1f} GB, and "
            f"{device.free_memory / 1e9:.1f} GB are free; use a smaller model or --batch-size"
        )
    model = new_model(
        config,
        ops_for(device, dtype),
        max_batch=B,
        max_seq_len=length,
        training=False,
        with_logits=False,
    )
    model.load(initial_weights(config, 0))
    decoder = Decoder(model, batch=B, length=length)
    greedy = Sampling(temperature=0)
    return lambda: generate(decoder, list(prompts), max_tokens=tokens, sampling=greedy)


def _transformers(device: Device, dtype: str, config: ModelConfig, prompts: Prompts) -> Generator:
    """Returns the generation of transformers' model of the same sizes, with random weights.

    The loop is that of its `generate` for greedy decoding without the checks around each token.
    Raises DeviceError if transformers or PyTorch cannot be imported.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise DeviceError(
            f"transformers cannot be used ({error}): pip install torch transformers"
        ) from None

    precision = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    with torch.device(device.name):
        model = transformers.AutoModelForCausalLM.from_config(_their_config(config, transformers))
    model = model.to(precision).eval()
    read = torch.from_numpy(prompts).long().to(device.name)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def step(tokens: Any, cache: Any) -> tuple[Any, Any]:
        """Returns the likeliest next tokens (B, 1), and the extended cache."""
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

    def tokens() -> Iterator[object]:
        new, cache = step(read, None)
        while True:
            yield new.tolist()
            new, cache = step(new, cache)

    return tokens


def _their_config(config: ModelConfig, transformers: Any) -> Any:
    if isinstance(config, GPT2Config):
        return transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.n_positions,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
        )
    assert isinstance(config, LlamaConfig)
    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.n_positions,
        hidden_size=config.n_embd,
        intermediate_size=config.n_inner,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def _reader(device: Device) -> Callable[[], list[float]]:
    """Returns a function that measures READS times how many GB/s the device reads.

    On a GPU that is a copy, whose bytes read and written count, as in bench/kernels.py. On a CPU it
    is the product of a vector and a matrix far larger than the caches, with all threads of BLAS.
    """
    count = COPY_BYTES[device.name] // FLOAT32.itemsize
    src = device.empty((count,), FLOAT32)
    device.fill_zero(src)
    if device.is_gpu:
        dst, moved = device.empty((count,), FLOAT32), 2 * src.nbytes
        work = lambda: device.copy(dst, src)  # noqa: E731
    else:
        matrix, moved = src.reshape(-1, min(READ_COLUMNS, count)), src.nbytes
        x = device.zeros((1, matrix.shape[1]), FLOAT32)
        y = device.empty((1, matrix.shape[0]), FLOAT32)
        work = lambda: device.matmul(y, x, matrix.T)  # noqa: E731
    return lambda: [moved / ms / 1e6 for ms in device.time_ms(work, repeat=READS)]


def table(rows: Sequence[GenerateTime]) -> Table:
    """Returns text_table of the rows as a table for the console."""
    head, lines = text_table(rows)
    columns = Table(box=None)
    for title in head:
        columns.add_column(title, justify="right" if title else "left", no_wrap=True)
    for line in lines:
        columns.add_row(*line)
    return columns


def text_table(rows: Sequence[GenerateTime]) -> tuple[list[str], list[list[str]]]:
    """Returns the titles and the lines of a table; the last column is our speed-up over PEER."""
    lines = []
    for size in dict.fromkeys(row.size for row in rows):
        group = [row for row in rows if row.size == size]
        ours = next((row for row in group if row.name == OURS and row.token_ms), None)
        for row in group:
            lines.append([size if row is group[0] else "", *_cells(row, ours)])
    return ["", "", *COLUMNS], lines


def bounds(rows: Sequence[GenerateTime]) -> list[str]:
    """Returns a line for each size: its weights, the bandwidth, and the bound that follows."""
    found = {}
    for row in rows:
        if row.token_ms:
            ms = row.weight_bytes / row.read_gb_s / 1e6
            found[row.size] = (
                f"{row.size}: a token reads {row.weight_bytes / 1e6:,.1f} MB of weights; at the "
                f"measured {row.read_gb_s:,.1f} GB/s that takes at least {ms:.2f} ms"
            )
    return list(found.values())


def problems(rows: Sequence[GenerateTime]) -> list[str]:
    """Returns one line for each row that has a problem."""
    return [f"{row.name} at {row.size}: {row.problem}" for row in rows if row.problem]


def _cells(row: GenerateTime, ours: GenerateTime | None) -> list[str]:
    if not row.token_ms:
        return [row.name, "failed", *[""] * (len(COLUMNS) - 1)]
    return [
        row.name,
        f"{row.prompt_ms:.2f}",
        f"{row.token_ms:.2f}",
        f"{row.fastest_ms:.2f}",
        f"{row.tokens_per_s:,.1f}",
        f"{row.share:.0%}",
        f"{row.token_ms / ours.token_ms:.2f} x" if ours and ours is not row else "",
    ]
