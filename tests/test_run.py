"""A run validates, samples and saves at the steps that its options name, with the given sizes."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import quiet, train_settings
from rich.console import Console

from gpu_gpt2.config import TrainConfig, model_config
from gpu_gpt2.data.dataset import of_run
from gpu_gpt2.device import open_device
from gpu_gpt2.evaluate import hellaswag_accuracy, validation_loss
from gpu_gpt2.formats.multiple_choice import Example, write_choices
from gpu_gpt2.formats.tokens import write_tokens
from gpu_gpt2.models.families import new_model
from gpu_gpt2.models.size import flops_per_token, parameter_groups
from gpu_gpt2.models.weights import load_arena
from gpu_gpt2.open_model import open_model
from gpu_gpt2.ops import ops_for
from gpu_gpt2.train import train
from gpu_gpt2.training import checkpoint

Run = Callable[..., tuple[int, str, str]]
TEXT = "".join(f"{i} squared is {i * i}, and the cube of {i} is {i**3}.\n" for i in range(300))
CPU = ("--device", "cpu", "--tokenizer", "bytes", "--data", "numbers.txt", "--batch-size", "4")


@pytest.fixture(autouse=True)
def home(run: Run) -> None:
    """Every test has its own cache, its own place for runs, and a text."""
    Path("numbers.txt").write_text(TEXT)


def settings(**changes: object) -> TrainConfig:
    values = {"data": "numbers.txt", "save_every": 0, "eval_every": 0, "sample_tokens": 0}
    return train_settings(**{**values, **changes})


def records(key: str, run_dir: str = "run") -> dict[int, Any]:
    lines = Path(run_dir, "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r[key] for r in map(json.loads, lines) if key in r}


def saved_steps(run_dir: str = "run") -> list[int]:
    return [int(path.name[5:]) for path in checkpoint.checkpoints(Path(run_dir))]


def test_checkpoints_and_validations_have_their_own_rhythm() -> None:
    train(settings(steps=10, save_every=4, eval_every=3, keep_last=0), quiet())
    assert saved_steps() == [4, 8, 10]
    assert list(records("val_loss")) == [0, 3, 6, 9, 10]


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"keep_last": 1}, [12]),
        ({"keep_last": 2}, [10, 12]),
        ({"keep_last": 0}, [2, 4, 6, 8, 10, 12]),
        ({"keep_last": 1, "keep_every": 4}, [4, 8, 12]),
    ],
)
def test_checkpoints_that_are_kept(changes: dict[str, int], kept: list[int]) -> None:
    train(settings(steps=12, save_every=2, **changes), quiet())
    assert saved_steps() == kept


def test_the_best_checkpoint_is_saved_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.25, 3.0, 4.0])  # at steps 0, 3, ..., 15, 16
    monkeypatch.setattr("gpu_gpt2.run.validation_loss", lambda *_, **__: next(losses))
    train(settings(steps=16, save_every=4, eval_every=3, keep_last=1, keep_best=True), quiet())
    assert saved_steps() == [6, 16]


def test_validation_over_a_number_of_batches() -> None:
    """The first batches of the text, as evaluating just these tokens gives."""
    train(settings(eval_every=8, eval_batches=2), quiet())
    tokens = np.frombuffer(TEXT.encode()[-(len(TEXT) // 10) :], np.uint8)
    state = checkpoint.load(checkpoint.latest(Path("run")))
    val = of_run(state.train).val
    assert len(val) == 2 * 4 * 32 + 1 < len(of_run(replace(state.train, eval_batches=0)).val)
    assert len(tokens) > len(val)
    model = new_model(
        state.model,
        ops_for(open_device("cpu"), "fp32"),
        max_batch=1,
        max_seq_len=32,
        training=False,
    )
    model.load(state.weights)
    expected = validation_loss(model, val, 1, 32)
    assert records("val_loss")[8] == pytest.approx(expected, rel=1e-6)


def val_text() -> str:
    Path("val.txt").write_text(TEXT[:2000])
    return "val.txt"


def val_tokens() -> str:
    write_tokens(Path("other_val.bin"), np.frombuffer(TEXT[:2000].encode(), np.uint8))
    return "other_val.bin"


def val_folder() -> str:
    Path("shards").mkdir()
    write_tokens(Path("shards/x_val_000000.bin"), np.frombuffer(TEXT[:2000].encode(), np.uint8))
    write_tokens(Path("shards/x_train_000001.bin"), np.frombuffer(TEXT[:3000].encode(), np.uint8))
    return "shards"


def val_pattern() -> str:
    val_folder()
    return "shards/*_val_*.bin"


@pytest.mark.parametrize("make", [val_text, val_tokens, val_folder, val_pattern])
@pytest.mark.parametrize("data", ["numbers.txt", "shards_of_data"])
def test_validation_data_of_one_s_own(make: Callable[[], str], data: str, run: Run) -> None:
    if data != "numbers.txt":
        Path(data).mkdir()
        write_tokens(Path(data, "n_train.bin"), np.frombuffer(TEXT.encode(), np.uint8))
    given = [word if word != "numbers.txt" else data for word in CPU]
    code, out, err = run(
        "train", *given, "--model", "nano", "--seq-len", "32", "--steps", "2", "--val-data",
        make(), "--run-dir", "run",
    )  # fmt: skip
    assert code == 0, err
    # A document of a text begins with <|endoftext|>, a token file with its own first token.
    count = 2001 if make is val_text else 2000
    total = len(TEXT) + (data == "numbers.txt")
    assert f"{total:,} tokens to train on, {count:,} held out" in out
    code, out, err = run("evaluate", "run", "--device", "cpu")
    assert code == 0, err
    assert f"over {count - 1:,} tokens" in out
    assert f"loss {records('val_loss')[2]:.4f}" in out


def examples() -> list[Example]:
    rng = np.random.default_rng(0)
    return [
        Example(
            context=rng.integers(0, 256, 8).astype(np.int32),
            completions=tuple(rng.integers(0, 256, n).astype(np.int32) for n in (3, 5, 2, 4)),
            label=int(rng.integers(0, 4)),
        )
        for _ in range(7)
    ]


def test_hellaswag_is_measured_when_it_is_due() -> None:
    write_choices(Path("questions.bin"), examples())
    more = {"hellaswag": "questions.bin", "hellaswag_every": 3, "steps": 7}
    outcome = train(settings(**more), quiet())
    found = records("hellaswag_acc_norm")
    assert list(found) == [3, 6, 7]
    state = checkpoint.load(outcome.checkpoint)
    model = new_model(
        state.model, ops_for(open_device("cpu"), "fp32"), max_batch=4, max_seq_len=32,
        training=False,
    )  # fmt: skip
    model.load(state.weights)
    correct, count = hellaswag_accuracy(model, examples())
    assert (found[7], count) == (correct / 7, 7)
    lines = Path("run/main.log").read_text().splitlines()
    assert f"s:7 eval:{found[7]:.4f}" in lines


def test_samples_continue_the_prompt() -> None:
    output = io.StringIO()
    console = Console(file=output, width=200)
    train(settings(steps=4, sample_every=2, sample_tokens=9, sample_prompt="One é "), console)
    samples = output.getvalue().split("sample after step ")[1:]
    assert [sample[0] for sample in samples] == ["2", "4"]
    for sample in samples:
        text = sample.split("\n", 1)[1]
        assert text.startswith("One é ")
        assert 6 < len(text.split("─")[0].rstrip("\n")) <= 6 + 9


def test_main_log_is_in_llmc_s_format() -> None:
    train(settings(steps=3, eval_every=2), quiet())
    loss, val, lr, norm = map(records, ("loss", "val_loss", "lr", "grad_norm"))
    expected = [f"s:0 tel:{val[0]:.4f}"]
    for step in (1, 2, 3):
        numbers = f"trl:{loss[step]:.4f} lr:{lr[step]:.6f} norm:{norm[step]:.2f}"
        expected.append(f"s:{step - 1} {numbers}")
        expected += [f"s:{step} tel:{val[step]:.4f}"] if step in val else []
    assert Path("run/main.log").read_text().splitlines() == expected


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        (("--n-layer", "3"), (3, 2, 32, 32)),
        (("--n-embd", "64", "--n-head", "4"), (2, 4, 64, 32)),
        (("--context", "48", "--seq-len", "48"), (2, 2, 32, 48)),
    ],
)
def test_sizes_over_a_named_one(options: tuple[str, ...], sizes: tuple[int, ...], run: Run) -> None:
    more = () if "--seq-len" in options else ("--seq-len", "16")
    code, out, err = run(
        "train", *CPU, "--model", "nano", *options, *more, "--steps", "2", "--run-dir", "run"
    )
    assert code == 0, err
    model = checkpoint.load(checkpoint.latest(Path("run"))).model
    assert (model.n_layer, model.n_head, model.n_embd, model.n_positions) == sizes
    assert f"layers {sizes[0]}, channels {sizes[2]}, heads {sizes[1]}, context {sizes[3]}" in out
    code, _, err = run("train", "--resume", "--run-dir", "run", "--steps", "3")
    assert code == 0, err
    assert run("generate", "run", "--device", "cpu", "--max-tokens", "3")[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--n-head", "3"), "n_embd 32 does not divide into n_head 3 equal heads"),
        (("--n-layer", "-1"), "--n-layer must be a whole number >= 0, not -1"),
        (("--context", "16", "--seq-len", "32"), "longer than the model's context of 16"),
        (("--steps", "5", "--tokens-per-param", "3"), "both set the length; leave out one"),
        (("--tokens-per-param", "0"), "--tokens-per-param must be a number > 0"),
        (("--steps", "0.001epochs"), "are less than one optimizer step"),
        (("--steps", "10", "--warmup-steps", "11"), "--warmup-steps 11 is longer than the run of"),
        (
            ("--steps", "10", "--warmup-steps", "9", "--lr-schedule", "wsd"),
            "--warmup-steps 9 and the decay from step 8 on",
        ),
        (("--hellaswag", "none.bin"), "none.bin"),
        (("--hellaswag-every", "5"), "--hellaswag-every needs a file: name it with --hellaswag"),
        (("--val-data", "none.txt"), "none.txt; give a text file"),
        (("--keep-every", "3", "--save-every", "2"), "--keep-every 3 is not a multiple of --save"),
        (("--config", "none.toml"), "cannot read none.toml"),
        (("--preset", "none"), "unknown preset 'none'"),
        (("--preset", "t4", "--resume"), "leave out --preset, --config"),
        (("--on-nan", "pray"), "--on-nan must be one of stop, skip, rollback"),
        (("--lr-schedule", "step"), "--lr-schedule must be one of cosine, linear, constant, wsd"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    options: tuple[str, ...], message: str, run: Run
) -> None:
    code, _, err = run("train", *CPU, "--model", "nano", *options, "--run-dir", "run")
    assert code == 1
    assert message in err
    assert len(err.splitlines()) == 1
    assert not Path("run").exists()


def test_the_length_of_a_run_in_epochs_and_in_tokens_per_parameter(run: Run) -> None:
    common = (
        *CPU, "--model", "nano", "--seq-len", "32", "--sample-tokens", "0",
        "--total-batch-tokens", "128",
    )  # fmt: skip
    tokens = int(len(TEXT) * 0.9)
    code, out, err = run("train", *common, "--steps", "2epochs", "--run-dir", "epochs")
    assert code == 0, err
    last = max(records("loss", "epochs"))
    assert last * 128 <= 2 * tokens + 200 < (last + 2) * 128
    code, out, err = run("train", *common, "--tokens-per-param", "0.5", "--run-dir", "chinchilla")
    assert code == 0, err
    n = sum(parameter_groups(checkpoint.load(checkpoint.latest(Path("epochs"))).model).values())
    assert max(records("loss", "chinchilla")) == -(-n // 2 // 128)
    assert "0.502 tokens per parameter" in out


def test_flops_and_groups_are_counted_as_in_llmc() -> None:
    d12 = model_config("d12")
    assert flops_per_token(d12, 1024) == 803_478_528
    groups = parameter_groups(d12)
    assert sum(groups.values()) == 124_475_904
    assert groups["embeddings"] == (50_304 + 1024) * 768
    assert groups["norms"] == (4 * 12 + 2) * 768
    assert groups["attention"] == 12 * (4 * 768 * 768 + 4 * 768)


def test_a_run_prints_its_size_before_it_begins(run: Run) -> None:
    code, out, err = run(
        "train", *CPU, "--model", "nano", "--seq-len", "32", "--steps", "2", "--run-dir", "run",
        "--total-batch-tokens", "128",
    )  # fmt: skip
    assert code == 0, err
    assert out.startswith("GPT-2 nano: 38,784 parameters, fp32 on cpu\n")
    assert "embeddings 13.3 k, attention 8.45 k, MLP 16.7 k, norms 320; 37.9 k with w" in out
    assert "256 tokens in all: " in out
    assert "0.0066 tokens per parameter; 245 kFLOP per token, 62.7 MFLOP in all" in out


def test_weights_are_those_of_the_seed_unless_they_are_given() -> None:
    a, b = (
        load_arena(open_model(train(settings(steps=1, seed=s, run_dir=f"{s}"), quiet()).checkpoint))
        for s in (1, 2)
    )
    assert np.abs(a - b).max() > 0.01
