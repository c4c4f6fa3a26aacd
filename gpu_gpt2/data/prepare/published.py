"""Files that others have made and put on the web: token files of FineWeb, llm.c's starter pack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from gpu_gpt2.data.prepare.download import Remote
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.formats import debug_state, llmc, multiple_choice, tokenizer_bin, tokens
from gpu_gpt2.formats.llmc_header import HEADER_BYTES, header_bytes, read_header

TOKEN_BYTES: Final = tokens.GPT2.dtype.itemsize
SHARD_TOKENS: Final = 10**8  # in all published shards but each set's last
VAL_PART: Final = 10  # of --tokens, one token in so many more is got for validation


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSet:
    """A set of token files as llm.c's fineweb.py writes them."""

    url: str  # of the folder
    stem: str  # of the names
    shards: int  # for training, numbered from 1; for validation there is one, number 0


SHARD_SETS: Final[Mapping[str, ShardSet]] = {
    "fineweb10B": ShardSet(
        url="https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main",
        stem="fineweb",
        shards=103,
    ),
    "fineweb100B": ShardSet(
        url="https://huggingface.co/datasets/chrisdryden/FineWebTokenizedGPT2/resolve/main",
        stem="fineweb",
        shards=1028,
    ),
    "edu_fineweb100B": ShardSet(
        url="https://huggingface.co/datasets/karpathy/fineweb-edu-100B-gpt2-token-shards"
        "/resolve/main",
        stem="edu_fineweb",
        shards=1001,
    ),
}
STARTER_PACK: Final = "starter-pack"
STARTER_PACK_URL: Final = "https://huggingface.co/datasets/karpathy/llmc-starter-pack/resolve/main"


def _check_debug_state(path: Path) -> None:
    read_header(path, "debug state").expect(0, "magic number", (debug_state.MAGIC,))


STARTER_PACK_FILES: Final[Mapping[str, tuple[Callable[[Path], object], int | None]]] = {
    # the reader that checks it, and its bytes as far as they follow from the format
    "gpt2_124M.bin": (llmc.open_model, 497_904_640),
    "gpt2_124M_bf16.bin": (llmc.open_model, 248_952_832),
    "gpt2_124M_debug_state.bin": (_check_debug_state, 549_369_860),
    "gpt2_tokenizer.bin": (tokenizer_bin.read_tokenizer_bin, None),
    "tiny_shakespeare_train.bin": (tokens.read_tokens, 611_544),
    "tiny_shakespeare_val.bin": (tokens.read_tokens, 66_560),
    "hellaswag_val.bin": (multiple_choice.read_choices, None),
}
NAMES: Final = (*SHARD_SETS, STARTER_PACK)


def published(name: str, out: Path, token_limit: int | None) -> list[Remote]:
    """The files of a set and where they go; ConfigError where there is no such set.

    token_limit: training tokens; the last file is cut, and a tenth as many are for validation.
    """
    folder = out / name
    if name == STARTER_PACK:
        if token_limit is not None:
            raise ConfigError(f"{STARTER_PACK} comes as a whole; leave out --tokens")
        return [
            Remote(
                url=f"{STARTER_PACK_URL}/{file}",
                path=folder / file,
                check=check,
                size=size,
            )
            for file, (check, size) in STARTER_PACK_FILES.items()
        ]
    if name not in SHARD_SETS:
        raise ConfigError(f"nothing is published as {name!r}; choose {', '.join(NAMES)}")
    if token_limit is not None and token_limit < VAL_PART:
        raise ConfigError(f"--tokens {token_limit} is too few; give {VAL_PART} or more")
    shards = SHARD_SETS[name]
    files = [(f"{shards.stem}_val_000000.bin", token_limit and token_limit // VAL_PART)]
    for i in range(shards.shards):
        left = None if token_limit is None else token_limit - i * SHARD_TOKENS
        if left is not None and left <= 0:
            break
        files.append((f"{shards.stem}_train_{i + 1:06d}.bin", left))
    remotes = []
    for file, count in files:
        whole = count is None or count >= SHARD_TOKENS
        limit = None if whole or count is None else HEADER_BYTES + TOKEN_BYTES * count
        remotes.append(
            Remote(
                url=f"{shards.url}/{file}",
                path=folder / file,
                check=partial(_check_shard, limit),
                usual_size=HEADER_BYTES + TOKEN_BYTES * SHARD_TOKENS,
                limit=limit,
            )
        )
    return remotes


def expected_bytes(remotes: Sequence[Remote]) -> int:
    """About how many bytes the files have."""
    return sum(remote.limit or remote.size or remote.usual_size or 0 for remote in remotes)


def _check_shard(limit: int | None, path: Path) -> None:
    """DataError unless it is a token file; the header of one that was cut gets its new count."""
    header = read_header(path, "token file")
    header.expect(0, "magic number", (tokens.GPT2.magic,))
    if header.file_bytes == limit:
        count = (limit - HEADER_BYTES) // TOKEN_BYTES
        with path.open("r+b") as file:
            file.write(header_bytes(tokens.GPT2.magic, header.version, count))
    tokens.read_tokens(path)
