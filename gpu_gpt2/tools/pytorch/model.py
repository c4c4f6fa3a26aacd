"""The base of our models in PyTorch: losses, and weights and gradients in our layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from gpu_gpt2.config import ModelConfig
from gpu_gpt2.models.families import parameter_count
from gpu_gpt2.models.weights import FloatArray, Piece, named, part_of, pieces


class TorchModel(nn.Module, ABC):  # type: ignore[misc]
    """A model with the cross-entropy loss at its end.

    A family adds modules with the names of its parameters in models/, by which weights are copied:
    the parameter ln1w is ln1.weight of a layer in `blocks`, ln1b is ln1.bias, wte is wte.weight.
    """

    blocks: nn.Sequential  # the layers

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def logits(self, tokens: Any) -> Any:
        """Returns the logits (B, T, rows of the head) of tokens (B, T)."""

    def forward(self, tokens: Any, targets: Any) -> tuple[Any, Any]:
        """Returns logits (B * T, rows) and the mean loss in nats; tokens, targets (B, T)."""
        logits = self.logits(tokens).flatten(0, 1)
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
        """Yields every piece of the model with the torch parameter that holds it."""
        for piece in pieces(self.config):
            owner = self if piece.layer is None else self.blocks[piece.layer]
            name, kind = piece.name, "weight"
            if not hasattr(owner, name):
                name, kind = name[:-1], "weight" if name.endswith("w") else "bias"
            yield piece, getattr(getattr(owner, name), kind)
