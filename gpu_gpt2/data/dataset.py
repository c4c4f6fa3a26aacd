"""From what --data names to tokens: a built-in corpus, a text file or a token file."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from gpu_gpt2.cache import cache_dir
from gpu_gpt2.data.corpus import BUILT_IN, VAL_FRACTION, Corpus, text_file
from gpu_gpt2.errors import ConfigError, DataError, UserError
from gpu_gpt2.formats.tokens import Tokens, check_tokens, is_token_file, read_tokens, write_tokens
from gpu_gpt2.tokenizer import Tokenizer, make_tokenizer, vocab_size_of

CACHE_VERSION: Final = 1  # raised whenever the same text would give other tokens
CACHED: Final = ("train.bin", "val.bin", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Tokens to train on and tokens held out, with the tokenizer that made them."""

    name: str
    tokenizer: Tokenizer
    train: Tokens  # (tokens,) uint16
    val: Tokens  # (tokens,) uint16; its first token is never predicted
    val_bytes: int  # of text behind the predicted tokens of val; <|endoftext|> counts as none

    @property
    def val_tokens_per_byte(self) -> float:
        return (len(self.val) - 1) / self.val_bytes

    def val_bits_per_byte(self, loss: float) -> float:
        """Bits per byte of held-out text for a mean loss in nats per token: any tokenizer's
        losses become comparable. Predicting <|endoftext|> costs bits but adds no bytes."""
        return loss / math.log(2) * self.val_tokens_per_byte


def prepare(data: str, tokenizer_spec: str) -> Dataset:
    """The tokens of `data`: the name of a built-in corpus, or the path of a text or token file.

    tokenizer_spec: "gpt2", "bytes" or "bpe:N". A text is tokenised once and then read from a
    cache. UserError says what is wrong with either.
    """
    vocab_size_of(tokenizer_spec)
    path = Path(data)
    if data not in BUILT_IN and is_token_file(path):
        return _from_token_file(path, tokenizer_spec)
    corpus = BUILT_IN[data]() if data in BUILT_IN else text_file(path)
    cache = _cache_folder(corpus, tokenizer_spec)
    if cache is not None:
        try:
            return _read_cache(cache, corpus.name)
        except (UserError, OSError, ValueError):
            pass  # none yet, or a damaged one
    tokenizer = make_tokenizer(tokenizer_spec, corpus.train)
    dataset = _dataset(
        corpus.name, tokenizer, _encode(tokenizer, corpus.train), _encode(tokenizer, corpus.val)
    )
    if cache is not None:
        with suppress(UserError, OSError):  # a full or read-only disk must not stop the training
            _write_cache(cache, dataset)
    return dataset


def _encode(tokenizer: Tokenizer, documents: Sequence[str]) -> Tokens:
    """The documents' tokens, <|endoftext|> in front of each, as llm.c does."""
    mark = np.array([tokenizer.eot], np.uint16)
    parts = [(mark, tokenizer.encode(text).astype(np.uint16)) for text in documents]
    return np.concatenate([tokens for pair in parts for tokens in pair])


def _dataset(name: str, tokenizer: Tokenizer, train: Tokens, val: Tokens) -> Dataset:
    counts = np.bincount(val[1:], minlength=tokenizer.vocab_size)
    val_bytes = int(counts @ tokenizer.token_bytes().astype(np.int64))
    if val_bytes == 0:
        raise DataError(f"{name}: no text is left for validation; give more")
    return Dataset(name, tokenizer, train, val, val_bytes)


def _from_token_file(path: Path, spec: str) -> Dataset:
    """Validation: the file X_val.bin beside X_train.bin, else the last tenth of the tokens."""
    if spec.startswith("bpe:"):
        raise ConfigError(
            f"{path} is a token file, which carries no vocabulary: {spec} cannot be trained on "
            f"it; use --tokenizer gpt2, or bytes"
        )
    tokenizer = make_tokenizer(spec, ())
    train = read_tokens(path)
    check_tokens(train, tokenizer.vocab_size, str(path))
    val_path = path.with_name(path.name.removesuffix("_train.bin") + "_val.bin")
    if path.name.endswith("_train.bin") and val_path.exists():
        val = read_tokens(val_path)
        check_tokens(val, tokenizer.vocab_size, str(val_path))
    else:
        cut = int(len(train) * (1 - VAL_FRACTION))
        train, val = train[:cut], train[cut:]
    return _dataset(path.stem, tokenizer, train, val)


def _cache_folder(corpus: Corpus, spec: str) -> Path | None:
    """Where the tokens of this text with this tokenizer lie, or None where there is no home."""
    digest = hashlib.sha256(f"{CACHE_VERSION} {spec}".encode())
    for documents in (corpus.train, corpus.val):
        digest.update(f"\0{len(documents)}".encode())
        for text in documents:
            content = text.encode()
            digest.update(f"\0{len(content)}\0".encode() + content)
    folder = cache_dir("data")
    return folder and folder / f"{corpus.name}-{digest.hexdigest()[:16]}"


def _read_cache(folder: Path, name: str) -> Dataset:
    """The dataset in `folder`; OSError, ValueError or DataError if any byte of it is wrong."""
    sums = json.loads((folder / "meta.json").read_bytes())
    if sums != {file: _sha256(folder / file) for file in CACHED}:
        raise ValueError(f"{folder} is damaged")
    tokenizer = Tokenizer.load(folder)
    return _dataset(
        name, tokenizer, read_tokens(folder / "train.bin"), read_tokens(folder / "val.bin")
    )


def _write_cache(folder: Path, dataset: Dataset) -> None:
    """Writes a whole folder beside `folder` and renames it: nobody sees half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        write_tokens(temporary / "train.bin", dataset.train)
        write_tokens(temporary / "val.bin", dataset.val)
        dataset.tokenizer.save(temporary)
        sums = {file: _sha256(temporary / file) for file in CACHED}
        (temporary / "meta.json").write_text(json.dumps(sums, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
