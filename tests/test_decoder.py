"""Logits with a KV cache equal those of a whole forward pass, at every position."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from devices import every_device
from models import new_model, noisy_weights

from gpu_gpt2.config import GPT2Config, LlamaConfig, ModelConfig
from gpu_gpt2.device.cpu import CpuDevice
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.models.decoder import Decoder, Sampling
from gpu_gpt2.models.kv_cache import cache_bytes
from gpu_gpt2.models.model import Model

S = 21  # positions of the context
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=67, n_positions=S, n_embd=48, n_layer=3, n_head=3),
    "llama": LlamaConfig(
        vocab_size=67, n_positions=S, n_embd=32, n_layer=3, n_head=4, n_kv_head=2, n_inner=40
    ),
    "llama, one key head, untied": LlamaConfig(
        vocab_size=131, n_positions=S, n_embd=48, n_layer=2, n_head=3, n_kv_head=1, n_inner=72,
        rope_theta=500.0, tie_word_embeddings=False,
    ),
}  # fmt: skip
every_family = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
# The bound that docs/numerics.md states, as a part of the largest logit.
BOUND = {"fp32": 1e-5, "bf16": 2.0**-6, "fp16": 2.0**-9}


def loaded(config: ModelConfig, device: str = "cpu", dtype: str = "fp32", *, B: int = 1) -> Model:
    """A model whose logits are far from even."""
    model = new_model(config, device, dtype, B=B, T=S, training=False)
    model.load(4 * noisy_weights(config, noise_seed=3))
    return model


def tokens_of(config: ModelConfig, B: int) -> np.ndarray:
    return np.random.default_rng(B).integers(0, config.vocab_size, (B, S), dtype=np.int32)


def whole_logits(model: Model, tokens: np.ndarray) -> np.ndarray:
    """The logits (B, S, V) of a forward pass without a cache."""
    logits = model.ops.device.download(model.forward(tokens)).astype(np.float32)
    return logits.reshape(*tokens.shape, -1)[:, :, : model.config.vocab_size]


@every_device
@every_family
def test_logits_equal_the_whole_forward_pass_at_every_position(
    config: ModelConfig, dtype: str, device: str
) -> None:
    """Prompts of different lengths in one batch, up to the last position of the context."""
    model = loaded(config, device, dtype, B=3)
    tokens = tokens_of(config, 3)
    expected = whole_logits(model, tokens)
    limit = BOUND[dtype] * np.abs(expected).max()
    lengths = np.array([1, 4, 9])
    decoder = Decoder(model, batch=3, length=S)
    decoder.prefill([row[:n] for row, n in zip(tokens, lengths, strict=True)])
    compared = 0
    for step in range(S):
        logits = decoder.read_logits()
        for b, position in enumerate(lengths - 1 + step):
            if position < S:
                worst = np.abs(logits[b] - expected[b, position]).max()
                assert worst <= limit, f"sequence {b}, position {position}"
                compared += 1
        following = np.minimum(lengths + step, S - 1)
        decoder.feed(tokens[np.arange(3), following])
        if decoder.full:
            break
        decoder.decode()
    assert compared == 13 + 13 + 13
    assert decoder.full


@every_family
def test_what_was_read_before_is_forgotten(config: ModelConfig) -> None:
    model = loaded(config)
    tokens = tokens_of(config, 1)[0]
    decoder = Decoder(model, batch=1, length=S)
    decoder.prefill([tokens[5:]])
    decoder.prefill([tokens[:3]])
    decoder.feed(tokens[3:4])
    decoder.decode()
    again = decoder.read_logits()
    fresh = Decoder(model, batch=1, length=S)
    fresh.prefill([tokens[:3]])
    fresh.feed(tokens[3:4])
    fresh.decode()
    assert np.array_equal(again, fresh.read_logits())


@every_family
def test_a_training_model_decodes_with_the_same_bits(config: ModelConfig) -> None:
    weights = noisy_weights(config, noise_seed=3)
    tokens = tokens_of(config, 1)[0]
    logits = []
    for training, recompute in ((False, 0), (True, 0), (True, 3)):
        model = new_model(config, B=2, T=S, training=training, recompute=recompute)
        model.load(weights)
        decoder = Decoder(model, batch=1, length=S)
        decoder.prefill([tokens[:6]])
        decoder.feed(tokens[6:7])
        decoder.decode()
        logits.append(decoder.read_logits())
    assert np.array_equal(logits[0], logits[1])
    assert np.array_equal(logits[0], logits[2])


@pytest.mark.parametrize("device", ["cpu", "emulator"])
def test_a_sequence_does_not_depend_on_the_others_of_its_batch(device: str) -> None:
    config = CONFIGS["llama"]
    model = loaded(config, device, B=3)
    tokens = tokens_of(config, 3)
    sampling = Sampling(temperature=1.5, top_k=0, seed=7)

    def drawn(prompts: list[np.ndarray]) -> list[list[int]]:
        decoder = Decoder(model, batch=len(prompts), length=S)
        decoder.prefill(prompts)
        decoder.sample(sampling)
        rows = [decoder.read_tokens().result()[:, 0].tolist()]
        for _ in range(6):
            decoder.step(sampling)
            rows.append(decoder.read_tokens().result()[:, 0].tolist())
        return np.transpose(rows).tolist()

    alone = drawn([tokens[0, :5]])
    together = drawn([tokens[0, :5], tokens[1, :9], tokens[2, :2]])
    assert together[0] == alone[0]
    assert together[1] != together[0]


def test_uploaded_arrays_are_never_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that shares the host's memory may read them later."""
    uploaded: list[tuple[np.ndarray, np.ndarray]] = []

    def upload(self: CpuDevice, dst: np.ndarray, src: np.ndarray) -> None:
        uploaded.append((src, src.copy()))
        dst[...] = src

    model = loaded(CONFIGS["llama"], B=2)
    monkeypatch.setattr(CpuDevice, "upload", upload)
    decoder = Decoder(model, batch=2, length=S)
    tokens = tokens_of(CONFIGS["llama"], 2)
    decoder.prefill([tokens[0, :3], tokens[1, :5]])
    decoder.sample(Sampling())
    decoder.step(Sampling(seed=1))
    decoder.feed(tokens[:, 5])
    decoder.step(Sampling(seed=1))
    assert len(uploaded) == 6
    for src, then in uploaded:
        np.testing.assert_array_equal(src, then)


