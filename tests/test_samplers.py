"""The samplers of llm.c and llama2.c: what both C programs choose from the same logits."""

import llama2c_models
import numpy as np
import pytest
from llama2c_models import A, B

from gpu_gpt2.cli.text import decoder_of
from gpu_gpt2.config import LlamaConfig
from gpu_gpt2.generate import generate
from gpu_gpt2.rng.xorshift import Xorshift64Star
from gpu_gpt2.samplers import Llama2cSampler, LlmcSampler

LOGITS = np.array([1, 2, 0.5, 3, -1, 2.5, 0, 1.5], np.float32)


@pytest.mark.parametrize(
    ("seed", "draws", "uniform"),
    [
        (1, [1206177355, 2882512552, 3117485455, 1303648416, 241277360],
         [0.280835032, 0.671137214, 0.725846112, 0.303529263, 0.056176722]),
        (42, [1456360119, 3359763283, 3393612768, 4054632243, 3283045847],
         [0.339085221, 0.782255828, 0.790136993, 0.944042623, 0.764393628]),
        (1337, [989205090, 818269915, 1335155955, 3876892996, 2941700015],
         [0.230317235, 0.190518260, 0.310865164, 0.902659476, 0.684917867]),
        (133742, [3033531262, 2674377904, 2312864567, 2287415643, 1408443089],
         [0.706299007, 0.622677088, 0.538505733, 0.532580435, 0.327928662]),
        (13371337, [740755583, 337499614, 90980514, 844950619, 3652220873], None),
    ],
)  # fmt: skip
def test_draws_are_those_of_the_c_programs(
    seed: int, draws: list[int], uniform: list[float] | None
) -> None:
    rng = Xorshift64Star(seed)
    assert [rng.draw() for _ in draws] == draws
    if uniform is not None:
        rng = Xorshift64Star(seed)
        values = [rng.uniform() for _ in uniform]
        assert all(value.dtype == np.float32 for value in values)
        np.testing.assert_array_equal(values, np.array(uniform, np.float32))


@pytest.mark.parametrize(
    ("seed", "draws", "state"),
    [
        (1, 5, 585415316980522496),
        (42, 5, 6045135835962859838),
        (13371337, 17, 0xD6195EB091D351F3),
    ],
)
def test_the_state_after_some_draws(seed: int, draws: int, state: int) -> None:
    rng = Xorshift64Star(seed)
    for _ in range(draws):
        rng.draw()
    assert rng.state == state


@pytest.mark.parametrize(
    ("temperature", "top_p", "tokens"),
    [
        (1.0, 0.0, "3 5 5 7 5 5 2 3 3 5 3 3 5 1 1 3 3 3 7 3 3 5 3 3"),
        (1.0, 1.0, "3 5 5 7 5 5 2 3 3 5 3 3 5 1 1 3 3 3 7 3 3 5 3 3"),
        (1.0, 0.9, "3 1 1 0 1 1 3 5 3 5 3 3 7 3 3 5 3 3 0 3 5 5 3 3"),
        (0.7, 0.9, "3 5 5 7 5 1 3 3 3 5 3 3 1 3 3 5 3 3 7 3 3 5 3 3"),
        (1.0, 0.5, "3 5 5 5 5 5 3 3 3 5 3 3 5 3 3 3 3 3 5 3 3 5 3 3"),
        (0.0, 0.9, " ".join(["3"] * 24)),
    ],
)
def test_llama2c_chooses_what_llama2c_chooses(
    temperature: float, top_p: float, tokens: str
) -> None:
    sampler = Llama2cSampler(temperature=temperature, top_p=top_p, seed=42)
    assert [sampler.choose(LOGITS.copy()) for _ in range(24)] == [int(t) for t in tokens.split()]


def test_llama2c_leaves_the_logits_as_they_are() -> None:
    logits = LOGITS.copy()
    Llama2cSampler(temperature=0.7, top_p=0.9, seed=42).choose(logits)
    np.testing.assert_array_equal(logits, LOGITS)


def test_llama2c_takes_the_first_of_the_likeliest() -> None:
    logits = np.array([0, 2, 2, 1], np.float32)
    assert Llama2cSampler(temperature=0, top_p=0.9, seed=1).choose(logits) == 1


def test_llama2c_with_a_nucleus_smaller_than_one_token_takes_the_likeliest() -> None:
    """No probability reaches the cutoff (1 - 0.2) / 3, so llama2.c would read outside its array."""
    sampler = Llama2cSampler(temperature=1, top_p=0.2, seed=1)
    assert [sampler.choose(np.zeros(4, np.float32)) for _ in range(5)] == [0] * 5


