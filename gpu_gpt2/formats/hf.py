"""Hugging Face folders and safetensors files of GPT-2 and Llama models, with their config.json.

Differences from our layout: the layers are separate tensors, and the vocabulary is not padded. A
tied head is left out, or stored once more as lm_head. hf_gpt2.py and hf_llama.py have the rest, by
family.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from gpu_gpt2.config import GPT2_VOCAB_SIZE, GPT2Config, LlamaConfig, ModelConfig
from gpu_gpt2.errors import DataError
from gpu_gpt2.formats.files import BLOCK_BYTES
from gpu_gpt2.formats.hf_family import HEAD, HFFamily, dtype_of, rows_of
from gpu_gpt2.formats.hf_gpt2 import HFGPT2
from gpu_gpt2.formats.hf_llama import EMBEDDING, HFLlama
from gpu_gpt2.formats.safetensors import TensorFile, TensorWriter
from gpu_gpt2.formats.vocabulary import holds_vocabulary
from gpu_gpt2.models.weights import Piece, Weights, WeightSource, pieces

MODEL_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"  # names the files of a model in several files
CONFIG_FILE: Final = "config.json"

_FAMILIES: Final[Mapping[str, HFFamily]] = {  # by model_type in config.json
    GPT2Config.family: HFGPT2(),
    LlamaConfig.family: HFLlama(),
}
_SHARD: Final = re.compile(r"[\w.-]+\.safetensors", re.ASCII)  # a name without a folder
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # suffixes of files that may be pickles


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HFModel:
    """A model whose tensors have all been checked, as a source of weights."""

    folder: Path | None  # None for a lone .safetensors file without a config.json beside it
    config: ModelConfig
    dtype: np.dtype[Any]
    eot: int | None
    prefix: str  # beginning of the tensors' names
    files: Mapping[str, TensorFile]  # file that holds each tensor, by its name

    @property
    def tokenizer_path(self) -> Path | None:
        return self.folder if self.folder and holds_vocabulary(self.folder) else None

    def read(self) -> Iterator[tuple[Piece, Weights]]:
        for piece in pieces(self.config):
            yield piece, self._read(piece)

    def _read(self, piece: Piece) -> Weights:
        family = _FAMILIES[self.config.family]
        tensors = family.stored(piece, self.config)
        names = [family.full_name(tensor, self.prefix) for tensor in tensors]
        if len(tensors) == 1:
            return tensors[0].ours(self.files[names[0]].read(names[0]))
        whole = np.empty(piece.shape, dtype_of({self.files[name].dtype(name) for name in names}))
        for tensor, name, rows in zip(tensors, names, rows_of(tensors, whole), strict=True):
            rows[...] = tensor.ours(self.files[name].read(name))
        return whole


def open_folder(folder: Path) -> HFModel:
    """The model in a folder, in one file or several; DataError says what is wrong.

    Reads what transformers' classes of a GPT-2 and a Llama save, with a head or, if it is tied,
    without, in float32, float16 or bfloat16.
    """
    if (folder / MODEL_FILE).is_file():
        where = folder / MODEL_FILE
        files = _tensors_of(TensorFile(where))
    elif (folder / INDEX_FILE).is_file():
        where = folder / INDEX_FILE
        files = _sharded_tensors(where)
    elif pickles := _pickles_in(folder):
        raise refuse_pickle(pickles[0])
    else:
        raise DataError(f"{folder / MODEL_FILE}: no such file")
    return _checked(where, files, read_json(folder / CONFIG_FILE))


def open_file(path: Path) -> HFModel:
    """The model in one safetensors file; DataError.

    Without a config.json beside the file it must be a GPT-2 of a published width.
    """
    files = _tensors_of(TensorFile(path))
    config = path.parent / CONFIG_FILE
    return _checked(path, files, read_json(config) if config.is_file() else None)


def holds_model(folder: Path) -> bool:
    """True if a folder has the files of a model, readable or not."""
    names = (CONFIG_FILE, MODEL_FILE, INDEX_FILE)
    return any((folder / name).is_file() for name in names) or bool(_pickles_in(folder))


def write_model(
    folder: Path, source: WeightSource, watch: Callable[[Weights], None] = lambda values: None
) -> None:
    """Writes a folder that `transformers.AutoModelForCausalLM.from_pretrained` opens unchanged.

    The weights keep the source's dtype. watch: called with each piece that has been written.
    Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = source.config
    family = _FAMILIES[config.family]
    shapes = {
        family.full_name(tensor, family.prefix): tensor.shape
        for piece in pieces(config)
        for tensor in family.stored(piece, config)
    }
    with (folder / MODEL_FILE).open("wb") as file:
        writer = TensorWriter(file, shapes, source.dtype)
        for piece, values in source.read():
            tensors = family.stored(piece, config)
            for tensor, rows in zip(tensors, rows_of(tensors, values), strict=True):
                writer.write(family.full_name(tensor, family.prefix), tensor.theirs(rows))
            watch(values)
    settings = {
        "architectures": [family.architecture],
        "model_type": config.family,
        **family.settings(config, source.eot),
        "torch_dtype": source.dtype.name,  # the key that every transformers understands
    }
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; DataError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def is_pickle(path: Path) -> bool:
    """True if a file is a pickle, or a zip archive, into which PyTorch packs pickles."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError:
        return False  # the caller opens the file next, and reports why it cannot be read
    return start == b"PK\3\4" or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5")


def refuse_pickle(path: Path) -> DataError:
    """The error for a pickle, which is never opened here; it says how to convert the file."""
    message = (
        f"{path} is a pickle, which can run any program when it is opened, so gpu-gpt2 does not; "
        f"if you trust it, "
    )
    folder = path.parent
    if not (path.name.startswith("pytorch_model") and (folder / CONFIG_FILE).is_file()):
        return DataError(
            message + "load it with PyTorch and save the model again with "
            "save_pretrained(FOLDER, safe_serialization=True) of transformers"
        )
    safe = folder.with_name(folder.name + "-safetensors")
    code = (
        f"from transformers import AutoModelForCausalLM as M; "
        f"M.from_pretrained({str(folder)!r}).save_pretrained({str(safe)!r}, "
        f"safe_serialization=True)"
    )
    return DataError(f"{message}convert it with: python -c {shlex.quote(code)}")


def _tensors_of(file: TensorFile) -> dict[str, TensorFile]:
    return dict.fromkeys(file.names, file)


def _sharded_tensors(index: Path) -> dict[str, TensorFile]:
    """The tensors of a model in several files, each with the file that the index names for it."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise DataError(f"{index}: weight_map is missing or not an object; save the model again")
    shards: dict[str, TensorFile] = {}
    for name, shard in names.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise DataError(
                f"{index}: {name!r} is said to be in {shard!r}, expected the name of a "
                f".safetensors file in the same folder; save the model again"
            )
        if shard not in shards:
            shards[shard] = TensorFile(index.parent / shard)
        if name not in shards[shard].names:
            raise DataError(
                f"{index}: {name!r} is said to be in {shard}, which does not have it; the files "
                f"belong to different models, so get them again"
            )
    return {name: shards[shard] for name, shard in names.items()}


