"""Every level of recomputation needs less memory and gives the same bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from devices import CPU, KERNELS
from models import TINY, TINY_LLAMA, new_model, noisy_weights, random_batch

from gpu_gpt2.config import MAX_RECOMPUTE, GPT2Config, ModelConfig
from gpu_gpt2.device.base import FLOAT32
from gpu_gpt2.models.arena import bytes_of
from gpu_gpt2.models.batch import Batch
from gpu_gpt2.models.families import activations
from gpu_gpt2.models.init import initial_weights

CONFIG = replace(TINY, n_layer=3)
LLAMA = replace(TINY_LLAMA, n_layer=3)
B, T = 2, 11

families = pytest.mark.parametrize("config", [CONFIG, LLAMA], ids=["gpt2", "llama"])


def losses_and_gradients(
    config: ModelConfig, device: str, dtype: str, recompute: int
) -> tuple[bytes, bytes]:
    """Losses and gradients of two micro-steps."""
    model = new_model(config, device, dtype, B=B, T=T, recompute=recompute)
    model.load(noisy_weights(config, noise_seed=1))
    rng = np.random.default_rng(2)
    for micro_step in range(2):
        batch = random_batch(config, rng, B, T)
        losses = model.forward_backward(batch, first=micro_step == 0, micro_steps=2)
    download = model.ops.device.download
    return download(losses).tobytes(), download(model.grad_arena).tobytes()


@families
@pytest.mark.parametrize(("dtype", "device"), CPU + KERNELS)
def test_every_level_gives_the_bits_of_level_0(
    dtype: str, device: str, config: ModelConfig
) -> None:
    expected = losses_and_gradients(config, device, dtype, 0)
    for recompute in range(1, MAX_RECOMPUTE + 1):
        found = losses_and_gradients(config, device, dtype, recompute)
        assert found == expected, f"level {recompute}"


@families
def test_every_level_needs_less_memory(config: ModelConfig) -> None:
    sizes = [
        bytes_of(activations(config, B, T, recompute=level), FLOAT32)
        for level in range(MAX_RECOMPUTE + 1)
    ]
    assert sorted(sizes, reverse=True) == sizes
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize(
    ("config", "parts", "activation"),
    [(CONFIG, ("", "_mean", "_rstd"), "gelu"), (LLAMA, ("", "_rstd"), "swiglu")],
)
def test_each_level_keeps_fewer_activations_of_every_layer(
    config: ModelConfig, parts: tuple[str, ...], activation: str
) -> None:
    def kept(level: int) -> set[str]:
        specs = activations(config, B, T, recompute=level)
        return {spec.name for spec in specs if spec.stacked and spec.shape[0] == config.n_layer}

    norms = {f"{name}{part}" for name in ("ln1", "ln2") for part in parts}
    assert kept(0) - kept(1) == {activation}
    assert kept(1) - kept(2) == norms
    assert kept(2) - kept(3) == {"qkv", "lse", "att", "res_att", "fc"}
    assert kept(3) == {"res_mlp"}


@families
def test_without_training_all_layers_share_their_activations(config: ModelConfig) -> None:
    specs = activations(config, B, T, training=False)
    assert {spec.shape[0] for spec in specs if spec.stacked} == {1}
    assert not {"dres", "dfc", "dqkv", "delta", "order"} & {spec.name for spec in specs}


@pytest.mark.parametrize(("dtype", "device"), KERNELS)
@pytest.mark.parametrize(("n_embd", "n_positions"), [(12, 33), (6, 33), (20, 7)])
def test_models_run_whose_biases_are_not_aligned_to_16_bytes(
    n_embd: int, n_positions: int, dtype: str, device: str
) -> None:
    """The 4 C elements of a bias take a multiple of 16 bytes, but do not begin at one here."""
    config = GPT2Config(vocab_size=67, n_positions=n_positions, n_embd=n_embd, n_layer=2, n_head=1)
    model = new_model(config, device, dtype, B=1, T=7)
    model.load(initial_weights(config, 0))
    tokens = np.arange(7, dtype=np.int32)[None]
    model.forward_backward(Batch.of(tokens, tokens))
    assert np.isfinite(model.ops.device.download(model.grad_arena)).all()
