"""The tensors of an arena are aligned, fit into it, and overlap only if they are meant to."""

import numpy as np
import pytest

from gpu_gpt2.config import GPT2Config
from gpu_gpt2.device.base import X_DTYPES
from gpu_gpt2.models.arena import ALIGNMENT, bytes_of, flat_views, views
from gpu_gpt2.models.families import activations, parameter_count, parameters

CONFIG = GPT2Config(vocab_size=259, n_positions=9, n_embd=15, n_layer=2, n_head=3)


@pytest.mark.parametrize("dtype", X_DTYPES)
def test_activations_are_aligned_and_overlap_only_where_they_share(dtype: str) -> None:
    specs = activations(CONFIG, B=2, T=7)
    size = bytes_of(specs, X_DTYPES[dtype])
    arena = np.zeros(size, np.uint8)
    named = views(specs, X_DTYPES[dtype], arena)
    start = arena.ctypes.data
    for spec in specs:
        view = getattr(named, spec.name)
        assert view.shape == spec.shape
        assert (view.ctypes.data - start) % ALIGNMENT == 0
        if spec.shares:
            assert np.shares_memory(view, getattr(named, spec.shares))
        else:
            view.view(np.uint8).reshape(-1)[:] += 1
    assert arena.max() == 1  # no byte belongs to two tensors


def test_an_arena_that_is_too_small_is_refused() -> None:
    specs = activations(CONFIG, B=2, T=7)
    arena = np.zeros(bytes_of(specs, X_DTYPES["fp32"]) - ALIGNMENT, np.uint8)
    with pytest.raises(MemoryError, match=r"the arena of .* is too small"):
        views(specs, X_DTYPES["fp32"], arena)


def test_parameters_fill_their_arena_without_gaps() -> None:
    arena = np.zeros(parameter_count(CONFIG), np.float32)
    named = flat_views(parameters(CONFIG), arena)
    for view in vars(named).values():
        view += 1
    assert (arena == 1).all()
