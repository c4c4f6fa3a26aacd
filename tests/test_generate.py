"""Sampling: the likeliest token, top-k, seeds, and a text longer than the context."""

import numpy as np
import pytest
from models import new_model

from gpu_gpt2.config import GPT2Config
from gpu_gpt2.errors import CheckpointError, ConfigError
from gpu_gpt2.generate import generate
from gpu_gpt2.models.init import initial_weights
from gpu_gpt2.models.model import Model

CONFIG = GPT2Config(vocab_size=131, n_positions=8, n_embd=32, n_layer=2, n_head=2)
PROMPT = np.array([5, 7, 9], np.int32)


@pytest.fixture(scope="module")
def model() -> Model:
    model = new_model(CONFIG, B=1, T=8, training=False)
    model.load(10 * initial_weights(CONFIG, 0))  # far from uniform
    return model


def test_greedy_takes_the_likeliest_of_the_whole_forward(model: Model) -> None:
    context = PROMPT
    for token in generate(model, PROMPT, max_tokens=12, temperature=0):
        logits = model.forward(context[None, -8:])[-1, : CONFIG.vocab_size]
        assert token == logits.argmax()
        context = np.append(context, np.int32(token))
    assert len(context) == 15


def test_the_seed_decides(model: Model) -> None:
    first, again, other = (
        list(generate(model, PROMPT, max_tokens=20, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_top_k_draws_from_the_k_likeliest_only(model: Model) -> None:
    logits = model.forward(PROMPT[None])[-1, : CONFIG.vocab_size].copy()
    best = set(np.argsort(logits)[-3:])
    drawn = {
        next(generate(model, PROMPT, max_tokens=1, temperature=50.0, top_k=3, seed=seed))
        for seed in range(60)
    }
    assert drawn == best


def test_frequencies_follow_the_probabilities(model: Model) -> None:
    logits = model.forward(PROMPT[None])[-1, : CONFIG.vocab_size].astype(np.float64)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    n = 400
    drawn = [
        next(generate(model, PROMPT, max_tokens=1, temperature=1.0, top_k=0, seed=seed))
        for seed in range(n)
    ]
    top = int(p.argmax())
    sigma = np.sqrt(p[top] * (1 - p[top]) / n)
    assert abs(drawn.count(top) / n - p[top]) < 4 * sigma


@pytest.mark.parametrize(
    "settings", [{"temperature": -1.0}, {"temperature": float("nan")}, {"seed": -1}, {"top_k": -1}]
)
def test_impossible_settings_are_refused(model: Model, settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must"):
        next(generate(model, PROMPT, max_tokens=1, **settings))


def test_damaged_weights_are_named() -> None:
    model = new_model(CONFIG, B=1, T=8, training=False)
    model.load(np.full(model.param_arena.size, np.nan, np.float32))
    with pytest.raises(CheckpointError, match="weights are damaged"):
        next(generate(model, PROMPT, max_tokens=1))


def test_padding_is_never_drawn_however_likely() -> None:
    """All real logits are negative here, those of the padded rows 0."""
    model = new_model(CONFIG, B=1, T=8, training=False)
    model.params.wte[: CONFIG.vocab_size] = 1.0
    model.params.lnfb[:] = -1.0
    logits = model.forward(PROMPT[None])[-1]
    assert logits.argmax() >= CONFIG.vocab_size
    for temperature in (0.0, 1.0):
        tokens = generate(model, PROMPT, max_tokens=20, temperature=temperature, top_k=0)
        assert max(tokens) < CONFIG.vocab_size
