"""Muon: kernels/muon.cu and the NumPy ops, and the optimizer against PyTorch's, on every device."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from devices import assert_case, every_device, kernel_devices, op_cases
from models import new_model, noisy_weights, random_batch, training_step

from gpu_gpt2.config import OPTIONS, GPT2Config, LlamaConfig, ModelConfig
from gpu_gpt2.models.arena import TensorSpec, offsets
from gpu_gpt2.models.families import parameters
from gpu_gpt2.models.model import Model
from gpu_gpt2.models.weights import FloatArray, named
from gpu_gpt2.ops.cases import Case
from gpu_gpt2.ops.table import MUON_COEFFICIENTS, MUON_EPS
from gpu_gpt2.tools.pytorch.families import torch_model
from gpu_gpt2.training.muon import (
    ITERATIONS,
    MOMENTUM,
    OPTIMIZERS,
    UPDATE_RMS,
    Matrix,
    Muon,
    matrices,
    muon_count,
)

GPT2 = GPT2Config(vocab_size=131, n_positions=19, n_embd=48, n_layer=2, n_head=3)
LLAMA = LlamaConfig(
    vocab_size=131, n_positions=19, n_embd=48, n_layer=2, n_head=4, n_kv_head=2, n_inner=40,
    tie_word_embeddings=False,
)  # fmt: skip
# Its matrices, and what follows them, do not begin at multiples of 16 bytes.
ODD = GPT2Config(vocab_size=67, n_positions=11, n_embd=15, n_layer=3, n_head=3)
B, T = 2, 17
LR, DECAY = 3e-3, 0.1
MATRICES = {"qkvw", "attprojw", "fcw", "fcprojw"}

# Limits of ten steps beside PyTorch, about twice what was seen in the emulator: of the losses, and
# of the weights, whose error is the norm of the difference over that of how far they moved. Small
# singular values of the momentum, which rounding decides in 16 bits, grow up to 480-fold.
LOSS_LIMITS = {"fp32": 3e-6, "bf16": 1.5e-3, "fp16": 3e-4}
MATRIX_LIMITS = {"fp32": 5e-5, "bf16": 0.2, "fp16": 0.06}
# Of the other weights: qkvb has the bias of the keys, whose gradient is 0 but for rounding.
OTHER_LIMITS = {"fp32": 5e-5, "bf16": 0.2, "fp16": 0.07}

families = pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])


@op_cases("muon_momentum", "muon_polynomial", "muon_update")
def test_agrees_with_float64(case: Case, dtype: str, device: str) -> None:
    assert_case(case, dtype, device)


# --- beside PyTorch ---


def exact_zeropower(
    grad: Any, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float
) -> Any:
    """PyTorch's Newton-Schulz iteration in float64 instead of bfloat16."""
    a, b, c = ns_coefficients
    x = grad.double() / grad.double().norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.to(grad.dtype)


def parts_of(config: ModelConfig, spec: TensorSpec, tensor: Any) -> Iterator[Any]:
    """The matrices of a tensor of the layers, cut by the sizes of the heads and of the MLP."""
    heads = [config.n_head, config.kv_heads, config.kv_heads]
    cuts = {"qkvw": [heads_ * config.head_size for heads_ in heads]}
    if isinstance(config, LlamaConfig):
        cuts["fcw"] = [config.n_inner, config.n_inner]
    for layer in tensor:
        yield from torch.split(layer, cuts.get(spec.name, [len(layer)]))


