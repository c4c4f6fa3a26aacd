"""Hugging Face folders: transformers opens ours, we open theirs, and damage gets one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from gpu_gpt2.config import ModelConfig
from gpu_gpt2.errors import CheckpointError
from gpu_gpt2.formats import hf
from gpu_gpt2.layout import parameter_count

CONFIG = ModelConfig(vocab_size=257, n_positions=17, n_embd=48, n_layer=2, n_head=3)
EOT = 256
HF_CONFIG = GPT2Config(vocab_size=257, n_positions=17, n_embd=48, n_layer=2, n_head=3)
QKV = "transformer.h.1.attn.c_attn.weight"


def random_arena(config: ModelConfig, seed: int = 0) -> hf.FloatArray:
    arena = np.random.default_rng(seed).standard_normal(parameter_count(config), np.float32)
    hf.named(config, arena)["wte"][config.vocab_size :] = 0
    return arena


def same_bits(a: Any, b: Any) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())


def assert_same_weights(model: GPT2Model, config: ModelConfig, arena: hf.FloatArray) -> None:
    """Compares every parameter of transformers' model, spelled out, with our arena."""
    ours = hf.named(config, arena)
    pairs = [
        (model.wte.weight, ours["wte"][: config.vocab_size]),
        (model.wpe.weight, ours["wpe"]),
        (model.ln_f.weight, ours["lnfw"]),
        (model.ln_f.bias, ours["lnfb"]),
    ]
    for l, block in enumerate(model.h):
        pairs += [
            (block.ln_1.weight, ours["ln1w"][l]),
            (block.ln_1.bias, ours["ln1b"][l]),
            (block.attn.c_attn.weight.T, ours["qkvw"][l]),
            (block.attn.c_attn.bias, ours["qkvb"][l]),
            (block.attn.c_proj.weight.T, ours["attprojw"][l]),
            (block.attn.c_proj.bias, ours["attprojb"][l]),
            (block.ln_2.weight, ours["ln2w"][l]),
            (block.ln_2.bias, ours["ln2b"][l]),
            (block.mlp.c_fc.weight.T, ours["fcw"][l]),
            (block.mlp.c_fc.bias, ours["fcb"][l]),
            (block.mlp.c_proj.weight.T, ours["fcprojw"][l]),
            (block.mlp.c_proj.bias, ours["fcprojb"][l]),
        ]
    assert sum(theirs.numel() for theirs, _ in pairs) == sum(p.numel() for p in model.parameters())
    for theirs, mine in pairs:
        assert same_bits(theirs.detach().float().numpy(), mine)
    assert not ours["wte"][config.vocab_size :].any()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder written by us; tests that damage it copy it first."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    hf.save_model(folder, CONFIG, random_arena(CONFIG), EOT)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def random_hf_model(cls: type[Any]) -> Any:
    """A model whose biases and norms are random too: transformers starts them at 0 and 1."""
    torch.manual_seed(1)
    model = cls(HF_CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def test_transformers_opens_our_folder(saved: Path) -> None:
    model, info = GPT2LMHeadModel.from_pretrained(saved, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[kind], (kind, info[kind])
    assert_same_weights(model.transformer, CONFIG, random_arena(CONFIG))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.dtype == torch.float32
    c = model.config
    assert (c.vocab_size, c.n_positions, c.n_embd, c.n_layer, c.n_head) == (257, 17, 48, 2, 3)
    assert (c.activation_function, c.layer_norm_epsilon) == ("gelu_new", 1e-5)
    assert (c.bos_token_id, c.eos_token_id) == (EOT, EOT)
    assert model.generation_config.eos_token_id == EOT


def test_the_file_says_what_older_transformers_ask_for(saved: Path) -> None:
    with safe_open(saved / hf.MODEL_FILE, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cls", [GPT2LMHeadModel, GPT2Model])
def test_we_open_what_transformers_saves(
    cls: type[Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = random_hf_model(cls).to(dtype)
    model.save_pretrained(tmp_path)
    config, arena = hf.load_model(tmp_path)
    assert config == CONFIG
    assert arena.dtype == np.float32
    assert_same_weights(getattr(model, "transformer", model), config, arena)


@pytest.mark.parametrize("config", [CONFIG, ModelConfig(vocab_size=128, n_embd=8, n_head=1)])
def test_round_trip_is_exact(config: ModelConfig, tmp_path: Path) -> None:
    arena = random_arena(config)
    arena[:3] = [-0.0, np.inf, np.nan]
    hf.save_model(tmp_path, config, arena, EOT)
    config_back, arena_back = hf.load_model(tmp_path)
    assert config_back == config
    assert same_bits(arena_back, arena)


def test_padding_rows_are_neither_stored_nor_invented(tmp_path: Path) -> None:
    arena = random_arena(CONFIG)
    hf.named(CONFIG, arena)["wte"][CONFIG.vocab_size :] = 7
    hf.save_model(tmp_path, CONFIG, arena, EOT)
    assert load_file(tmp_path / hf.MODEL_FILE)["transformer.wte.weight"].shape == (257, 48)
    assert same_bits(hf.load_model(tmp_path)[1], random_arena(CONFIG))


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_masks_and_a_stored_head_are_ignored(prefix: str, folder: Path) -> None:
    tensors = load_file(folder / hf.MODEL_FILE)
    tensors = {prefix + name.removeprefix("transformer."): t for name, t in tensors.items()}
    tensors["lm_head.weight"] = tensors[f"{prefix}wte.weight"]
    for l in range(CONFIG.n_layer):
        tensors[f"{prefix}h.{l}.attn.bias"] = np.ones((1, 1, 17, 17), np.uint8)
        tensors[f"{prefix}h.{l}.attn.masked_bias"] = np.array([-1e4], np.float32)
    save_file(tensors, folder / hf.MODEL_FILE)
    assert same_bits(hf.load_model(folder)[1], random_arena(CONFIG))


Tensors = dict[str, Any]


def with_other_shape(tensors: Tensors) -> None:
    tensors[QKV] = np.ascontiguousarray(tensors[QKV].T)


def with_other_dtype(tensors: Tensors) -> None:
    tensors[QKV] = tensors[QKV].astype(np.int32)


def with_one_missing(tensors: Tensors) -> None:
    del tensors[QKV]


def with_a_third_layer(tensors: Tensors) -> None:
    tensors["transformer.h.2.ln_1.weight"] = np.ones(48, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_other_shape, f"{QKV}: expected shape (48, 144), found (144, 48)"),
        (with_other_dtype, f"{QKV}: expected one of F32, F16, BF16, found I32"),
        (with_one_missing, f"tensor {QKV} of shape (48, 144) is missing"),
        (with_a_third_layer, "'transformer.h.2.ln_1.weight' (1 such) is not a tensor of a GPT-2"),
    ],
)
def test_wrong_tensors_are_named(
    change: Callable[[Tensors], None], message: str, folder: Path
) -> None:
    tensors = load_file(folder / hf.MODEL_FILE)
    change(tensors)
    save_file(tensors, folder / hf.MODEL_FILE)
    with pytest.raises(CheckpointError) as caught:
        hf.load_model(folder)
    assert str(caught.value).startswith(f"{folder / hf.MODEL_FILE}: {message}")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model_type", "llama", "model_type is 'llama'; only 'gpt2' can be read"),
        ("model_type", None, "model_type is None"),
        ("activation_function", "relu", "activation_function is 'relu'; only 'gelu_new' or"),
        ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon is 1e-06; only 1e-05 is supported"),
        ("tie_word_embeddings", False, "tie_word_embeddings is False"),
        ("scale_attn_weights", False, "scale_attn_weights is False"),
        ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx is True"),
        ("reorder_and_upcast_attn", True, "reorder_and_upcast_attn is True"),
        ("add_cross_attention", True, "add_cross_attention is True"),
        ("n_inner", 100, "n_inner is 100; only 4 x n_embd = 192 is supported"),
        ("n_layer", None, "n_layer missing"),
        ("n_layer", -1, "n_layer must be a whole number >= 1, not -1"),
        ("n_head", 5, "n_embd 48 does not divide into n_head 5 equal heads"),
        ("n_embd", "48", "n_embd must be a whole number >= 1, not '48'"),
    ],
)
def test_unsupported_configs_are_refused_by_name(
    name: str, value: Any, message: str, folder: Path
) -> None:
    path = folder / hf.CONFIG_FILE
    values = json.loads(path.read_text())
    values[name] = value
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as caught:
        hf.load_model(folder)
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("name", ["vocab_size", "n_positions", "n_layer", "n_embd"])
def test_huge_sizes_are_checked_against_the_file_before_any_allocation(
    name: str, folder: Path
) -> None:
    path = folder / hf.CONFIG_FILE
    values = json.loads(path.read_text())
    values[name] = 48 << 40
    values["n_head"] = max(1, values["n_embd"] >> 4)
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"expected shape|is missing"):
        hf.load_model(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "expected a JSON object, found list"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(
    text: bytes, message: str, folder: Path
) -> None:
    (folder / hf.CONFIG_FILE).write_bytes(text)
    with pytest.raises(CheckpointError) as caught:
        hf.load_model(folder)
    assert str(caught.value).startswith(f"{folder / hf.CONFIG_FILE}: {message}")


@pytest.mark.parametrize("name", [hf.MODEL_FILE, hf.CONFIG_FILE])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError) as caught:
        hf.load_model(folder)
    assert str(caught.value) == f"{folder / name}: no such file"


