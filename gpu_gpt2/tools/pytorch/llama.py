"""Llama in PyTorch, with rotary pairs that are neighbours, as in our model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gpu_gpt2.config import LlamaConfig
from gpu_gpt2.models.rope import rope_angles
from gpu_gpt2.tools.pytorch.model import TorchModel


class Block(nn.Module):  # type: ignore[misc]
    """One transformer layer: x + attention(norm(x)), then x + MLP(norm(x))."""

    angles: Any  # (n_positions, D / 2, 2) float32: cosine and sine

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        C, F, D = c.n_embd, c.n_inner, c.head_size
        self.heads, self.kv_heads = c.n_head, c.n_kv_head
        self.ln1, self.ln2 = (nn.RMSNorm(C, c.rms_norm_eps) for _ in range(2))
        self.qkv = nn.Linear(C, (c.n_head + 2 * c.n_kv_head) * D, bias=False)
        self.attproj = nn.Linear(C, C, bias=False)
        self.fc = nn.Linear(C, 2 * F, bias=False)
        self.fcproj = nn.Linear(F, C, bias=False)
        angles = rope_angles(c.n_positions, D, c.rope_theta).reshape(-1, D // 2, 2)
        self.register_buffer("angles", torch.from_numpy(angles), persistent=False)

    def forward(self, x: Any) -> Any:
        """Returns the layer's output for x (B, T, C), in the shape and dtype of x."""
        B, T, C = x.shape
        H, G = self.heads, self.kv_heads
        qkv = self.qkv(self.ln1(x)).view(B, T, H + 2 * G, C // H).transpose(1, 2)
        q, k, v = qkv.split((H, G, G), dim=1)  # (B, H or G, T, D)
        q, k = (self._rotated(heads) for heads in (q, k))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)
        x = x + self.attproj(y.transpose(1, 2).reshape(B, T, C))
        gate, up = self.fc(self.ln2(x)).chunk(2, dim=-1)
        return x + self.fcproj(nn.functional.silu(gate) * up)

    def _rotated(self, heads: Any) -> Any:
        """Returns heads (B, H, T, D) with each pair rotated by its angle, in their dtype."""
        cos, sin = self.angles[: heads.shape[2]].unbind(-1)  # (T, D / 2)
        a, b = heads.unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
        return pairs.flatten(-2).to(heads.dtype)


class TorchLlama(TorchModel):
    """A Llama in PyTorch. `vocab_rows` is the number of rows of wte and the head: see TorchGPT2."""

    def __init__(self, c: LlamaConfig, vocab_rows: int) -> None:
        super().__init__(c)
        self.wte = nn.Embedding(vocab_rows, c.n_embd)
        self.blocks = nn.Sequential(*(Block(c) for _ in range(c.n_layer)))
        self.lnf = nn.RMSNorm(c.n_embd, c.rms_norm_eps)
        self.head = nn.Linear(c.n_embd, vocab_rows, bias=False)
        if c.tie_word_embeddings:
            self.head.weight = self.wte.weight

    def logits(self, tokens: Any) -> Any:
        return self.head(self.lnf(self.blocks(self.wte(tokens))))
