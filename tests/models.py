"""Small models, batches and settings of runs, which several test files share."""

from __future__ import annotations

import io

import numpy as np
from rich.console import Console

from gpu_gpt2.config import GPT2Config, LlamaConfig, ModelConfig, TrainConfig
from gpu_gpt2.device import open_device
from gpu_gpt2.models import families
from gpu_gpt2.models.batch import Batch
from gpu_gpt2.models.families import decayed_count
from gpu_gpt2.models.init import initial_weights
from gpu_gpt2.models.model import Model
from gpu_gpt2.ops import ops_for
from gpu_gpt2.training.optimizer import AdamW, StepResult

TINY = GPT2Config(vocab_size=67, n_positions=11, n_embd=32, n_layer=2, n_head=2)
TINY_LLAMA = LlamaConfig(
    vocab_size=67, n_positions=11, n_embd=32, n_layer=2, n_head=4, n_kv_head=2, n_inner=40
)


def new_model(
    config: ModelConfig,
    device: str = "cpu",
    dtype: str = "fp32",
    *,
    B: int,
    T: int,
    recompute: int = 0,
    training: bool = True,
) -> Model:
    """A model for batches of up to (B, T) on a device by name; its weights are not set yet."""
    return families.new_model(
        config,
        ops_for(open_device(device), dtype),
        max_batch=B,
        max_seq_len=T,
        recompute=recompute,
        training=training,
    )


def noisy_weights(config: ModelConfig, seed: int = 0, *, noise_seed: int) -> np.ndarray:
    """Initial weights with biases and norms moved off 0 and 1, so that every term counts."""
    arena = initial_weights(config, seed)
    decayed = decayed_count(config)
    rng = np.random.default_rng(noise_seed)
    arena[decayed:] += 0.1 * rng.standard_normal(arena.size - decayed, dtype=np.float32)
    return arena


def random_batch(config: ModelConfig, rng: np.random.Generator, B: int, T: int) -> Batch:
    """Tokens and targets drawn evenly from the whole vocabulary."""
    return Batch.of(*rng.integers(0, config.vocab_size, (2, B, T), dtype=np.int32))


def training_step(model: Model, optimizer: AdamW, batches: list[Batch], lr: float) -> StepResult:
    """One optimizer step over some micro-batches; waits for its result."""
    for i, batch in enumerate(batches):
        losses = model.forward_backward(
            batch, first=i == 0, micro_steps=len(batches), loss_scale=optimizer.loss_scale
        )
    return optimizer.step(lr, losses, micro_steps=len(batches)).result()


def mean_loss(model: Model, batch: Batch) -> float:
    """The mean loss of a batch, whose gradients are left in the model."""
    return float(model.ops.device.download(model.forward_backward(batch)).mean())


def train_settings(**changes: object) -> TrainConfig:
    """The settings of a run of a few steps on the CPU; `data` must be given."""
    values = {
        "model": "nano", "device": "cpu", "dtype": "fp32", "tokenizer": "bytes", "steps": 8,
        "batch_size": 4, "seq_len": 32, "total_batch_tokens": 256, "lr": 3e-3, "warmup_steps": 2,
        "weight_decay": 0.1, "eval_every": 4, "save_every": 4, "sample_every": 0, "seed": 3,
        "run_dir": "run",
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


def quiet() -> Console:
    """A console that nobody sees."""
    return Console(file=io.StringIO())
