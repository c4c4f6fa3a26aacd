"""verify passes for a model and its debug state made by PyTorch, and names every changed value."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from devices import CPU, KERNELS, kernel_devices
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_gpt2.config import GPT2Config, LlamaConfig
from gpu_gpt2.device import open_device
from gpu_gpt2.errors import DataError
from gpu_gpt2.formats import hf, llmc
from gpu_gpt2.formats.debug_state import DebugState, read_debug_state, write_debug_state
from gpu_gpt2.formats.llmc_header import HEADER_BYTES
from gpu_gpt2.models.init import initial_weights
from gpu_gpt2.models.weights import Arena
from gpu_gpt2.open_model import open_model
from gpu_gpt2.tools.verify import compare
from gpu_gpt2.tools.verify.compare import (
    LIMITS,
    STARTER_PACK_LOSSES,
    STEPS,
    Finding,
    compare_tensor,
    expected_losses,
    losses_path,
    verify,
)
from gpu_gpt2.tools.verify.make import torch_results, with_noise, write_debug_files
from gpu_gpt2.training import checkpoint

Run = Callable[..., tuple[int, str, str]]

CONFIG = GPT2Config(vocab_size=301, n_positions=24, n_embd=48, n_layer=2, n_head=3)
LLAMA = LlamaConfig(
    vocab_size=301, n_positions=24, n_embd=48, n_layer=2, n_head=4, n_kv_head=2, n_inner=40
)
B, T = 2, 17


@pytest.fixture(scope="module")
def debug_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model, its debug state and its losses, made by PyTorch."""
    folder = tmp_path_factory.mktemp("debug_files")
    weights = with_noise(CONFIG, initial_weights(CONFIG, 42))
    batch = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, B, T), dtype=np.int32)
    written = list(write_debug_files(folder, "small", CONFIG, weights, *batch))
    assert [path.name for path in written] == [
        "small.bin", "small_bf16.bin", "small_debug_state.bin", "small_losses.json",
    ]  # fmt: skip
    return folder


def findings(
    debug_files: Path,
    *,
    model: str = "small.bin",
    device: str = "cpu",
    dtype: str = "fp32",
    losses: tuple[float, ...] | None = None,
    **changes: object,
) -> dict[str, Finding]:
    """Verifies the small model against its debug state, of which `changes` replace parts."""
    path = debug_files / "small_debug_state.bin"
    state = read_debug_state(path, CONFIG)
    known = expected_losses(path, CONFIG, state) if losses is None else losses
    fields = {name: getattr(state, name) for name in DebugState.__dataclass_fields__}
    changed = DebugState(**fields | changes)
    found = verify(open_model(debug_files / model), changed, known, open_device(device), dtype)
    return {finding.what: finding for finding in found}


def failed(found: dict[str, Finding]) -> list[str]:
    """The names of the comparisons that failed."""
    return [what for what, finding in found.items() if not finding.passed]


def test_all_comparisons_with_pytorch_pass_in_float32_on_the_cpu(debug_files: Path) -> None:
    found = findings(debug_files)
    assert not failed(found)
    assert len(found) == 1 + 1 + 16 + STEPS + 1


