"""A whole training step by kernels against the same step in NumPy: every op in its place."""

import numpy as np
from devices import kernel_devices
from models import new_model, noisy_weights, random_batch, training_step

from gpu_gpt2.config import ModelConfig
from gpu_gpt2.models.arena import flat_views
from gpu_gpt2.models.gpt2 import GPT2, parameters
from gpu_gpt2.training.optimizer import AdamW

CONFIG = ModelConfig(vocab_size=131, n_positions=19, n_embd=48, n_layer=2, n_head=3)
B, T = 2, 17
MICRO_STEPS = 2
# Each limit is about four times the error seen in the emulator (a loss happened to be exact). Of a
# gradient: worst element, as part of the tensor's largest. Of the weights: root mean square, for
# where a gradient is almost zero, Adam's first step depends on its sign alone, so that single
# weights may differ by twice the learning rate.
LOSS_LIMITS = {"fp32": 1e-6, "bf16": 1e-4, "fp16": 2e-5}
GRAD_LIMITS = {"fp32": 1.5e-6, "bf16": 2e-2, "fp16": 3e-3}
WEIGHT_LIMITS = {"fp32": 1e-7, "bf16": 4e-4, "fp16": 1e-4}


def two_micro_steps(model: GPT2, optimizer: AdamW, updates: int) -> list[float]:
    rng = np.random.default_rng(1)
    return [
        training_step(
            model, optimizer, [random_batch(CONFIG, rng, B, T) for _ in range(MICRO_STEPS)], 1e-3
        ).loss
        for _ in range(updates)
    ]


def weights() -> np.ndarray:
    """Noisy weights that bfloat16 holds exactly, so that all dtypes start from the same numbers."""
    return noisy_weights(CONFIG, noise_seed=5).astype("bfloat16").astype(np.float32)


def built(device: str, dtype: str, weight_decay: float = 0.1) -> tuple[GPT2, AdamW]:
    model = new_model(CONFIG, device, dtype, B=B, T=T)
    optimizer = AdamW(model, weight_decay=weight_decay)
    optimizer.load(weights())
    return model, optimizer


@kernel_devices
def test_a_training_step_equals_the_numpy_step(dtype: str, device: str) -> None:
    reference, reference_optimizer = built("cpu", "fp32")
    ours, optimizer = built(device, dtype)
    expected = two_micro_steps(reference, reference_optimizer, updates=1)
    actual = two_micro_steps(ours, optimizer, updates=1)
    np.testing.assert_allclose(actual, expected, rtol=LOSS_LIMITS[dtype])
    download = ours.ops.device.download
    gradient = download(ours.grad_arena) / download(optimizer.loss_scale)
    grads = flat_views(parameters(CONFIG), gradient)
    for spec in parameters(CONFIG):
        grad, right = getattr(grads, spec.name), getattr(reference.grads, spec.name)
        worst = np.abs(grad - right).max() / np.abs(right).max()
        assert worst < GRAD_LIMITS[dtype], f"gradient of {spec.name}: {worst:.2e} of its largest"
    assert not grads.wte[CONFIG.vocab_size :].any()
    drift = download(optimizer.master) - reference_optimizer.master
    assert np.sqrt(np.mean(drift**2)) < WEIGHT_LIMITS[dtype]
    if dtype != "fp32":
        rounded = download(optimizer.master).astype(ours.x_dtype)
        np.testing.assert_array_equal(download(ours.param_arena), rounded)


@kernel_devices
def test_two_runs_give_the_same_bits(dtype: str, device: str) -> None:
    bits = set()
    for _ in range(2):
        model, optimizer = built(device, dtype)
        two_micro_steps(model, optimizer, updates=2)
        bits.add(model.ops.device.download(optimizer.master).tobytes())
    assert len(bits) == 1


@kernel_devices
def test_overfits_one_batch(dtype: str, device: str) -> None:
    model, optimizer = built(device, dtype, weight_decay=0.0)
    batch = random_batch(CONFIG, np.random.default_rng(2), B, T)
    losses = [training_step(model, optimizer, [batch], 1e-2).loss for _ in range(25)]
    assert losses[0] > 4.5  # ln 131 = 4.88
    assert losses[-1] < 0.3
