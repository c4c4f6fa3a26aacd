"""Small Llama models and a tokenizer in llama2.c's formats, generated from a seed."""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpu_gpt2.config import LlamaConfig
from gpu_gpt2.formats import llama2c
from gpu_gpt2.models.families import parameter_count
from gpu_gpt2.models.weights import Arena, FloatArray, named

TOKENIZER_SHA256 = "d76249f9bec808e0f4add393aba6e6bc2a46bae67f499fd64f579cbc4b450565"
# Model A shares its head with the embedding; model B does not.
A = LlamaConfig(
    vocab_size=288, n_positions=32, n_embd=64, n_layer=2, n_head=4, n_kv_head=2, n_inner=128
)
B = LlamaConfig(
    vocab_size=288, n_positions=24, n_embd=48, n_layer=3, n_head=4, n_kv_head=1, n_inner=80,
    tie_word_embeddings=False,
)  # fmt: skip
SEEDS = {A: 12345, B: 777}


@functools.cache
def model(config: LlamaConfig) -> Arena:
    """Model A or B: weights drawn one after the other in the order of llama2.c's version 0."""
    c = config
    C, F, L, V = c.n_embd, c.n_inner, c.n_layer, c.vocab_size
    K = c.n_kv_head * c.head_size
    draws = _xorshift(SEEDS[config])

    def drawn(*shape: int, scale: float, center: float = 0.0) -> FloatArray:
        count = int(np.prod(shape))
        u = np.fromiter(draws, np.float64, count)
        return (center + (u - 0.5) * scale).astype(np.float32).reshape(shape)

    wte = drawn(V, C, scale=2)
    ln1w = drawn(L, C, scale=0.25, center=1)
    wq, wk, wv, wo = (drawn(L, rows, C, scale=0.5) for rows in (C, K, K, C))
    ln2w = drawn(L, C, scale=0.25, center=1)
    w1, w2, w3 = (drawn(L, *shape, scale=0.5) for shape in ((F, C), (C, F), (F, C)))
    lnfw = drawn(C, scale=0.25, center=1)
    arena = np.zeros(parameter_count(c), np.float32)
    ours = named(c, arena)
    if not c.tie_word_embeddings:
        ours["head"][:V] = drawn(V, C, scale=2)
    ours["wte"][:V] = wte
    ours["qkvw"][:] = np.concatenate([wq, wk, wv], axis=1)
    ours["fcw"][:] = np.concatenate([w1, w3], axis=1)
    for name, values in (
        ("attprojw", wo),
        ("fcprojw", w2),
        ("ln1w", ln1w),
        ("ln2w", ln2w),
        ("lnfw", lnfw),
    ):
        ours[name][:] = values
    return Arena(c, arena)


def model_file(path: Path, config: LlamaConfig = A, version: int = 0, group_size: int = 64) -> Path:
    """Writes model A or B as a file of llama2.c."""
    llama2c.write_model(path, model(config), version, group_size=group_size)
    return path


def tokenizer_entries() -> list[tuple[bytes, float]]:
    """The words and scores of a vocabulary of 288 tokens."""
    words = (
        "th", "he", " t", "the", " the", "an", "and", " a", " an", " and", "xx", "xxx", "  ", " ",
        "t", "h", "e", "a", "n", "d", "é", "o", "c", "s", "i", ".", "x", ",", "日",
    )  # fmt: skip
    special = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256))]
    learned = [(w.encode(), -float(k) if w.strip() else -1e9) for k, w in enumerate(words)]
    return [(word, 0.0) for word in special] + learned


def tokenizer_file(path: Path) -> Path:
    """Writes the vocabulary of 288 tokens as llama2.c's tokenizer.bin, spelled out here again."""
    entries = tokenizer_entries()
    content = struct.pack("<I", max(len(word) for word, _ in entries))
    for word, score in entries:
        content += struct.pack("<fi", score, len(word)) + word
    path.write_bytes(content)
    return path


def _xorshift(seed: int) -> Iterator[float]:
    """xorshift64* with llama2.c's conversion to a number in [0, 1)."""
    state = seed
    while True:
        state ^= state >> 12
        state ^= (state << 25) & (2**64 - 1)
        state ^= state >> 27
        yield ((state * 0x2545F4914F6CDD1D & (2**64 - 1)) >> 32 >> 8) / 16777216
