"""Models and tokenizers of llama2.c in the commands: convert, train, generate, data prepare."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama2c_models import A, B, model, model_file, tokenizer_entries, tokenizer_file

from gpu_gpt2 import convert
from gpu_gpt2.data.dataset import prepare
from gpu_gpt2.device import open_device
from gpu_gpt2.errors import DataError
from gpu_gpt2.formats import files, hf, llama2c
from gpu_gpt2.formats.llama2c_tokenizer import tokenizer_content
from gpu_gpt2.formats.tokens import read_tokens
from gpu_gpt2.models.batch import Batch
from gpu_gpt2.models.families import new_model
from gpu_gpt2.models.init import InitialWeights
from gpu_gpt2.models.weights import Arena, load_arena
from gpu_gpt2.open_model import open_model, tokenizer_of
from gpu_gpt2.ops import ops_for
from gpu_gpt2.tokenizer import GPT2Tokenizer, Llama2cTokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("version", ["v0", "v1"])
@pytest.mark.parametrize("config", [A, B], ids=["A", "B"])
def test_there_and_back_is_byte_for_byte(config: object, version: str, run: Run) -> None:
    before = model_file(Path("a.bin"), config, int(version[1])).read_bytes()  # type: ignore[arg-type]
    tokenizer = tokenizer_file(Path("tok288.bin")).read_bytes()
    code, out, err = run("convert", "a.bin", "folder", "--to", "hf")
    assert (code, err) == (0, "")
    assert out.startswith("wrote folder: a Llama of ")
    assert "try it: gpu-gpt2 generate folder" in out
    assert Path("folder/tokenizer.bin").read_bytes() == tokenizer
    Path("new").mkdir()
    code, out, err = run("convert", "folder", "new/b.bin", "--to", f"llama2c-{version}")
    assert (code, err) == (0, "")
    assert "its tokenizer for llama2.c's programs: new/tokenizer.bin" in out
    assert Path("new/b.bin").read_bytes() == before
    assert Path("new/tokenizer.bin").read_bytes() == tokenizer
    assert tokenizer_of(open_model("new/b.bin")).prompt_ids("the") == [1, 263]


def test_int8_is_converted(run: Run) -> None:
    model_file(Path("a.bin"))
    assert run("convert", "a.bin", "q.bin", "--to", "llama2c-v2")[0] == 0
    assert Path("q.bin").read_bytes() == model_file(Path("b.bin"), A, 2).read_bytes()
    code, out, _ = run("convert", "q.bin", "c.bin", "--to", "llama2c-v0")
    assert code == 0
    assert (
        "no tokenizer.bin: the source has no tokenizer that this file of llama2.c can hold" in out
    )
    found, expected = load_arena(open_model("c.bin")), model(A).weights
    assert 0 < np.abs(found - expected).max() < 0.005


def test_transformers_computes_what_llama2c_does(run: Run) -> None:
    from transformers import AutoModelForCausalLM

    model_file(Path("b.bin"), B)
    assert run("convert", "b.bin", "folder", "--to", "hf")[0] == 0
    opened = AutoModelForCausalLM.from_pretrained("folder", dtype=torch.float32)
    with torch.no_grad():
        logits = opened(torch.tensor([[1, 260, 17, 263, 5, 287, 100, 42]])).logits[0].numpy()
    assert logits.argmax(axis=1).tolist() == [196, 191, 133, 191, 147, 261, 55, 178]
    expected = [1.439948, 5.764609, -0.470039, -0.658558, 0.300384, -2.344806, 2.041005, -3.010952]
    np.testing.assert_allclose(logits[7, :8], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "argmax", "expected"),
    [
        (A, [204, 204, 240, 24, 28, 25, 130, 107],
         [5.561991, 5.169609, -1.045133, 7.265559, -5.138434, 1.523735, -0.196927, 0.863704]),
        (B, [196, 191, 133, 191, 147, 261, 55, 178],
         [1.439948, 5.764609, -0.470039, -0.658558, 0.300384, -2.344806, 2.041005, -3.010952]),
    ],
    ids=["A", "B"],
)  # fmt: skip
def test_logits_are_those_of_llama2c(
    config: object, argmax: list[int], expected: list[float], tmp_path: Path
) -> None:
    source = open_model(model_file(tmp_path / "a.bin", config))  # type: ignore[arg-type]
    ops = ops_for(open_device("cpu"), "fp32")
    ours = new_model(source.config, ops, max_batch=1, max_seq_len=8, training=False)
    ours.load(load_arena(source))
    logits = ours.forward(np.array([[1, 260, 17, 263, 5, 287, 100, 42]], np.int32))
    logits = logits[:, : source.config.vocab_size]
    assert logits.argmax(axis=1).tolist() == argmax
    np.testing.assert_allclose(logits[7, :8], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("nano", "b.bin", "--to", "llama2c-v0"), "llama2.c's files hold Llama models only, and "
         "this model is a GPT-2; convert to hf, llmc-fp32 or llmc-bf16"),
        (("a.bin", "b.bin", "--to", "llmc-fp32"), "llm.c's files hold GPT-2 only, and this model "
         "is a Llama"),
        (("a.bin", "b.bin", "--to", "llama2c-v3"), "unknown kind of file 'llama2c-v3'; choose --to "
         "hf | llmc-fp32 | llmc-bf16 | llama2c-v0 | llama2c-v1 | llama2c-v2"),
        (("theta", "b.bin", "--to", "llama2c-v2"), "rope_theta is 500000, and llama2.c's files "),
        (("junk.bin", "b", "--to", "hf"), "junk.bin: begins neither as a model file of llm.c "
         "(magic number 20240326) nor as one of llama2.c (magic number 0x616b3432, or the sizes "),
        (("empty.bin", "b", "--to", "hf"), "empty.bin: begins neither as a model file of llm.c"),
        (("cut.bin", "b", "--to", "hf"), "cut.bin: version 0 of a Llama of 2 layers of 64, "
         "vocabulary 288, context 32 would make 371996 bytes, but the file holds 371000;"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_and_leaves_nothing(
    args: tuple[str, ...], message: str, run: Run
) -> None:
    model_file(Path("a.bin"))
    shutil.copy("a.bin", "cut.bin")
    os.truncate("cut.bin", 371_000)
    Path("junk.bin").write_bytes(bytes(range(256)) * 20)
    Path("empty.bin").touch()
    config = replace(A, rope_theta=500_000.0)
    hf.write_model(Path("theta"), Arena(config, model(A).weights, 1))
    before = sorted(Path().rglob("*"))
    code, out, err = run("convert", *args)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert message in err
    assert sorted(Path().rglob("*")) == before


def test_the_tokenizer_beside_a_model(run: Run) -> None:
    """tok288.bin before tokenizer.bin; one of another size is refused; none is written over."""
    model_file(Path("a.bin"))
    message = "the model has 288 tokens and no tokenizer; .* or llama2.c's tokenizer.bin beside"
    with pytest.raises(DataError, match=message):
        tokenizer_of(open_model("a.bin"))
    content = tokenizer_file(Path("tokenizer.bin")).read_bytes()
    assert isinstance(tokenizer_of(open_model("a.bin")), Llama2cTokenizer)
    Path("tokenizer.bin").write_bytes(content + b"\0\0\0\0\2\0\0\0zz")
    message = r"tokenizer.bin: its tokenizer has 289 tokens, the model 288; they belong to diff"
    with pytest.raises(DataError, match=message):
        tokenizer_of(open_model("a.bin"))
    assert run("convert", "a.bin", "b.bin", "--to", "llama2c-v1")[0] == 0
    assert Path("tokenizer.bin").read_bytes() != content
    tokenizer_file(Path("tok288.bin"))
    assert isinstance(tokenizer_of(open_model("a.bin")), Llama2cTokenizer)
    assert run("convert", "a.bin", "out", "--to", "hf")[0] == 0
    assert Path("out/tokenizer.bin").read_bytes() == content
    assert json.loads(Path("out/config.json").read_text())["bos_token_id"] == 1


def test_a_tokenizer_of_another_model_stays(run: Run) -> None:
    """The source's tokenizer is then written under the other name that llama2.c's models have."""
    model_file(Path("a.bin"))
    content = tokenizer_file(Path("tok288.bin")).read_bytes()
    Path("new").mkdir()
    Path("new/tokenizer.bin").write_bytes(content + b"\0\0\0\0\2\0\0\0zz")
    code, out, err = run("convert", "a.bin", "new/model", "--to", "llama2c-v0")
    assert (code, err) == (0, "")
    assert "its tokenizer for llama2.c's programs: new/tok288.bin" in out
    assert Path("new/tok288.bin").read_bytes() == content
    assert Path("new/tokenizer.bin").stat().st_size == len(content) + 10
    Path("tok288.bin").unlink()
    Path("new/tok288.bin").unlink()
    _, out, _ = run("convert", "a.bin", "new/other.bin", "--to", "llama2c-v0")
    assert "no tokenizer.bin: the source has no tokenizer" in out


def test_a_vocabulary_that_tokenizer_bin_cannot_hold(run: Run) -> None:
    config = replace(A, vocab_size=257)
    hf.write_model(Path("folder"), InitialWeights(config=config, seed=1))
    GPT2Tokenizer.of_bytes().save(Path("folder"))
    code, out, err = run("convert", "folder", "a.bin", "--to", "llama2c-v0")
    assert (code, err) == (0, "")
    assert "no tokenizer.bin: the source has no tokenizer that this file of llama2.c can" in out
    assert "try it" not in out
    assert sorted(os.listdir()) == ["a.bin", "folder"]


@pytest.mark.parametrize("to", ["llama2c-v0", "llama2c-v2"])
def test_a_disk_that_fills_up_leaves_nothing(
    to: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [20]

    def write_array(*args: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        files.write_array(*args)

    model_file(Path("a.bin"))
    monkeypatch.setattr(llama2c, "write_array", write_array)
    code, _, err = run("convert", "a.bin", "b", "--to", to)
    assert code == 1
    assert err.endswith(
        "/b: No space left on device; nothing of it is left, so mend that and try again\n"
    )
    assert os.listdir() == ["a.bin"]


@pytest.mark.parametrize("to", ["llama2c-v0", "llama2c-v2"])
def test_a_source_that_turns_out_bad_leaves_nothing(to: str, run: Run) -> None:
    source = open_model(model_file(Path("a.bin")))
    os.truncate("a.bin", 100_000)
    with pytest.raises(DataError, match=r"a\.bin: \d+ bytes at offset .* became shorter"):
        convert.convert(source, Path("b"), to, lambda _: None)
    assert os.listdir() == ["a.bin"]


def test_training_data_has_bos_between_documents(run: Run) -> None:
    tokenizer_file(Path("tok288.bin"))
    Path("texts.jsonl").write_text('{"text": "the and"}\n{"text": "hé"}\n')
    code, _, err = run(
        "data", "prepare", "texts.jsonl", "--tokenizer", "tok288.bin", "--out", "out",
        "--val-tokens", "0",
    )  # fmt: skip
    assert code == 0, err
    (path,) = Path("out").rglob("*train*.bin")
    assert read_tokens(path).tolist() == [1, 263, 268, 1, 272, 274, 279]


def test_a_text_is_tokenised_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer_file(Path("tok288.bin"))
    Path("book.txt").write_text("the and hé " * 200)
    first = prepare("book.txt", "tok288.bin")
    assert first.train[0][:3].tolist() == [1, 263, 268]
    monkeypatch.setattr(Llama2cTokenizer, "encode", None)
    again = prepare("book.txt", "tok288.bin")
    assert again.train[0].tolist() == first.train[0].tolist()
    assert again.tokenizer.digest() == first.tokenizer.digest()


def test_a_run_keeps_its_tokenizer(run: Run) -> None:
    tokenizer_file(Path("tok288.bin"))
    Path("book.txt").write_text("the and hé " * 200)
    code, _, err = run(
        "train", "--model", "llama:nano", "--tokenizer", "tok288.bin", "--data", "book.txt",
        "--device", "cpu", "--steps", "2", "--run-dir", "run", "--batch-size", "2", "--seq-len",
        "16", "--total-batch-tokens", "32", "--sample-every", "0",
    )  # fmt: skip
    assert code == 0, err
    Path("tok288.bin").unlink()
    source = open_model("run")
    assert isinstance(tokenizer_of(source), Llama2cTokenizer)
    assert (source.config.vocab_size, source.eot) == (288, 1)
    code, _, err = run("generate", "run", "--prompt", "the and", "--max-tokens", "3")
    assert code == 0, err
    assert run("train", "--resume", "--run-dir", "run", "--steps", "3")[0] == 0
    assert run("convert", "run", "a.bin", "--to", "llama2c-v2")[0] == 0
    assert load_arena(open_model("a.bin")).size == load_arena(open_model("run")).size
    assert Path("tokenizer.bin").is_file()


def test_names_without_a_suffix_and_folders_with_one(run: Run) -> None:
    """The first bytes tell the kind of a file; the name of a folder tells nothing."""
    model_file(Path("model"))
    assert open_model("model").config == A
    assert run("convert", "model", "folder.bin", "--to", "hf")[0] == 0
    assert open_model("folder.bin").config == A
    assert run("convert", "folder.bin", "c", "--to", "llama2c-v1")[0] == 0
    assert open_model("c").config == A


def test_tokens_that_16_bits_do_not_hold_are_evaluated(run: Run) -> None:
    """A vocabulary of more than 65,536 tokens, of which the text is one."""
    V = 65_600
    config = replace(A, vocab_size=V, n_embd=8, n_head=2, n_kv_head=1, n_inner=16)
    entries = tokenizer_entries()
    words = [word for word, _ in entries] + [b"w%d" % i for i in range(V - len(entries) - 1)]
    scores = [score for _, score in entries] + [-1e6] * (V - len(entries))
    Path("tokenizer.bin").write_bytes(tokenizer_content([*words, "é".encode() * 2], [*scores]))
    source = InitialWeights(config=config, seed=0)
    llama2c.write_model(Path("a.bin"), source, 0)
    Path("text.txt").write_text("éé" * 6, "utf-8")
    tokens = tokenizer_of(open_model("a.bin")).prompt_ids("éé" * 6)
    assert tokens == [1, 272, *[V - 1] * 6]
    model = new_model(
        config, ops_for(open_device("cpu"), "fp32"), max_batch=1, max_seq_len=7, training=False
    )
    model.load(load_arena(source))
    batch = Batch.of(np.array([tokens[:-1]], np.int32), np.array([tokens[1:]], np.int32))
    expected = float(model.losses(batch).mean())
    code, out, err = run("evaluate", "a.bin", "--data", "text.txt", "--device", "cpu")
    assert (code, err) == (0, "")
    assert out.startswith(f"loss {expected:.4f}  ")
