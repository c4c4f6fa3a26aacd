"""verify: a pair made by PyTorch passes; a number changed anywhere in it is found and named."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from devices import kernel_devices
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_gpt2.cli.app import main
from gpu_gpt2.config import ModelConfig
from gpu_gpt2.device import open_device
from gpu_gpt2.errors import DataError
from gpu_gpt2.formats.debug_state import DebugState, read_debug_state, write_debug_state
from gpu_gpt2.formats.llmc_header import HEADER_BYTES
from gpu_gpt2.models.init import initial_weights
from gpu_gpt2.models.weights import Arena
from gpu_gpt2.open_model import open_model
from gpu_gpt2.tools.verify.judge import (
    LIMITS,
    STARTER_PACK_LOSSES,
    STEPS,
    Finding,
    _compared,
    expected_losses,
    losses_path,
    verify,
)
from gpu_gpt2.tools.verify.pair import make_pair, stirred
from gpu_gpt2.training import checkpoint

CONFIG = ModelConfig(vocab_size=301, n_positions=24, n_embd=48, n_layer=2, n_head=3)
B, T = 2, 17


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model and its numbers in PyTorch."""
    folder = tmp_path_factory.mktemp("pair")
    weights = stirred(CONFIG, initial_weights(CONFIG, 42))
    batch = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, B, T), dtype=np.int32)
    made = list(make_pair(folder, "small", CONFIG, weights, *batch))
    assert [path.name for path in made] == [
        "small.bin", "small_bf16.bin", "small_debug_state.bin", "small_losses.json",
    ]  # fmt: skip
    return folder


def findings(
    pair: Path,
    *,
    model: str = "small.bin",
    device: str = "cpu",
    dtype: str = "fp32",
    losses: tuple[float, ...] | None = None,
    **changes: object,
) -> dict[str, Finding]:
    """What verify says of the pair, with parts of its debug state replaced."""
    path = pair / "small_debug_state.bin"
    state = read_debug_state(path, CONFIG)
    known = expected_losses(path, CONFIG, state) if losses is None else losses
    fields = {name: getattr(state, name) for name in DebugState.__dataclass_fields__}
    changed = DebugState(**fields | changes)
    found = verify(open_model(pair / model), changed, known, open_device(device), dtype)
    return {finding.what: finding for finding in found}


def failed(found: dict[str, Finding]) -> list[str]:
    return [what for what, finding in found.items() if not finding.passed]


def test_the_pair_passes_in_float32(pair: Path) -> None:
    found = findings(pair)
    assert not failed(found)
    assert len(found) == 1 + 1 + 16 + STEPS + 1