def test_a_decoder_is_freed_with_its_last_reference() -> None:
    model = loaded(CONFIGS["gpt2"])
    decoder = Decoder(model, batch=1, length=S)
    decoder.prefill([tokens_of(CONFIGS["gpt2"], 1)[0, :3]])
    decoder.sample(Sampling())
    dead = weakref.ref(decoder)
    gc.disable()
    try:
        del decoder
        assert dead() is None
    finally:
        gc.enable()


def test_cache_bytes_are_those_of_the_cache() -> None:
    config = CONFIGS["llama"]
    decoder = Decoder(loaded(config, B=2), batch=2, length=10)
    held = sum(k.nbytes + v.nbytes for k, v in decoder._cache.layers)
    assert cache_bytes(config, np.dtype(np.float32), batch=2, length=10) == held


def test_impossible_caches_and_prompts_are_refused() -> None:
    config = CONFIGS["gpt2"]
    model = loaded(config)
    with pytest.raises(ConfigError, match=f"{S + 1} tokens is longer than the {S}"):
        Decoder(model, batch=1, length=S + 1)
    decoder = Decoder(model, batch=1, length=5)
    for prompts in ([np.zeros(0, np.int32)], [np.zeros(6, np.int32)], [np.zeros(2, np.int32)] * 2):
        with pytest.raises(ValueError, match="expected 1 prompts of 1 to 5"):
            decoder.prefill(prompts)
