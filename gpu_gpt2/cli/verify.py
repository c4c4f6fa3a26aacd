"""`gpu-gpt2 verify`: compares a model on this device with results of PyTorch."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import typer
from rich.text import Text

from gpu_gpt2.cli.common import Device, Dtype, console, say
from gpu_gpt2.config import AUTO
from gpu_gpt2.data.corpus import python_docs
from gpu_gpt2.device import choose_dtype, open_device
from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.formats.debug_state import read_debug_state
from gpu_gpt2.formats.tokenizer_bin import TOKENIZER_BIN
from gpu_gpt2.models.weights import load_arena
from gpu_gpt2.open_model import open_model
from gpu_gpt2.tokenizer import GPT2Tokenizer
from gpu_gpt2.tools.verify.compare import expected_losses, verify

BATCH: Final = (4, 64)  # (B, T) of the pairs that --make makes, as in llm.c's debug state


def verify_model(
    model: Annotated[
        str,
        typer.Argument(help="Model file or folder; with --make also the name of a model size."),
    ] = "d6",
    debug_state: Annotated[
        Path | None,
        typer.Argument(
            help="Debug state of the model, in llm.c's format (*_debug_state.bin): a batch, and "
            "the logits, loss and gradients that PyTorch computes for it.",
            show_default=False,
        ),
    ] = None,
    make: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Instead of comparing, write a model and its debug state into this folder "
            "(needs PyTorch).",
        ),
    ] = None,
    device_name: Device = AUTO,
    dtype: Dtype = AUTO,
) -> None:
    """Compare a model with PyTorch: logits, loss, all gradients and ten training steps.

    The exit status is 1 if an error is too large. To try the command without files of your own,
    write a model and its debug state first: gpu-gpt2 verify --make FOLDER.
    """
    if make is not None:
        _make(model, make)
        return
    if debug_state is None:
        raise ConfigError(
            "name a model and its debug state, or make a pair with: gpu-gpt2 verify --make DIR"
        )
    device = open_device(device_name)
    dtype = choose_dtype(dtype, device)
    source = open_model(model)
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


def _make(model: str, folder: Path) -> None:
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("verify --make needs PyTorch: pip install torch")
    from gpu_gpt2.tools.verify.make import with_noise, write_debug_files

    source = open_model(model)
    B, T = BATCH[0], min(BATCH[1], source.config.n_positions)
    tokenizer = GPT2Tokenizer.gpt2()
    if source.config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(f"{model} has another vocabulary than GPT-2's; choose one that has it")
    weights = load_arena(source)
    name = Path(model).stem
    if not Path(model).exists():  # a name: initial weights
        name = "gpt2_" + model.replace(":", "_")
        weights = with_noise(source.config, weights)
    text = "\n\n".join(python_docs().val)
    ids = tokenizer.encode(text[: 64 * B * T])[: B * T + 1]
    tokens, targets = (np.ascontiguousarray(a.reshape(B, T)) for a in (ids[:-1], ids[1:]))
    started = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_bin(folder / TOKENIZER_BIN)  # llm.c's programs want it there
        for path in write_debug_files(folder, name, source.config, weights, tokens, targets):
            say(f"{time.monotonic() - started:5.1f} s  {path}  {path.stat().st_size:,} bytes")
    except OSError as e:
        raise DataError(f"{folder}: cannot be written: {e.strerror or e}") from e
    say(f"try it: gpu-gpt2 verify {folder / name}.bin {folder / name}_debug_state.bin")