def test_float32_passes_with_a_tenth_of_the_limits(
    debug_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits leave room for larger models and other devices; this small model needs none."""
    tenth = compare.Limits(
        **{
            name: getattr(compare.LIMITS["fp32"], name) / 10
            for name in ("element", "rms", "loss", "later_loss")
        }
    )
    monkeypatch.setattr(compare, "LIMITS", {"fp32": tenth})
    assert not failed(findings(debug_files))


@kernel_devices
def test_all_comparisons_with_pytorch_pass_on_devices_with_kernels(
    debug_files: Path, dtype: str, device: str
) -> None:
    model = "small_bf16.bin" if dtype == "bf16" else "small.bin"
    assert not failed(findings(debug_files, model=model, device=device, dtype=dtype))


@pytest.mark.parametrize(("dtype", "device"), CPU + KERNELS)
@pytest.mark.parametrize("tied", [True, False])
def test_all_comparisons_with_pytorch_pass_for_a_llama(
    tied: bool, dtype: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 with a tenth of the limits, as for GPT-2."""
    tenth = {name: getattr(LIMITS["fp32"], name) / 10 for name in compare.Limits.__slots__}
    monkeypatch.setitem(compare.LIMITS, "fp32", compare.Limits(**tenth))
    config = replace(LLAMA, tie_word_embeddings=tied)
    source = Arena(config, with_noise(config, initial_weights(config, 42)))
    batch = np.random.default_rng(0).integers(0, config.vocab_size, (2, B, T), dtype=np.int32)
    results = torch_results(config, source.weights, *batch)
    found = {f.what: f for f in verify(source, *results, open_device(device), dtype)}
    assert not failed(found)
    assert len(found) == 1 + 1 + (8 if tied else 9) + STEPS + 1


@pytest.mark.parametrize("name", ["wte", "wpe", "ln1b", "qkvw", "attprojb", "fcprojw", "lnfw"])
def test_one_wrong_element_of_a_gradient_is_named_with_its_position(
    debug_files: Path, name: str
) -> None:
    grads = dict(read_debug_state(debug_files / "small_debug_state.bin", CONFIG).grads)
    grad = np.array(grads[name])
    rms = float(np.sqrt(np.square(grad).mean()))
    position = tuple(size // 2 for size in grad.shape)
    grad[position] += 0.01 * (rms + abs(grad[position]))
    found = findings(debug_files, grads=grads | {name: grad})
    assert failed(found) == [f"d{name}"]
    assert f"at [{', '.join(map(str, position))}]" in found[f"d{name}"].detail


def test_small_errors_of_all_elements_fail_by_their_root_mean_square(debug_files: Path) -> None:
    """Each element is within its own limit here."""
    grads = dict(read_debug_state(debug_files / "small_debug_state.bin", CONFIG).grads)
    grads["fcw"] = grads["fcw"] * 1.00005
    assert failed(findings(debug_files, grads=grads)) == ["dfcw"]


def test_an_element_in_a_row_of_large_elements_has_their_limit() -> None:
    """All other rows of the tensor are zero, so that its own rms is small."""
    expected = np.zeros((100, 8), np.float32)
    expected[3] = 1.0
    expected[3, 5] = 0.0
    ours = expected.copy()
    ours[3, 5] = 0.5e-4  # half of the limit for this row, five limits for the tensor
    limits = replace(LIMITS["fp32"], rms=1.0)
    assert compare_tensor("x", ours, expected, limits).passed
    ours[3, 5] = 2e-4
    assert not compare_tensor("x", ours, expected, limits).passed


def test_a_wrong_logit_and_a_wrong_loss_are_named(debug_files: Path) -> None:
    state = read_debug_state(debug_files / "small_debug_state.bin", CONFIG)
    logits = np.array(state.logits)
    logits[5, 300] += 0.01
    assert failed(findings(debug_files, logits=logits, loss=state.loss + 1e-4)) == [
        "logits",
        "loss",
    ]
    logits[5, 300] = np.nan
    assert failed(findings(debug_files, logits=logits)) == ["logits"]


def test_a_wrong_loss_of_a_later_step_is_named(debug_files: Path) -> None:
    known = list(json.loads((debug_files / "small_losses.json").read_text())["losses"])
    known[7] += 1e-3
    assert failed(findings(debug_files, losses=tuple(known))) == ["loss, step 7"]


def test_losses_that_cannot_be_compared_must_decrease(
    debug_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = findings(debug_files, losses=())
    assert not failed(found)
    assert "none to compare with" in found["10 steps"].detail
    monkeypatch.setitem(compare.OPTIMIZER_SETTINGS, "lr", 10.0)
    assert "10 steps" in failed(findings(debug_files, losses=()))


def test_a_checkpoint_that_loads_changed_is_found(
    debug_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = checkpoint.load

    def wrong(folder: Path) -> checkpoint.TrainingState:
        state = right(folder)
        state.v[:] = np.nextafter(state.v, 1, dtype=np.float32)
        return state

    monkeypatch.setattr(checkpoint, "load", wrong)
    assert failed(findings(debug_files)) == ["written and read back"]


def test_the_losses_of_llmcs_starter_pack_are_known_without_a_file(tmp_path: Path) -> None:
    state = DebugState(
        tokens=np.zeros((4, 64), np.int32), targets=np.zeros((4, 64), np.int32),
        logits=np.zeros((0, 0), np.float32), loss=5.27001, grads={},
    )  # fmt: skip
    path = tmp_path / "gpt2_124M_debug_state.bin"
    assert expected_losses(path, GPT2Config(), state) == STARTER_PACK_LOSSES
    assert expected_losses(path, CONFIG, state) == ()


@pytest.mark.parametrize("content", ["{", "[]", '{"losses": [1, 2]}', '{"losses": 3}', "\xff"])
def test_a_damaged_file_of_losses_is_refused(
    debug_files: Path, tmp_path: Path, content: str
) -> None:
    state = read_debug_state(debug_files / "small_debug_state.bin", CONFIG)
    path = tmp_path / "x_debug_state.bin"
    losses_path(path).write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=r"x_losses\.json"):
        expected_losses(path, CONFIG, state)


# --- the debug state's file ---


def test_a_debug_state_that_is_read_and_written_has_the_same_bytes(
    debug_files: Path, tmp_path: Path
) -> None:
    path = debug_files / "small_debug_state.bin"
    write_debug_state(tmp_path / "again.bin", CONFIG, read_debug_state(path, CONFIG))
    assert (tmp_path / "again.bin").read_bytes() == path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again.bin"]


def test_a_debug_state_without_a_finite_loss_is_refused(debug_files: Path, tmp_path: Path) -> None:
    state = read_debug_state(debug_files / "small_debug_state.bin", CONFIG)
    write_debug_state(tmp_path / "changed.bin", CONFIG, replace(state, loss=float("nan")))
    with pytest.raises(DataError, match=r"changed\.bin: its loss is nan; the file is damaged"):
        read_debug_state(tmp_path / "changed.bin", CONFIG)


def test_a_debug_state_of_wrong_shapes_is_not_written(debug_files: Path, tmp_path: Path) -> None:
    state = read_debug_state(debug_files / "small_debug_state.bin", CONFIG)
    with pytest.raises(ValueError, match=r"logits: expected \(34, 301\), got \(33, 301\)"):
        write_debug_state(tmp_path / "new.bin", CONFIG, replace(state, logits=state.logits[1:]))
    assert list(tmp_path.iterdir()) == []


def test_the_debug_state_of_gpt2_has_the_size_of_llmcs_file(tmp_path: Path) -> None:
    header = np.zeros(HEADER_BYTES // 4, np.int32)
    header[:4] = 20240327, 2, 4, 64  # magic number, version, B, T
    path = tmp_path / "header_only.bin"
    header.tofile(path)
    with pytest.raises(DataError, match=" 549369860 bytes"):
        read_debug_state(path, GPT2Config())


def test_a_debug_state_of_another_model_size_is_refused(debug_files: Path) -> None:
    other = GPT2Config(vocab_size=301, n_positions=24, n_embd=48, n_layer=3, n_head=3)
    with pytest.raises(DataError, match=r"small_debug_state.bin.*3 layers of 48.* bytes"):
        read_debug_state(debug_files / "small_debug_state.bin", other)


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
def test_a_debug_state_with_a_wrong_word_is_refused(
    debug_files: Path, tmp_path: Path, offset: int, word: int, message: str
) -> None:
    content = bytearray((debug_files / "small_debug_state.bin").read_bytes())
    content[offset : offset + 4] = np.int32(word).tobytes()
    path = tmp_path / "changed.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_debug_state(path, CONFIG)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_damaged_debug_state_is_refused(
    debug_files: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray((debug_files / "small_debug_state.bin").read_bytes())
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
    if bytes(content) == (debug_files / "small_debug_state.bin").read_bytes():
        return
    with pytest.raises(DataError, match=r"changed\.bin"):
        read_debug_state(path, CONFIG)


# --- the command `gpu-gpt2 verify` ---


def test_the_command_passes_the_files_that_it_makes(run: Run) -> None:
    code, out, _ = run("verify", "nano", "--make", "made")
    assert code == 0
    assert sorted(path.name for path in Path("made").iterdir()) == [
        "gpt2_nano.bin", "gpt2_nano_bf16.bin", "gpt2_nano_debug_state.bin",
        "gpt2_nano_losses.json", "gpt2_tokenizer.bin",
    ]  # fmt: skip
    command = out.splitlines()[-1].partition("gpu-gpt2 verify ")[2]
    code, out, _ = run("verify", *command.split(), "--device", "cpu")
    assert code == 0
    assert "29 of 29 comparisons passed" in out


def test_the_command_fails_for_the_debug_state_of_another_model(
    debug_files: Path, run: Run
) -> None:
    llmc.write_model(Path("other.bin"), Arena(CONFIG, initial_weights(CONFIG, 1)), "fp32")
    code, out, _ = run(
        "verify", "other.bin", str(debug_files / "small_debug_state.bin"), "--device", "cpu"
    )
    assert code == 1
    assert "FAIL" in out
    assert "dwte" in out


@pytest.mark.parametrize(("model", "count"), [("nano", 29), ("llama:nano", 21)])
def test_the_command_compares_with_pytorch_on_this_machine(
    model: str, count: int, run: Run
) -> None:
    code, out, _ = run("verify", model, "--device", "cpu")
    assert code == 0
    assert f"{count} of {count} comparisons passed" in out


def test_the_command_compares_a_folder_of_a_llama(run: Run) -> None:
    config = replace(LLAMA, tie_word_embeddings=False)
    hf.write_model(Path("llama"), Arena(config, initial_weights(config, 1)))
    code, out, _ = run("verify", "llama", "--device", "cpu")
    assert code == 0
    assert "dhead" in out
    code, _, err = run("verify", "llama", "x_debug_state.bin", "--device", "cpu")
    assert code == 1
    assert "llama is a Llama, and llm.c's debug states are only for GPT-2; compare with" in err


def test_files_of_llmc_are_not_made_for_a_llama(run: Run) -> None:
    code, _, err = run("verify", "llama:nano", "--make", "made")
    assert code == 1
    assert "llama:nano is a Llama, and llm.c's debug states are only for GPT-2" in err
    assert not Path("made").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--make", "made"), "verify --make needs PyTorch: pip install torch"),
        ((), "verify without a debug state needs PyTorch: pip install torch"),
    ],
)
def test_without_pytorch_the_command_says_what_to_install(
    args: tuple[str, ...], message: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run("verify", "nano", *args)
    assert code == 1
    assert message in err


def test_files_are_not_made_for_a_vocabulary_smaller_than_gpt2s(
    debug_files: Path, run: Run
) -> None:
    code, _, err = run("verify", str(debug_files / "small.bin"), "--make", "made")
    assert code == 1
    assert "small.bin has another vocabulary than GPT-2's; choose one that has it" in err


def test_a_folder_that_cannot_be_made_for_the_files_is_an_error(run: Run) -> None:
    Path("file").touch()
    code, _, err = run("verify", "nano", "--make", "file/made")
    assert code == 1
    assert "file/made: cannot be written: Not a directory" in err
