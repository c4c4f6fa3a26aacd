"""`gpu-gpt2 generate`: prompts, forms of the output, samples, samplers, and how it ends."""

import io
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from llama_words import BOS, EOS, LlamaWords, byte_ids
from models import noisy_weights

from gpu_gpt2.cli import generate as generate_module
from gpu_gpt2.cli import text as text_module
from gpu_gpt2.cli.text import Stopwatch, show
from gpu_gpt2.config import GPT2_VOCAB_SIZE, LlamaConfig
from gpu_gpt2.errors import DataError
from gpu_gpt2.models.decoder import Sampling
from gpu_gpt2.models.weights import Arena, named
from gpu_gpt2.samplers import Llama2cSampler, LlmcSampler

Run = Callable[..., tuple[int, str, str]]
CONFIG = LlamaConfig(
    vocab_size=LlamaWords.vocab_size,
    n_positions=32,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    n_inner=48,
)
SOURCE = Arena(CONFIG, 10 * noisy_weights(CONFIG, noise_seed=1))
EMPTY_PROMPT = ("generate", "model", "--device", "cpu")


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the command open a small Llama with a vocabulary of Llama 2."""
    monkeypatch.setattr(generate_module, "open_model", lambda name: SOURCE)
    monkeypatch.setattr(text_module, "tokenizer_of", lambda source: LlamaWords())


@dataclass
class Call:
    """What the command asks of gpu_gpt2.generate."""

    prompts: list[list[int]]
    length: int
    max_tokens: int
    sampling: object
    stop: frozenset[int]


def scripted(
    monkeypatch: pytest.MonkeyPatch, *sequences: list[int], end: type[BaseException] | None = None
) -> list[Call]:
    """Lets the command generate these tokens, and then raise `end`; returns its calls."""
    calls = []

    def fake(
        decoder: object,
        prompts: list[np.ndarray],
        *,
        max_tokens: int,
        sampling: object,
        stop: frozenset[int],
    ) -> Iterator[list[int | None]]:
        ids = [prompt.tolist() for prompt in prompts]
        calls.append(Call(ids, decoder.length, max_tokens, sampling, stop))
        for i in range(max(map(len, sequences), default=0)):
            yield [tokens[i] if i < len(tokens) else None for tokens in sequences]
        if end:
            raise end

    monkeypatch.setattr(generate_module, "generate_tokens", fake)
    return calls


def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the command shows, one for each time."""
    texts: list[str] = []
    monkeypatch.setattr(generate_module, "show", texts.append)
    return texts


def test_each_token_is_shown_when_it_comes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = shown(monkeypatch)
    scripted(monkeypatch, [*byte_ids("dé\n"), BOS])
    code, _, err = run(*EMPTY_PROMPT, "--prompt", "abc")
    assert code == 0, err
    assert texts == ["abc", "d", "", "é", "\n", "", "", "\n"]
    assert re.fullmatch(r"prompt 5 tokens, generated 5 tokens, [\d,.]+ tokens/s\n", err)


def test_output_is_flushed_also_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    class Pipe(io.StringIO):
        def write(self, text: str) -> int:
            done.append(text)
            return len(text)

        def flush(self) -> None:
            done.append("flushed")

    monkeypatch.setattr(sys, "stdout", Pipe())
    show("a\x1b[1mb")
    assert done == ["a\x1b[1mb", "flushed"]


def test_the_last_character_may_be_incomplete(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, byte_ids("é")[:1])
    assert run(*EMPTY_PROMPT)[:2] == (0, "\ufffd\n")


