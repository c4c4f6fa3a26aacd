"""A model and its debug state, made with PyTorch: what `verify` needs, without a download.

Needs torch, the only part of gpu_gpt2 but for timings that does.
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
from gpu_gpt2.models.gpt2 import decayed_count
from gpu_gpt2.models.weights import Arena, FloatArray, named
from gpu_gpt2.tools.torch_gpt2 import TorchGPT2
from gpu_gpt2.tools.verify.judge import HYPER, STEPS, losses_path


def stirred(config: ModelConfig, weights: FloatArray) -> FloatArray:
    """Initial weights (n,) float32 with every bias and layernorm moved off 0 and 1.

    As they start, half of the gradients would not depend on them, and errors in them not show.
    """
    stirred: FloatArray = weights.copy()
    start = decayed_count(config)
    rng = np.random.default_rng(0)
    stirred[start:] += 0.05 * rng.standard_normal(weights.size - start, dtype=np.float32)
    return stirred


def make_pair(
    folder: Path,
    name: str,
    config: ModelConfig,
    weights: FloatArray,
    tokens: npt.NDArray[np.int32],
    targets: npt.NDArray[np.int32],
) -> Iterator[Path]:
    """Writes a model and what PyTorch makes of a batch, and yields each file when it is complete.

    weights (n,) float32 is a parameter arena; tokens, targets (B, T) int32. The files, in
    `folder`: NAME.bin and NAME_bf16.bin (llm.c's model files), NAME_debug_state.bin, and
    NAME_losses.json with the losses of ten training steps. All in float32 on the CPU.
    """
    for suffix, dtype in (("", "fp32"), ("_bf16", "bf16")):
        path = folder / f"{name}{suffix}.bin"
        llmc.write_model(path, Arena(config, weights), dtype)
        yield path
    model = TorchGPT2(config, config.vocab_size)
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
    path = folder / f"{name}_debug_state.bin"
    write_debug_state(path, config, state)
    yield path
    path = losses_path(path)
    losses = {"losses": ten_losses(model, x, y), "optimizer": HYPER, "torch": torch.__version__}
    path.write_text(json.dumps(losses, indent=1) + "\n")
    yield path


def ten_losses(model: TorchGPT2, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """Mean losses in nats of ten AdamW steps of PyTorch's on one batch."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=HYPER["lr"],
        betas=(HYPER["beta1"], HYPER["beta2"]),
        eps=HYPER["eps"],
        weight_decay=HYPER["weight_decay"],
    )
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), HYPER["max_grad_norm"])
        optimizer.step()
        losses.append(loss.item())
    return losses
