"""Hugging Face's Llamas: transformers opens ours with our logits, and we open what it saves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from models import noisy_weights
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel

from gpu_gpt2.config import LlamaConfig
from gpu_gpt2.errors import DataError
from gpu_gpt2.formats import hf
from gpu_gpt2.models.weights import Arena, FloatArray, load_arena, named

# All sizes that are multiplied somewhere differ, and the head has three pairs.
CONFIG = LlamaConfig(
    vocab_size=257, n_positions=17, n_embd=24, n_layer=2, n_head=4, n_kv_head=2, n_inner=40,
    rms_norm_eps=3e-5, rope_theta=777.0,
)  # fmt: skip
UNTIED = replace(CONFIG, tie_word_embeddings=False)
ONE_KV_HEAD = replace(CONFIG, n_head=3, n_kv_head=1)
CONFIGS = [CONFIG, UNTIED, ONE_KV_HEAD, replace(CONFIG, n_kv_head=4)]
EOT = 256
DTYPES = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
}


def random_arena(config: LlamaConfig) -> FloatArray:
    return noisy_weights(config, noise_seed=1)


def hf_config(c: LlamaConfig, **changes: Any) -> transformers.LlamaConfig:
    sizes = {
        "vocab_size": c.vocab_size, "hidden_size": c.n_embd, "intermediate_size": c.n_inner,
        "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head, "max_position_embeddings": c.n_positions,
        "rms_norm_eps": c.rms_norm_eps, "tie_word_embeddings": c.tie_word_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
    }  # fmt: skip
    return transformers.LlamaConfig(**{**sizes, **changes})


def random_hf_model(config: LlamaConfig, cls: type[Any] = LlamaForCausalLM) -> Any:
    """A model whose norms are random too: transformers starts them at 1."""
    torch.manual_seed(1)
    model = cls(hf_config(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def assert_same_weights(model: Any, config: LlamaConfig, arena: FloatArray) -> None:
    """Compares every parameter of transformers' model, spelled out, with our arena."""
    ours = named(config, arena)
    D, H, G, F = config.head_size, config.n_head, config.n_kv_head, config.n_inner
    # Row h D + 2 j + b of ours is row h D + b D / 2 + j of theirs.
    order = np.array(
        [h * D + b * D // 2 + j for h in range(H) for j in range(D // 2) for b in (0, 1)]
    )
    base = getattr(model, "model", model)
    pairs = [
        (base.embed_tokens.weight, ours["wte"][: config.vocab_size]),
        (base.norm.weight, ours["lnfw"]),
    ]
    if not config.tie_word_embeddings:
        pairs.append((model.lm_head.weight, ours["head"][: config.vocab_size]))
    for l, layer in enumerate(base.layers):
        qkv, fc = ours["qkvw"][l], ours["fcw"][l]
        attention, mlp = layer.self_attn, layer.mlp
        pairs += [
            (layer.input_layernorm.weight, ours["ln1w"][l]),
            (attention.q_proj.weight[order], qkv[: H * D]),
            (attention.k_proj.weight[order[: G * D]], qkv[H * D : (H + G) * D]),
            (attention.v_proj.weight, qkv[(H + G) * D :]),
            (attention.o_proj.weight, ours["attprojw"][l]),
            (layer.post_attention_layernorm.weight, ours["ln2w"][l]),
            (mlp.gate_proj.weight, fc[:F]),
            (mlp.up_proj.weight, fc[F:]),
            (mlp.down_proj.weight, ours["fcprojw"][l]),
        ]
    assert sum(theirs.numel() for theirs, _ in pairs) == sum(p.numel() for p in model.parameters())
    for theirs, mine in pairs:
        np.testing.assert_array_equal(theirs.detach().float().numpy(), mine)
    assert not ours["wte"][config.vocab_size :].any()


@pytest.mark.parametrize("config", CONFIGS)
def test_transformers_opens_our_folder(config: LlamaConfig, tmp_path: Path) -> None:
    arena = random_arena(config)
    hf.write_model(tmp_path, Arena(config, arena, EOT))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[kind], (kind, info[kind])
    assert type(model) is LlamaForCausalLM
    assert_same_weights(model, config, arena)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == config.tie_word_embeddings
    c = model.config
    assert (c.rms_norm_eps, c.rope_parameters["rope_theta"]) == (3e-5, 777.0)
    assert (c.bos_token_id, c.eos_token_id) == (EOT, EOT)


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip_is_exact(config: LlamaConfig, tmp_path: Path) -> None:
    arena = random_arena(config)
    arena[:3] = [-0.0, np.inf, np.nan]
    hf.write_model(tmp_path, Arena(config, arena, EOT))
    source = hf.open_folder(tmp_path)
    assert (source.config, source.eot) == (config, EOT)
    assert load_arena(source).tobytes() == arena.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard", ["10GB", "10KB"])
@pytest.mark.parametrize("config", CONFIGS)
def test_we_open_what_transformers_saves(
    config: LlamaConfig, shard: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = random_hf_model(config).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / hf.INDEX_FILE).exists() == (shard == "10KB")
    source = hf.open_folder(tmp_path)
    assert source.config == config
    assert source.dtype == DTYPES[dtype]
    assert {values.dtype for _, values in source.read()} == {DTYPES[dtype]}
    assert_same_weights(model, config, load_arena(source))
    hf.write_model(tmp_path / "again", source)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert again.dtype == dtype
    theirs = model.state_dict()
    assert again.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in again.state_dict().items())


