"""Hugging Face's Llama: the names and layouts of its tensors, and its settings in config.json.

Differences from our layout: queries, keys and values are three tensors, as are gate and up
projection two, and the rows of queries and keys are in another order (see StoredTensor.ours).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gpu_gpt2.config import ROPE_THETA, LlamaConfig
from gpu_gpt2.errors import DataError
from gpu_gpt2.formats.hf_family import HEAD, HFFamily, StoredTensor, new_config
from gpu_gpt2.formats.safetensors import TensorFile
from gpu_gpt2.models.weights import Piece

EMBEDDING: Final = "embed_tokens.weight"

# Hugging Face's names of the tensors outside the layers, by our names.
_WHOLE: Final[Mapping[str, str]] = {"wte": EMBEDDING, "head": HEAD, "lnfw": "norm.weight"}
# Hugging Face's names of the tensors of a layer that are one tensor in both layouts.
_LAYER: Final[Mapping[str, str]] = {
    "ln1w": "input_layernorm.weight",
    "attprojw": "self_attn.o_proj.weight",
    "ln2w": "post_attention_layernorm.weight",
    "fcprojw": "mlp.down_proj.weight",
}
# Hugging Face's names of the sizes in LlamaConfig.
_SIZES: Final[Mapping[str, str]] = {
    "vocab_size": "vocab_size",
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_inner": "intermediate_size",
    "rms_norm_eps": "rms_norm_eps",
}
_SUPPORTED: Final[Mapping[str, tuple[Any, ...]]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (None, 1),
    "quantization_config": (None,),
}
_EPS: Final = 1e-6  # rms_norm_eps of a config.json without it: transformers' default
# The settings of RoPE: transformers 5 writes the first, transformers 4 wrote the second, which
# counts if a file has both.
_ROPE_DICTS: Final = ("rope_parameters", "rope_scaling")


class HFLlama(HFFamily):
    """LlamaForCausalLM and LlamaModel."""

    architecture = "LlamaForCausalLM"
    prefix = "model."
    ignored = re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # RoPE's frequencies
    supported = _SUPPORTED

    def stored(self, piece: Piece, config: LlamaConfig) -> tuple[StoredTensor, ...]:
        if piece.layer is None:
            return (StoredTensor(_WHOLE[piece.name], piece.shape),)
        layer, C = f"layers.{piece.layer}.", config.n_embd
        if piece.name == "qkvw":
            H, G, D = config.n_head, config.n_kv_head, config.head_size
            return (
                StoredTensor(f"{layer}self_attn.q_proj.weight", (H * D, C), half_split_heads=H),
                StoredTensor(f"{layer}self_attn.k_proj.weight", (G * D, C), half_split_heads=G),
                StoredTensor(f"{layer}self_attn.v_proj.weight", (G * D, C)),
            )
        if piece.name == "fcw":
            return tuple(
                StoredTensor(f"{layer}mlp.{name}_proj.weight", (config.n_inner, C))
                for name in ("gate", "up")
            )
        return (StoredTensor(layer + _LAYER[piece.name], piece.shape),)

    def config_of_settings(self, path: Path, values: Mapping[str, Any]) -> LlamaConfig:
        defaults = {"rms_norm_eps": _EPS, "num_key_value_heads": values.get("num_attention_heads")}
        sizes = {theirs: values.get(theirs, defaults.get(theirs)) for theirs in _SIZES.values()}
        if sizes["num_key_value_heads"] is None:
            sizes["num_key_value_heads"] = defaults["num_key_value_heads"]
        if missing := [name for name, value in sizes.items() if value is None]:
            raise DataError(f"{path}: {', '.join(missing)} missing")
        config = new_config(
            path,
            LlamaConfig,
            {
                **{ours: sizes[theirs] for ours, theirs in _SIZES.items()},
                "rope_theta": _rope_theta(path, values),
                "tie_word_embeddings": values.get("tie_word_embeddings", False),
            },
        )
        if values.get("head_dim") not in (None, config.head_size):
            raise DataError(
                f"{path}: head_dim is {values['head_dim']!r}; only hidden_size / "
                f"num_attention_heads = {config.head_size} is supported"
            )
        return config

    def config_of_shapes(
        self, where: Path, files: Mapping[str, TensorFile], prefix: str
    ) -> LlamaConfig:
        raise DataError(
            f"{where}: the number of heads is not known from the tensors of a Llama; put the "
            f"model's config.json beside the file"
        )

    def settings(self, config: LlamaConfig, eot: int | None) -> dict[str, Any]:
        return {
            **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
            "head_dim": config.head_size,
            "tie_word_embeddings": config.tie_word_embeddings,
            # transformers 5 reads the first of these, versions before it the other two.
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "rope_theta": config.rope_theta,
            "rope_scaling": None,
            **{name: values[0] for name, values in _SUPPORTED.items() if values[0] is not None},
            "bos_token_id": eot,
            "eos_token_id": eot,
            "attention_dropout": 0.0,  # trained without dropout
        }


def _rope_theta(path: Path, values: Mapping[str, Any]) -> Any:
    """Returns the base of RoPE's angles in a config.json; DataError unless it is plain RoPE."""
    theta = values.get("rope_theta")
    for name in _ROPE_DICTS:
        rope = values.get(name) or {}
        if not isinstance(rope, dict):
            raise DataError(f"{path}: {name} is {rope!r}; expected an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise DataError(f"{path}: rope_type in {name} is {kind!r}; only 'default' is supported")
        if rope.get("partial_rotary_factor") not in (None, 1):
            raise DataError(
                f"{path}: partial_rotary_factor in {name} is {rope['partial_rotary_factor']!r}; "
                f"only 1 is supported"
            )
        theta = rope.get("rope_theta") or theta
    return ROPE_THETA if theta is None else theta
