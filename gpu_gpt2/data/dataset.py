"""The tokens that --data names, of a built-in corpus, a text file or token files."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from gpu_gpt2.cache import cache_dir
from gpu_gpt2.config import TrainConfig
from gpu_gpt2.data.corpus import BUILT_IN, VAL_FRACTION, Corpus, text_file
from gpu_gpt2.errors import ConfigError, DataError, UserError
from gpu_gpt2.formats.files import sha256_of
from gpu_gpt2.formats.tokens import (
    Tokens,
    check_tokens,
    is_token_file,
    read_tokens,
    stem_and_split,
    write_tokens,
)
from gpu_gpt2.tokenizer import (
    Tokenizer,
    cache_key,
    make_tokenizer,
    open_tokenizer,
    vocab_size_of,
)

CACHE_VERSION: Final = 3  # raised whenever the same text would give other tokens
MAX_VAL_TOKENS: Final = 1 << 20  # evaluated of a long text: enough for three digits of the loss
CACHED: Final = ("train.bin", "val.bin")  # beside the files of the tokenizer
SUMS: Final = "meta.json"  # the SHA-256 of each file of a cached data set


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Training tokens and held-out tokens, with the tokenizer that made them."""

    name: str
    tokenizer: Tokenizer
    train: tuple[Tokens, ...]  # shards, each (tokens,)
    val: Tokens  # (tokens,); its first token is never predicted
    shards: bool  # whether the tokens are from token files, and not made here from one text
    val_bytes: int  # bytes of text behind the predicted tokens of val; <|endoftext|> counts 0

    @property
    def val_tokens_per_byte(self) -> float:
        return (len(self.val) - 1) / self.val_bytes

    def val_bits_per_byte(self, loss: float) -> float:
        """Bits per byte of held-out text for a mean loss in nats per token.

        They make losses with different tokenizers comparable. <|endoftext|> costs bits when it is
        predicted but adds no bytes.
        """
        return loss / math.log(2) * self.val_tokens_per_byte

    def with_val(self, val: Tokens) -> Dataset:
        """Returns the same training tokens with `val` (tokens,) as the held-out ones."""
        return _dataset(self.name, self.tokenizer, self.train, val, shards=self.shards)


def of_run(config: TrainConfig) -> Dataset:
    """Returns the tokens that a run trains on, and those that it validates on. Raises UserError."""
    # One token more, because the first is never predicted.
    val_tokens = config.eval_batches * config.batch_size * config.seq_len + 1
    return prepare(
        config.data,
        config.tokenizer,
        config.val_data,
        val_tokens=val_tokens if config.eval_batches else None,
    )


def prepare(
    data: str, tokenizer_spec: str, val_data: str = "", *, val_tokens: int | None = None
) -> Dataset:
    """Returns the training and held-out tokens of `data`. Raises UserError.

    data: the name of a built-in corpus; the path of a text or token file; a folder of shards; or
    a pattern such as 'data/fineweb_train_*.bin'. tokenizer_spec: "gpt2", "bytes", "bpe:N",
    "llama2c:N" or the path of a tokenizer. val_data: the path of a text or of token files to
    validate on; all of `data` is then trained on. val_tokens: the most tokens to hold out,
    MAX_VAL_TOKENS if not given. A text is tokenised once and then read from a cache.
    """
    most = MAX_VAL_TOKENS if val_tokens is None else val_tokens
    vocab_size_of(tokenizer_spec)
    if data not in BUILT_IN and (shards := token_files(data)):
        return _from_token_files(shards, tokenizer_spec, val_data, most)
    corpus = BUILT_IN[data]() if data in BUILT_IN else text_file(Path(data))
    if val_data and data not in BUILT_IN:  # nothing has to be held out of a text of the user's own
        corpus = replace(corpus, train=("".join((*corpus.train, *corpus.val)),))
    dataset = _from_corpus(corpus, tokenizer_spec)
    val = _val_tokens(val_data, dataset.tokenizer, most) if val_data else dataset.val
    return dataset.with_val(val[:most])