def test_the_base_model_of_a_tied_llama_is_opened(tmp_path: Path) -> None:
    model = random_hf_model(CONFIG, LlamaModel)
    model.save_pretrained(tmp_path)
    source = hf.open_folder(tmp_path)
    assert source.prefix == ""
    assert_same_weights(model, CONFIG, load_arena(source))


def test_the_base_model_of_an_untied_llama_lacks_a_head(tmp_path: Path) -> None:
    random_hf_model(UNTIED, LlamaModel).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"tensor lm_head.weight of shape \(257, 24\) is missing"):
        hf.open_folder(tmp_path)


def test_parts_of_a_piece_may_have_several_dtypes(tmp_path: Path) -> None:
    arena = random_arena(CONFIG)
    hf.write_model(tmp_path, Arena(CONFIG, arena, EOT))
    tensors = load_file(tmp_path / hf.MODEL_FILE)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    save_file(tensors, tmp_path / hf.MODEL_FILE)
    rows = named(CONFIG, arena)["qkvw"][1][24:36]
    rows[...] = rows.astype(np.float16)
    source = hf.open_folder(tmp_path)
    assert source.dtype == np.float32
    np.testing.assert_array_equal(load_arena(source), arena)


# --- the head ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with a tied head, written by us."""
    hf.write_model(tmp_path / "model", Arena(CONFIG, random_arena(CONFIG), EOT))
    return tmp_path / "model"


def change_settings(folder: Path, **changes: Any) -> Path:
    """Changes entries of config.json, and removes those that are `...`; returns its path."""
    path = folder / hf.CONFIG_FILE
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: v for name, v in values.items() if v is not ...}))
    return path


def store_head(folder: Path, change: float) -> None:
    tensors = load_file(folder / hf.MODEL_FILE)
    head = tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += change
    save_file(tensors, folder / hf.MODEL_FILE)


@pytest.mark.parametrize("said", [True, False, ...])
def test_a_stored_head_that_equals_the_embedding_is_tied(said: Any, folder: Path) -> None:
    store_head(folder, 0.0)
    change_settings(folder, tie_word_embeddings=said)
    source = hf.open_folder(folder)
    assert source.config == CONFIG
    np.testing.assert_array_equal(load_arena(source), random_arena(CONFIG))


@pytest.mark.parametrize("said", [False, ...])
def test_a_stored_head_that_differs_is_untied(said: Any, folder: Path) -> None:
    store_head(folder, 1.0)
    change_settings(folder, tie_word_embeddings=said)
    assert hf.open_folder(folder).config == UNTIED


def test_a_stored_head_that_should_be_tied_and_differs_is_refused(folder: Path) -> None:
    store_head(folder, 1.0)
    with pytest.raises(
        DataError, match=r"lm_head.weight differs from model.embed_tokens.weight in rows 0 to 256, "
    ):
        hf.open_folder(folder)


def test_without_a_word_about_it_a_head_is_not_tied(folder: Path) -> None:
    """As in transformers, whose Llamas are not tied by default."""
    change_settings(folder, tie_word_embeddings=...)
    with pytest.raises(DataError, match=r"tensor lm_head.weight of shape \(257, 24\) is missing"):
        hf.open_folder(folder)


