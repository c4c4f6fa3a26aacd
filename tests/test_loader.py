"""Batches: llm.c's order, exact places to go on from, reading ahead, and validation."""

from __future__ import annotations

import json
import time
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_gpt2.data import loader as loader_module
from gpu_gpt2.data.loader import BatchLoader, sequential_batches
from gpu_gpt2.data.prefetch import DEPTH, Prefetcher
from gpu_gpt2.errors import DataError
from gpu_gpt2.formats.tokens import read_tokens, write_tokens
from gpu_gpt2.models.batch import Batch


def _rows(batch: Batch) -> np.ndarray:
    """(B, T + 1) tokens, after checking that the batch fits together."""
    assert batch.tokens.dtype == batch.targets.dtype == batch.order.dtype == np.int32
    assert batch.tokens.flags.c_contiguous
    assert batch.targets.flags.c_contiguous
    np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    expected = sorted(range(batch.tokens.size), key=lambda i: (batch.tokens.flat[i], i))
    np.testing.assert_array_equal(batch.order, expected)
    return np.hstack([batch.tokens, batch.targets[:, -1:]])


def make(shards: list[np.ndarray], B: int, T: int, **options: int) -> BatchLoader:
    return BatchLoader(
        shards, B, T, **{"scattered": False, "vocab_size": 2**16, "seed": 42} | options
    )


def shards_of(*counts: int) -> list[np.ndarray]:
    """Shards in which no token comes twice."""
    starts = np.cumsum([0, *counts])
    return [np.arange(a, b, dtype=np.uint16) for a, b in pairwise(starts)]


