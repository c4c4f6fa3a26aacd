"""`gpu-gpt2 verify`: compares a model on this device with results of PyTorch."""

from __future__ import annotations

import importlib.util
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import numpy.typing as npt
import typer
from rich.text import Text

from gpu_gpt2.cli.common import Device, Dtype, console, say
from gpu_gpt2.config import AUTO, GPT2_VOCAB_SIZE, GPT2Config, ModelConfig
from gpu_gpt2.data.corpus import python_docs
from gpu_gpt2.device import choose_dtype, open_device
from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.formats.debug_state import DebugState, read_debug_state
from gpu_gpt2.formats.tokenizer_bin import TOKENIZER_BIN
from gpu_gpt2.models.weights import Arena, WeightSource, load_arena
from gpu_gpt2.open_model import open_model
from gpu_gpt2.tokenizer import GPT2Tokenizer
from gpu_gpt2.tools.verify.compare import expected_losses, verify

BATCH: Final = (4, 64)  # (B, T) of batches that are compared, as in llm.c's debug state


def verify_model(
    model: Annotated[
        str,
        typer.Argument(help="Model file or folder; with --make also the name of a model size."),
    ] = "d6",
    debug_state: Annotated[
        Path | None,
        typer.Argument(
            help="Debug state of a GPT-2, in llm.c's format (*_debug_state.bin): a batch, and the "
            "logits, loss and gradients that PyTorch computed for it.",
            show_default="PyTorch computes now",
        ),
    ] = None,
    make: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Instead of comparing, write a GPT-2 and its debug state into this folder, for a "
            "machine without PyTorch.",
        ),
    ] = None,
    device_name: Device = AUTO,
    dtype: Dtype = AUTO,
) -> None:
    """Compare a model with PyTorch: logits, loss, all gradients and ten training steps.

    PyTorch computes on this machine, in float32 on the CPU, unless a debug state has its results.
    The exit status is 1 if an error is too large.
    """
    if make is not None:
        _make(model, make)
        return
    if debug_state is None:
        _check_for_pytorch("verify without a debug state")
    device = open_device(device_name)
    dtype = choose_dtype(dtype, device)
    if debug_state is None:
        source = _open_with_noise(model)
        state, losses = _results_of_pytorch(source)
    else:
        source = open_model(model)
        _check_is_gpt2(model, source)
        state = read_debug_state(debug_state, source.config)
        losses = expected_losses(debug_state, source.config, state)
    say(f"{model} in {dtype} on {device.name}, compared with PyTorch in float32")
    failed = count = 0
    for finding in verify(source, state, losses, device, dtype):
        mark = Text("ok   ", "green") if finding.passed else Text("FAIL ", "bold red")
        console.print(mark + Text(f"{finding.what:<22}{finding.detail}"), soft_wrap=True)
        count += 1
        failed += not finding.passed
    say(f"{count - failed} of {count} comparisons passed")
    if failed:
        raise typer.Exit(1)


def _results_of_pytorch(source: WeightSource) -> tuple[DebugState, Sequence[float]]:
    """Returns PyTorch's results for a batch, and its losses of ten steps on the batch."""
    from gpu_gpt2.tools.verify.make import torch_results

    config = source.config
    if config.vocab_size == GPT2_VOCAB_SIZE:
        tokens, targets = _text_batch(config, GPT2Tokenizer.gpt2())
    else:
        shape = (2, BATCH[0], min(BATCH[1], config.n_positions))
        rng = np.random.default_rng(0)
        tokens, targets = rng.integers(config.vocab_size, size=shape, dtype=np.int32)
    return torch_results(config, load_arena(source), tokens, targets)


def _make(model: str, folder: Path) -> None:
    """Writes a GPT-2 and its debug state into a folder."""
    _check_for_pytorch("verify --make")
    from gpu_gpt2.tools.verify.make import write_debug_files

    source = _open_with_noise(model)
    _check_is_gpt2(model, source)
    tokenizer = GPT2Tokenizer.gpt2()
    if source.config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(f"{model} has another vocabulary than GPT-2's; choose one that has it")
    weights = load_arena(source)
    name = Path(model).stem if Path(model).exists() else "gpt2_" + model.replace(":", "_")
    tokens, targets = _text_batch(source.config, tokenizer)
    started = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_bin(folder / TOKENIZER_BIN)  # llm.c's programs want it there
        for path in write_debug_files(folder, name, source.config, weights, tokens, targets):
            say(f"{time.monotonic() - started:5.1f} s  {path}  {path.stat().st_size:,} bytes")
    except OSError as e:
        raise DataError(f"{folder}: cannot be written: {e.strerror or e}") from e
    say(f"try it: gpu-gpt2 verify {folder / name}.bin {folder / name}_debug_state.bin")


def _open_with_noise(model: str) -> WeightSource:
    """Opens a model; a new one, which has only a name, gets noise in its initial weights."""
    from gpu_gpt2.tools.verify.make import with_noise

    source = open_model(model)
    if Path(model).exists():
        return source
    return Arena(source.config, with_noise(source.config, load_arena(source)))


def _text_batch(config: ModelConfig, tokenizer: GPT2Tokenizer) -> npt.NDArray[np.int32]:
    """Returns tokens and targets (2, B, T) int32 of a text."""
    B, T = BATCH[0], min(BATCH[1], config.n_positions)
    text = "\n\n".join(python_docs().val)
    ids = tokenizer.encode(text[: 64 * B * T])[: B * T + 1]
    return np.stack([ids[:-1].reshape(B, T), ids[1:].reshape(B, T)])


def _check_for_pytorch(what: str) -> None:
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(f"{what} needs PyTorch: pip install torch")


def _check_is_gpt2(model: str, source: WeightSource) -> None:
    if not isinstance(source.config, GPT2Config):
        raise ConfigError(
            f"{model} is a {source.config.title}, and llm.c's debug states are only for GPT-2; "
            f"compare with PyTorch on this machine: gpu-gpt2 verify {shlex.quote(model)}"
        )
