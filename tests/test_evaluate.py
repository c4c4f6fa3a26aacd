"""Validation loss and multiple choice: against transformers, a count by hand, and llm.c's way."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import seal
from devices import every_device
from models import new_model, random_batch, training_step
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from gpu_gpt2.data.corpus import python_docs
from gpu_gpt2.data.loader import sequential_batches
from gpu_gpt2.errors import CheckpointError, ConfigError, DataError
from gpu_gpt2.evaluate import (
    BATCHES_PER_SUM,
    answers,
    check_examples,
    completion_losses,
    hellaswag_accuracy,
    mean_loss,
    row_length,
    validation_loss,
)
from gpu_gpt2.formats.multiple_choice import COMPLETIONS, Example, write_choices
from gpu_gpt2.formats.tokens import write_tokens
from gpu_gpt2.models.batch import Batch
from gpu_gpt2.models.model import Model
from gpu_gpt2.models.weights import load_arena
from gpu_gpt2.open_model import open_model
from gpu_gpt2.tokenizer import GPT2Tokenizer
from gpu_gpt2.training.optimizer import AdamW

V, T = 257, 24  # the vocabulary of --tokenizer bytes, and the context
Run = Callable[..., tuple[int, str, str]]


CONFIGS = {
    "gpt2": GPT2Config(
        vocab_size=V, n_positions=T, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3
    ),
    "llama": LlamaConfig(
        vocab_size=V, max_position_embeddings=T, hidden_size=32, intermediate_size=40,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def torch_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedModel:
    """A small model in a Hugging Face folder of its own, far from uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    GPT2Tokenizer.of_bytes().save(folder)
    model.folder = str(folder)
    return model


def our_model(
    torch_model: PreTrainedModel, B: int, device: str = "cpu", dtype: str = "fp32"
) -> Model:
    source = open_model(torch_model.folder)
    model = new_model(source.config, device, dtype, B=B, T=T, training=False)
    model.load(load_arena(source))
    return model


