"""Opens a model by name or path, whatever its kind of file, and finds its tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from gpu_gpt2.config import DEFAULTS, GPT2_VOCAB_SIZE, MODELS, model_config
from gpu_gpt2.errors import DataError
from gpu_gpt2.formats import hf, llama2c, llama2c_tokenizer, llmc, tokenizer_bin
from gpu_gpt2.formats.llmc_header import KINDS, MODEL_MAGIC, magic_of
from gpu_gpt2.models.init import InitialWeights
from gpu_gpt2.models.weights import WeightSource
from gpu_gpt2.tokenizer import GPT2Tokenizer, Tokenizer, open_tokenizer
from gpu_gpt2.training import checkpoint

_SUFFIXES: Final = (".safetensors", ".bin")
_NAME: Final = re.compile(r"d\d+|(gpt[23]|llama):.*")


def open_model(name: str | Path) -> WeightSource:
    """The weights of a model, whose file is checked but not yet read; UserError.

    `name` is the path of a run (its newest checkpoint is opened), of a checkpoint, a Hugging Face
    folder, a .safetensors file, or a model file of llm.c or llama2.c; or, for a new model, a name
    such as d12.
    """
    path = Path(name)
    if path.is_file() or (path.suffix in _SUFFIXES and not path.is_dir()):
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


def tokenizer_of(source: WeightSource) -> Tokenizer:
    """The model's own tokenizer, or GPT-2's for a model without one whose vocabulary has its size.

    DataError if there is none, or it does not fit the model.
    """
    path, size = source.tokenizer_path, source.config.vocab_size
    if path is not None:
        tokenizer = open_tokenizer(path)
        if tokenizer.vocab_size != size:
            raise DataError(
                f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, the model {size}; they "
                f"belong to different models"
            )
        return tokenizer
    if size == GPT2_VOCAB_SIZE:
        return GPT2Tokenizer.gpt2()
    raise DataError(
        f"{source.folder or 'the model'} has {size} tokens and no tokenizer; only GPT-2's "
        f"{GPT2_VOCAB_SIZE} are known without one, so name a folder that has a tokenizer.json, or "
        f"put llm.c's {tokenizer_bin.TOKENIZER_BIN} or llama2.c's "
        f"{llama2c_tokenizer.TOKENIZER_BIN} beside the model"
    )


def _open_file(path: Path) -> WeightSource:
    if path.suffix == ".safetensors":
        return hf.open_file(path)
    if hf.is_pickle(path):
        raise hf.refuse_pickle(path)
    if path.suffix == ".bin" or magic_of(path) in KINDS or llama2c.is_llama2c(path):
        return _open_bin(path)
    raise DataError(
        f"{path} is no model; expected a run or checkpoint of gpu-gpt2, a Hugging "
        f"Face folder, a .safetensors file or a .bin file of llm.c or llama2.c"
    )


def _open_bin(path: Path) -> WeightSource:
    """The model in a .bin file, whose first bytes tell whether llm.c or llama2.c wrote it."""
    if magic_of(path) in KINDS:
        return llmc.open_model(path)
    if llama2c.is_llama2c(path):
        return llama2c.open_model(path)
    raise DataError(
        f"{path}: begins neither as a model file of llm.c (magic number {MODEL_MAGIC}) nor as one "
        f"of llama2.c (magic number {llama2c.MAGIC:#x}, or the sizes of version 0); the file is "
        f"damaged or of another kind"
    )
