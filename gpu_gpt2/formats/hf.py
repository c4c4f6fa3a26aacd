"""Hugging Face GPT-2 folders: model.safetensors and config.json, bytes on disk and nothing else.

Differences from our layout: layers are separate tensors, the four projections are Conv1D weights
(in, out), the vocabulary is not padded, and the tied head is not stored.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import EllipsisType
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gpu_gpt2.config import ModelConfig
from gpu_gpt2.errors import CheckpointError, ConfigError
from gpu_gpt2.layout import flat_views, parameter_count, parameters

MODEL_FILE: Final = "model.safetensors"
CONFIG_FILE: Final = "config.json"

FloatArray: TypeAlias = npt.NDArray[np.float32]

_PREFIX: Final = "transformer."  # of GPT2LMHeadModel's names; GPT2Model has none

# Our names, what Hugging Face calls them, and whether they are Conv1D weights, (in, out).
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

# Causal masks that older files carry, and the head, which is wte again.
_IGNORED: Final = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias|lm_head\.weight")

_READABLE: Final[Mapping[str, np.dtype[Any]]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

# Settings under which a GPT-2 computes something else than ours, and the values that do not.
# The first value is what a config.json without the setting means.
_SUPPORTED: Final[Mapping[str, tuple[Any, ...]]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}


def save_model(folder: Path, config: ModelConfig, weights: FloatArray, eot: int) -> None:
    """Writes a folder that `transformers.GPT2LMHeadModel.from_pretrained` opens unchanged.

    `weights` is a parameter arena (n,) float32, `eot` the token that ends a text. Needs as much
    memory again as the transposed matrices. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ours = named(config, weights)
    tensors = {_PREFIX + t.name: t.view(ours) for t in _tensors(config)}
    write_tensors(folder / MODEL_FILE, tensors)
    settings = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **asdict(config),
        **{name: values[0] for name, values in _SUPPORTED.items()},
        "n_inner": None,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "embd_pdrop": 0.0,  # trained without dropout
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "torch_dtype": "float32",
    }
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_model(folder: Path) -> tuple[ModelConfig, FloatArray]:
    """The sizes of the GPT-2 in a folder and its weights as a parameter arena (n,) float32.

    Reads what `GPT2LMHeadModel` and `GPT2Model` save, in float32, float16 or bfloat16. The padding
    rows of wte are zero. Raises CheckpointError.
    """
    config = _load_config(folder / CONFIG_FILE)
    file = TensorFile(folder / MODEL_FILE)
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in file.names) else ""
    expected = {name for name in file.names if _IGNORED.fullmatch(name)}
    for tensor in _tensors(config):  # all checks come before the first allocation
        file.check(prefix + tensor.name, tensor.shape)
        expected.add(prefix + tensor.name)
    file.refuse_others(expected)
    weights = np.zeros(parameter_count(config), np.float32)
    ours = named(config, weights)
    for tensor in _tensors(config):
        file.read(prefix + tensor.name, out=tensor.view(ours))
    return config, weights


def named(config: ModelConfig, arena: FloatArray) -> dict[str, FloatArray]:
    """The tensors of a parameter arena (n,) by `layout.parameters`' names, as views."""
    return vars(flat_views(parameters(config), arena))


class TensorFile:
    """A safetensors file open for reading; every error is a CheckpointError naming the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            file: Any = safe_open(path, framework="numpy")
            self.names: frozenset[str] = frozenset(file.keys())
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file") from None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from error
        self._file = file

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuses a tensor that is missing, of another shape, or not of floats."""
        if name not in self.names:
            raise CheckpointError(f"{self._path}: tensor {name} of shape {shape} is missing")
        header = self._file.get_slice(name)
        if (found := tuple(header.get_shape())) != shape:
            raise CheckpointError(f"{self._path}: {name}: expected shape {shape}, found {found}")
        if (dtype := header.get_dtype()) not in _READABLE:
            raise CheckpointError(
                f"{self._path}: {name}: expected one of {', '.join(_READABLE)}, found {dtype}"
            )

    def refuse_others(self, expected: Collection[str]) -> None:
        """Refuses a file that holds more than the expected tensors."""
        if others := sorted(self.names.difference(expected)):
            raise CheckpointError(
                f"{self._path}: {others[0]!r} ({len(others)} such) is not a tensor of a GPT-2 of "
                f"these sizes"
            )

    def read(self, name: str, out: FloatArray) -> None:
        """Copies a checked tensor into `out` of the same shape, which may be a strided view."""
        out[...] = self._file.get_tensor(name)


def write_tensors(path: Path, tensors: Mapping[str, FloatArray]) -> None:
    """Writes a safetensors file. Raises OSError, a full disk included."""
    # safetensors.numpy writes the memory behind an array and never looks at strides.
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, metadata={"format": "pt"})  # older transformers insist
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            code = int(number.group(1))
            raise OSError(code, os.strerror(code), str(path)) from error
        raise


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor as Hugging Face stores it, and the part of our arrays that it corresponds to."""

    name: str  # without the prefix
    shape: tuple[int, ...]
    ours: str
    part: int | slice | EllipsisType
    transposed: bool = False

    def view(self, weights: Mapping[str, FloatArray]) -> FloatArray:
        part: FloatArray = weights[self.ours][self.part]
        return part.T if self.transposed else part


def _tensors(c: ModelConfig) -> Iterator[_Tensor]:
    C = c.n_embd
    yield _Tensor("wte.weight", (c.vocab_size, C), "wte", slice(c.vocab_size))
    yield _Tensor("wpe.weight", (c.n_positions, C), "wpe", ...)
    stacked = {spec.name: spec.shape[1:] for spec in parameters(c)}
    for layer in range(c.n_layer):
        for ours, (name, transposed) in _LAYER.items():
            shape = stacked[ours][::-1] if transposed else stacked[ours]
            yield _Tensor(f"h.{layer}.{name}", shape, ours, layer, transposed)
    yield _Tensor("ln_f.weight", (C,), "lnfw", ...)
    yield _Tensor("ln_f.bias", (C,), "lnfb", ...)


def _load_config(path: Path) -> ModelConfig:
    values = read_json(path)
    if values.get("model_type") != "gpt2":
        raise CheckpointError(
            f"{path}: model_type is {values.get('model_type')!r}; only 'gpt2' can be read"
        )
    for name, supported in _SUPPORTED.items():
        if (value := values.get(name, supported[0])) not in supported:
            allowed = " or ".join(repr(s) for s in supported)
            raise CheckpointError(f"{path}: {name} is {value!r}; only {allowed} is supported")
    sizes = {field.name: values.get(field.name) for field in fields(ModelConfig)}
    if missing := [name for name, value in sizes.items() if value is None]:
        raise CheckpointError(f"{path}: {', '.join(missing)} missing")
    try:
        config = ModelConfig(**sizes)  # type: ignore[arg-type]  # it checks its arguments
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if values.get("n_inner") not in (None, 4 * config.n_embd):
        raise CheckpointError(
            f"{path}: n_inner is {values['n_inner']!r}; only 4 x n_embd = {4 * config.n_embd} "
            f"is supported"
        )
    return config
