"""Llama against transformers and PyTorch: loss, every gradient, ten optimizer steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devices import CPU, KERNELS
from models import mean_loss, new_model, noisy_weights, random_batch, training_step
from transformers import AutoModelForCausalLM

from gpu_gpt2.config import LlamaConfig
from gpu_gpt2.evaluate import validation_loss
from gpu_gpt2.formats import hf
from gpu_gpt2.models.batch import Batch
from gpu_gpt2.models.families import decayed_count
from gpu_gpt2.models.model import Model
from gpu_gpt2.models.size import flops_per_token, parameter_groups
from gpu_gpt2.models.weights import Arena, FloatArray, load_arena, named
from gpu_gpt2.tools.pytorch.families import torch_model
from gpu_gpt2.tools.verify.compare import LIMITS, compare_tensor
from gpu_gpt2.training.optimizer import AdamW

# The vocabulary has padding rows, and the last of 33 tokens is alone in its tile.
TIED = LlamaConfig(
    vocab_size=1027, n_positions=40, n_embd=96, n_layer=3, n_head=4, n_kv_head=2, n_inner=160,
    rms_norm_eps=3e-5, rope_theta=500.0,
)  # fmt: skip
UNTIED = replace(TIED, n_head=3, n_kv_head=1, tie_word_embeddings=False)
B, T = 3, 33

both = pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
everywhere = pytest.mark.parametrize(("dtype", "device"), CPU + KERNELS)


def weights(config: LlamaConfig) -> FloatArray:
    return noisy_weights(config, noise_seed=1)


def batch(config: LlamaConfig, seed: int = 0) -> Batch:
    tokens, targets = np.random.default_rng(seed).integers(0, config.vocab_size, (2, B, T), "i4")
    tokens[:, ::3] = tokens[0, 0]  # some tokens often, so that their gradients add up
    return Batch.of(tokens, targets)


def our_model(config: LlamaConfig, device: str = "cpu", dtype: str = "fp32") -> Model:
    model = new_model(config, device, dtype, B=B, T=T)
    model.load(weights(config))
    return model


Arenas = Callable[..., FloatArray]


@pytest.fixture
def theirs(tmp_path: Path) -> Callable[..., Any]:
    """Makes transformers' model of the same weights, in float64 unless another dtype is given."""

    def make(config: LlamaConfig, dtype: torch.dtype = torch.float64) -> Any:
        hf.write_model(tmp_path / "ours", Arena(config, weights(config)))
        return AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=dtype)

    return make


@pytest.fixture
def arena_of(tmp_path: Path) -> Arenas:
    """Reads the weights or the gradients of transformers' model as a parameter arena."""

    def read(config: LlamaConfig, model: Any, *, gradients: bool = False) -> FloatArray:
        copy = type(model)(model.config)
        with torch.no_grad():
            for to, source in zip(copy.parameters(), model.parameters(), strict=True):
                to.copy_(source.grad if gradients else source)
        copy.save_pretrained(tmp_path / "theirs")
        source = hf.open_folder(tmp_path / "theirs")
        assert source.config == config
        return load_arena(source)

    return read


def torch_loss(model: Any, batch: Batch) -> Any:
    logits = model(torch.from_numpy(batch.tokens).long()).logits
    targets = torch.from_numpy(batch.targets).long().reshape(-1)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)


@both
@everywhere
def test_loss_and_every_gradient_match_transformers(
    dtype: str,
    device: str,
    config: LlamaConfig,
    theirs: Callable[..., Any],
    arena_of: Arenas,
) -> None:
    limits = LIMITS["fp32" if dtype == "fp32" else "16 bits"]
    ours, exact = our_model(config, device, dtype), theirs(config)
    loss = torch_loss(exact, batch(config))
    loss.backward()
    assert abs(mean_loss(ours, batch(config)) - loss.item()) <= limits.loss
    expected = named(config, arena_of(config, exact, gradients=True))
    found = named(config, ours.ops.device.download(ours.grad_arena))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        finding = compare_tensor(name, gradient, expected[name], limits)
        assert finding.passed, f"{name}: {finding.detail}"
        if name in ("wte", "head"):
            assert not gradient[config.vocab_size :].any()