def _from_corpus(corpus: Corpus, tokenizer_spec: str) -> Dataset:
    """Returns the tokens of a text, from the cache if they are there."""
    cache = _cache_folder(corpus, tokenizer_spec)
    if cache is not None:
        try:
            return _read_cache(cache, corpus.name)
        except (UserError, OSError, ValueError):
            pass  # none yet, or a damaged one
    tokenizer = make_tokenizer(tokenizer_spec, corpus.train)
    dataset = _dataset(
        corpus.name, tokenizer, [_encode(tokenizer, corpus.train)], _encode(tokenizer, corpus.val)
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


def _dataset(
    name: str,
    tokenizer: Tokenizer,
    train: Sequence[Tokens],
    val: Tokens,
    *,
    shards: bool = False,
) -> Dataset:
    counts = np.bincount(val[1:], minlength=tokenizer.vocab_size)
    val_bytes = int(counts @ tokenizer.token_bytes().astype(np.int64))
    if val_bytes == 0:
        raise DataError(f"{name}: no text is left for validation; give more")
    return Dataset(name, tokenizer, tuple(train), val, shards, val_bytes)


def matching_files(data: str) -> list[Path]:
    """The files that a pattern matches, sorted, or the one path `data`; DataError if none."""
    path = Path(data)
    if path.exists() or not glob.has_magic(data):
        return [path]
    if found := sorted(map(Path, glob.glob(data))):
        return found
    raise DataError(
        f"no file matches {data}; give a text file, fetch token files with gpu-gpt2 data get, or "
        f"make token files with gpu-gpt2 data prepare"
    )


def token_files(data: str) -> list[Path]:
    """The token files to train on that `data` names, sorted; none if it names another kind of file.

    data: a token file, a pattern, or a folder, of which the *_train*.bin count. DataError if a
    pattern or a folder has none.
    """
    path = Path(data)
    if not path.is_dir():
        found = matching_files(data)
        return found if found != [path] or is_token_file(path) else []
    found = sorted(p for p in path.glob("*.bin") if stem_and_split(p.name)[1] == "train")
    if not found:
        raise DataError(
            f"{data} holds no token files such as NAME_train.bin or NAME_train_000001.bin; make "
            f"some with gpu-gpt2 data prepare"
        )
    return found


def _from_token_files(paths: Sequence[Path], spec: str, val_data: str, most: int) -> Dataset:
    """Returns a dataset of shards, validated on `val_data` if it is given.

    Otherwise the _val files beside the shards, or a tenth of the last shard, are held out, of which
    the first `most` tokens are used.
    """
    if spec.startswith("bpe:"):
        raise ConfigError(
            f"{paths[0]} is a token file, which carries no vocabulary: {spec} cannot be trained "
            f"on it; use --tokenizer gpt2, or bytes"
        )
    tokenizer = make_tokenizer(spec, ())
    train = [read_tokens(path) for path in paths]
    if val_data:
        val = _val_tokens(val_data, tokenizer, most)
        return _dataset(paths[0].stem, tokenizer, train, val, shards=True)
    if val_paths := sorted({val for path in paths for val in _val_files(path)} - set(paths)):
        val = _first_tokens(val_paths, most)
    else:
        cut = int(len(train[-1]) * (1 - VAL_FRACTION))
        train[-1], val = train[-1][:cut], train[-1][cut : cut + most]
    check_tokens(val, tokenizer.vocab_size, str((val_paths or paths)[-1]))
    return _dataset(paths[0].stem, tokenizer, train, val, shards=True)


def _val_tokens(val_data: str, tokenizer: Tokenizer, most: int) -> Tokens:
    """Returns the first `most` tokens of text files or token files to validate on.

    Raises ConfigError for a built-in text, and DataError, also for tokens outside the vocabulary.
    """
    if val_data in BUILT_IN:
        raise ConfigError(
            f"--val-data takes text or token files, not the built-in text {val_data}; name a file, "
            f"or leave it out"
        )
    paths = matching_files(val_data)
    if paths[0].is_dir():
        paths = sorted(p for p in paths[0].glob("*.bin") if stem_and_split(p.name)[1] == "val")
        if not paths:
            raise DataError(f"{val_data} holds no token files such as NAME_val.bin; name a file")
    if not is_token_file(paths[0]):
        corpora = [text_file(path) for path in paths]
        return _encode(tokenizer, ["".join((*c.train, *c.val)) for c in corpora])[:most]
    val = _first_tokens(paths, most)
    check_tokens(val, tokenizer.vocab_size, str(paths[-1]))
    return val


def _val_files(path: Path) -> Iterator[Path]:
    """X_val.bin and X_val_*.bin beside X_train.bin or X_train_000001.bin."""
    stem, split = stem_and_split(path.name)
    if split == "train":
        for other in path.parent.glob("*.bin"):
            if stem_and_split(other.name) == (stem, "val"):
                yield other


def _first_tokens(paths: Sequence[Path], count: int) -> Tokens:
    """The first `count` tokens of token files read one after the other."""
    parts: list[Tokens] = []
    for path in paths:
        parts.append(read_tokens(path)[:count])
        count -= len(parts[-1])
        if count == 0:
            break
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _cache_folder(corpus: Corpus, spec: str) -> Path | None:
    """The folder for the tokens of a text with a tokenizer; None for a user without a home."""
    digest = hashlib.sha256(f"{CACHE_VERSION} {cache_key(spec)}".encode())
    for documents in (corpus.train, corpus.val):
        digest.update(f"\0{len(documents)}".encode())
        for text in documents:
            content = text.encode()
            digest.update(f"\0{len(content)}\0".encode() + content)
    folder = cache_dir("data")
    return folder and folder / f"{corpus.name}-{digest.hexdigest()[:16]}"


def _read_cache(folder: Path, name: str) -> Dataset:
    """The dataset in `folder`; OSError, ValueError or DataError if any byte of it is wrong."""
    sums = json.loads((folder / SUMS).read_bytes())
    if sums != _sums(folder) or not set(CACHED) < sums.keys():
        raise ValueError(f"{folder} is damaged")
    tokenizer = open_tokenizer(folder)
    return _dataset(
        name, tokenizer, [read_tokens(folder / "train.bin")], read_tokens(folder / "val.bin")
    )


def _write_cache(folder: Path, dataset: Dataset) -> None:
    """Writes a folder beside `folder` and renames it, so that nobody sees half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        write_tokens(temporary / "train.bin", dataset.train[0])
        write_tokens(temporary / "val.bin", dataset.val)
        dataset.tokenizer.save(temporary)
        (temporary / SUMS).write_text(json.dumps(_sums(temporary), indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a cached data set by its name, without the file of sums."""
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS)
    return {name: sha256_of(folder / name) for name in names}
