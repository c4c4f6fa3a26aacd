"""generate and chat with files of llama2.c: the text is what llama2.c's run prints."""

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import llama2c_models
import pytest
from llama2c_models import A, B

from gpu_gpt2.config import LlamaConfig

Run = Callable[..., tuple[int, str, str]]


def write_files(config: LlamaConfig, version: int = 0) -> None:
    llama2c_models.model_file(Path("model.bin"), config, version)
    llama2c_models.tokenizer_file(Path("tokenizer.bin"))


@pytest.mark.parametrize(
    ("config", "max_tokens", "text"), [(A, 32, ""), (A, 99, ""), (B, 24, "th|a"), (B, 3, "th")]
)
def test_the_text_that_run_prints(
    run: Run, config: LlamaConfig, max_tokens: int, text: str
) -> None:
    """Outputs of llama2.c's run with -t 0. Model B draws BOS as its eighth token."""
    write_files(config)
    options = ("--sampler", "llama2c", "--temperature", "0", "--max-tokens", str(max_tokens))
    code, out, err = run("generate", "model.bin", "--device", "cpu", *options)
    assert (code, out) == (0, f"{text}\n"), err


def test_tokens_from_an_int8_file(run: Run) -> None:
    """Model A in groups of 64 takes the argmax of the float32 model from BOS on."""
    write_files(A, version=2)
    options = ("--sampler", "llama2c", "--temperature", "0", "--max-tokens", "6", "--output", "ids")
    code, out, err = run("generate", "model.bin", "--device", "cpu", *options)
    assert (code, out) == (0, "1 204 204 240 240 240 240\n"), err


def test_a_tokenizer_from_elsewhere(run: Run) -> None:
    write_files(B)
    Path("tokenizer.bin").rename("words.bin")
    options = ("--device", "cpu", "--prompt", "the", "--max-tokens", "0")
    code, _, err = run("generate", "model.bin", *options)
    assert code == 1
    assert "has 288 tokens and no tokenizer" in err or "the model has 288 tokens" in err
    assert run("generate", "model.bin", *options, "--tokenizer", "words.bin")[:2] == (0, "the\n")
    code, _, err = run("generate", "model.bin", *options, "--tokenizer", "no.bin")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "no.bin" in err


def test_a_chat_with_a_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(A)
    monkeypatch.setattr("sys.stdin", StringIO("a\n"))
    code, out, err = run("chat", "model.bin", "--device", "cpu")
    assert code == 0, err
    assert out.startswith("User: Assistant: ")
