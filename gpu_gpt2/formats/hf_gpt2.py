"""Hugging Face's GPT-2: the names and layouts of its tensors, and its settings in config.json.

Differences from our layout: the four projections are Conv1D weights (in, out).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

from gpu_gpt2.config import LAYER_NORM_EPSILON, GPT2Config
from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.formats.hf_family import HFFamily, StoredTensor, new_config
from gpu_gpt2.formats.safetensors import TensorFile
from gpu_gpt2.models.weights import Piece

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


class HFGPT2(HFFamily):
    """GPT2LMHeadModel and GPT2Model."""

    architecture = "GPT2LMHeadModel"
    prefix = "transformer."
    ignored = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # causal masks that older files carry
    supported = _SUPPORTED

    def stored(self, piece: Piece, config: GPT2Config) -> tuple[StoredTensor, ...]:
        if piece.layer is None:
            return (StoredTensor(_WHOLE[piece.name], piece.shape),)
        name, transposed = _LAYER[piece.name]
        shape = piece.shape[::-1] if transposed else piece.shape
        return (StoredTensor(f"h.{piece.layer}.{name}", shape, transposed),)

    def config_of_settings(self, path: Path, values: Mapping[str, Any]) -> GPT2Config:
        sizes = {field.name: values.get(field.name) for field in fields(GPT2Config)}
        sizes["layer_norm_epsilon"] = values.get("layer_norm_epsilon", LAYER_NORM_EPSILON)
        config = new_config(path, GPT2Config, sizes)
        if values.get("n_inner") not in (None, 4 * config.n_embd):
            raise DataError(
                f"{path}: n_inner is {values['n_inner']!r}; only 4 x n_embd = {4 * config.n_embd} "
                f"is supported"
            )
        return config

    def config_of_shapes(
        self, where: Path, files: Mapping[str, TensorFile], prefix: str
    ) -> GPT2Config:
        """Returns the sizes of a model without config.json, given OpenAI's head size."""
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
                f"{where}: the number of heads is not known for n_embd {n_embd}, which is no "
                f"published GPT-2's; put the model's config.json beside the file"
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

    def settings(self, config: GPT2Config, eot: int | None) -> dict[str, Any]:
        return {
            **asdict(config),
            **{name: values[0] for name, values in _SUPPORTED.items()},
            "n_inner": None,
            "bos_token_id": eot,
            "eos_token_id": eot,
            "embd_pdrop": 0.0,  # trained without dropout
            "resid_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