def test_float32_passes_with_a_tenth_of_the_limits(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits leave room for sizes and devices, but not more than this small model shows."""
    from gpu_gpt2.tools.verify import judge

    tenth = judge.Limits(
        **{
            name: getattr(judge.LIMITS["fp32"], name) / 10
            for name in ("element", "rms", "loss", "later_loss")
        }
    )
    monkeypatch.setattr(judge, "LIMITS", {"fp32": tenth})
    assert not failed(findings(pair))


@kernel_devices
def test_the_pair_passes_on_devices_with_kernels(pair: Path, dtype: str, device: str) -> None:
    model = "small_bf16.bin" if dtype == "bf16" else "small.bin"
    assert not failed(findings(pair, model=model, device=device, dtype=dtype))


@pytest.mark.parametrize("name", ["wte", "wpe", "ln1b", "qkvw", "attprojb", "fcprojw", "lnfw"])
def test_one_wrong_gradient_is_named(pair: Path, name: str) -> None:
    grads = dict(read_debug_state(pair / "small_debug_state.bin", CONFIG).grads)
    grad = np.array(grads[name])
    rms = float(np.sqrt(np.square(grad).mean()))
    place = tuple(size // 2 for size in grad.shape)
    grad[place] += 0.01 * (rms + abs(grad[place]))
    found = findings(pair, grads=grads | {name: grad})
    assert failed(found) == [f"d{name}"]
    assert f"at [{', '.join(map(str, place))}]" in found[f"d{name}"].detail


def test_a_small_error_everywhere_is_found(pair: Path) -> None:
    """Each element within its own limit, but their root mean square is not."""
    grads = dict(read_debug_state(pair / "small_debug_state.bin", CONFIG).grads)
    grads["fcw"] = grads["fcw"] * 1.00005
    assert failed(findings(pair, grads=grads)) == ["dfcw"]


def test_an_element_is_judged_by_its_row(pair: Path) -> None:
    """Beside large neighbours a small element may be off by what they may, in a tensor of zeros."""
    expected = np.zeros((100, 8), np.float32)
    expected[3] = 1.0
    expected[3, 5] = 0.0
    ours = expected.copy()
    ours[3, 5] = 0.5e-4  # half of the limit for this row, five limits for the tensor
    limits = replace(LIMITS["fp32"], rms=1.0)
    assert _compared("x", ours, expected, limits).passed
    ours[3, 5] = 2e-4
    assert not _compared("x", ours, expected, limits).passed


def test_a_wrong_logit_and_a_wrong_loss_are_named(pair: Path) -> None:
    state = read_debug_state(pair / "small_debug_state.bin", CONFIG)
    logits = np.array(state.logits)
    logits[5, 300] += 0.01
    assert failed(findings(pair, logits=logits, loss=state.loss + 1e-4)) == ["logits", "loss"]
    logits[5, 300] = np.nan
    assert failed(findings(pair, logits=logits)) == ["logits"]


def test_a_wrong_step_is_named(pair: Path) -> None:
    known = list(json.loads((pair / "small_losses.json").read_text())["losses"])
    known[7] += 1e-3
    assert failed(findings(pair, losses=tuple(known))) == ["loss, step 7"]


def test_without_known_losses_they_must_fall(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_gpt2.tools.verify import judge

    found = findings(pair, losses=())
    assert not failed(found)
    assert "none to compare with" in found["10 steps"].detail
    monkeypatch.setitem(judge.HYPER, "lr", 10.0)
    assert "10 steps" in failed(findings(pair, losses=()))


def test_state_that_comes_back_changed_is_found(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = checkpoint.load

    def wrong(folder: Path) -> checkpoint.TrainingState:
        state = right(folder)
        state.v[:] = np.nextafter(state.v, 1, dtype=np.float32)
        return state

    monkeypatch.setattr(checkpoint, "load", wrong)
    assert failed(findings(pair)) == ["written and read back"]


def test_the_starter_packs_losses_are_known_without_a_file(tmp_path: Path) -> None:
    state = DebugState(
        tokens=np.zeros((4, 64), np.int32), targets=np.zeros((4, 64), np.int32),
        logits=np.zeros((0, 0), np.float32), loss=5.27001, grads={},
    )  # fmt: skip
    path = tmp_path / "gpt2_124M_debug_state.bin"
    assert expected_losses(path, ModelConfig(), state) == STARTER_PACK_LOSSES
    assert expected_losses(path, CONFIG, state) == ()


@pytest.mark.parametrize("content", ["{", "[]", '{"losses": [1, 2]}', '{"losses": 3}', "\xff"])
def test_damaged_losses_are_refused(pair: Path, tmp_path: Path, content: str) -> None:
    state = read_debug_state(pair / "small_debug_state.bin", CONFIG)
    path = tmp_path / "x_debug_state.bin"
    losses_path(path).write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=r"x_losses\.json"):
        expected_losses(path, CONFIG, state)


# --- the file ---


def test_a_debug_state_comes_back_as_written(pair: Path, tmp_path: Path) -> None:
    path = pair / "small_debug_state.bin"
    write_debug_state(tmp_path / "again.bin", CONFIG, read_debug_state(path, CONFIG))
    assert (tmp_path / "again.bin").read_bytes() == path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again.bin"]


def test_the_debug_state_of_gpt2_has_llmcs_size() -> None:
    from gpu_gpt2.formats.debug_state import _shapes

    elements = sum(int(np.prod(shape)) for _, shape, _ in _shapes(ModelConfig(), 4, 64))
    assert HEADER_BYTES + 4 * elements == 549_369_860


def test_a_state_of_other_sizes_is_refused(pair: Path) -> None:
    other = ModelConfig(vocab_size=301, n_positions=24, n_embd=48, n_layer=3, n_head=3)
    with pytest.raises(DataError, match=r"small_debug_state.bin.*3 layers of 48.* bytes"):
        read_debug_state(pair / "small_debug_state.bin", other)


@pytest.mark.parametrize(
    ("offset", "word", "message"),
    [
        (0, 20240326, "magic number 20240326 at offset 0, expected 20240327"),
        (4, 1, "version 1 at offset 4, expected 2"),
        (8, -1, "batch size -1 at offset 8"),
        (8, 2**31 - 1, "batch size 2147483647 at offset 8"),
        (12, 25, "sequence length 25 at offset 12, expected 1 to 24"),
        (HEADER_BYTES, 301, "tokens hold 301, outside the vocabulary of 301"),
        (HEADER_BYTES + 4 * B * T, -1, "targets hold -1"),
    ],
)
def test_a_wrong_word_is_refused(
    pair: Path, tmp_path: Path, offset: int, word: int, message: str
) -> None:
    content = bytearray((pair / "small_debug_state.bin").read_bytes())
    content[offset : offset + 4] = np.int32(word).tobytes()
    path = tmp_path / "changed.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_debug_state(path, CONFIG)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_is_refused_or_read(
    pair: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray((pair / "small_debug_state.bin").read_bytes())
    change = data.draw(st.sampled_from(["cut", "extended", "flipped", "word"]))
    if change == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    elif change == "extended":
        content += data.draw(st.binary(min_size=1, max_size=9))
    elif change == "flipped":
        content[data.draw(st.integers(0, 15))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        at = 4 * data.draw(st.integers(0, 3))
        content[at : at + 4] = np.int32(data.draw(st.integers(-(2**31), 2**31 - 1))).tobytes()
    path = tmp_path_factory.mktemp("fuzz") / "changed.bin"
    path.write_bytes(content)
    if bytes(content) == (pair / "small_debug_state.bin").read_bytes():
        return
    with pytest.raises(DataError, match=r"changed\.bin"):
        read_debug_state(path, CONFIG)


# --- the command ---


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gpu-gpt2", "verify", *args])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def test_the_command_makes_a_pair_that_it_then_passes(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, _ = run("nano", "--make", "pair")
    assert code == 0
    assert sorted(path.name for path in Path("pair").iterdir()) == [
        "gpt2_nano.bin", "gpt2_nano_bf16.bin", "gpt2_nano_debug_state.bin",
        "gpt2_nano_losses.json", "gpt2_tokenizer.bin",
    ]  # fmt: skip
    command = out.splitlines()[-1].partition("gpu-gpt2 verify ")[2]
    code, out, _ = run(*command.split(), "--device", "cpu")
    assert code == 0
    assert "29 of 29 comparisons passed" in out


def test_the_command_fails_on_another_models_numbers(
    pair: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    other = Path("other.bin")
    from gpu_gpt2.formats.llmc import write_model

    write_model(other, Arena(CONFIG, initial_weights(CONFIG, 1)), "fp32")
    code, out, _ = run("other.bin", str(pair / "small_debug_state.bin"), "--device", "cpu")
    assert code == 1
    assert "FAIL" in out
    assert "dwte" in out


def test_the_command_says_what_it_needs(run: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = run()
    assert code == 1
    assert "gpu-gpt2 verify --make DIR" in err
    assert len(err.splitlines()) == 1
