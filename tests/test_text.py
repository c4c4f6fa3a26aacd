"""Text that comes token by token: characters over several tokens, and bytes that are no UTF-8."""

import pytest
from llama_words import BOS, EOS, FIRST_BYTE, WORDS, LlamaWords, byte_ids

from gpu_gpt2.text import TextStream, printed_by_llama2c
from gpu_gpt2.tokenizer import GPT2Tokenizer

TEXT = "aé日本\n😀\u0301 z"


def word(text: bytes) -> int:
    return FIRST_BYTE + 256 + WORDS.index(text)


def test_a_character_appears_with_its_last_token() -> None:
    stream = TextStream(LlamaWords(), None)
    parts = [stream.add([token]) for token in byte_ids("é日😀a")]
    assert parts == ["", "é", "", "", "日", "", "", "", "😀", "a"]
    assert stream.finish() == ""


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_text_does_not_depend_on_how_its_tokens_come(size: int) -> None:
    tokens = byte_ids(TEXT)
    stream = TextStream(LlamaWords(), None)
    parts = [stream.add(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    assert "".join(parts) + stream.finish() == TEXT


def test_gpt2_s_tokens_that_split_a_character() -> None:
    tokenizer = GPT2Tokenizer.gpt2()
    tokens = tokenizer.encode("😀日本語").tolist()
    stream = TextStream(tokenizer, tokenizer.eot)
    parts = [stream.add([token]) for token in tokens]
    assert parts[0] == ""
    assert "".join(parts) + stream.finish() == "😀日本語"


def test_bytes_that_are_not_utf8_are_replaced_and_nothing_behind_them_is_lost() -> None:
    stream = TextStream(LlamaWords(), None)
    tokens = [FIRST_BYTE + byte for byte in b"a\xffb\xe6\x97c\xf0\x9f"]
    parts = [stream.add([token]) for token in tokens]
    assert "".join(parts) == "a\ufffdb\ufffdc"
    assert stream.finish() == "\ufffd"


def test_a_piece_knows_the_token_in_front_of_it() -> None:
    the = word(b" the")
    assert TextStream(LlamaWords(), BOS).add([the, the]) == "the the"
    assert TextStream(LlamaWords(), None).add([the]) == " the"
    assert TextStream(LlamaWords(), BOS).add([BOS, the]) == "\n<s>\nthe"


def test_llama2c_prints_no_single_bytes_outside_ascii() -> None:
    stream = TextStream(LlamaWords(), BOS, printed_by_llama2c)
    tokens = [*byte_ids("日\x11\x7f\x00"), word(b"\xc3\xa9"), *byte_ids("é |~\t\n\r\v\f"), EOS]
    assert stream.add(tokens) == "é |~\t\n\r\v\f\n</s>\n"


def test_llama2c_prints_these_single_bytes() -> None:
    printed = {byte for byte in range(256) if printed_by_llama2c(bytes([byte]))}
    assert printed == {*range(0x20, 0x7F), 0x09, 0x0A, 0x0B, 0x0C, 0x0D}
    assert printed_by_llama2c(b"") == b""
