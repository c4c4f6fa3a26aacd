"""Generation: greedy, seeds, top-k, stop tokens, samplers on the host, and a sliding window."""

import numpy as np
import pytest
from models import new_model

from gpu_gpt2.config import GPT2Config
from gpu_gpt2.device.emulator import EmulatorDevice
from gpu_gpt2.errors import CheckpointError, ConfigError
from gpu_gpt2.generate import generate
from gpu_gpt2.models.decoder import Decoder, Sampling
from gpu_gpt2.models.init import initial_weights
from gpu_gpt2.models.model import Model

S = 8  # positions of the context
CONFIG = GPT2Config(vocab_size=131, n_positions=S, n_embd=32, n_layer=2, n_head=2)
PROMPT = np.array([5, 7, 9], np.int32)
GREEDY = Sampling(temperature=0)


class Likeliest:
    """A sampler on the host that takes the likeliest token, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def choose(self, logits: np.ndarray) -> int:
        assert logits.shape == (CONFIG.vocab_size,)
        assert logits.dtype == np.float32
        self.calls += 1
        return int(logits.argmax())


@pytest.fixture(scope="module")
def model() -> Model:
    model = new_model(CONFIG, B=3, T=S, training=False)
    model.load(10 * initial_weights(CONFIG, 0))  # far from uniform
    return model


@pytest.fixture(scope="module")
def decoder(model: Model) -> Decoder:
    return Decoder(model, batch=1, length=S)


def tokens_of(decoder: Decoder, max_tokens: int, **settings: float) -> list[int]:
    """The tokens that continue PROMPT."""
    drawn = generate(decoder, [PROMPT], max_tokens=max_tokens, sampling=Sampling(**settings))
    return [token for (token,) in drawn]


def greedy_by_whole_passes(model: Model, prompt: np.ndarray, count: int) -> list[int]:
    """What `generate` must choose, from forward passes over the window without a cache.

    The window begins at the first token until it is full, then at the last S / 2 tokens.
    """
    text, start = prompt, 0
    for _ in range(count):
        if len(text) - start > S:
            start = len(text) - S // 2
        logits = model.forward(text[None, start:])[-1, : CONFIG.vocab_size]
        text = np.append(text, np.int32(logits.argmax()))
    return text[len(prompt) :].tolist()


def test_greedy_takes_the_likeliest_also_when_the_window_slides(
    model: Model, decoder: Decoder
) -> None:
    assert tokens_of(decoder, 25, temperature=0) == greedy_by_whole_passes(model, PROMPT, 25)


def test_a_prompt_may_fill_the_context(model: Model, decoder: Decoder) -> None:
    prompt = np.arange(S, dtype=np.int32)
    drawn = [t for (t,) in generate(decoder, [prompt], max_tokens=3, sampling=GREEDY)]
    assert drawn == greedy_by_whole_passes(model, prompt, 3)


def test_a_batch_with_prompts_of_different_lengths(model: Model) -> None:
    prompts = [PROMPT, np.array([4], np.int32), np.array([100, 3, 20, 8, 77], np.int32)]
    rows = list(generate(Decoder(model, batch=3, length=S), prompts, max_tokens=3, sampling=GREEDY))
    for prompt, drawn in zip(prompts, np.transpose(rows).tolist(), strict=True):
        assert drawn == greedy_by_whole_passes(model, prompt, 3)


def test_a_sampler_on_the_host_chooses(model: Model, decoder: Decoder) -> None:
    sampler = Likeliest()
    drawn = [t for (t,) in generate(decoder, [PROMPT], max_tokens=20, sampling=[sampler])]
    assert drawn == greedy_by_whole_passes(model, PROMPT, 20)
    assert sampler.calls == 20


def test_a_stop_token_is_the_last_of_its_sequence(model: Model) -> None:
    prompts = [PROMPT, np.array([4], np.int32)]
    expected = [greedy_by_whole_passes(model, prompt, 5) for prompt in prompts]
    assert expected[0][1] not in expected[1]
    decoder = Decoder(model, batch=2, length=S)

    def rows(*stop: int) -> list[list[int | None]]:
        return list(generate(decoder, prompts, max_tokens=5, sampling=GREEDY, stop=frozenset(stop)))

    first, second = zip(*rows(expected[0][1]), strict=True)
    assert first == (*expected[0][:2], None, None, None)
    assert list(second) == expected[1]
    stop = {expected[0][1], expected[1][-1]}
    lengths = [min(row.index(token) for token in stop if token in row) + 1 for row in expected]
    assert len(rows(*stop)) == max(lengths)  # all have ended


def test_the_seed_decides(decoder: Decoder) -> None:
    first, again, other = (tokens_of(decoder, 20, temperature=1, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_random_numbers_do_not_repeat_when_the_window_slides(model: Model) -> None:
    """With even probabilities, tokens depend on the random numbers alone."""
    even = new_model(CONFIG, B=1, T=S, training=False)
    drawn = tokens_of(Decoder(even, batch=1, length=S), 40, temperature=1, top_k=0)
    windows = [tuple(drawn[i : i + S // 2]) for i in range(S - len(PROMPT) + 1, 36, S // 2 + 1)]
    assert len(set(windows)) == len(windows) >= 5


def test_top_k_draws_from_the_k_likeliest_only(model: Model, decoder: Decoder) -> None:
    logits = model.forward(PROMPT[None])[-1, : CONFIG.vocab_size].copy()
    best = set(np.argsort(logits)[-3:])
    drawn = {tokens_of(decoder, 1, temperature=50.0, top_k=3, seed=seed)[0] for seed in range(60)}
    assert drawn == best


def test_frequencies_follow_the_probabilities(model: Model, decoder: Decoder) -> None:
    logits = model.forward(PROMPT[None])[-1, : CONFIG.vocab_size].astype(np.float64)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    n = 400
    drawn = [tokens_of(decoder, 1, temperature=1.0, top_k=0, seed=seed)[0] for seed in range(n)]
    top = int(p.argmax())
    sigma = np.sqrt(p[top] * (1 - p[top]) / n)
    assert abs(drawn.count(top) / n - p[top]) < 4 * sigma


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")},
        {"seed": -1}, {"seed": 2**64}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1},
        {"top_p": float("nan")},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        Sampling(**settings)


@pytest.mark.parametrize(("length", "max_tokens"), [(0, 1), (S + 1, 1), (3, -1)])
def test_impossible_prompts_and_lengths_are_refused(
    decoder: Decoder, length: int, max_tokens: int
) -> None:
    prompts = [np.zeros(length, np.int32)]
    with pytest.raises(ConfigError, match=r"expected 1 to 8|must be 0 or more"):
        next(generate(decoder, prompts, max_tokens=max_tokens, sampling=GREEDY))


def test_no_tokens_are_made_if_none_are_asked_for(decoder: Decoder) -> None:
    assert tokens_of(decoder, 0) == []


@pytest.mark.parametrize("on_host", [False, True])
def test_damaged_weights_are_named(on_host: bool) -> None:
    model = new_model(CONFIG, B=1, T=S, training=False)
    model.load(np.full(model.param_arena.size, np.nan, np.float32))
    sampling = [Likeliest()] if on_host else Sampling()
    tokens = generate(Decoder(model, batch=1, length=S), [PROMPT], max_tokens=1, sampling=sampling)
    with pytest.raises(CheckpointError, match="weights are damaged"):
        next(tokens)


def test_damaged_weights_are_named_although_the_next_step_has_been_enqueued(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The emulator would report memory that the step reads because of the token -1."""
    monkeypatch.setattr(EmulatorDevice, "is_async", True)
    model = new_model(CONFIG, "emulator", "fp32", B=1, T=S, training=False)
    model.load(np.full(model.param_arena.size, np.nan, np.float32))
    decoder = Decoder(model, batch=1, length=S)
    tokens = generate(decoder, [PROMPT], max_tokens=2, sampling=Sampling())
    with pytest.raises(CheckpointError, match="weights are damaged"):
        next(tokens)
    assert decoder._positions.tolist() == [len(PROMPT) + 1]  # after the second draw


def test_padding_is_never_drawn_however_likely() -> None:
    """All real logits are negative here, those of the padded rows 0."""
    model = new_model(CONFIG, B=1, T=S, training=False)
    model.params.wte[: CONFIG.vocab_size] = 1.0
    model.params.lnfb[:] = -1.0
    logits = model.forward(PROMPT[None])[-1]
    assert logits.argmax() >= CONFIG.vocab_size
    for temperature in (0.0, 1.0):
        tokens = tokens_of(Decoder(model, batch=1, length=S), 20, temperature=temperature, top_k=0)
        assert max(tokens) < CONFIG.vocab_size
