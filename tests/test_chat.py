"""Conversations: turns share one cache, EOS ends an answer, and a full context ends the chat."""

import io
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from llama_words import BOS, EOS, LlamaWords, byte_ids
from models import noisy_weights

from gpu_gpt2.chat import Conversation, turn_text
from gpu_gpt2.cli import chat as chat_module
from gpu_gpt2.cli.text import decoder_of
from gpu_gpt2.config import LlamaConfig
from gpu_gpt2.errors import CheckpointError
from gpu_gpt2.generate import generate
from gpu_gpt2.models.decoder import Decoder, Sampling
from gpu_gpt2.models.weights import Arena

Run = Callable[..., tuple[int, str, str]]
CONFIG = LlamaConfig(
    vocab_size=LlamaWords.vocab_size,
    n_positions=64,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    n_inner=48,
)
SOURCE = Arena(CONFIG, 10 * noisy_weights(CONFIG, noise_seed=1))
GREEDY = Sampling(temperature=0)


def new_decoder(length: int = CONFIG.n_positions) -> Decoder:
    return decoder_of(SOURCE, "cpu", "fp32", batch=1, length=length)


def continuation(tokens: list[int], count: int) -> list[int]:
    """The `count` tokens that follow `tokens`, which the model reads in one prefill."""
    texts = generate(new_decoder(), [np.array(tokens, np.int32)], max_tokens=count, sampling=GREEDY)
    return [token for (token,) in texts if token is not None]


def taken(answer: Iterator[int], count: int) -> list[int]:
    """The first tokens of an answer, which is then stopped."""
    return [token for _, token in zip(range(count), answer, strict=False)]


def test_the_format_of_a_turn() -> None:
    assert turn_text("Hi there") == "[INST] Hi there [/INST]"
    assert turn_text("Hi", "Be\nkind.") == "[INST] <<SYS>>\nBe\nkind.\n<</SYS>>\n\nHi [/INST]"


def test_a_turn_continues_all_that_was_said_before() -> None:
    """As if the model read both turns, the answer and EOS at once."""
    conversation = Conversation(new_decoder(), GREEDY)
    first, second = [BOS, 70, 80, 90], [BOS, 100, 110]
    answer = taken(conversation.answer(first), 5)
    assert answer == continuation(first, 5)
    again = taken(conversation.answer(second), 6)
    assert again == continuation([*first, *answer, EOS, *second], 6)
    assert again != continuation(second, 6)
    third = taken(conversation.answer(first), 4)
    assert third == continuation([*first, *answer, EOS, *second, *again, EOS, *first], 4)


def scripted(monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> None:
    """Lets every decoder draw these tokens, one after the other."""
    drawn = iter(tokens)

    def sample(decoder: Decoder, sampling: Sampling) -> None:
        decoder.feed(np.array([next(drawn)], np.int32))

    monkeypatch.setattr(Decoder, "sample", sample)


def test_an_answer_ends_with_eos_which_the_next_turn_does_not_repeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scripted(monkeypatch, [70, EOS, 71, BOS, 72, EOS])
    decoder = new_decoder()
    conversation = Conversation(decoder, GREEDY)
    assert conversation.left == 64
    assert list(conversation.answer([BOS, 5, 6])) == [70, EOS]
    assert conversation.left == 64 - 5
    fed = []
    feed = Decoder.feed
    monkeypatch.setattr(Decoder, "feed", lambda d, t: (fed.append(int(t[0])), feed(d, t)))
    assert list(conversation.answer([BOS, 7])) == [71, BOS, 72, EOS]  # BOS ends no answer
    assert fed == [BOS, 7, 71, BOS, 72, EOS]
    assert conversation.left == 64 - 11


def test_the_last_token_is_the_one_that_the_full_context_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scripted(monkeypatch, [70] * 100)
    conversation = Conversation(new_decoder(8), GREEDY)
    assert len(list(conversation.answer([BOS, 5, 6]))) == 8 - 3 + 1
    assert conversation.left == 0


def test_a_turn_that_just_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [70, 71, 72, 73])
    conversation = Conversation(new_decoder(8), GREEDY)
    assert taken(conversation.answer([BOS, 5]), 2) == [70, 71]
    assert conversation.left == 3  # 2 tokens of the turn, 2 of the answer, and EOS
    assert list(conversation.answer([BOS, 5, 6])) == [72]
    assert conversation.left == 0


