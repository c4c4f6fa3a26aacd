"""Training that starts from the weights of a model: `gpu-gpt2 train --init-from`."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from models import quiet

from gpu_gpt2.config import TrainConfig
from gpu_gpt2.formats import hf, llmc
from gpu_gpt2.models.weights import Arena, load_arena
from gpu_gpt2.open_model import open_model
from gpu_gpt2.run import Run as TrainingRun
from gpu_gpt2.tokenizer import GPT2Tokenizer
from gpu_gpt2.train import train
from gpu_gpt2.training import checkpoint
from gpu_gpt2.training.schedule import learning_rate
from gpu_gpt2.training.stop_signal import StopSignal

Run = Callable[..., tuple[int, str, str]]
SQUARES = "".join(f"{i} squared is {i * i}, and the cube of {i} is {i**3}.\n" for i in range(300))
COUNTING = "".join(f"after {i} comes {i + 1}; before it comes {i - 1}.\n" for i in range(400))
SMALL = (
    "--device", "cpu", "--model", "nano", "--batch-size", "4", "--eval-every", "0",
    "--sample-tokens", "0",
)  # fmt: skip


@pytest.fixture
def trained(run: Run) -> Path:
    """A run that learned about squares, with a vocabulary of its own; text to fine-tune on."""
    Path("squares.txt").write_text(SQUARES)
    Path("counting.txt").write_text(COUNTING)
    code, _, err = run(
        "train", "--data", "squares.txt", *SMALL, "--tokenizer", "bpe:300", "--steps", "60",
        "--lr", "0.01", "--run-dir", "squares",
    )  # fmt: skip
    assert code == 0, err
    return Path("squares")


def records(folder: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def fine_tune(run: Run, source: str, *more: str) -> None:
    code, _, err = run(
        "train", "--init-from", source, "--data", "counting.txt", "--val-data", "counting.txt",
        "--device", "cpu", "--batch-size", "4", "--steps", "10", "--eval-every", "10",
        "--warmup-steps", "0", "--sample-tokens", "0", "--run-dir", "tuned", *more,
    )  # fmt: skip
    assert code == 0, err


def evaluated(run: Run, source: str, *more: str) -> float:
    code, out, err = run("evaluate", source, "--data", "counting.txt", "--device", "cpu", *more)
    assert code == 0, err
    match = re.search(r"^loss ([0-9.]+)", out, re.MULTILINE)
    assert match
    return float(match[1])


def as_run(run: Run, trained: Path) -> str:
    return str(trained)


def as_hugging_face_folder(run: Run, trained: Path) -> str:
    assert run("convert", str(trained), "folder", "--to", "hf")[0] == 0
    return "folder"


def as_safetensors_file(run: Run, trained: Path) -> str:
    folder = Path(as_hugging_face_folder(run, trained))
    return str(folder / "model.safetensors")


def as_llmc_fp32(run: Run, trained: Path) -> str:
    Path("llmc").mkdir()
    assert run("convert", str(trained), "llmc/model.bin", "--to", "llmc-fp32")[0] == 0
    return "llmc/model.bin"


def as_llmc_bf16(run: Run, trained: Path) -> str:
    Path("llmc").mkdir()
    assert run("convert", str(trained), "llmc/model.bin", "--to", "llmc-bf16")[0] == 0
    return "llmc/model.bin"


@pytest.mark.parametrize(
    "source", [as_run, as_hugging_face_folder, as_safetensors_file, as_llmc_fp32, as_llmc_bf16]
)
def test_the_loss_before_training_is_that_of_evaluate(
    source: Callable[[Run, Path], str], run: Run, trained: Path
) -> None:
    name = source(run, trained)
    fine_tune(run, name)
    validations = [r for r in records("tuned") if "val_loss" in r]
    assert [r["step"] for r in validations] == [0, 10]
    assert validations[0]["val_loss"] == pytest.approx(evaluated(run, name), abs=6e-5)
    assert validations[1]["val_loss"] < validations[0]["val_loss"]
    assert evaluated(run, "tuned") == pytest.approx(validations[1]["val_loss"], abs=6e-5)
    ours, theirs = (open_model(p).tokenizer_path for p in ("tuned", "squares"))
    assert ours is not None
    assert theirs is not None
    assert (ours / "tokenizer.json").read_bytes() == (theirs / "tokenizer.json").read_bytes()


def test_the_default_rate_is_a_tenth_of_a_new_model_s(run: Run, trained: Path) -> None:
    fine_tune(run, "squares")
    assert checkpoint.load(checkpoint.latest(Path("tuned"))).train.lr == pytest.approx(1e-4)


def test_a_shorter_sequence_leaves_the_later_positions_alone(run: Run, trained: Path) -> None:
    fine_tune(run, "squares", "--seq-len", "16", "--weight-decay", "0")
    before, after = (open_model(path) for path in ("squares", "tuned"))
    assert before.config == after.config
    wpe = [
        next(values.copy() for piece, values in source.read() if piece.name == "wpe")
        for source in (before, after)
    ]
    assert (wpe[0][:16] != wpe[1][:16]).all(axis=1).all()
    np.testing.assert_array_equal(wpe[0][16:], wpe[1][16:])


def test_a_fine_tuned_run_is_resumed_without_the_model_it_started_from(
    run: Run, trained: Path
) -> None:
    fine_tune(run, "squares")
    shutil.move("tuned", "whole")
    fine_tune(run, "squares", "--save-every", "5", "--keep-last", "0")
    shutil.rmtree("squares")
    code, _, err = run("train", "--resume", "--run-dir", "tuned/step_00000005")
    assert code == 0, err
    a, b = (checkpoint.load(checkpoint.latest(Path(name))) for name in ("whole", "tuned"))
    np.testing.assert_array_equal(a.weights, b.weights)


STEPS = 10
LOSS_LIMIT = 2e-5  # relative; ten steps of float32 rounding in another order of sums
WEIGHT_LIMIT = 2e-4  # absolute; AdamW moves a weight by lr however small its gradient is


def test_ten_steps_agree_with_pytorch(run: Run, trained: Path, tmp_path: Path) -> None:
    """The same ten batches through transformers' GPT-2 and torch's AdamW, from the same weights."""
    folder = checkpoint.latest(trained)
    config = replace(
        checkpoint.load(folder).train,
        data=str(Path("counting.txt").absolute()), val_data="", init_from=str(folder), model="",
        tokenizer=str(folder), steps=STEPS, lr=1e-3, warmup_steps=3, weight_decay=0.1,
        batch_size=2, total_batch_tokens=128, max_grad_norm=0.5, run_dir=str(tmp_path / "ours"),
    )  # fmt: skip
    batches = []
    with StopSignal(quiet()) as stop, TrainingRun(config, quiet(), None, stop) as training:
        batches += [training.next_batch() for _ in range(STEPS * config.grad_accum_steps)]
    shutil.rmtree(config.run_dir)
    ours = train(config, quiet()).checkpoint
    our_losses = [r["loss"] for r in records(config.run_dir) if "loss" in r]

    model = transformers.GPT2LMHeadModel.from_pretrained(
        folder, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    ).train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )
    their_losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(config.grad_accum_steps):
            batch = batches.pop(0)
            tokens, targets = (torch.from_numpy(a).long() for a in (batch.tokens, batch.targets))
            logits = model(tokens).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            (loss / config.grad_accum_steps).backward()
            total += loss.item() / config.grad_accum_steps
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        their_losses.append(total)
    np.testing.assert_allclose(our_losses, their_losses, rtol=LOSS_LIMIT)
    model.save_pretrained(tmp_path / "theirs")
    a, b = (load_arena(open_model(path)) for path in (ours, tmp_path / "theirs"))
    np.testing.assert_allclose(a, b, atol=WEIGHT_LIMIT)
    assert our_losses[-1] < our_losses[0]


def fresh(name: str, value: float) -> Callable[[], str]:
    """A model file whose first weight is `value`."""

    def write() -> str:
        source = open_model("squares")
        weights = load_arena(source)
        weights[0] = value
        llmc.write_model(Path(name), Arena(source.config, weights), "fp32")
        shutil.copytree(checkpoint.latest(Path("squares")), "copy")
        Path("copy/manifest.json").unlink()  # a Hugging Face folder has none
        Path("copy/training.json").unlink()
        hf.write_model(Path("copy"), Arena(source.config, weights, source.eot))
        return "copy/model.safetensors"

    return write


def damaged() -> str:
    """A checkpoint with one wrong bit in a weight."""
    shutil.copytree(checkpoint.latest(Path("squares")), "copy")
    path = Path("copy/model.safetensors")
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1
    path.write_bytes(content)
    return "copy"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--init-from", damaged], "copy/model.safetensors: the file is damaged"),
        (["--init-from", "nowhere"], "nowhere: no checkpoint here"),
        (["--init-from", "gpt2"], "gpt2 is the name of a size; use --model gpt2 for random weig"),
        (["--init-from", "squares", "--model", "d12"], "sizes of its own; leave out --model"),
        (["--init-from", "squares", "--n-layer", "3"], "sizes of its own; leave out --n-layer"),
        (["--init-from", "squares", "--seq-len", "33"], "longer than the model's context of 32"),
        (["--init-from", "squares", "--tokenizer", "bytes"], "bytes has 257 tokens, --init-from"),
        (["--init-from", fresh("nan.bin", np.nan)], "a weight is not a finite number; the file is"),
        (
            ["--init-from", fresh("big.bin", 1e5), "--device", "emulator", "--dtype", "fp16"],
            "its largest weight, 100000, is beyond the range of fp16; use --dtype bf16 or fp32",
        ),
        (["--init-from", "squares", "--data", "gpt2.bin"], "is outside the vocabulary of 300"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(
    args: list[str | Callable[[], str]], message: str, run: Run, trained: Path
) -> None:
    tokens = np.full(3000, 50256, np.uint16)
    from gpu_gpt2.formats.tokens import write_tokens

    write_tokens(Path("gpt2.bin"), tokens)
    words = [arg if isinstance(arg, str) else arg() for arg in args]
    more = [] if "--data" in words else ["--data", "counting.txt"]
    device = [] if "--device" in words else ["--device", "cpu"]
    code, _, err = run("train", *words, *more, *device, "--run-dir", "tuned")
    assert code == 1
    assert len(err.splitlines()) == 1, err
    assert message in err
    assert not Path("tuned").exists()


@pytest.mark.emulator
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_fine_tuning_in_every_dtype_of_the_kernels(dtype: str, run: Run, trained: Path) -> None:
    loss = evaluated(run, "squares")
    fine_tune(
        run, "squares", "--device", "emulator", "--dtype", dtype, "--steps", "2",
        "--eval-batches", "2",
    )  # fmt: skip
    first = next(r for r in records("tuned") if "val_loss" in r)
    assert first["step"] == 0
    assert first["val_loss"] == pytest.approx(loss, rel=0.1)
    settings = json.loads((checkpoint.latest(Path("tuned")) / "training.json").read_text())
    assert TrainConfig.from_dict(settings["train"]).dtype == dtype


def test_the_sizes_and_tokenizer_of_a_preset_give_way_to_those_of_the_model(
    run: Run, trained: Path
) -> None:
    fine_tune(run, "squares", "--preset", "tiny-cpu", "--seq-len", "32")
    source, tuned = (
        checkpoint.load(checkpoint.latest(Path(name))) for name in ("squares", "tuned")
    )
    assert tuned.model == source.model
    assert tuned.train.lr_schedule == "wsd"  # the preset's
    code, _, err = run(
        "train", "--init-from", "squares", "--preset", "tiny-cpu", "--n-layer", "3",
        "--run-dir", "other",
    )  # fmt: skip
    assert code == 1
    assert "--init-from squares has sizes of its own; leave out --n-layer (" in err


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_of_transformers_is_fine_tuned(tied: bool, run: Run) -> None:
    """It learns, what is saved is a Llama with the same head, and transformers has its loss."""
    Path("counting.txt").write_text(COUNTING)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        tie_word_embeddings=tied,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained("llama")
    GPT2Tokenizer.of_bytes().save(Path("llama"))
    fine_tune(run, "llama", "--lr", "0.01", "--weight-decay", "0")
    losses = [r["val_loss"] for r in records("tuned") if "val_loss" in r]
    assert losses[1] < losses[0] - 0.5
    assert open_model("tuned").config == open_model("llama").config
    folder = checkpoint.latest(Path("tuned"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.from_numpy(GPT2Tokenizer.of_bytes().encode(COUNTING).astype(np.int64))
    T, count = 32, (len(ids) - 1) // 32
    rows = ids[: count * T].reshape(count, T), ids[1 : count * T + 1].reshape(count, T)
    with torch.no_grad():
        logits = model(rows[0]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[1].flatten())
    assert loss.item() == pytest.approx(losses[1], abs=5e-3)  # we count the end of the text too
