"""Computes what `verify` compares with, in PyTorch, and writes it into files of llm.c.

This file and tools/pytorch/ are the only parts of gpu_gpt2 that need torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from gpu_gpt2.config import ModelConfig
from gpu_gpt2.formats import llmc
from gpu_gpt2.formats.debug_state import DebugState, write_debug_state
from gpu_gpt2.models.families import decayed_count
from gpu_gpt2.models.weights import Arena, FloatArray, named
from gpu_gpt2.tools.pytorch.families import torch_model
from gpu_gpt2.tools.pytorch.model import TorchModel
from gpu_gpt2.tools.verify.compare import OPTIMIZER_SETTINGS, STEPS, losses_path


def with_noise(config: ModelConfig, weights: FloatArray) -> FloatArray:
    """Returns a copy of initial weights (n,) float32 with noise in every bias and norm.

    Initial biases are 0 and initial weights of norms are 1: terms multiplied by them vanish or stay
    unchanged, so that a wrong gradient formula could pass unnoticed.
    """
    noisy: FloatArray = weights.copy()
    start = decayed_count(config)  # the matrices come first
    rng = np.random.default_rng(0)
    noisy[start:] += 0.05 * rng.standard_normal(weights.size - start, dtype=np.float32)
    return noisy


def torch_results(
    config: ModelConfig,
    weights: FloatArray,
    tokens: npt.NDArray[np.int32],
    targets: npt.NDArray[np.int32],
) -> tuple[DebugState, list[float]]:
    """Returns PyTorch's results for one batch, and its losses of ten steps on the batch.

    weights (n,) float32 is a parameter arena; tokens, targets (B, T) int32. PyTorch computes in
    float32 on the CPU.
    """
    model = torch_model(config, config.vocab_size)
    model.load(weights)
    x, y = (torch.from_numpy(a).long() for a in (tokens, targets))
    logits, loss = model(x, y)
    loss.backward()
    state = DebugState(
        tokens=tokens,
        targets=targets,
        logits=logits.detach().numpy(),
        loss=loss.item(),
        grads=named(config, model.gradients()),
    )
    return state, torch_losses(model, x, y)


def write_debug_files(
    folder: Path,
    name: str,
    config: ModelConfig,
    weights: FloatArray,
    tokens: npt.NDArray[np.int32],
    targets: npt.NDArray[np.int32],
) -> Iterator[Path]:
    """Writes a GPT-2 and PyTorch's results for one batch; yields each file when it is complete.

    The arguments are those of torch_results. The files, in `folder`: NAME.bin and NAME_bf16.bin
    (llm.c's model files), NAME_debug_state.bin, and NAME_losses.json with the losses of ten
    training steps.
    """
    for suffix, dtype in (("", "fp32"), ("_bf16", "bf16")):
        path = folder / f"{name}{suffix}.bin"
        llmc.write_model(path, Arena(config, weights), dtype)
        yield path
    state, ten_losses = torch_results(config, weights, tokens, targets)
    path = folder / f"{name}_debug_state.bin"
    write_debug_state(path, config, state)
    yield path
    path = losses_path(path)
    losses = {
        "losses": ten_losses,
        "optimizer": OPTIMIZER_SETTINGS,
        "torch": torch.__version__,
    }
    path.write_text(json.dumps(losses, indent=1) + "\n")
    yield path


def torch_losses(model: TorchModel, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """Trains `model` for ten AdamW steps on one batch; returns the mean loss of each in nats."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=OPTIMIZER_SETTINGS["lr"],
        betas=(OPTIMIZER_SETTINGS["beta1"], OPTIMIZER_SETTINGS["beta2"]),
        eps=OPTIMIZER_SETTINGS["eps"],
        weight_decay=OPTIMIZER_SETTINGS["weight_decay"],
    )
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER_SETTINGS["max_grad_norm"])
        optimizer.step()
        losses.append(loss.item())
    return losses