def test_damaged_weights_are_named() -> None:
    weights = np.full_like(SOURCE.weights, np.nan)
    decoder = decoder_of(Arena(CONFIG, weights), "cpu", "fp32", batch=1, length=8)
    with pytest.raises(CheckpointError, match="weights are damaged"):
        next(Conversation(decoder, GREEDY).answer([BOS]))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the command open a small Llama with a vocabulary of Llama 2."""
    monkeypatch.setattr(chat_module, "open_model", lambda name: SOURCE)
    monkeypatch.setattr(chat_module, "vocabulary", lambda source, named: LlamaWords())


def typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


@pytest.mark.parametrize("end", ["", "\n", "  \nmore\n"])
@pytest.mark.usefixtures("model")
def test_a_chat_of_two_turns(run: Run, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """It ends at the end of the input or at an empty line."""
    typed(monkeypatch, f"Hi\nSo\n{end}")
    scripted(monkeypatch, [*byte_ids("é!"), EOS, *byte_ids("Yes"), EOS])
    code, out, err = run("chat", "model", "--device", "cpu")
    assert (code, err) == (0, "")
    assert out == "User: Assistant: é!\nUser: Assistant: Yes\nUser: " + ("" if end else "\n")


@pytest.mark.usefixtures("model")
def test_the_system_prompt_belongs_to_the_first_turn(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = []

    def answer(conversation: Conversation, turn: list[int]) -> Iterator[int]:
        turns.append(turn)
        return iter([])

    monkeypatch.setattr(Conversation, "answer", answer)
    typed(monkeypatch, "Hi\nSo\n")
    assert run("chat", "model", "--device", "cpu", "--system", "Be")[0] == 0
    encode = LlamaWords().prompt_ids
    assert turns == [encode(turn_text("Hi", "Be")), encode(turn_text("So"))]


@pytest.mark.usefixtures("model")
def test_a_full_context_and_a_long_message_are_said(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, f"{'x' * 60}\nHi\n")
    scripted(monkeypatch, byte_ids("." * 100))
    code, out, _ = run("chat", "model", "--device", "cpu")
    assert code == 0
    assert "(This message has 77 tokens, and the context has room for 64. Shorten it, or " in out
    assert out.endswith("." * 46 + "\n(The context of 64 tokens is full. Start a new chat.)\n")


@pytest.mark.usefixtures("model")
def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, "Hi\nSo\n")
    drawn = iter([*byte_ids("abc"), *byte_ids("d"), EOS])

    def sample(decoder: Decoder, sampling: Sampling) -> None:
        token = next(drawn)
        decoder.feed(np.array([token], np.int32))
        if [token] == byte_ids("c"):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Decoder, "sample", sample)
    code, out, _ = run("chat", "model", "--device", "cpu")
    assert code == 0
    assert out == "User: Assistant: abc\nUser: Assistant: d\nUser: \n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("model")
def test_ctrl_c_at_the_question_ends_the_chat(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(question: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert run("chat", "model", "--device", "cpu") == (130, "\n", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "--temperature must be a finite number >= 0, not -1"),
        (["--top-p", "0"], "--top-p must be a number > 0 and <= 1, not 0"),
    ],
)
def test_bad_options(run: Run, options: list[str], message: str) -> None:
    assert run("chat", "nowhere", *options) == (1, "", f"gpu-gpt2: {message}\n")


@pytest.mark.parametrize("in_config", [True, False])
def test_another_chat_template_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_config: bool
) -> None:
    source = SimpleNamespace(folder=tmp_path, config=CONFIG, read=SOURCE.read)
    monkeypatch.setattr(chat_module, "open_model", lambda name: source)
    monkeypatch.setattr(chat_module, "vocabulary", lambda source, named: LlamaWords())

    def put(template: str) -> None:
        if in_config:
            content = json.dumps({"chat_template": template})
            (tmp_path / "tokenizer_config.json").write_text(content)
        else:
            (tmp_path / "chat_template.jinja").write_text(template)

    put("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
    code, _, err = run("chat", "model", "--device", "cpu")
    assert code == 1
    assert err.startswith("gpu-gpt2: model has a chat template of its own, and chat knows only ")
    assert len(err.splitlines()) == 1
    put("{% if system %}<<SYS>>{% endif %}[INST]")
    typed(monkeypatch, "")
    assert run("chat", "model", "--device", "cpu")[0] == 0


def test_a_vocabulary_that_is_not_llama_2_s_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_module, "open_model", lambda name: SOURCE)
    words = SimpleNamespace(prompt_ids=lambda text: [256])
    monkeypatch.setattr(chat_module, "vocabulary", lambda source, named: words)
    code, _, err = run("chat", "model", "--device", "cpu")
    assert code == 1
    assert err.startswith("gpu-gpt2: model has no vocabulary of Llama 2")
