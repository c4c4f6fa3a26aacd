"""Training steps and attention of PyTorch, which `bench` times beside ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gpu_gpt2.config import DEFAULTS, ModelConfig
from gpu_gpt2.device.cuda import FLUSH_BYTES
from gpu_gpt2.tools.pytorch.families import torch_model

WARM_UP: Final = 3  # untimed runs of attention: PyTorch loads kernels and grows its memory pool


def torch_step(
    config: ModelConfig,
    device: str,
    dtype: str,
    tokens: npt.NDArray[np.int32],
    targets: npt.NDArray[np.int32],
    *,
    lr: float,
    compiled: bool,
) -> Callable[[], Callable[[], float]]:
    """Returns a function that enqueues one training step on `device`, "cpu" or "cuda".

    Calling the function's result waits for the step and returns its loss. A step is forward,
    backward, clipping and fused AdamW on tokens, targets (B, T) int32. In bf16 and fp16 the forward
    pass runs under autocast, and weights stay float32. With `compiled`, torch.compile compiles it.
    """
    if device == "cuda":
        torch.set_float32_matmul_precision("highest" if dtype == "fp32" else "high")
    model = torch_model(config, config.padded_vocab_size).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=lr,
        betas=(DEFAULTS["beta1"], DEFAULTS["beta2"]),
        eps=DEFAULTS["eps"],
        fused=True,
    )
    forward = torch.compile(model) if compiled else model
    x, y = (torch.from_numpy(a).long().to(device) for a in (tokens, targets))
    precision = torch.float16 if dtype == "fp16" else torch.bfloat16

    def step() -> Callable[[], float]:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, precision, enabled=dtype != "fp32"):
            _, loss = forward(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), DEFAULTS["max_grad_norm"])
        optimizer.step()
        return lambda: float(loss.item())

    return step


def torch_attention_ms(
    dtype: str, B: int, H: int, T: int, D: int, repeat: int, backward: bool
) -> list[float]:
    """Returns `repeat` times in ms of causal flash attention, or of its backward pass.

    q, k, v are (B, H, T, D) in `dtype`, "bf16" or "fp16". The L2 cache is flushed before each run.
    Returns [] if PyTorch cannot use the GPU.
    """
    if not torch.cuda.is_available():
        return []
    precision = torch.float16 if dtype == "fp16" else torch.bfloat16
    q, k, v, dy = (torch.randn(B, H, T, D, device="cuda", dtype=precision) for _ in range(4))
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.FLASH_ATTENTION):
        for i in range(WARM_UP + repeat):
            for x in (q, k, v):
                x.requires_grad_(backward)
                x.grad = None
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            flush.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            if backward:
                y.backward(dy)
            else:
                nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            stop.record()
            torch.cuda.synchronize()
            if i >= WARM_UP:
                times.append(start.elapsed_time(stop))
    return times
