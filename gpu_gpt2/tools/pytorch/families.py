"""The families of models in PyTorch."""

from __future__ import annotations

from gpu_gpt2.config import GPT2Config, LlamaConfig, ModelConfig
from gpu_gpt2.tools.pytorch.gpt2 import TorchGPT2
from gpu_gpt2.tools.pytorch.llama import TorchLlama
from gpu_gpt2.tools.pytorch.model import TorchModel


def torch_model(config: ModelConfig, vocab_rows: int) -> TorchModel:
    """Returns a model of the family of `config` in PyTorch; `vocab_rows` is as for TorchGPT2."""
    if isinstance(config, LlamaConfig):
        return TorchLlama(config, vocab_rows)
    assert isinstance(config, GPT2Config)
    return TorchGPT2(config, vocab_rows)