class Theirs:
    """Our model in PyTorch, trained by torch.optim.Muon and torch.optim.AdamW."""

    def __init__(self, config: ModelConfig, weights: FloatArray) -> None:
        self.model = torch_model(config, config.vocab_size)
        self.config, self.arena = config, torch.from_numpy(weights.copy())
        self.grad = torch.zeros_like(self.arena)
        groups: dict[str, list[Any]] = {"muon": [], "decayed": [], "others": []}
        for spec, start in offsets(parameters(config)):
            part = slice(start, start + spec.size)
            whole = self.arena[part].reshape(spec.shape), self.grad[part].reshape(spec.shape)
            pairs = [whole]
            if spec.name in MATRICES:
                weight, grad = (parts_of(config, spec, tensor) for tensor in whole)
                pairs = list(zip(weight, grad, strict=True))
            for weight, grad in pairs:  # views of the arenas, which change with them
                parameter = torch.nn.Parameter(weight)
                parameter.grad = grad
                group = "decayed" if spec.name in ("wte", "wpe", "head") else "others"
                groups["muon" if spec.name in MATRICES else group].append(parameter)
        self.muon = torch.optim.Muon(
            groups["muon"], lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(
            [
                {"params": groups["decayed"], "weight_decay": DECAY},
                {"params": groups["others"], "weight_decay": 0.0},
            ],
            lr=LR,
            betas=(0.9, 0.95),
            eps=1e-8,
        )

    def step(self, batch: Any) -> float:
        """Trains on a batch and returns its mean loss."""
        self.model.load(self.arena.numpy())
        self.model.zero_grad()
        tokens, targets = (torch.from_numpy(a).long() for a in (batch.tokens, batch.targets))
        _, loss = self.model(tokens, targets)
        loss.backward()
        gradient = torch.from_numpy(self.model.gradients())
        self.grad.copy_(gradient * min(1.0, 1.0 / gradient.norm().item()))
        self.muon.step()
        self.adamw.step()
        return float(loss.item())


def weights(config: ModelConfig) -> FloatArray:
    """Noisy weights that bfloat16 holds exactly, so that all dtypes start from the same numbers."""
    return noisy_weights(config, noise_seed=5).astype("bfloat16").astype(np.float32)


def built(
    config: ModelConfig, device: str, dtype: str, weight_decay: float = DECAY
) -> tuple[Model, Muon]:
    model = new_model(config, device, dtype, B=B, T=T)
    optimizer = Muon(model, weight_decay=weight_decay)
    optimizer.load(weights(config))
    return model, optimizer


def moved(config: ModelConfig, before: FloatArray, after: FloatArray) -> dict[str, FloatArray]:
    """How far the weights of each tensor have moved."""
    return named(config, after.astype(np.float64) - before)


@functools.cache
def ten_steps_of_torch(config: ModelConfig) -> tuple[FloatArray, list[float]]:
    theirs = Theirs(config, weights(config))
    losses = [theirs.step(random_batch(config, np.random.default_rng(i), B, T)) for i in range(10)]
    return theirs.arena.numpy(), losses


@every_device
@families
def test_ten_steps_match_pytorch(
    config: ModelConfig, dtype: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", exact_zeropower)
    theirs, expected = ten_steps_of_torch(config)
    model, optimizer = built(config, device, dtype)
    for i in range(10):
        batch = random_batch(config, np.random.default_rng(i), B, T)
        loss = training_step(model, optimizer, [batch], LR).loss
        assert abs(loss - expected[i]) < LOSS_LIMITS[dtype], f"step {i + 1}"
    ours = model.ops.device.download(optimizer.master)
    found, right = (moved(config, weights(config), after) for after in (ours, theirs))
    for name in found.keys() - {"qkvb"}:
        error = np.linalg.norm(found[name] - right[name]) / np.linalg.norm(right[name])
        limits = MATRIX_LIMITS if name in MATRICES else OTHER_LIMITS
        assert error < limits[dtype], name
    if dtype != "fp32":
        rounded = ours.astype(model.x_dtype)
        np.testing.assert_array_equal(model.ops.device.download(model.param_arena), rounded)


def directions(
    config: ModelConfig, device: str, dtype: str
) -> Iterator[tuple[FloatArray, FloatArray]]:
    """Each matrix of a random gradient, and what our first update subtracts from its weights.

    The rms of the latter is UPDATE_RMS only if all singular values are 1.
    """
    model, optimizer = built(config, device, dtype, weight_decay=0.0)
    ops, before = model.ops, model.ops.device.download(optimizer.master)
    grad = np.random.default_rng(3).standard_normal(before.size, np.float32)
    batch = random_batch(config, np.random.default_rng(0), B, T)
    losses = model.forward_backward(batch, loss_scale=optimizer.loss_scale)
    scale = ops.device.download(optimizer.loss_scale)
    ops.device.upload(model.grad_arena, grad * scale)
    assert optimizer.step(1.0, losses).result().updated
    after = ops.device.download(optimizer.master)
    for matrix in matrices(config):
        shape = matrix.rows, matrix.columns
        step = before[matrix.part].astype(np.float64) - after[matrix.part]
        step /= UPDATE_RMS * np.sqrt(max(shape))
        yield grad[matrix.part].reshape(shape), step.reshape(shape)


@every_device
@families
def test_in_16_bits_the_iteration_is_as_exact_as_pytorchs(
    config: ModelConfig, dtype: str, device: str
) -> None:
    """PyTorch iterates in bfloat16 whatever the dtype of the weights is."""
    iterate = torch.optim._muon._zeropower_via_newtonschulz
    settings = {"ns_coefficients": MUON_COEFFICIENTS, "ns_steps": ITERATIONS, "eps": MUON_EPS}
    allowed = {"fp32": 1e-3, "bf16": 1.5, "fp16": 0.3}[dtype]
    for grad, ours in directions(config, device, dtype):
        exact = exact_zeropower(torch.from_numpy(grad).double(), **settings).numpy()
        theirs = iterate(torch.from_numpy(grad), **settings).double().numpy()
        error = np.linalg.norm(ours - exact)
        assert error < allowed * np.linalg.norm(theirs - exact), grad.shape


# --- the optimizer by itself ---


def test_the_constants_are_those_of_pytorch() -> None:
    defaults = torch.optim.Muon([torch.nn.Parameter(torch.zeros(2, 2))]).defaults
    assert MUON_COEFFICIENTS == defaults["ns_coefficients"]
    assert (MUON_EPS, ITERATIONS) == (defaults["eps"], defaults["ns_steps"])
    assert (MOMENTUM, defaults["nesterov"]) == (defaults["momentum"], True)


def test_q_k_and_v_and_gate_and_up_are_matrices_of_their_own() -> None:
    def shapes(config: ModelConfig) -> list[tuple[int, int]]:
        return [(matrix.rows, matrix.columns) for matrix in matrices(config)]

    C = GPT2.n_embd
    layers = [[(C, C)] * 6, [(C, C)] * 2, [(4 * C, C)] * 2, [(C, 4 * C)] * 2]
    assert shapes(GPT2) == [shape for tensor in layers for shape in tensor]
    qkv = [(48, 48), (24, 48), (24, 48)]
    layers = [qkv * 2, [(48, 48)] * 2, [(40, 48)] * 4, [(48, 40)] * 2]
    assert shapes(LLAMA) == [shape for tensor in layers for shape in tensor]
    for config in (GPT2, LLAMA):
        ends = [matrix.part.stop for matrix in matrices(config)]
        starts = [matrix.start for matrix in matrices(config)]
        assert starts[1:] == ends[:-1]
        assert sum(map(muon_elements, matrices(config))) == muon_count(config)


def muon_elements(matrix: Matrix) -> int:
    return matrix.rows * matrix.columns


def test_the_names_of_the_optimizers_are_the_choices_of_the_option() -> None:
    assert tuple(OPTIMIZERS) == OPTIONS["optimizer"].choices


@kernel_devices
def test_matrices_that_begin_at_odd_elements_give_the_numpy_step(dtype: str, device: str) -> None:
    assert {matrix.start % 4 for matrix in matrices(ODD)} == {0, 1, 2, 3}
    ends = []
    for where, X in (("cpu", "fp32"), (device, dtype)):
        model = new_model(ODD, where, X, B=2, T=7)
        optimizer = Muon(model, weight_decay=DECAY)
        assert (model.decayed % 4, optimizer.v.size % 4) != (0, 0)
        optimizer.load(weights(ODD))
        rng = np.random.default_rng(1)
        for _ in range(2):
            assert training_step(model, optimizer, [random_batch(ODD, rng, 2, 7)], LR).updated
        ends.append(model.ops.device.download(optimizer.master))
    found, right = (moved(ODD, weights(ODD), after) for after in ends[::-1])
    for name in found.keys() - {"qkvb"}:
        error = np.linalg.norm(found[name] - right[name]) / np.linalg.norm(right[name])
        assert error < {"fp32": 2e-3, "bf16": 0.5, "fp16": 0.2}[dtype], name


def state_of(optimizer: Muon) -> list[bytes]:
    """Every bit that updates change."""
    arrays = (*optimizer.saved_arrays, optimizer.model.param_arena)
    return [optimizer.model.ops.device.download(array).tobytes() for array in arrays]


@every_device
def test_a_step_without_an_update_changes_no_bit(dtype: str, device: str) -> None:
    model, optimizer = built(LLAMA, device, dtype)
    ops, batch = model.ops, random_batch(LLAMA, np.random.default_rng(0), B, T)
    training_step(model, optimizer, [batch], LR)
    before = state_of(optimizer)
    losses = model.forward_backward(batch, loss_scale=optimizer.loss_scale)
    ops.device.upload(model.grads.wte[:1, :1], np.full((1, 1), np.inf, np.float32))
    assert not optimizer.step(LR, losses).result().updated
    assert state_of(optimizer) == before
    assert optimizer.state().updates == 1


@kernel_devices
def test_two_runs_give_the_same_bits(dtype: str, device: str) -> None:
    ends = []
    for _ in range(2):
        model, optimizer = built(GPT2, device, dtype)
        batch = random_batch(GPT2, np.random.default_rng(0), B, T)
        for _ in range(2):
            training_step(model, optimizer, [batch], LR)
        ends.append(state_of(optimizer))
    assert ends[0] == ends[1]


@families
def test_learns_one_batch_by_heart(config: ModelConfig) -> None:
    model, optimizer = built(config, "cpu", "fp32", weight_decay=0.0)
    batch = random_batch(config, np.random.default_rng(2), B, T)
    losses = [training_step(model, optimizer, [batch], 1e-2).loss for _ in range(25)]
    assert losses[0] > 4.5  # ln 131 = 4.88
    assert losses[-1] < 0.1