@pytest.mark.parametrize("name", [hf.MODEL_FILE, hf.CONFIG_FILE])
def test_a_folder_in_the_place_of_a_file_is_refused(name: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(CheckpointError, match=name):
        hf.load_model(folder)


fuzz = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@fuzz
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_model_is_refused(share: float, saved: Path, folder: Path) -> None:
    whole = (saved / hf.MODEL_FILE).read_bytes()
    (folder / hf.MODEL_FILE).write_bytes(whole[: int(share**4 * len(whole))])  # often the header
    with pytest.raises(CheckpointError) as caught:
        hf.load_model(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / hf.MODEL_FILE}: not a whole safetensors file: ")
    assert "\n" not in message


def test_an_extended_model_is_refused(folder: Path) -> None:
    with (folder / hf.MODEL_FILE).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        hf.load_model(folder)


@fuzz
@given(data=st.data(), bit=st.integers(0, 7))
@pytest.mark.parametrize("name", [hf.MODEL_FILE, hf.CONFIG_FILE])
def test_a_flipped_bit_is_refused_or_harmless(
    data: st.DataObject, bit: int, name: str, saved: Path, folder: Path
) -> None:
    damaged = bytearray((saved / name).read_bytes())
    header = 8 + int.from_bytes(damaged[:8], "little") if name == hf.MODEL_FILE else len(damaged)
    damaged[data.draw(st.integers(0, header - 1))] ^= 1 << bit
    (folder / name).write_bytes(damaged)
    refusal = None
    try:
        config, arena = hf.load_model(folder)
    except CheckpointError as error:
        refusal = str(error)
    if refusal is None:  # it was in the metadata, say, or in the dropout
        assert (config.n_embd, config.n_layer) == (CONFIG.n_embd, CONFIG.n_layer)
        assert same_bits(arena, random_arena(CONFIG))
    else:
        assert refusal.startswith(str(folder))
        assert "\n" not in refusal
