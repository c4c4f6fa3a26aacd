"""GPT-2 in PyTorch eager: what our steps are timed beside and verified against. Needs torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gpu_gpt2.config import DEFAULTS, ModelConfig
from gpu_gpt2.device.cuda import FLUSH_BYTES
from gpu_gpt2.models.gpt2 import parameter_count
from gpu_gpt2.models.weights import FloatArray, Piece, named, part_of, pieces


class Block(nn.Module):  # type: ignore[misc]
    """One transformer layer."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads = c.n_head
        self.ln1, self.ln2 = nn.LayerNorm(c.n_embd), nn.LayerNorm(c.n_embd)
        self.qkv = nn.Linear(c.n_embd, 3 * c.n_embd)
        self.attproj = nn.Linear(c.n_embd, c.n_embd)
        self.fc = nn.Linear(c.n_embd, 4 * c.n_embd)
        self.fcproj = nn.Linear(4 * c.n_embd, c.n_embd)

    def forward(self, x: Any) -> Any:
        B, T, C = x.shape
        qkv = self.qkv(self.ln1(x)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attproj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.fcproj(nn.functional.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class TorchGPT2(nn.Module):  # type: ignore[misc]
    """GPT-2 with the loss at the end."""

    def __init__(self, c: ModelConfig, vocab_rows: int) -> None:
        super().__init__()
        self.config = c
        self.wte = nn.Embedding(vocab_rows, c.n_embd)
        self.wpe = nn.Embedding(c.n_positions, c.n_embd)
        self.blocks = nn.Sequential(*(Block(c) for _ in range(c.n_layer)))
        self.lnf = nn.LayerNorm(c.n_embd)

    def forward(self, tokens: Any, targets: Any) -> tuple[Any, Any]:
        """Logits (B * T, vocab_rows) and the mean loss of tokens and targets (B, T)."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        logits = nn.functional.linear(self.lnf(self.blocks(x)), self.wte.weight).flatten(0, 1)
        return logits, nn.functional.cross_entropy(logits, targets.flatten())

    def load(self, weights: FloatArray) -> None:
        """Sets all weights from a parameter arena (n,) float32; there are no padding rows here."""
        tensors = named(self.config, weights)
        with torch.no_grad():
            for piece, theirs in self._pieces():
                theirs.copy_(torch.from_numpy(part_of(piece, tensors)))

    def gradients(self) -> FloatArray:
        """The gradients of all weights as a parameter arena (n,) float32, padding rows zero."""
        arena = np.zeros(parameter_count(self.config), np.float32)
        tensors = named(self.config, arena)
        for piece, theirs in self._pieces():
            part_of(piece, tensors)[...] = theirs.grad.cpu().numpy()
        return arena

    def _pieces(self) -> Iterator[tuple[Piece, Any]]:
        """Every piece of the model with the torch parameter that holds it."""
        for piece in pieces(self.config):
            owner = self if piece.layer is None else self.blocks[piece.layer]
            name, kind = piece.name, "weight"
            if not hasattr(owner, name):
                name, kind = name[:-1], "weight" if name.endswith("w") else "bias"
            yield piece, getattr(getattr(owner, name), kind)


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
    """A function that enqueues one step on "cpu" or "cuda" and returns what waits for its loss.

    Forward, backward, clipping, fused AdamW. tokens, targets (B, T) int32. With 16 bits
    it is torch's autocast, weights stay float32. `compiled`: by torch.compile.
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
    """Milliseconds of causal flash attention on q, k, v (B, H, T, D), or of its backward pass.

    The L2 cache is emptied before each. [] if PyTorch cannot use the GPU.
    """
    if not torch.cuda.is_available():
        return []
    precision = torch.float16 if dtype == "fp16" else torch.bfloat16
    q, k, v, dy = (torch.randn(B, H, T, D, device="cuda", dtype=precision) for _ in range(4))
    flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.FLASH_ATTENTION):
        for i in range(repeat + 3):
            for x in (q, k, v):
                x.requires_grad_(backward)
                x.grad = None
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            flushed.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            if backward:
                y.backward(dy)
            else:
                nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            stop.record()
            torch.cuda.synchronize()
            if i >= 3:
                times.append(start.elapsed_time(stop))
    return times
