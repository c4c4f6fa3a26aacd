"""GPT-2 in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gpu_gpt2.config import GPT2Config
from gpu_gpt2.tools.pytorch.model import TorchModel


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


class TorchGPT2(TorchModel):
    """A GPT-2 in PyTorch.

    `vocab_rows` is the number of rows of wte: config.vocab_size, or padded_vocab_size where the
    step is timed, as in our model.
    """

    def __init__(self, c: GPT2Config, vocab_rows: int) -> None:
        super().__init__(c)
        self.wte = nn.Embedding(vocab_rows, c.n_embd)
        self.wpe = nn.Embedding(c.n_positions, c.n_embd)
        self.blocks = nn.Sequential(*(Block(c) for _ in range(c.n_layer)))
        self.lnf = nn.LayerNorm(c.n_embd, c.layer_norm_epsilon)

    def logits(self, tokens: Any) -> Any:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        return nn.functional.linear(self.lnf(self.blocks(x)), self.wte.weight)
