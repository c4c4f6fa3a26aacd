"""llama2.c's tokenizer: SentencePiece's byte-pair encoding, with scores instead of ranks.

A text begins with a space that is put in front of it. Each character is a token of its own if the
vocabulary has it, and one token per byte otherwise. Then the adjacent pair whose union has the
highest score merges, the leftmost of equal ones, until no pair merges. Source: llama2.c's run.c.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.errors import ConfigError
from gpu_gpt2.formats.files import new_file
from gpu_gpt2.formats.llama2c_tokenizer import (
    BOS,
    EOS,
    FIRST_BYTE,
    FIRST_PIECE,
    SPACE_SCORE,
    TOKENIZER_BIN,
    UNKNOWN,
    byte_word,
    tokenizer_content,
)
from gpu_gpt2.tokenizer.base import Tokenizer, without_lone_surrogates

_NO_MERGE: Final = -1e10  # a pair merges if its score is higher
_MAX_CHARACTER_BYTES: Final = 4  # of UTF-8
_CACHED_WORDS: Final = 1 << 16  # most words of a text are among this many
_MAX_CACHED_BYTES: Final = 64  # longer words seldom come twice
_WORD: Final = re.compile(rb" *[^ ]+| +")
_SPACE: Final = "\u2581"  # stands for a space in SentencePiece's vocabularies


class Llama2cTokenizer(Tokenizer):
    """A vocabulary of llama2.c; BOS separates the documents of its training data."""

    def __init__(self, words: Sequence[bytes], scores: Sequence[float]) -> None:
        """words: the bytes of every id, as tokenizer.bin has them; scores: one of each."""
        self.vocab_size = len(words)
        self.name = f"llama2c:{self.vocab_size}"
        self.eot = BOS
        self.stop_ids = frozenset({BOS})
        self._words, self._scores = list(words), list(scores)
        self._ids = {word: i for i, word in reversed([*enumerate(words)])}
        self._pieces = list(words)
        self._pieces[FIRST_BYTE:FIRST_PIECE] = [bytes([byte]) for byte in range(256)]
        # If no token has a space behind another character, nothing merges across the start of a
        # word, and each word can be encoded by itself.
        self._by_word = not any(re.search(rb"[^ ] ", word) for word in words)
        self._cached = lru_cache(_CACHED_WORDS)(self._encode_word)

    @classmethod
    def train(cls, documents: Sequence[str], vocab_size: int) -> Llama2cTokenizer:
        """Trains a vocabulary of `vocab_size` tokens on `documents`; deterministic.

        Ids have the order of llama2.c's own vocabularies: special tokens, bytes, merges in the
        order in which they are made, single characters. As there, no merge has a newline, a second
        space, or a digit beside another character. Characters that are too rare for a place in the
        vocabulary are encoded as bytes. Raises ConfigError if the text is too short.
        """
        # Imported here because only training needs it and it is slow to load.
        from tokenizers import Tokenizer as Trained
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import Digits, Metaspace, Split
        from tokenizers.pre_tokenizers import Sequence as Steps
        from tokenizers.trainers import BpeTrainer

        count = vocab_size - FIRST_PIECE
        texts = [without_lone_surrogates(text) for text in documents]
        alphabet = _alphabet(texts, max(1, count // 2))
        trained = Trained(BPE())
        trained.pre_tokenizer = Steps(
            [Split("\n", "removed"), Metaspace(), Digits(individual_digits=True)]
        )
        trained.train_from_iterator(
            texts,
            BpeTrainer(
                vocab_size=count,
                limit_alphabet=len(alphabet),
                initial_alphabet=alphabet,
                show_progress=False,
            ),
        )
        vocab = trained.get_vocab()
        if len(vocab) < count:
            raise ConfigError(
                f"the text is too short for a vocabulary of {vocab_size} tokens: it has pairs for "
                f"{FIRST_PIECE + len(vocab)}; use a smaller N in --tokenizer llama2c:N"
            )
        in_order = sorted(vocab, key=lambda word: (len(word) == 1, vocab[word]))
        words = [word.replace(_SPACE, " ").encode() for word in in_order]
        scores = [SPACE_SCORE if not word.strip() else -float(i) for i, word in enumerate(words)]
        special = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *map(byte_word, range(256))]
        return cls([*special, *words], [*[0.0] * len(special), *scores])

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Returns the ids (tokens,) int32 of `text`, without BOS: see Tokenizer.encode.

        The time grows as n log n with the length of a word, and linearly with the count of words.
        """
        return self.encode_bytes(without_lone_surrogates(text).encode())

    def encode_bytes(self, text: bytes) -> npt.NDArray[np.int32]:
        """Returns the ids (tokens,) int32 of a text in bytes, which need not be valid UTF-8."""
        if not text:
            return np.zeros(0, np.int32)
        if _continues(text[0]):  # must not become a character with the space in front
            ids = self._merged([*self._characters(b" "), *self._characters(text)])
            return np.array(ids, np.int32)
        text = b" " + text
        ids = []
        for word in _WORD.findall(text) if self._by_word else [text]:
            ids += (self._cached if len(word) <= _MAX_CACHED_BYTES else self._encode_word)(word)
        return np.array(ids, np.int32)

    def piece(self, token: int, previous: int | None) -> bytes:
        """Returns the bytes of a token; straight after BOS, without the space in front."""
        word = self._pieces[token]
        return word[1:] if previous == BOS and word.startswith(b" ") else word

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """Returns the bytes of each token, (V,) int32; 0 for <unk>, BOS and EOS.

        The space that is put in front of a document counts as a byte.
        """
        counts = np.array([*map(len, self._pieces)], np.int32)
        counts[[UNKNOWN, BOS, EOS]] = 0
        return counts

    def tokens(self) -> list[bytes]:
        """Returns the bytes of every id; those of <unk>, BOS and EOS are their names."""
        return list(self._pieces)

    def digest(self) -> str:
        """Returns the SHA-256 of the words and the scores."""
        entries = repr([*zip(self._words, self._scores, strict=True)])
        return hashlib.sha256(entries.encode()).hexdigest()

    def save_bin(self, path: Path) -> None:
        """Writes llama2.c's tokenizer.bin, so that `path` is complete or untouched; DataError."""
        with new_file(path) as file:
            file.write(tokenizer_content(self._words, self._scores))

    def save(self, folder: Path) -> None:
        """Writes tokenizer.bin, and the same vocabulary for transformers as tokenizer.json.

        In the tokenizer.json ranks stand for the scores, so transformers may split a long run of
        spaces otherwise. It takes U+2581 for a space. A vocabulary with words that are not UTF-8,
        which tokenizer.json cannot hold, is written as tokenizer.bin only.
        """
        (folder / TOKENIZER_BIN).write_bytes(tokenizer_content(self._words, self._scores))
        try:
            files = self._transformers_files()
        except UnicodeDecodeError:
            return
        for name, content in files.items():
            text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
            (folder / name).write_text(text, encoding="utf-8")

    def _characters(self, text: bytes) -> list[int]:
        """The ids before any merge: of whole characters, or of single bytes."""
        ids: list[int] = []
        start = 0
        while start < len(text):
            end = start + 1
            last = min(start + _MAX_CHARACTER_BYTES, len(text))  # also in invalid UTF-8
            while end < last and _continues(text[end]):
                end += 1
            character = text[start:end]
            if (found := self._ids.get(character)) is not None:
                ids.append(found)
            else:
                ids += [FIRST_BYTE + byte for byte in character]
            start = end
        return ids

    def _encode_word(self, word: bytes) -> list[int]:
        """The ids of a word."""
        return self._merged(self._characters(word))

    def _merged(self, ids: list[int]) -> list[int]:
        """The ids after all merges; those given are overwritten.

        A heap holds the pairs that can merge. An entry is out of date, and skipped, if one of its
        two tokens has been merged since.
        """
        n = len(ids)
        words = [self._words[i] for i in ids]
        before, after = list(range(-1, n - 1)), list(range(1, n + 1))
        heap: list[tuple[float, int, int, int, int]] = []

        def push(left: int, right: int) -> None:
            union = self._ids.get(words[left] + words[right])
            if union is not None and self._scores[union] > _NO_MERGE:
                heap.append((-self._scores[union], left, ids[left], ids[right], union))

        for left in range(n - 1):
            push(left, left + 1)
        heapq.heapify(heap)
        while heap:
            _, left, first, second, union = heapq.heappop(heap)
            right = after[left]
            if right >= n or (ids[left], ids[right]) != (first, second):
                continue
            ids[left], words[left] = union, self._words[union]
            ids[right] = -1  # in no entry of the heap
            after[left] = after[right]
            neighbours = [(before[left], left)] if before[left] >= 0 else []
            if after[left] < n:
                before[after[left]] = left
                neighbours.append((left, after[left]))
            for pair in neighbours:
                count = len(heap)
                push(*pair)
                if len(heap) > count:
                    heapq.heappush(heap, heap.pop())
        return [i for i in ids if i >= 0]

    def _transformers_files(self) -> dict[str, dict[str, Any]]:
        """The contents of tokenizer.json and tokenizer_config.json; UnicodeDecodeError."""
        special = {UNKNOWN: "<unk>", BOS: "<s>", EOS: "</s>"}
        vocab: dict[str, int] = {}
        for i, word in enumerate(self._words):
            vocab.setdefault(special.get(i) or word.decode().replace(" ", _SPACE), i)
        merges = []
        for union, i in sorted(vocab.items(), key=lambda item: (-self._scores[item[1]], item[1])):
            if i >= FIRST_PIECE:
                pairs = [(union[:cut], union[cut:]) for cut in range(1, len(union))]
                merges += [[a, b] for a, b in pairs if a in vocab and b in vocab]
        added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        space, text = {"String": " "}, {"Sequence": {"id": "A", "type_id": 0}}
        begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
        tokenizer = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, "content": name, **added, "special": True} for i, name in special.items()
            ],
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": _SPACE},
                    {"type": "Replace", "pattern": space, "content": _SPACE},
                ],
            },
            "pre_tokenizer": None,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [begin, text],
                "pair": [begin, text, begin, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
            },
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": "<unk>",
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": vocab,
                "merges": merges,
            },
        }
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "<s>",  # it separates documents, as BOS does in llama2.c's training data
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
        }
        return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def _alphabet(texts: Sequence[str], count: int) -> list[str]:
    """U+2581, which stands for a space, and the commonest other characters, `count` in all.

    Of equally common characters the smaller code points are taken; the trainer of the tokenizers
    library would take any of them.
    """
    counts = Counter[str]()
    for text in texts:
        counts.update(text)
    for character in (" ", "\n", _SPACE):
        del counts[character]
    common = sorted(counts, key=lambda character: (-counts[character], character))
    return [_SPACE, *common[: count - 1]]


def _continues(byte: int) -> bool:
    """True for a byte 10xxxxxx, which continues a character of UTF-8."""
    return byte >> 6 == 2
