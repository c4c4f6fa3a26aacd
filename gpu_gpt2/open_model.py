"""Models by name or path, whatever kind of file they lie in, and the tokenizer that fits them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from gpu_gpt2.config import DEFAULTS, GPT2_VOCAB_SIZE, MODELS, model_config
from gpu_gpt2.errors import DataError
from gpu_gpt2.formats import hf, llmc
from gpu_gpt2.formats.vocabulary import holds_vocabulary
from gpu_gpt2.models.init import InitialWeights
from gpu_gpt2.models.weights import WeightSource
from gpu_gpt2.tokenizer import Tokenizer
from gpu_gpt2.training import checkpoint

TOKENIZER_BIN: Final = "gpt2_tokenizer.bin"  # as llm.c's programs call it, beside the model

_SUFFIXES: Final = (".safetensors", ".bin")
_NAME: Final = re.compile(r"d\d+|gpt[23]:.*")


def open_model(name: str | Path) -> WeightSource:
    """The weights of a model, checked but not yet read; UserError says what is wrong.

    `name` is a run (its newest checkpoint), a checkpoint or Hugging Face folder, a .safetensors
    file, a model file of llm.c, or, for a new model, a name such as d12.
    """
    path = Path(name)
    if path.is_file() or path.suffix in _SUFFIXES:
        return _open_file(path)
    if not path.exists() and (str(name) in MODELS or _NAME.fullmatch(str(name))):
        return InitialWeights(config=model_config(str(name)), seed=DEFAULTS["seed"])
    files = sorted(file.name for file in path.glob("*") if file.suffix in _SUFFIXES)
    if files and not hf.holds_model(path) and not checkpoint.checkpoints(path):
        raise DataError(
            f"{path} is no run and no Hugging Face folder, but holds {files[0]} ({len(files)} "
            f"such); name that file"
        )
    return hf.open_folder(checkpoint.latest(path))


def folder_of(source: WeightSource) -> Path | None:
    """Where the tokenizer and the training state of a model may lie."""
    return source.folder if isinstance(source, hf.HFModel) else None


def tokenizer_of(source: WeightSource) -> Tokenizer:
    """The tokenizer in the model's folder that fits it, else GPT-2's where that does."""
    folder, size = folder_of(source), source.config.vocab_size
    if folder is not None and holds_vocabulary(folder):
        tokenizer = Tokenizer.open(folder)
        if tokenizer.vocab_size != size:
            raise DataError(
                f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, config.json {size}; "
                f"they belong to different models"
            )
        return tokenizer
    if isinstance(source, llmc.LlmcModel) and (file := source.path.parent / TOKENIZER_BIN).exists():
        tokenizer = Tokenizer.open(file)
        if tokenizer.vocab_size == size:  # else it belongs to another model in that folder
            return tokenizer
    if size == GPT2_VOCAB_SIZE:
        return Tokenizer.gpt2()
    raise DataError(
        f"{folder or 'the model'} has {size} tokens and no tokenizer; only GPT-2's "
        f"{GPT2_VOCAB_SIZE} are known without one, so name a folder that has a tokenizer.json, or "
        f"put a {TOKENIZER_BIN} beside the model"
    )


def _open_file(path: Path) -> WeightSource:
    if path.suffix == ".safetensors":
        return hf.open_file(path)
    if hf.is_pickle(path):
        raise hf.refuse_pickle(path)
    if path.suffix == ".bin":
        return llmc.open_model(path)
    raise DataError(
        f"{path}: not a model by its name; expected a run or checkpoint of gpu-gpt2, a Hugging "
        f"Face folder, a .safetensors file or a .bin file of llm.c"
    )