@pytest.mark.parametrize("top_p", [0.0, 0.5])
def test_llama2c_with_a_vocabulary_of_one_token(top_p: float) -> None:
    sampler = Llama2cSampler(temperature=1, top_p=top_p, seed=1)
    assert sampler.choose(np.ones(1, np.float32)) == 0


def test_llama2c_with_equal_probabilities_prefers_lower_ids() -> None:
    """Half of four equal tokens: the third makes the sum exceed 0.5, and the fourth is out."""
    sampler = Llama2cSampler(temperature=1, top_p=0.5, seed=7)
    drawn = {sampler.choose(np.zeros(4, np.float32)) for _ in range(200)}
    assert drawn == {0, 1, 2}


def test_llmc_chooses_what_its_loop_over_scalars_chooses() -> None:
    """The coins of seed 1337, and the loop of llm.c's sample_softmax, one scalar at a time."""
    logits = np.random.default_rng(0).normal(0, 3, 500).astype(np.float32)
    sampler = LlmcSampler(1337)
    for coin in (0.230317235, 0.19051826, 0.310865164, 0.902659476, 0.684917867):
        norm = 0.0
        for logit in logits:
            norm += float(np.exp(logit))
        left, cdf = np.float32(float(np.float32(coin)) * norm), np.float32(0)
        expected = logits.size - 1
        for i, logit in enumerate(logits):
            cdf += np.exp(logit)
            if left < cdf:
                expected = i
                break
        assert sampler.choose(logits) == expected


def test_llmc_s_first_coins_decide() -> None:
    """Ten equal tokens: the coins 0.230, 0.191, 0.311, 0.903, 0.685 fall into tenths."""
    sampler = LlmcSampler(1337)
    assert [sampler.choose(np.zeros(10, np.float32)) for _ in range(5)] == [2, 1, 3, 9, 6]


def test_llmc_overflows_to_the_last_token_as_llm_c_does() -> None:
    logits = np.array([0, 100, 100, 0], np.float32)
    assert LlmcSampler(1337).choose(logits) == 3


@pytest.mark.parametrize(
    ("config", "settings", "tokens"),
    [
        (A, (0.0, 0.9, 1), "204 204 " + "240 " * 30),
        (B, (0.0, 0.9, 1),
         "196 259 20 127 100 139 1 68 128 205 128 208 240 151 2 228 205 66 151 2 228 146 220 221"),
        (A, (1.0, 0.9, 42),
         "204 204 247 247 247 247 247 59 96 121 238 2 124 93 12 12 12 12 32 67 64 64 64 64 64 64 "
         "64 64 64 64 64 64"),
        (A, (1.0, 0.0, 42),
         "204 204 247 247 247 247 172 172 172 172 12 12 32 108 115 73 178 103 268 268 268 268 268 "
         "268 268 242 14 147 220 220 84 84"),
        (B, (3.0, 0.95, 133742),
         "276 218 55 1 51 18 193 110 215 15 15 260 38 75 262 209 164 122 275 191 108 241 161 11"),
    ],
)  # fmt: skip
def test_a_model_continues_as_in_llama2c(
    config: LlamaConfig, settings: tuple[float, float, int], tokens: str
) -> None:
    """Tokens that llama2.c's run drew from BOS on, up to the end of the context."""
    temperature, top_p, seed = settings
    S = config.n_positions
    decoder = decoder_of(llama2c_models.model(config), "cpu", "fp32", batch=1, length=S)
    sampler = Llama2cSampler(temperature=temperature, top_p=top_p, seed=seed)
    drawn = generate(decoder, [np.array([1], np.int32)], max_tokens=S, sampling=[sampler])
    assert [token for (token,) in drawn] == [int(token) for token in tokens.split()]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_extreme_temperatures(top_p: float) -> None:
    """One at which the logits overflow acts as 0; an infinite one makes all tokens as likely."""
    for temperature in (1e-40, 1e-38):
        sampler = Llama2cSampler(temperature=temperature, top_p=top_p, seed=42)
        assert [sampler.choose(1e3 * LOGITS) for _ in range(5)] == [3] * 5
    sampler = Llama2cSampler(temperature=1e300, top_p=top_p, seed=42)
    assert {sampler.choose(LOGITS) for _ in range(100)} == set(range(8))
