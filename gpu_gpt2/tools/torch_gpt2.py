"""GPT-2 in PyTorch: `bench` times it beside our model, and `verify` compares the two.

This file needs torch. Its modules have the names of the parameters in models/gpt2.py, by which
weights are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gpu_gpt2.config import DEFAULTS, GPT2Config
from gpu_gpt2.device.cuda import FLUSH_BYTES
from gpu_gpt2.models.families import parameter_count
from gpu_gpt2.models.weights import FloatArray, Piece, named, part_of, pieces

WARM_UP: Final = 3  # untimed runs of attention: PyTorch loads kernels and grows its memory pool


class Block(nn.Module):  # type: ignore[misc]
    """One transformer layer: x + attention(layernorm(x)), then x + MLP(layernorm(x))."""

    def __init__(self, c: GPT2Config) -> None:
        super().__init__()
        self.heads = c.n_head
        self.ln1, self.ln2 = (nn.LayerNorm(c.n_embd, c.layer_norm_epsilon) for _ in range(2))
        self.qkv = nn.Linear(c.n_embd, 3 * c.n_embd)
        self.attproj = nn.Linear(c.n_embd, c.n_embd)
        self.fc = nn.Linear(c.n_embd, 4 * c.n_embd)
        self.fcproj = nn.Linear(4 * c.n_embd, c.n_embd)

    def forward(self, x: Any) -> Any:
        """Returns the layer's output for x (B, T, C), in the shape and dtype of x."""
        B, T, C = x.shape
        qkv = self.qkv(self.ln1(x)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attproj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.fcproj(nn.functional.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class TorchGPT2(nn.Module):  # type: ignore[misc]
    """GPT-2 with the cross-entropy loss at its end.

    `vocab_rows` is the number of rows of wte: config.vocab_size, or padded_vocab_size where the
    step is timed, as in our model.
    """

    def __init__(self, c: GPT2Config, vocab_rows: int) -> None:
        super().__init__()
        self.config = c
        self.wte = nn.Embedding(vocab_rows, c.n_embd)
        self.wpe = nn.Embedding(c.n_positions, c.n_embd)
        self.blocks = nn.Sequential(*(Block(c) for _ in range(c.n_layer)))
        self.lnf = nn.LayerNorm(c.n_embd, c.layer_norm_epsilon)

    def forward(self, tokens: Any, targets: Any) -> tuple[Any, Any]:
        """Returns logits (B * T, vocab_rows) and the mean loss in nats; tokens, targets (B, T)."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        logits = nn.functional.linear(self.lnf(self.blocks(x)), self.wte.weight).flatten(0, 1)
        return logits, nn.functional.cross_entropy(logits, targets.flatten())

    def load(self, weights: FloatArray) -> None:
        """Sets all weights from a parameter arena (n,) float32, whose padding rows are left out."""
        tensors = named(self.config, weights)
        with torch.no_grad():
            for piece, theirs in self._pieces():
                theirs.copy_(torch.from_numpy(part_of(piece, tensors)))

    def gradients(self) -> FloatArray:
        """Returns all gradients as a parameter arena (n,) float32, whose padding rows are zero."""
        arena = np.zeros(parameter_count(self.config), np.float32)
        tensors = named(self.config, arena)
        for piece, theirs in self._pieces():
            part_of(piece, tensors)[...] = theirs.grad.cpu().numpy()
        return arena

    def _pieces(self) -> Iterator[tuple[Piece, Any]]:
        """Yields every piece of the model with the torch parameter that holds it.

        The parameter ln1w is ln1.weight of a layer, ln1b is ln1.bias, and wte is wte.weight.
        """
        for piece in pieces(self.config):
            owner = self if piece.layer is None else self.blocks[piece.layer]
            name, kind = piece.name, "weight"
            if not hasattr(owner, name):
                name, kind = name[:-1], "weight" if name.endswith("w") else "bias"
            yield piece, getattr(getattr(owner, name), kind)


def torch_step(
    config: GPT2Config,
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
    model = TorchGPT2(config, config.padded_vocab_size).to(device)
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