def _checked(
    where: Path, files: Mapping[str, TensorFile], settings: dict[str, Any] | None
) -> HFModel:
    """The model in the tensors found at `where`, all checked before any is read; DataError."""
    family = _family(where.parent / CONFIG_FILE, files, settings)
    prefix = family.prefix if any(name.startswith(family.prefix) for name in files) else ""
    if settings is None:
        config = family.config_of_shapes(where, files, prefix)
        eot: Any = GPT2_VOCAB_SIZE - 1
    else:
        path = where.parent / CONFIG_FILE
        family.check_supported(path, settings)
        config = family.config_of_settings(path, settings)
        eot = settings.get("eos_token_id")
    dtypes = set()
    expected = {HEAD}
    for piece in pieces(config):
        for tensor in family.stored(piece, config):
            name = family.full_name(tensor, prefix)
            if name not in files:
                raise DataError(f"{where}: tensor {name} of shape {tensor.shape} is missing")
            files[name].check(name, tensor.shape)
            dtypes.add(files[name].dtype(name))
            expected.add(name)
    others = [
        name
        for name in sorted(files.keys() - expected)
        if not family.ignored.fullmatch(name.removeprefix(family.prefix))
    ]
    if others:
        raise DataError(
            f"{where}: {others[0]!r} ({len(others)} such) is not a tensor of a {config.title} of "
            f"these sizes"
        )
    return HFModel(
        folder=None if settings is None else where.parent,
        config=_with_stored_head(config, files, prefix),
        dtype=dtype_of(dtypes),
        eot=eot if type(eot) is int and 0 <= eot < config.vocab_size else None,
        prefix=prefix,
        files=files,
    )


def _family(
    path: Path, files: Mapping[str, TensorFile], settings: dict[str, Any] | None
) -> HFFamily:
    """The family that the config.json at `path` names, or that the tensors have without one."""
    if settings is None:
        is_llama = any(name.endswith(EMBEDDING) for name in files)
        return _FAMILIES[LlamaConfig.family if is_llama else GPT2Config.family]
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        known = " and ".join(map(repr, _FAMILIES))
        raise DataError(f"{path}: model_type is {model_type!r}; only {known} can be read")
    return _FAMILIES[model_type]


def _with_stored_head(
    config: ModelConfig, files: Mapping[str, TensorFile], prefix: str
) -> ModelConfig:
    """The model with a tied head if the head that a file stores is equal to wte.

    Raises DataError if it differs in a model whose head is tied.
    """
    if HEAD not in files:
        return config
    untied = config if isinstance(config, LlamaConfig) and not config.tie_word_embeddings else None
    family = _FAMILIES[config.family]
    wte_piece = next(piece for piece in pieces(config) if piece.name == "wte")
    (wte,) = (family.full_name(tensor, prefix) for tensor in family.stored(wte_piece, config))
    head = files[HEAD]
    head.check(HEAD, (config.vocab_size, config.n_embd))
    step = max(1, BLOCK_BYTES // (4 * config.n_embd))
    for start in range(0, config.vocab_size, step):
        rows = range(start, min(start + step, config.vocab_size))
        a, b = files[wte].read(wte, rows), head.read(HEAD, rows)
        if a.astype(np.float32).tobytes() != b.astype(np.float32).tobytes():
            if untied:
                return untied
            raise DataError(
                f"{head.path}: {HEAD} differs from {wte} in rows {rows.start} to "
                f"{rows.stop - 1}, and {CONFIG_FILE} says that they are one matrix"
            )
    return replace(untied, tie_word_embeddings=True) if untied else config


def _pickles_in(folder: Path) -> list[Path]:
    """The pickles in a folder that may hold a model."""
    return [
        path
        for path in sorted(folder.glob("*"))
        if path.suffix in _PICKLES and path.is_file() and is_pickle(path)
    ]
