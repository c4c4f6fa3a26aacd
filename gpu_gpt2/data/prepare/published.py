"""Files that others made and published: token files of FineWeb, llm.c's starter pack."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpu_gpt2.data.prepare.download import Remote, hub_url
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.formats import debug_state, llmc, multiple_choice, tokenizer_bin
from gpu_gpt2.formats.llmc_header import GPT2_SHARD_MAGIC, HEADER_BYTES, read_header
from gpu_gpt2.formats.tokens import GPT2, SHARD_TOKENS, read_tokens, shard_name


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSet:
    """A set of shards as llm.c's fineweb.py writes them: number 0 is for validation."""

    dataset: str  # on the Hugging Face Hub
    stem: str  # common beginning of the file names
    shards: int  # number of training shards; the first is number 1


SHARD_SETS: Final[Mapping[str, ShardSet]] = {
    "fineweb10B": ShardSet(dataset="kjj0/fineweb10B-gpt2", stem="fineweb", shards=103),
    "fineweb100B": ShardSet(
        dataset="chrisdryden/FineWebTokenizedGPT2", stem="fineweb", shards=1028
    ),
    "edu_fineweb100B": ShardSet(
        dataset="karpathy/fineweb-edu-100B-gpt2-token-shards", stem="edu_fineweb", shards=1001
    ),
}
STARTER_PACK: Final = "starter-pack"
STARTER_PACK_DATASET: Final = "karpathy/llmc-starter-pack"
# The reader that checks each file, and the file's bytes where they follow from its format.
STARTER_PACK_FILES: Final[Mapping[str, tuple[Callable[[Path], object], int | None]]] = {
    "gpt2_124M.bin": (llmc.open_model, 497_904_640),
    "gpt2_124M_bf16.bin": (llmc.open_model, 248_952_832),
    "gpt2_124M_debug_state.bin": (debug_state.read_debug_header, 549_369_860),
    tokenizer_bin.TOKENIZER_BIN: (tokenizer_bin.read_tokenizer_bin, None),
    shard_name("tiny_shakespeare", "train"): (read_tokens, 611_544),
    shard_name("tiny_shakespeare", "val"): (read_tokens, 66_560),
    "hellaswag_val.bin": (multiple_choice.read_choices, None),
}
NAMES: Final = (*SHARD_SETS, STARTER_PACK)


def published(name: str, out: Path, min_tokens: int | None) -> list[Remote]:
    """The files of a set and their paths; ConfigError if there is no such set.

    min_tokens: training tokens wanted, of which as few whole shards are taken as hold so many;
    None for all shards.
    """
    folder = out / name
    if name == STARTER_PACK:
        if min_tokens is not None:
            raise ConfigError(f"{STARTER_PACK} comes as a whole; leave out --tokens")
        return [
            Remote(
                url=hub_url(STARTER_PACK_DATASET, file),
                path=folder / file,
                check=check,
                on_hub=True,
                size=size,
            )
            for file, (check, size) in STARTER_PACK_FILES.items()
        ]
    if name not in SHARD_SETS:
        raise ConfigError(f"nothing is published as {name!r}; choose {', '.join(NAMES)}")
    if min_tokens is not None and min_tokens < 1:
        raise ConfigError(f"--tokens {min_tokens} is too few; give 1 or more")
    shards = SHARD_SETS[name]
    count = shards.shards
    if min_tokens is not None:
        count = min(count, math.ceil(min_tokens / SHARD_TOKENS))
    files = [shard_name(shards.stem, "val", 0)]
    files += [shard_name(shards.stem, "train", i) for i in range(1, count + 1)]
    return [
        Remote(
            url=hub_url(shards.dataset, file), path=folder / file, check=_check_shard, on_hub=True
        )
        for file in files
    ]


def _check_shard(path: Path) -> None:
    """Raises DataError unless the file is a whole shard of GPT-2's tokens."""
    read_header(path, "token file").expect_magic(GPT2_SHARD_MAGIC)
    read_tokens(path)


def expected_bytes(remotes: Sequence[Remote]) -> int:
    """An estimate of the bytes of all files; those of unknown size count as shards."""
    shard_bytes = HEADER_BYTES + GPT2.dtype.itemsize * SHARD_TOKENS
    return sum(remote.size or shard_bytes for remote in remotes)
