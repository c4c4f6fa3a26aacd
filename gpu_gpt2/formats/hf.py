"""Hugging Face GPT-2 folders and safetensors files: their tensors, names and config.json.

Differences from our layout: the layers are separate tensors, the four projections are Conv1D
weights (in, out), and the vocabulary is not padded. The tied head is left out, or stored once more
as lm_head.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np

from gpu_gpt2.config import GPT2_VOCAB_SIZE, LAYER_NORM_EPSILON, GPT2Config, ModelConfig
from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.formats.files import BLOCK_BYTES
from gpu_gpt2.formats.safetensors import TensorFile, TensorWriter
from gpu_gpt2.formats.vocabulary import holds_vocabulary
from gpu_gpt2.models.weights import Piece, Weights, WeightSource, pieces

MODEL_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"  # names the files of a model in several files
CONFIG_FILE: Final = "config.json"

_PREFIX: Final = "transformer."  # begins tensor names in GPT2LMHeadModel, not in GPT2Model
_HEAD: Final = "lm_head.weight"

# Hugging Face's names of the tensors outside the layers, by our names.
_WHOLE: Final[Mapping[str, str]] = {
    "wte": "wte.weight",
    "wpe": "wpe.weight",
    "lnfw": "ln_f.weight",
    "lnfb": "ln_f.bias",
}
# Hugging Face's names of a layer's tensors, each with True for a Conv1D weight, (in, out).
_LAYER: Final[Mapping[str, tuple[str, bool]]] = {
    "ln1w": ("ln_1.weight", False),
    "ln1b": ("ln_1.bias", False),
    "qkvw": ("attn.c_attn.weight", True),
    "qkvb": ("attn.c_attn.bias", False),
    "attprojw": ("attn.c_proj.weight", True),
    "attprojb": ("attn.c_proj.bias", False),
    "ln2w": ("ln_2.weight", False),
    "ln2b": ("ln_2.bias", False),
    "fcw": ("mlp.c_fc.weight", True),
    "fcb": ("mlp.c_fc.bias", False),
    "fcprojw": ("mlp.c_proj.weight", True),
    "fcprojb": ("mlp.c_proj.bias", False),
}

_MASK: Final = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # causal masks that older files carry
_SHARD: Final = re.compile(r"[\w.-]+\.safetensors", re.ASCII)  # a name without a folder

# Settings that change what a GPT-2 computes, with the values under which it computes what our model
# does. The first value is the one that a config.json without the setting implies.
_SUPPORTED: Final[Mapping[str, tuple[Any, ...]]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}

_PUBLISHED_WIDTHS: Final = (768, 1024, 1280, 1600)  # n_embd of OpenAI's models
_PUBLISHED_HEAD_SIZE: Final = 64  # all of OpenAI's models have heads of this size
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
            name, transposed = _stored(piece)
            values = self.files[self.prefix + name].read(self.prefix + name)
            yield piece, values.T if transposed else values


def open_folder(folder: Path) -> HFModel:
    """The GPT-2 in a folder, in one file or several; DataError says what is wrong.

    Reads what `GPT2LMHeadModel` and `GPT2Model` save, in float32, float16 or bfloat16.
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
    """The GPT-2 in one safetensors file; without a config.json beside it, of a published width."""
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
    """Writes a folder that `transformers.GPT2LMHeadModel.from_pretrained` opens unchanged.

    The weights keep the source's dtype. watch: called with each piece that has been written.
    Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {}
    for piece in pieces(source.config):
        name, transposed = _stored(piece)
        shapes[_PREFIX + name] = piece.shape[::-1] if transposed else piece.shape
    with (folder / MODEL_FILE).open("wb") as file:
        writer = TensorWriter(file, shapes, source.dtype)
        for piece, values in source.read():
            name, transposed = _stored(piece)
            writer.write(_PREFIX + name, values.T if transposed else values)
            watch(values)
    settings = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **asdict(source.config),
        **{name: values[0] for name, values in _SUPPORTED.items()},
        "n_inner": None,
        "bos_token_id": source.eot,
        "eos_token_id": source.eot,
        "embd_pdrop": 0.0,  # trained without dropout
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
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
        f"from transformers import GPT2LMHeadModel as M; "
        f"M.from_pretrained({str(folder)!r}).save_pretrained({str(safe)!r}, "
        f"safe_serialization=True)"
    )
    return DataError(f"{message}convert it with: python -c {shlex.quote(code)}")


def _stored(piece: Piece) -> tuple[str, bool]:
    """The name of a piece in the file, without prefix, and whether it is transposed there."""
    if piece.layer is None:
        return _WHOLE[piece.name], False
    name, transposed = _LAYER[piece.name]
    return f"h.{piece.layer}.{name}", transposed


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
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in files) else ""
    if settings is None:
        config = _config_of_shapes(where, files, prefix)
        eot: Any = GPT2_VOCAB_SIZE - 1
    else:
        config = _config_of_settings(where.parent / CONFIG_FILE, settings)
        eot = settings.get("eos_token_id")
    dtypes = set()
    expected = {_HEAD}
    for piece in pieces(config):
        stored, transposed = _stored(piece)
        name = prefix + stored
        shape = piece.shape[::-1] if transposed else piece.shape
        if name not in files:
            raise DataError(f"{where}: tensor {name} of shape {shape} is missing")
        files[name].check(name, shape)
        dtypes.add(files[name].dtype(name))
        expected.add(name)
    others = [
        name
        for name in sorted(files.keys() - expected)
        if not _MASK.fullmatch(name.removeprefix(_PREFIX))
    ]
    if others:
        raise DataError(
            f"{where}: {others[0]!r} ({len(others)} such) is not a tensor of a GPT-2 of these sizes"
        )
    if _HEAD in files:
        _check_tied(files, prefix + _WHOLE["wte"], config)
    return HFModel(
        folder=None if settings is None else where.parent,
        config=config,
        dtype=dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32),
        eot=eot if type(eot) is int and 0 <= eot < config.vocab_size else None,
        prefix=prefix,
        files=files,
    )


def _check_tied(files: Mapping[str, TensorFile], wte: str, config: ModelConfig) -> None:
    """Raises DataError if the stored head differs from wte, as our models share one matrix."""
    head = files[_HEAD]
    head.check(_HEAD, (config.vocab_size, config.n_embd))
    step = max(1, BLOCK_BYTES // (4 * config.n_embd))
    for start in range(0, config.vocab_size, step):
        rows = range(start, min(start + step, config.vocab_size))
        a, b = files[wte].read(wte, rows), head.read(_HEAD, rows)
        if a.astype(np.float32).tobytes() != b.astype(np.float32).tobytes():
            raise DataError(
                f"{head.path}: {_HEAD} differs from {wte} in rows {rows.start} to "
                f"{rows.stop - 1}; only models that share these two can be read"
            )


def _config_of_settings(path: Path, values: dict[str, Any]) -> ModelConfig:
    """The sizes in a config.json; DataError if that model computes something else than ours."""
    if values.get("model_type") != "gpt2":
        raise DataError(
            f"{path}: model_type is {values.get('model_type')!r}; only 'gpt2' can be read"
        )
    for name, supported in _SUPPORTED.items():
        if (value := values.get(name, supported[0])) not in supported:
            allowed = " or ".join(repr(s) for s in supported)
            raise DataError(f"{path}: {name} is {value!r}; only {allowed} is supported")
    sizes = {field.name: values.get(field.name) for field in fields(GPT2Config)}
    sizes["layer_norm_epsilon"] = values.get("layer_norm_epsilon", LAYER_NORM_EPSILON)
    if missing := [name for name, value in sizes.items() if value is None]:
        raise DataError(f"{path}: {', '.join(missing)} missing")
    try:
        config = GPT2Config(**sizes)  # type: ignore[arg-type]  # it checks its arguments
    except ConfigError as error:
        raise DataError(f"{path}: {error}") from error
    if values.get("n_inner") not in (None, 4 * config.n_embd):
        raise DataError(
            f"{path}: n_inner is {values['n_inner']!r}; only 4 x n_embd = {4 * config.n_embd} "
            f"is supported"
        )
    return config


def _config_of_shapes(where: Path, files: Mapping[str, TensorFile], prefix: str) -> ModelConfig:
    """The sizes of a model without config.json, from its shapes and the published head size."""
    shapes = []
    for ours in ("wte", "wpe"):
        name = prefix + _WHOLE[ours]
        shape = files[name].shape(name) if name in files else ()
        if len(shape) != 2:
            raise DataError(
                f"{where}: expected a matrix {name}, as every GPT-2 has, and found "
                f"{shape or 'none'}; this is another kind of model"
            )
        shapes.append(shape)
    (vocab_size, n_embd), (n_positions, _) = shapes
    if n_embd not in _PUBLISHED_WIDTHS:
        raise DataError(
            f"{where}: the number of heads is not known for n_embd {n_embd}, which is no published "
            f"GPT-2's; put the model's {CONFIG_FILE} beside the file"
        )
    layers = {match[1] for name in files if (match := re.match(rf"{prefix}h\.(\d+)\.", name))}
    try:
        return GPT2Config(
            vocab_size=vocab_size,
            n_positions=n_positions,
            n_embd=n_embd,
            n_layer=len(layers),
            n_head=n_embd // _PUBLISHED_HEAD_SIZE,
        )
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from error


def _pickles_in(folder: Path) -> list[Path]:
    """The pickles in a folder that may hold a model."""
    return [
        path
        for path in sorted(folder.glob("*"))
        if path.suffix in _PICKLES and path.is_file() and is_pickle(path)
    ]