def llm_c_order(counts: list[int], block: int, seed: int, epochs: int) -> list[tuple[int, int]]:
    """(shard, block) in the order of llm.c's loader, after its description: draws one by one."""
    bits = np.random.MT19937()
    bits._legacy_seeding(seed)

    def shuffle(values: list[int]) -> list[int]:
        for i in range(len(values) - 1, 0, -1):
            j = int(bits.random_raw()) % (i + 1)
            values[i], values[j] = values[j], values[i]
        return values

    order = list(range(len(counts)))
    found = []
    for _ in range(epochs):
        for shard in shuffle(order):
            blocks = shuffle(list(range((counts[shard] - 1) // block)))
            found += [(shard, number) for number in blocks]
    return found


def test_the_first_blocks_of_tiny_shakespeare_are_llm_cs() -> None:
    """Which block comes when depends on the count of tokens alone: 305,260, batches of 4 x 1024."""
    loader = make([np.zeros(305_260, np.uint16)], 4, 1024)
    assert len(loader._blocks) == 74
    assert loader._blocks[:12].tolist() == [29, 58, 10, 4, 11, 25, 63, 56, 72, 65, 16, 21]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("counts", [[300], [241, 97, 400]])
def test_the_order_is_llm_cs(counts: list[int], world_size: int) -> None:
    B, T, epochs = 2, 8, 4
    shards = shards_of(*counts)
    block = world_size * B * T
    for rank in range(world_size):
        loader = make(shards, B, T, rank=rank, world_size=world_size)
        for shard, number in llm_c_order(counts, block, 42 + rank, epochs):
            start = number * block + rank * B * T
            text = shards[shard][start : start + B * T + 1]
            batch = loader.next_batch()
            _rows(batch)
            np.testing.assert_array_equal(batch.tokens.ravel(), text[:-1])
            np.testing.assert_array_equal(batch.targets.ravel(), text[1:])
        assert loader.state()["epoch"] == epochs - 1


def test_an_epoch_of_all_ranks_takes_every_block_once() -> None:
    counts, B, T, ranks = [100, 61, 222], 1, 6, 2
    shards = shards_of(*counts)
    per_epoch = sum((count - 1) // (ranks * B * T) for count in counts)
    loaders = [make(shards, B, T, rank=rank, world_size=ranks) for rank in range(ranks)]
    for _ in range(3):
        seen = [batch.next_batch().tokens for batch in loaders for _ in range(per_epoch)]
        expected = [s[: (len(s) - 1) // 12 * 12] for s in shards]
        np.testing.assert_array_equal(np.sort(np.ravel(seen)), np.concatenate(expected))


@given(done=st.integers(0, 40), counts=st.lists(st.integers(40, 150), min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("scattered", [False, True])
def test_a_restored_loader_gives_the_same_batches(
    done: int, counts: list[int], scattered: bool
) -> None:
    shards = shards_of(*counts)
    loader = make(shards, 2, 7, scattered=scattered)
    for _ in range(done):
        loader.next_batch()
    saved = json.loads(json.dumps(loader.state()))
    restored = make(shards, 2, 7, scattered=scattered)
    restored.restore(saved)
    for _ in range(30):
        expected, got = loader.next_batch(), restored.next_batch()
        np.testing.assert_array_equal(got.tokens, expected.tokens)
        np.testing.assert_array_equal(got.targets, expected.targets)
        np.testing.assert_array_equal(got.order, expected.order)
    assert restored.state() == loader.state()


@pytest.mark.parametrize(
    "change",
    [
        {"position": 100}, {"position": -1}, {"epoch": -1}, {"crc32": 0}, {"epoch": "x"},
        {"shards": [0, 0]}, {"shards": [0, 1, 2]}, {"shards": ["x", 1]}, {"shard": 2},
        {"shard": -1}, {"drawn": 625}, {"drawn": -1}, {"generator": "AAAA"}, {"generator": "?"},
        {"generator": "A" * 16},
        {"generator": 3}, {"epoch": 1e400},
        {"shard_crc32": [None]}, {"shard_crc32": [None, -1]}, {"shard_crc32": [None, 1 << 32]},
        {"shard_crc32": [None, True]}, {"shard_crc32": ["x", None]}, {"shard_crc32": 1},
    ],
)  # fmt: skip
def test_a_place_that_is_not_there_is_refused(change: dict[str, Any]) -> None:
    loader = make(shards_of(1000, 500), 4, 10)
    with pytest.raises(DataError, match="cannot resume"):
        loader.restore({**loader.state(), **change})
    with pytest.raises(DataError, match="the saved place in the data is damaged"):
        loader.restore({})


def test_another_text_is_not_gone_on_with() -> None:
    (tokens,) = shards_of(1000)
    saved = make([tokens], 4, 10).state()
    for changed in ([np.append(tokens, tokens[:1])], [tokens + 1]):
        with pytest.raises(DataError, match="not those of the saved run"):
            make(changed, 4, 10).restore(saved)


@pytest.mark.parametrize(("count", "B", "T"), [(1000, 4, 16), (97, 1, 7), (65, 3, 1), (130, 2, 64)])
def test_scattered_rows_come_once_an_epoch_from_changing_offsets(
    count: int, B: int, T: int
) -> None:
    shards = shards_of(count)
    rows = make(shards, 1, T, scattered=True)  # one row at a time tells the epochs apart
    batches = make(shards, B, T, scattered=True)
    starts: dict[int, list[int]] = {}
    for _ in range(3 * count // (B * T)):
        picked = []
        for _ in range(B):
            picked.append(_rows(rows.next_batch())[0])
            starts.setdefault(rows.state()["epoch"], []).append(int(picked[-1][0]))
        np.testing.assert_array_equal(_rows(batches.next_batch()), picked)
        assert batches.state() == rows.state()
    offsets = [min(starts[epoch]) for epoch in range(2)]
    for epoch, offset in enumerate(offsets):
        assert offset < T
        assert sorted(starts[epoch]) == list(range(offset, count - T, T))
    assert starts[0] != starts[1]
    assert T == 1 or offsets[0] != offsets[1]


def test_the_smallest_text_fills_any_scattered_batch() -> None:
    batch = make(shards_of(9), 5, 8, scattered=True).next_batch()
    np.testing.assert_array_equal(_rows(batch), [np.arange(9)] * 5)


def test_a_text_that_goes_on_beyond_the_checksum_is_another(monkeypatch: Any) -> None:
    monkeypatch.setattr(loader_module, "CHECKED_TOKENS", 10)
    (tokens,) = shards_of(1000)
    with pytest.raises(DataError, match="not those of the saved run"):
        make([tokens], 4, 10).restore(make([tokens[:900]], 4, 10).state())


SHARDS = 3


@pytest.fixture
def token_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three shards of 1000 tokens, of which the checksum before training covers the first ten."""
    monkeypatch.setattr(loader_module, "CHECKED_TOKENS", 10)
    paths = [tmp_path / f"x_train_{number:06d}.bin" for number in range(SHARDS)]
    for path, tokens in zip(paths, shards_of(*[1000] * SHARDS), strict=True):
        write_tokens(path, tokens)
    return paths


def change_token(path: Path, position: int) -> None:
    tokens = np.array(read_tokens(path))
    tokens[position] ^= 1
    write_tokens(path, tokens)


def loader_of(paths: list[Path]) -> BatchLoader:
    return make([read_tokens(path) for path in paths], 4, 10)


def opened(loader: BatchLoader) -> set[int]:
    """The indices of the shards whose checksums are known."""
    found = enumerate(loader.state()["shard_crc32"])
    return {index for index, crc32 in found if crc32 is not None}


def advance(loader: BatchLoader, shards: int) -> int:
    """Takes batches until that many more shards are opened; returns the index of the last."""
    for _ in range(shards):
        shard = loader._shard
        while loader._shard == shard:
            loader.next_batch()
    return int(loader._order[loader._shard])


@pytest.mark.parametrize("position", [10, 500, 999])
def test_a_token_changed_in_a_shard_read_before_is_noticed_on_resume(
    position: int, token_files: list[Path]
) -> None:
    loader = loader_of(token_files)
    index = advance(loader, 1)
    saved = json.loads(json.dumps(loader.state()))
    loader_of(token_files).restore(saved)
    change_token(token_files[index], position)
    with pytest.raises(DataError) as caught:
        loader_of(token_files).restore(saved)
    assert str(caught.value).startswith(
        f"{token_files[index]}: the tokens changed since this run read them first (CRC-32 "
    )


def test_the_shard_that_a_new_loader_opens_is_compared_too(token_files: list[Path]) -> None:
    loader = loader_of(token_files)
    first = int(loader._order[0])
    assert opened(loader) == {first}
    advance(loader, 1)
    change_token(token_files[first], 500)
    with pytest.raises(DataError, match=f"{token_files[first]}: the tokens changed since"):
        loader_of(token_files).restore(loader.state())


@pytest.mark.parametrize("resumed", [False, True])
def test_a_token_changed_during_a_run_is_noticed_in_the_next_epoch(
    resumed: bool, token_files: list[Path]
) -> None:
    loader = loader_of(token_files)
    advance(loader, SHARDS - 1)
    assert opened(loader) == set(range(SHARDS))
    if resumed:
        again = loader_of(token_files)
        again.restore(loader.state())
        loader = again
    # In place, as the loader has mapped the file.
    changed = int(loader._order[0])
    tokens = np.memmap(token_files[changed], np.uint16, "r+", offset=1024)
    tokens[500] ^= 1
    with pytest.raises(DataError, match=f"{token_files[changed]}: the tokens changed since"):  # noqa: PT012
        for _ in range(2 * SHARDS * 1000 // 40):
            loader.next_batch()
    assert loader.state()["epoch"] == 1


def test_checksums_are_of_all_tokens_of_the_shards_opened_so_far(
    token_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "CHECK_BLOCK", 64)
    loader = loader_of(token_files)
    index = advance(loader, 1)
    crc32 = loader.state()["shard_crc32"][index]
    assert crc32 == zlib.crc32(np.array(read_tokens(token_files[index])).tobytes())
    assert len(opened(loader)) == 2
    earlier = loader.state()
    advance(loader, 1)
    assert sum(found is not None for found in earlier["shard_crc32"]) == 2  # a state is a copy
    again = loader_of(token_files)
    again.restore(earlier)
    assert again.state() == earlier


def test_of_a_shard_not_opened_yet_only_the_beginning_is_compared(token_files: list[Path]) -> None:
    loader = loader_of(token_files)
    (other, *_) = set(range(SHARDS)) - opened(loader)
    change_token(token_files[other], 500)
    loader_of(token_files).restore(loader.state())
    change_token(token_files[other], 5)
    with pytest.raises(DataError, match="not those of the saved run"):
        loader_of(token_files).restore(loader.state())


def test_a_state_without_checksums_of_shards_is_read(token_files: list[Path]) -> None:
    loader = loader_of(token_files)
    advance(loader, 1)
    saved = loader.state()
    del saved["shard_crc32"]
    again = loader_of(token_files)
    again.restore(saved)
    assert opened(again) == opened(loader)  # the first shard and the current one
    np.testing.assert_array_equal(again.next_batch().tokens, loader.next_batch().tokens)


def test_a_token_outside_the_vocabulary_is_found_in_any_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader_module, "CHECK_BLOCK", 16)
    tokens = np.arange(100, dtype=np.uint16)
    tokens[63] = 200
    with pytest.raises(DataError, match="token 200 at position 63 is outside"):
        make([tokens], 2, 8, vocab_size=200)


def test_a_shard_must_fill_a_block() -> None:
    (tokens,) = shards_of(41)
    assert _rows(make([tokens], 5, 8).next_batch()).shape == (5, 9)
    with pytest.raises(DataError, match=r"40 tokens, too few: batches of 40 .* --batch-size or"):
        make([tokens[:40]], 5, 8)
    with pytest.raises(DataError, match=r"too few: batches of 80"):
        make([tokens], 5, 8, world_size=2)


def test_a_token_outside_the_vocabulary_is_named_with_its_file(tmp_path: Path) -> None:
    tokens = np.arange(100, dtype=np.uint16)
    tokens[63] = 200
    write_tokens(tmp_path / "x_train.bin", tokens)
    mapped = read_tokens(tmp_path / "x_train.bin")
    with pytest.raises(DataError, match=r"x_train\.bin: token 200 at position 63 is outside"):
        make([mapped], 2, 8, vocab_size=200)
    with pytest.raises(DataError, match=r"x_train\.bin holds 100 tokens, too few"):
        make([mapped], 20, 8)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32])
def test_batches_of_every_kind_of_token_fit_together(dtype: type) -> None:
    tokens = np.random.default_rng(0).integers(0, 40_000, 500).astype(dtype)
    _rows(make([tokens], 3, 11).next_batch())


# --- reading ahead ---


def test_the_prefetcher_gives_the_loaders_batches_and_states() -> None:
    shards = shards_of(300, 200)
    plain = make(shards, 2, 9)
    with Prefetcher(make(shards, 2, 9)) as ahead:
        for _ in range(60):
            assert ahead.state() == plain.state()
            np.testing.assert_array_equal(ahead.next_batch().tokens, plain.next_batch().tokens)


class SlowLoader:
    """A loader whose batches take their time, or fail."""

    def __init__(self, seconds: float, last: int = 10**9) -> None:
        self.seconds, self.last, self.read = seconds, last, 0

    def next_batch(self) -> Batch:
        if self.read == self.last:
            raise DataError("a disk gave up")
        time.sleep(self.seconds)
        self.read += 1
        return Batch(*(np.zeros((1, 1), np.int32) for _ in range(3)))

    def state(self) -> dict[str, int]:
        return {"position": self.read}


def test_reading_and_computing_overlap() -> None:
    with Prefetcher(SlowLoader(0.03)) as ahead:
        ahead.next_batch()
        started = time.perf_counter()
        for _ in range(10):
            time.sleep(0.03)  # the device at work
            ahead.next_batch()
        took = time.perf_counter() - started
    assert took < 0.5  # one after the other: 0.6


def test_no_more_is_read_ahead_than_is_said() -> None:
    loader = SlowLoader(0)
    with Prefetcher(loader) as ahead:
        ahead.next_batch()
        time.sleep(0.1)
        assert loader.read == 1 + DEPTH + 1  # one waits for room
        assert ahead.state() == {"position": 1}


def test_an_error_in_the_thread_is_the_trainers() -> None:
    with Prefetcher(SlowLoader(0, last=3)) as ahead:
        for _ in range(3):
            ahead.next_batch()
        for _ in range(2):
            with pytest.raises(DataError, match="a disk gave up"):
                ahead.next_batch()


def test_the_thread_ends_with_the_training() -> None:
    ahead = Prefetcher(SlowLoader(0))
    with pytest.raises(KeyboardInterrupt), ahead:
        raise KeyboardInterrupt
    assert not ahead._thread.is_alive()


# --- validation ---


@given(st.integers(2, 200), st.integers(1, 8), st.integers(1, 20))
@settings(deadline=None)
def test_validation_predicts_every_token_but_the_first_once(count: int, B: int, T: int) -> None:
    tokens = np.random.default_rng(count).integers(0, 60000, count).astype(np.uint16)
    batches = list(sequential_batches(tokens, B, T))
    for batch in batches:
        _rows(batch)
        b, t = batch.tokens.shape
        assert (b <= B and t == T) or (b == 1 and t < T)
    np.testing.assert_array_equal(np.concatenate([b.targets.ravel() for b in batches]), tokens[1:])
    np.testing.assert_array_equal(np.concatenate([b.tokens.ravel() for b in batches]), tokens[:-1])
    assert sum(b.tokens.shape != (B, T) for b in batches) <= 2


@pytest.mark.parametrize("count", [0, 1])
def test_validation_needs_two_tokens(count: int) -> None:
    with pytest.raises(DataError, match="a prediction needs 2"):
        next(sequential_batches(np.zeros(count, np.uint16), 2, 4))