@both
def test_ten_adamw_steps_match_pytorch(
    config: LlamaConfig, theirs: Callable[..., Any], arena_of: Arenas
) -> None:
    ours, model = our_model(config), theirs(config, torch.float32)
    optimizer = AdamW(ours, weight_decay=0.1)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    torch_optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(1, 11):
        result = training_step(ours, optimizer, [batch(config, step % 3)], 1e-3)
        torch_optimizer.zero_grad()
        loss = torch_loss(model, batch(config, step % 3))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch_optimizer.step()
        assert abs(result.loss - loss.item()) < 1e-5, f"step {step}"
        assert abs(result.grad_norm - norm.item()) < 1e-4 * norm.item()
    expected = named(config, arena_of(config, model))
    for name, found in named(config, ours.param_arena).items():
        worst = np.abs(found - expected[name]).max()
        assert worst < 2e-5, f"{name}: {worst:.2e} after ten steps of 1e-3"


@both
def test_micro_batches_add_up_to_the_whole_batch(config: LlamaConfig) -> None:
    """Also after a step, whose gradients are overwritten."""
    rows = batch(config)
    whole, parts = our_model(config), our_model(config)
    expected = whole.forward_backward(rows).sum()
    for _ in range(2):
        for i in range(B):
            row = Batch.of(rows.tokens[i : i + 1], rows.targets[i : i + 1])
            losses = parts.forward_backward(row, first=i == 0, micro_steps=B)
    np.testing.assert_allclose(losses.sum(), expected, rtol=1e-6)
    worst = np.abs(parts.grad_arena - whole.grad_arena).max()
    assert worst < 1e-6 * np.abs(whole.grad_arena).max()


@both
def test_validation_gives_the_loss_of_transformers(
    config: LlamaConfig, theirs: Callable[..., Any]
) -> None:
    tokens = np.random.default_rng(5).integers(0, config.vocab_size, B * T + 1, dtype=np.int32)
    rows = Batch.of(tokens[:-1].reshape(B, T), tokens[1:].reshape(B, T))
    with torch.no_grad():
        expected = torch_loss(theirs(config), rows).item()
    found = validation_loss(our_model(config), tokens, B, T)
    assert found == pytest.approx(expected, abs=1e-5)


@both
def test_our_model_in_pytorch_is_that_of_transformers(
    config: LlamaConfig, theirs: Callable[..., Any], arena_of: Arenas
) -> None:
    rows = batch(config)
    model, exact = torch_model(config, config.vocab_size).double(), theirs(config)
    model.load(weights(config))
    loss = torch_loss(exact, rows)
    loss.backward()
    _, found = model(*(torch.from_numpy(a).long() for a in (rows.tokens, rows.targets)))
    found.backward()
    assert found.item() == pytest.approx(loss.item(), abs=1e-6)
    ours, expected = model.gradients(), arena_of(config, exact, gradients=True)
    np.testing.assert_allclose(ours, expected, atol=1e-6 * np.abs(expected).max())


def test_a_llama_learns_one_batch_in_every_recompute_level() -> None:
    config = replace(TIED, vocab_size=67, n_layer=2)
    model = new_model(config, B=B, T=T, recompute=3)
    model.load(weights(config))
    optimizer, rows = AdamW(model), random_batch(config, np.random.default_rng(0), B, T)
    losses = [training_step(model, optimizer, [rows], 3e-3).loss for _ in range(40)]
    assert losses[0] > 4.0  # ln 67 = 4.2
    assert losses[-1] < 0.2


def test_parameters_and_flops_by_hand() -> None:
    """llama2.c's stories110M, whose parameters are known; its vocabulary needs no padding."""
    config = LlamaConfig(
        vocab_size=32000, n_positions=1024, n_embd=768, n_layer=12, n_head=12, n_kv_head=12,
        n_inner=2048,
    )  # fmt: skip
    groups = parameter_groups(config)
    assert sum(groups.values()) == 109_529_856
    assert groups == {
        "embeddings": 32000 * 768,
        "attention": 12 * 4 * 768 * 768,
        "MLP": 12 * 3 * 768 * 2048,
        "norms": 25 * 768,
    }
    attention = 6 * 12 * 768 * 1024
    assert flops_per_token(config, 1024) == 6 * 109_529_856 + attention
    untied = replace(config, tie_word_embeddings=False)
    assert parameter_groups(untied) == {**groups, "head": 32000 * 768}
    assert flops_per_token(untied, 1024) == flops_per_token(config, 1024)
    assert decayed_count(untied) == decayed_count(config) + 32000 * 768
