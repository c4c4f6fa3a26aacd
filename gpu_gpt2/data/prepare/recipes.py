"""The data sets that `data prepare` knows by name, and the user's own files: text, split, names.

The token files of a data set have the names and the tokens that llm.c's dev/data scripts give them.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from gpu_gpt2.data.prepare.documents import Source, find_sources, json_lines
from gpu_gpt2.data.prepare.download import Remote, hub_listing, hub_url
from gpu_gpt2.data.prepare.shards import Plan, Stream
from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.formats.files import whole
from gpu_gpt2.formats.multiple_choice import COMPLETIONS, Example, write_choices
from gpu_gpt2.formats.tokens import MAX_TOKENS, SHARD_TOKENS
from gpu_gpt2.tokenizer import cache_key, make_tokenizer, vocab_size_of

MAX_DEFAULT_VAL_TOKENS: Final = 10**7  # held out of own files without --val-tokens
ALIASES: Final[Mapping[str, str]] = {
    "fineweb": "fineweb10B",
    "edu-fineweb": "edu_fineweb10B",
    "edu_fineweb": "edu_fineweb10B",
}
_BYTES_PER_TOKEN: Final = {"bytes": 1}  # bytes of text per token; about 4 with any other tokenizer
_LISTING: Final = "files.json"  # list of the files to download, kept in the folder raw


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A data set by name: its raw text, and how its token files are made of it."""

    stem: str  # common beginning of the names of the token files and the manifest
    suffix: str  # ending of the names of the raw text files
    sharded: bool  # whether there are several training files of --shard-tokens each
    # Makes streams of the raw files, with so many tokens in a shard.
    streams: Callable[[Sequence[Path], int], tuple[Stream, ...]]