@pytest.mark.parametrize("source", ["--prompt", "-", "--prompt-file"])
def test_where_a_prompt_comes_from(run: Run, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    text = "ab é\n"
    Path("prompt.txt").write_bytes(text.encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    given = {
        "--prompt": ("--prompt", text),
        "-": ("--prompt", "-"),
        "--prompt-file": ("--prompt-file", "prompt.txt"),
    }[source]
    calls = scripted(monkeypatch)
    code, out, err = run(*EMPTY_PROMPT, *given)
    assert (code, out) == (0, f"{text}\n"), err
    assert calls[0].prompts == [LlamaWords().prompt_ids(text)]


def test_prompts_of_ids(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = scripted(monkeypatch, [70])
    for ids, text in (("1 100 101", "ab"), (" 100\n 101 ", "ab"), ("1 1", "\n<s>\n"), ("1", "")):
        code, out, err = run(*EMPTY_PROMPT, "--prompt-ids", ids)
        assert (code, out) == (0, f"{text}C\n"), err
        assert calls.pop().prompts == [[int(i) for i in ids.split()]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a", "--prompt-ids", "1"], "--prompt and --prompt-ids are both prompts"),
        (["--prompt-file", "no.txt"], "--prompt-file: cannot read no.txt: No such file"),
        (["--prompt-file", "."], "--prompt-file: cannot read .: Is a directory"),
        (["--prompt-file", "latin1.txt"], "latin1.txt is not UTF-8 text: byte 0xe9 at offset 3"),
        (["--prompt", "-"], "standard input is not UTF-8 text: byte 0xe9 at offset 3"),
        (["--prompt-ids", ""], "--prompt-ids is empty; give at least one token id"),
        (["--prompt-ids", "1 x"], "--prompt-ids takes whole numbers such as '1 5 9', not 'x'"),
        (["--prompt-ids", "1 -5"], "--prompt-ids takes whole numbers such as '1 5 9', not '-5'"),
        (["--prompt-ids", "1 ²"], "--prompt-ids takes whole numbers such as '1 5 9', not '²'"),
        (["--prompt-ids", "264"], "--prompt-ids: the model has no token 264; its ids are 0 to 263"),
        (["--prompt-ids", "9" * 5000], "--prompt-ids: the model has no token 999"),
        (["--prompt", "x" * 31], "the prompt has 33 tokens and the model's context 32; shorten"),
        (["--max-tokens", "-1"], "--max-tokens must be a whole number >= 0, not -1"),
        (["--num-samples", "0"], "--num-samples must be a whole number >= 1, not 0"),
        (["--temperature", "-0.1"], "--temperature must be a finite number >= 0, not -0.1"),
        (["--temperature", "nan"], "--temperature must be a finite number >= 0, not nan"),
        (["--top-k", "-1"], "--top-k must be a whole number from 0 to 2,147,483,647, not -1"),
        (["--top-p", "0"], "--top-p must be a number > 0 and <= 1, not 0"),
        (["--top-p", "1.1"], "--top-p must be a number > 0 and <= 1, not 1.1"),
        (["--top-p", "nan"], "--top-p must be a number > 0 and <= 1, not nan"),
        (["--seed", "-1"], "--seed must be a whole number from 0 to 2^63 - 1, not -1"),
        (["--output", "xml"], "--output must be one of text, ids, json, not 'xml'"),
        (["--sampler", "x"], "--sampler must be one of default, llmc, llama2c, not 'x'"),
        (["--sampler", "llmc", "--top-p", "0.9"], "--sampler llmc has no --top-p, as the program"),
        (["--sampler", "llama2c", "--top-k", "0"], "--sampler llama2c has no --top-k, as the pro"),
        (["--sampler", "llama2c", "--seed", "0"], "--seed 0 gives only zeros with --sampler llama"),
        (["--tokenizer", "gpt2"], "--tokenizer gpt2 has 50257 tokens and the model 264; give the"),
    ],
)
def test_bad_input(
    run: Run, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    Path("latin1.txt").write_bytes(b"caf\xe9")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    code, out, err = run(*EMPTY_PROMPT, *options)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1, err
    assert err.startswith(f"gpu-gpt2: {message}")


def test_a_long_prompt_can_be_truncated(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = scripted(monkeypatch, byte_ids("!"))
    code, out, err = run(*EMPTY_PROMPT, "--prompt", "x" * 20 + "y" * 20, "--truncate-prompt")
    assert (code, out) == (0, "x" * 20 + "y" * 20 + "!\n")
    assert calls[0].prompts == [byte_ids("x" * 12 + "y" * 20)]
    assert err.startswith("prompt 32 tokens")


def test_ids_and_json(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are printed in their order, although the second one ends first."""
    sequences = ([100, 101, 102], [103, BOS], [104, 105, 2])
    scripted(monkeypatch, *sequences)
    options = ("--prompt", "a", "--num-samples", "3", "--max-tokens", "3")
    code, out, _ = run(*EMPTY_PROMPT, *options, "--output", "ids")
    assert code == 0
    prompt = LlamaWords().prompt_ids("a")
    lines = [[int(i) for i in line.split()] for line in out.splitlines()]
    assert lines == [[*prompt, *tokens] for tokens in sequences]
    code, out, _ = run(*EMPTY_PROMPT, *options, "--output", "json")
    assert code == 0
    samples = [json.loads(line) for line in out.splitlines()]
    texts = [("abc", "max tokens"), ("d", "stop token"), ("ef\n</s>\n", "max tokens")]
    assert samples == [
        {"prompt": "a", "text": text, "ids": line, "prompt_tokens": 3, "ended": ended}
        for (text, ended), line in zip(texts, lines, strict=True)
    ]


def test_several_texts_have_headers_and_come_when_they_are_complete(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = shown(monkeypatch)
    scripted(monkeypatch, [*byte_ids("b"), BOS], byte_ids("cde"))
    code, _, err = run(*EMPTY_PROMPT, "--prompt", "a", "--num-samples", "2")
    assert code == 0
    assert [text for text in texts if text] == [
        "--- sample 1 of 2 ---\nab\n",
        "--- sample 2 of 2 ---\nacde\n",
    ]
    assert "generated 5 tokens, " in err


@pytest.mark.parametrize("prompt", ["", "ab"])
@pytest.mark.parametrize("sampler", ["default", "llama2c"])
def test_a_sample_does_not_depend_on_the_others(run: Run, prompt: str, sampler: str) -> None:
    options = ("--prompt", prompt, "--output", "ids", "--max-tokens", "40", "--sampler", sampler)
    outputs = [run(*EMPTY_PROMPT, *options, "--num-samples", str(n))[1] for n in (1, 2, 5)]
    assert outputs[2].startswith(outputs[1])
    assert outputs[1].startswith(outputs[0])
    assert len(set(outputs[2].splitlines())) == 5
    other = run(*EMPTY_PROMPT, *options, "--seed", "7")[1]
    assert other != outputs[0]


def test_samplers_and_their_defaults(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Llama2c(Llama2cSampler):
        def __init__(self, **settings: float) -> None:
            made.append(settings)
            super().__init__(**settings)

    class Llmc(LlmcSampler):
        def __init__(self, seed: int) -> None:
            made.append(seed)
            super().__init__(seed)

    monkeypatch.setattr(text_module, "Llama2cSampler", Llama2c)
    monkeypatch.setattr(text_module, "LlmcSampler", Llmc)
    calls = scripted(monkeypatch)

    def sampling_with(*options: str) -> object:
        made.clear()
        code, _, err = run(*EMPTY_PROMPT, *options)
        assert code == 0, err
        return calls.pop().sampling

    assert sampling_with() == Sampling(temperature=0.8, top_k=40, top_p=1.0, seed=0)
    options = ("--temperature", "0", "--top-k", "0", "--top-p", "0.5", "--seed", str(2**63 - 1))
    expected = Sampling(temperature=0, top_k=0, top_p=0.5, seed=2**63 - 1)
    assert sampling_with(*options) == expected
    sampling_with("--sampler", "llmc", "--num-samples", "2")
    assert made == [1337, 1338]
    sampling_with("--sampler", "llama2c", "--num-samples", "2")
    assert made == [{"temperature": 1.0, "top_p": 0.9, "seed": seed} for seed in (1, 2)]
    sampling_with("--sampler", "llama2c", "--temperature", "0", "--top-p", "1", "--seed", "42")
    assert made == [{"temperature": 0.0, "top_p": 1.0, "seed": 42}]


def test_llama2c_prints_what_run_prints(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """EOS is text, BOS ends it, and single bytes that are not ASCII are left out."""
    calls = scripted(monkeypatch, [*byte_ids("b日"), EOS, *byte_ids("\x11c"), BOS])
    code, out, _ = run(*EMPTY_PROMPT, "--prompt", "aé", "--sampler", "llama2c")
    assert (code, out) == (0, "ab\n</s>\nc\n")
    assert calls[0].stop == {BOS}


def test_llama2c_ends_where_the_context_is_full(run: Run) -> None:
    """As with -n 0: the model reads 32 tokens, and the last one that it gives is not read."""
    options = ("--prompt-ids", "1 100 101", "--sampler", "llama2c", "--temperature", "3")
    code, out, err = run(*EMPTY_PROMPT, *options, "--output", "json", "--max-tokens", "100")
    assert code == 0, err
    sample = json.loads(out)
    assert (len(sample["ids"]), sample["ended"]) == (33, "context")
    code, out, _ = run(*EMPTY_PROMPT, *options, "--output", "json", "--max-tokens", "30")
    assert json.loads(out) == {**sample, "ended": "max tokens"}
    code, out, _ = run(*EMPTY_PROMPT, "--prompt-ids", "1", "--max-tokens", "40", "--output", "ids")
    assert len(out.split()) == 41  # the default sampler slides the window


def test_the_cache_is_as_long_as_the_text(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = scripted(monkeypatch)
    for max_tokens, length in ((0, 4), (5, 8), (1000, 32)):
        run(*EMPTY_PROMPT, "--prompt-ids", "1 100 101", "--max-tokens", str(max_tokens))
        assert calls.pop().length == length


@pytest.mark.parametrize("output", ["text", "ids", "json"])
def test_ctrl_c_keeps_what_was_made(run: Run, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    tokens = byte_ids("bé")[:-1]
    scripted(monkeypatch, tokens, end=KeyboardInterrupt)
    code, out, err = run(*EMPTY_PROMPT, "--prompt-ids", "1 100", "--output", output)
    assert code == 130
    ids = [1, 100, *tokens]
    expected = {
        "text": "ab\ufffd",
        "ids": " ".join(map(str, ids)),
        "json": json.dumps(
            {"prompt": "a", "text": "b\ufffd", "ids": ids, "prompt_tokens": 2,
             "ended": "interrupted"}
        ),
    }  # fmt: skip
    assert out == expected[output] + "\n"
    assert err.startswith("prompt 2 tokens, generated 2 tokens, ")


def test_a_model_without_a_tokenizer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(source: Arena) -> None:
        raise DataError("the model has 264 tokens and no tokenizer")

    monkeypatch.setattr(text_module, "tokenizer_of", none)
    calls = scripted(monkeypatch, [5, 6])
    ids = ("--prompt-ids", "7 8", "--output", "ids")
    assert run(*EMPTY_PROMPT, *ids)[:2] == (0, "7 8 5 6\n")
    assert calls.pop().stop == frozenset()
    assert run(*EMPTY_PROMPT, *ids, "--sampler", "llama2c")[:2] == (0, "7 8 5 6\n")
    assert calls.pop().stop == {BOS}
    for options in (["--prompt", "a"], ["--prompt-ids", "7 8"], ["--output", "ids"]):
        code, _, err = run(*EMPTY_PROMPT, *options)
        assert code == 1
        assert err == (
            "gpu-gpt2: the model has 264 tokens and no tokenizer, or name one with --tokenizer, or "
            "use --prompt-ids with --output ids\n"
        )


def test_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    weights = Arena(CONFIG, SOURCE.weights)
    assert weights.config.vocab_size != GPT2_VOCAB_SIZE
    script = tmp_path / "pipe.py"
    script.write_text(
        "import sys\n"
        "from gpu_gpt2.cli import app, generate\n"
        "generate.open_model = lambda name: source\n"
        "from gpu_gpt2.models.init import InitialWeights\n"
        "from gpu_gpt2.config import model_config\n"
        "source = InitialWeights(config=model_config('nano'), seed=0)\n"
        "sys.argv = ['gpu-gpt2', 'generate', 'nano', '--device', 'cpu', '--max-tokens', '100000']\n"
        "app.main()\n"
    )
    command = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert command.stdout
    assert command.stderr
    assert command.stdout.read(20)
    command.stdout.close()
    assert command.wait(60) != 0
    assert command.stderr.read() == b""


def test_speed_excludes_the_first_token_of_each_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 11.0, 12.0])
    monkeypatch.setattr(text_module.time, "perf_counter", lambda: next(now))
    watch = Stopwatch()
    assert watch.report() == "generated 0 tokens"
    watch.count(4)
    assert watch.report() == "generated 4 tokens"
    watch.count(4)
    watch.count(2)
    assert watch.report() == "generated 10 tokens, 3.0 tokens/s"


def test_damaged_weights_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's warnings of overflows are not shown."""
    damaged = Arena(CONFIG, SOURCE.weights.copy())
    named(CONFIG, damaged.weights)["lnfw"][:] = 3e38
    monkeypatch.setattr(generate_module, "open_model", lambda name: damaged)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code, _, err = run(*EMPTY_PROMPT)
    assert code == 1
    assert err == ("gpu-gpt2: the model's weights are damaged: its logits are not finite numbers\n")


@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [
        ("--prompt - <&-", 0, "prompt 1 tokens, generated 2 tokens"),
        ("--output ids >&-", 0, "prompt 1 tokens, generated 2 tokens"),
        (">/dev/full", 1, "gpu-gpt2: cannot write the output: No space left on device; make room "
         "on the disk"),
        ("--output json >/dev/full", 1, "gpu-gpt2: cannot write the output: No space left on "),
    ],
)  # fmt: skip
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full of Linux")
def test_standard_streams_that_are_closed_or_full(
    redirection: str, code: int, message: str
) -> None:
    command = f"{sys.executable} -m gpu_gpt2 generate nano --device cpu --max-tokens 2"
    done = subprocess.run(
        ["bash", "-c", f"{command} {redirection}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1