def some_examples(count: int, longest: int = T // 2) -> list[Example]:
    """Random ones with a context and completions of 1 to `longest` tokens."""
    rng = np.random.default_rng(count)
    rows = [
        [rng.integers(0, V - 1, rng.integers(1, longest + 1)) for _ in range(1 + COMPLETIONS)]
        for _ in range(count)
    ]
    return [
        Example(context=row[0], completions=tuple(row[1:]), label=int(rng.integers(COMPLETIONS)))
        for row in rows
    ]


@torch.no_grad()
def torch_losses(model: PreTrainedModel, example: Example) -> list[float]:
    """Mean loss of each completion, one row at a time: no padding, no masks."""
    found = []
    for completion in example.completions:
        row = torch.tensor(np.concatenate([example.context, completion]))
        labels = row.clone()
        labels[: len(example.context)] = -100
        found.append(float(model(row[None], labels=labels[None]).loss))
    return found


def single_losses(model: Model, batches: list[Batch]) -> np.ndarray:
    """The loss of every target in float64, from one batch at a time."""
    return np.concatenate([model.losses(batch) for batch in batches]).astype(np.float64)


@every_device
def test_losses_that_add_up_are_the_mean_of_all_targets(
    torch_model: PreTrainedModel, dtype: str, device: str
) -> None:
    """Batches of three shapes; more full ones than are added up in float32."""
    B, row, count = (2, 3, 107) if device == "emulator" else (3, T, 3 * 35 * T + T + 5)
    model = our_model(torch_model, 3, device, dtype)
    tokens = np.random.default_rng(0).integers(0, V, count)
    batches = list(sequential_batches(tokens, B, row))
    assert len({batch.tokens.shape for batch in batches}) == 3
    loss = validation_loss(model, tokens, B, row)
    bound = (BATCHES_PER_SUM - 1) * 2.0**-24
    assert loss == pytest.approx(single_losses(model, batches).mean(), rel=bound)
    assert loss == mean_loss(model, batches)


def test_many_batches_add_up_without_drift(torch_model: PreTrainedModel) -> None:
    """Equal losses are rounded alike in every float32 sum, so the errors do not cancel."""
    model = our_model(torch_model, 1)
    batch = Batch.of(np.array([[5]]), np.array([[9]]))
    exact = float(model.losses(batch)[0])
    assert mean_loss(model, [batch] * 3001) == pytest.approx(exact, rel=15 * 2.0**-24)
    one_sum = np.full(3001, exact, np.float32).cumsum(dtype=np.float32)[-1] / 3001
    assert abs(one_sum / exact - 1) > 15 * 2.0**-24  # a single float32 sum would drift


def test_a_validation_reports_its_progress_and_can_be_stopped(
    torch_model: PreTrainedModel,
) -> None:
    model = our_model(torch_model, 2)
    tokens = np.random.default_rng(0).integers(0, V, 5 * T + 4)
    done: list[int] = []
    whole = validation_loss(model, tokens, 2, T, advance=done.append)
    assert done == [2 * T, 4 * T, 5 * T, 5 * T + 3]
    asked = 0

    def third_time() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    done.clear()
    assert validation_loss(model, tokens, 2, T, advance=done.append, stop=third_time) is None
    assert done == [2 * T, 4 * T]
    assert asked == 3
    done.clear()
    # A request that comes with the last batch does not throw away a loss that is complete.
    late = validation_loss(model, tokens, 2, T, advance=done.append, stop=lambda: len(done) == 4)
    assert late == whole


def test_hellaswag_in_a_run_changes_nothing(torch_model: PreTrainedModel) -> None:
    """A trainer's model has the arena of a training batch, and goes on training afterwards."""
    examples = some_examples(23)
    expected = sum(answers(our_model(torch_model, 10), examples))
    source = open_model(torch_model.folder)
    weights = []
    for during in (False, True):
        model = new_model(source.config, B=5, T=T)
        optimizer = AdamW(model)
        optimizer.load(load_arena(source))
        rng = np.random.default_rng(0)
        if during:
            done: list[int] = []
            assert hellaswag_accuracy(model, examples, advance=done.append) == (expected, 23)
            assert done == list(range(1, 24))
        for _ in range(2):
            training_step(model, optimizer, [random_batch(source.config, rng, 5, T)], 1e-3)
            if during:
                assert hellaswag_accuracy(model, examples) is not None
                validation_loss(model, np.arange(100), 5, T)
        weights.append(optimizer.master.copy())
    np.testing.assert_array_equal(weights[0], weights[1])


def test_hellaswag_can_be_stopped(
    torch_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = our_model(torch_model, 8)
    batches: list[Batch] = []
    losses = Model.losses
    monkeypatch.setattr(
        Model, "losses", lambda self, batch: batches.append(batch) or losses(self, batch)
    )
    done: list[int] = []
    examples = some_examples(23)
    stopped = hellaswag_accuracy(model, examples, advance=done.append, stop=lambda: len(done) == 4)
    assert stopped is None
    assert (len(done), len(batches)) == (4, 2)  # two examples in a batch


@every_device
def test_completions_cost_what_transformers_says(
    torch_model: PreTrainedModel, dtype: str, device: str
) -> None:
    small = device == "emulator"
    examples = some_examples(3, longest=3) if small else some_examples(23)
    model = our_model(torch_model, 8, device, dtype)
    found = np.array(list(completion_losses(model, examples)))
    expected = np.array([torch_losses(torch_model, example) for example in examples])
    np.testing.assert_allclose(found, expected, rtol=2e-5 if dtype == "fp32" else 0.05)


@pytest.mark.parametrize("B", [4, 7, 8, 13, 100])
def test_any_batch_finds_the_same_answers(torch_model: PreTrainedModel, B: int) -> None:
    examples = some_examples(23)
    expected = [
        int(np.argmin(torch_losses(torch_model, example))) == example.label for example in examples
    ]
    assert 0 < sum(expected) < len(expected)
    assert list(answers(our_model(torch_model, B), examples)) == expected


def test_llmcs_way_counts_the_same(torch_model: PreTrainedModel) -> None:
    """llm.c fills rows of T, leaves in them what was there before, and masks what counts."""
    examples = some_examples(23)
    B = 10
    model = our_model(torch_model, B)
    tokens, targets = np.zeros((2, B, T), np.int32)
    correct = 0
    for first in range(0, len(examples), B // 4):
        batch = examples[first : first + B // 4]
        mask = np.zeros((B, T), bool)
        for i, example in enumerate(batch):
            n = len(example.context)
            for j, completion in enumerate(example.completions):
                tokens[4 * i + j, :n] = example.context
                for k, token in enumerate(completion):
                    if n + k < T:  # llm.c refuses rows that fill T; the last input is not needed
                        tokens[4 * i + j, n + k] = token
                    targets[4 * i + j, n + k - 1] = token
                    mask[4 * i + j, n + k - 1] = True
        losses = model.losses(Batch.of(tokens, targets)).reshape(B, T)
        for i, example in enumerate(batch):
            best, best_loss = -1, 0.0
            for j in range(4):
                row = 4 * i + j
                mean = sum(map(float, losses[row][mask[row]])) / mask[row].sum()
                if j == 0 or mean < best_loss:
                    best, best_loss = j, mean
            correct += best == example.label
    assert sum(answers(model, examples)) == correct


def test_the_first_of_equals_wins(torch_model: PreTrainedModel) -> None:
    same = (np.array([5, 6]),) * 4
    examples = [Example(context=np.array([1]), completions=same, label=i) for i in range(4)]
    model = our_model(torch_model, 4)
    assert list(answers(model, examples)) == [True, False, False, False]


def test_damaged_weights_are_named(torch_model: PreTrainedModel) -> None:
    model = our_model(torch_model, 4)
    model.params.lnfw[0] = np.nan
    with pytest.raises(CheckpointError, match="weights are damaged"):
        list(answers(model, some_examples(1)))


def test_examples_that_cannot_be_scored_are_named() -> None:
    good = some_examples(1)
    long = Example(
        context=np.full(10, 255),
        completions=(np.ones(1), np.ones(6), np.ones(2), np.ones(3)),
        label=0,
    )
    assert row_length(long) == 15
    check_examples([*good, long], vocab_size=256, B=4, T=24, where="x.bin")
    check_examples([long], vocab_size=256, B=4, T=15, where="x.bin")
    with pytest.raises(
        DataError, match=r"x\.bin: example 1 takes 15 positions, .* the 14 of a row"
    ):
        check_examples([some_examples(1, 3)[0], long], vocab_size=256, B=4, T=14, where="x.bin")
    with pytest.raises(DataError, match=r"x\.bin: example 1 has token 255, outside .* of 255"):
        check_examples([some_examples(5, 1)[1], long], vocab_size=255, B=4, T=24, where="x.bin")
    with pytest.raises(ConfigError, match=r"batch size 3 is too small for x\.bin"):
        check_examples(good, vocab_size=257, B=3, T=24, where="x.bin")


@pytest.fixture
def run(run: Run) -> Run:
    """Runs the command as the fixture of conftest.py does, on the CPU."""
    return lambda *args: run(*args, "--device", "cpu")


@torch.no_grad()
def torch_mean_loss(model: PreTrainedModel, texts: list[list[int]], T: int) -> float:
    """Of every token but each text's first, in rows of T that begin one after the other."""
    losses: list[float] = []
    for text in texts:
        for start in range(0, len(text) - 1, T):
            row = torch.tensor(text[start : start + T + 1])
            logits = model(row[None, :-1]).logits[0]
            losses += torch.nn.functional.cross_entropy(logits, row[1:], reduction="none").tolist()
    return sum(losses) / len(losses)


def printed(out: str) -> tuple[float, float, float | None, int]:
    match = re.search(
        r"loss (\S+)  perplexity (\S+)(?:  (\S+) bits per byte)?  over (\S+) tokens", out
    )
    assert match, out
    loss, perplexity, per_byte, count = match.groups()
    return (
        float(loss), float(perplexity), per_byte and float(per_byte), int(count.replace(",", "")),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "row"), [((), T), (("--batch-size", "3", "--seq-len", "7"), 7)]
)
def test_all_of_a_text_counts(
    torch_model: PreTrainedModel, run: Run, options: tuple[str, ...], row: int
) -> None:
    text = "\ufeffnaïve cafés: £5\n" * 9
    Path("text.txt").write_text(text, "utf-8")
    code, out, err = run("evaluate", torch_model.folder, "--data", "text.txt", *options)
    assert code == 0, err
    content = text[1:].encode()
    expected = torch_mean_loss(torch_model, [[256, *content]], row)
    loss, perplexity, per_byte, count = printed(out)
    assert loss == pytest.approx(expected, abs=1e-4)
    assert perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert per_byte == pytest.approx(expected / math.log(2), abs=1e-3)
    assert count == len(content)


def test_token_files_by_a_pattern(torch_model: PreTrainedModel, run: Run) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, V, n).tolist() for n in (60, 25, 2)]
    for i, tokens in enumerate(texts):
        write_tokens(Path(f"val_{i}.bin"), np.array(tokens))
    code, out, err = run("evaluate", torch_model.folder, "--data", "val_*.bin")
    assert code == 0, err
    expected = torch_mean_loss(torch_model, texts, T)
    loss, _, per_byte, count = printed(out)
    assert loss == pytest.approx(expected, abs=1e-4)
    assert count == 59 + 24 + 1
    marks = sum(text[1:].count(256) for text in texts)  # count for tokens, not for bytes
    assert per_byte == pytest.approx(expected / math.log(2) * count / (count - marks), abs=1e-3)


def test_without_a_tokenizer_there_are_no_bits_per_byte(
    torch_model: PreTrainedModel, run: Run, tmp_path: Path
) -> None:
    torch_model.save_pretrained(tmp_path / "bare")
    write_tokens(Path("val.bin"), np.arange(50))
    code, out, err = run("evaluate", str(tmp_path / "bare"), "--data", "val.bin")
    assert code == 0, err
    assert "no bits per byte: " in out
    assert printed(out)[2] is None
    Path("text.txt").write_text("some text")
    code, out, err = run("evaluate", str(tmp_path / "bare"), "--data", "text.txt")
    assert code == 1
    assert "no tokenizer" in err


def test_hellaswag(torch_model: PreTrainedModel, run: Run) -> None:
    examples = some_examples(23)
    write_choices(Path("h.bin"), examples)
    right = sum(
        int(np.argmin(torch_losses(torch_model, example))) == example.label for example in examples
    )
    code, out, err = run("evaluate", torch_model.folder, "--hellaswag", "h.bin")
    assert code == 0, err
    assert out == f"HellaSwag {right}/23 = {right / 23:.4f} (acc_norm)\n"
    Path("text.txt").write_text("some text")
    code, out, _ = run("evaluate", torch_model.folder, "--hellaswag", "h.bin", "--data", "text.txt")
    assert f"HellaSwag {right}/23" in out
    assert printed(out)[3] == 9


SMALL = (
    "--model", "nano", "--tokenizer", "bpe:260", "--batch-size", "3", "--seq-len", "8",
    "--steps", "2",
)  # fmt: skip


def test_a_run_is_held_against_its_own_data(run: Run) -> None:
    Path("text.txt").write_text("to be or not to be\n" * 200)
    code, trained, err = run("train", "--data", "text.txt", *SMALL)
    assert code == 0, err
    code, out, err = run("evaluate", "runs/001")
    assert code == 0, err
    assert "text, held out" in out
    loss, _, per_byte, count = printed(out)
    validations = re.findall(r"validation loss (\S+)  (\S+) bits per byte", trained)
    assert (f"{loss:.4f}", f"{per_byte:.3f}") == validations[-1]
    val = json.loads(Path("runs/001/step_00000002/training.json").read_text())
    assert val["train"]["seq_len"] == 8
    assert count > 100
    Path("text.txt").write_text("another text altogether\n" * 200)
    code, _, err = run("evaluate", "runs/001")
    assert code == 1
    assert re.search(r"text\.txt gives another vocabulary than the run has", err)
    Path("text.txt").unlink()
    code, _, err = run("evaluate", "runs/001")
    assert code == 1
    assert "no file" in err
    assert len(err.splitlines()) == 1


def test_a_built_in_corpus_counts_as_far_as_it_is_held_out(
    torch_model: PreTrainedModel, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_gpt2.cli import evaluate

    documents = ("one", "and two")
    corpus = python_docs().__class__("x", ("trained on",), documents)
    monkeypatch.setattr(evaluate, "BUILT_IN", {"python-docs": lambda: corpus})
    code, out, err = run("evaluate", torch_model.folder, "--data", "python-docs")
    assert code == 0, err
    text = [256, *b"one", 256, *b"and two"]
    assert printed(out)[0] == pytest.approx(torch_mean_loss(torch_model, [text], T), abs=1e-4)


def _damage_weights(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wpe.weight"][0] = np.nan
    save_file(tensors, folder / "model.safetensors")


def _damage_training(folder: Path) -> None:
    content = json.loads((folder / "training.json").read_text())
    del content["train"]["data"]
    (folder / "training.json").write_text(json.dumps(content))
    seal(folder)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), r"is no run of gpu-gpt2, so it has no text of its own; name one with --data"),
        (("--data", "none.txt"), r"no file none\.txt"),
        (("--data", "*.bin"), r"no file matches \*\.bin"),
        (("--data", "latin1.txt"), r"latin1\.txt is not UTF-8 text: byte 0xe9 at offset 3"),
        (("--data", "cut.tokens"), r"cut\.tokens: 40 tokens, as offset 8 says"),
        (("--data", "beyond.tokens"), r"beyond\.tokens: token 257 at position 3 is outside"),
        (("--data", "one.tokens"), r"1 tokens of validation text are too few"),
        (("--hellaswag", "none.h"), r"cannot read the multiple-choice file none\.h"),
        (("--hellaswag", "cut.h"), r"cut\.h: "),
        (("--hellaswag", "h", "--batch-size", "3"), r"batch size 3 is too small for h"),
        (("--hellaswag", "h", "--seq-len", "2"), r"h: example \d+ takes \d+ positions, more than"),
        (("--hellaswag", "beyond.h"), r"beyond\.h: example 0 has token 300, outside"),
        (("--data", "text.txt", "--seq-len", "25"), r"sequence length 25 is longer .* of 24"),
        (("--data", "text.txt", "--seq-len", "0"), r"batches of 4 x 0 tokens cannot be"),
        (("--data", "text.txt", "--batch-size", "-1"), r"batches of -1 x 24 tokens cannot be"),
        (("--data", "text.txt", "--batch-size", "99999999"), r"at most 1,073,741,824"),
        (("--data", "text.txt", "--dtype", "bf16"), r"the CPU trains in fp32 only"),
    ],
)
def test_bad_input(
    torch_model: PreTrainedModel, run: Run, args: tuple[str, ...], message: str
) -> None:
    Path("text.txt").write_text("some text")
    Path("latin1.txt").write_bytes(b"caf\xe9 " * 100)
    write_tokens(Path("cut.tokens"), np.arange(40))
    Path("cut.tokens").write_bytes(Path("cut.tokens").read_bytes()[:-1])
    write_tokens(Path("beyond.tokens"), np.array([1, 2, 3, 257, 4]))
    write_tokens(Path("one.tokens"), np.array([1]))
    write_choices(Path("h"), some_examples(5))
    Path("cut.h").write_bytes(Path("h").read_bytes()[:-2])
    beyond = Example(context=np.array([300]), completions=(np.array([1]),) * 4, label=0)
    write_choices(Path("beyond.h"), [beyond])
    code, out, err = run("evaluate", torch_model.folder, *args)
    assert code == 1, out
    assert len(err.splitlines()) == 1, err
    assert re.search(message, err), err


@pytest.mark.parametrize(
    ("damage", "args", "message"),
    [
        (_damage_weights, (), r"the loss is nan: the model's weights are damaged"),
        (_damage_weights, ("--hellaswag", "h"), r"not a finite number: .* are damaged"),
        (_damage_training, (), r"training\.json: missing training settings: data"),
    ],
)
def test_a_damaged_run(run: Run, damage: Any, args: tuple[str, ...], message: str) -> None:
    Path("text.txt").write_text("to be or not to be\n" * 200)
    write_choices(Path("h"), some_examples(2, longest=3))
    assert run("train", "--data", "text.txt", *SMALL)[0] == 0
    damage(Path("runs/001/step_00000002"))
    code, _, err = run("evaluate", "runs/001", *args)
    assert code == 1
    assert len(err.splitlines()) == 1, err
    assert re.search(message, err), err