# --- config.json ---


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({"rope_parameters": ..., "rope_scaling": ...}, 777.0),  # transformers 4
        ({"rope_parameters": ..., "rope_theta": 5e5}, 5e5),
        ({"rope_theta": ..., "rope_scaling": ...}, 777.0),  # transformers 5
        ({"rope_theta": 5.0}, 777.0),  # rope_parameters counts
        ({"rope_scaling": {"type": "default"}}, 777.0),
        ({"rope_parameters": ..., "rope_theta": ...}, 10000.0),
    ],
)
def test_the_base_of_the_angles_is_read_as_in_transformers(
    changes: dict[str, Any], theta: float, folder: Path
) -> None:
    change_settings(folder, **changes)
    assert hf.open_folder(folder).config == replace(CONFIG, rope_theta=theta)
    theirs = AutoModelForCausalLM.from_pretrained(folder).config.rope_parameters
    assert theirs["rope_theta"] == theta


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_key_value_heads": ...}, {"n_kv_head": 4}),
        ({"num_key_value_heads": None}, {"n_kv_head": 4}),
        ({"rms_norm_eps": ...}, {"rms_norm_eps": 1e-6}),
        ({"head_dim": ...}, {}),
        ({"head_dim": None, "pretraining_tp": None}, {}),
    ],
)
def test_missing_settings_have_transformers_defaults(
    changes: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    config = replace(CONFIG, n_kv_head=4)
    hf.write_model(tmp_path, Arena(config, random_arena(config), EOT))
    change_settings(tmp_path, **changes)
    assert hf.open_folder(tmp_path).config == replace(config, **expected)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).config
    ours = hf.open_folder(tmp_path).config
    assert (ours.n_kv_head, ours.rms_norm_eps) == (theirs.num_key_value_heads, theirs.rms_norm_eps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
            "rope_type in rope_parameters is 'llama3'; only 'default' is supported",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type in rope_scaling is 'linear'; only 'default' is supported",
        ),
        ({"rope_scaling": [2.0]}, "rope_scaling is [2.0]; expected an object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor in rope_par"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only "),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta must be a positive number, not "),
        ({"attention_bias": True}, "attention_bias is True; only False is supported"),
        ({"mlp_bias": True}, "mlp_bias is True; only False is supported"),
        ({"head_dim": 8}, "head_dim is 8; only hidden_size / num_attention_heads = 6 is supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2; only 1 or None is supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}; only None is"),
        ({"model_type": "mistral"}, "model_type is 'mistral'; only 'gpt2' and 'llama' can be read"),
        ({"hidden_size": ...}, "hidden_size missing"),
        ({"num_key_value_heads": 3}, "n_head 4 is not a multiple of n_kv_head 3; "),
        ({"num_attention_heads": 8}, "head size 3 (n_embd / n_head) is odd"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings missing"),
    ],
)
def test_unsupported_configs_are_refused_by_name(
    changes: dict[str, Any], message: str, folder: Path
) -> None:
    path = change_settings(folder, **changes)
    with pytest.raises(DataError) as caught:
        hf.open_folder(folder)
    assert str(caught.value).startswith(f"{path}: {message}")


# --- tensors ---

Tensors = dict[str, Any]
Q = "model.layers.1.self_attn.q_proj.weight"


def without_q(tensors: Tensors) -> None:
    del tensors[Q]


def with_k_as_large_as_q(tensors: Tensors) -> None:
    tensors[Q.replace("q_proj", "k_proj")] = tensors[Q]


def with_a_bias(tensors: Tensors) -> None:
    tensors[Q.replace("weight", "bias")] = np.zeros(24, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_q, f"tensor {Q} of shape (24, 24) is missing"),
        (with_k_as_large_as_q, "model.layers.1.self_attn.k_proj.weight: expected shape (12, 24)"),
        (with_a_bias, "'model.layers.1.self_attn.q_proj.bias' (1 such) is not a tensor of a Llama"),
    ],
)
def test_wrong_tensors_are_named(
    change: Callable[[Tensors], None], message: str, folder: Path
) -> None:
    tensors = load_file(folder / hf.MODEL_FILE)
    change(tensors)
    save_file(tensors, folder / hf.MODEL_FILE)
    with pytest.raises(DataError) as caught:
        hf.open_folder(folder)
    assert str(caught.value).startswith(f"{folder / hf.MODEL_FILE}: {message}")


def test_the_frequencies_in_older_files_are_ignored(folder: Path) -> None:
    tensors = load_file(folder / hf.MODEL_FILE)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    save_file(tensors, folder / hf.MODEL_FILE)
    np.testing.assert_array_equal(load_arena(hf.open_folder(folder)), random_arena(CONFIG))


def test_a_single_file_needs_its_config(folder: Path, tmp_path: Path) -> None:
    path = shutil.copy(folder / hf.MODEL_FILE, tmp_path / "llama.safetensors")
    with pytest.raises(DataError, match=r"llama\.safetensors: the number of heads is not known "):
        hf.open_file(Path(path))
    shutil.copy(folder / hf.CONFIG_FILE, tmp_path / hf.CONFIG_FILE)
    assert hf.open_file(Path(path)).config == CONFIG
