"""Hugging Face models: transformers opens ours, we open theirs, and damage gets one clear line."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import new_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import GPT2LMHeadModel, GPT2Model

from gpu_gpt2.config import GPT2Config, ModelConfig
from gpu_gpt2.errors import DataError
from gpu_gpt2.formats import hf
from gpu_gpt2.formats.safetensors import TensorWriter
from gpu_gpt2.models.families import parameter_count
from gpu_gpt2.models.weights import Arena, FloatArray, Piece, Weights, load_arena, named

CONFIG = GPT2Config(vocab_size=257, n_positions=17, n_embd=48, n_layer=2, n_head=3)
EOT = 256
HF_CONFIG = transformers.GPT2Config(vocab_size=257, n_positions=17, n_embd=48, n_layer=2, n_head=3)
QKV = "transformer.h.1.attn.c_attn.weight"


def random_arena(config: ModelConfig, seed: int = 0) -> FloatArray:
    arena = np.random.default_rng(seed).standard_normal(parameter_count(config), np.float32)
    named(config, arena)["wte"][config.vocab_size :] = 0
    return arena


def same_bits(a: Any, b: Any) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())


def assert_same_weights(model: GPT2Model, config: ModelConfig, arena: FloatArray) -> None:
    """Compares every parameter of transformers' model, spelled out, with our arena."""
    ours = named(config, arena)
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
    hf.write_model(folder, Arena(CONFIG, random_arena(CONFIG), EOT))
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


def test_the_epsilon_of_layernorm_is_kept(tmp_path: Path) -> None:
    config = replace(CONFIG, layer_norm_epsilon=0.25)
    hf.write_model(tmp_path, Arena(config, random_arena(config), EOT))
    assert hf.open_folder(tmp_path).config == config
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    tokens = np.arange(10, dtype=np.int32)[None]
    ours = new_model(config, B=1, T=10, training=False)
    ours.load(random_arena(config))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits[0].numpy()
    actual = ours.forward(tokens)[:, : config.vocab_size]
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_the_file_says_what_older_transformers_ask_for(saved: Path) -> None:
    with safe_open(saved / hf.MODEL_FILE, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


NUMPY = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
}


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("cls", [GPT2LMHeadModel, GPT2Model])
def test_we_open_what_transformers_saves(
    cls: type[Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = random_hf_model(cls).to(dtype)
    model.save_pretrained(tmp_path)
    source = hf.open_folder(tmp_path)
    assert source.config == CONFIG
    assert source.dtype == NUMPY[dtype]
    assert {values.dtype for _, values in source.read()} == {NUMPY[dtype]}
    assert_same_weights(getattr(model, "transformer", model), CONFIG, load_arena(source))


@pytest.mark.parametrize("config", [CONFIG, GPT2Config(vocab_size=128, n_embd=8, n_head=1)])
def test_round_trip_is_exact(config: ModelConfig, tmp_path: Path) -> None:
    arena = random_arena(config)
    arena[:3] = [-0.0, np.inf, np.nan]
    hf.write_model(tmp_path, Arena(config, arena, EOT % config.vocab_size))
    source = hf.open_folder(tmp_path)
    assert (source.config, source.eot) == (config, EOT % config.vocab_size)
    assert same_bits(load_arena(source), arena)


def test_padding_rows_are_neither_stored_nor_invented(tmp_path: Path) -> None:
    arena = random_arena(CONFIG)
    named(CONFIG, arena)["wte"][CONFIG.vocab_size :] = 7
    hf.write_model(tmp_path, Arena(CONFIG, arena, EOT))
    assert load_file(tmp_path / hf.MODEL_FILE)["transformer.wte.weight"].shape == (257, 48)
    assert same_bits(load_arena(hf.open_folder(tmp_path)), random_arena(CONFIG))


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_masks_and_a_stored_head_are_ignored(prefix: str, folder: Path) -> None:
    tensors = load_file(folder / hf.MODEL_FILE)
    tensors = {prefix + name.removeprefix("transformer."): t for name, t in tensors.items()}
    tensors["lm_head.weight"] = tensors[f"{prefix}wte.weight"]
    for l in range(CONFIG.n_layer):
        tensors[f"{prefix}h.{l}.attn.bias"] = np.ones((1, 1, 17, 17), np.uint8)
        tensors[f"{prefix}h.{l}.attn.masked_bias"] = np.array([-1e4], np.float32)
    save_file(tensors, folder / hf.MODEL_FILE)
    assert same_bits(load_arena(hf.open_folder(folder)), random_arena(CONFIG))


def test_a_head_that_differs_at_its_end_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared in parts of three rows, the last one alone."""
    monkeypatch.setattr(hf, "BLOCK_BYTES", 3 * 4 * 48)
    tensors = load_file(folder / hf.MODEL_FILE)
    head = tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
    save_file(tensors, folder / hf.MODEL_FILE)
    assert hf.open_folder(folder).config == CONFIG
    head[-1, -1] += 1
    save_file(tensors, folder / hf.MODEL_FILE)
    with pytest.raises(DataError, match=r"in rows 255 to 256, and config\.json says that they"):
        hf.open_folder(folder)


@pytest.mark.parametrize(
    ("eot", "known"), [(0, 0), (256, 256), (257, None), (-1, None), ("a", None)]
)
def test_an_end_of_text_outside_the_vocabulary_is_dropped(
    eot: Any, known: int | None, folder: Path
) -> None:
    path = folder / hf.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": eot}))
    assert hf.open_folder(folder).eot == known


Tensors = dict[str, Any]


def with_other_shape(tensors: Tensors) -> None:
    tensors[QKV] = np.ascontiguousarray(tensors[QKV].T)


def with_other_dtype(tensors: Tensors) -> None:
    tensors[QKV] = tensors[QKV].astype(np.int32)


def with_one_missing(tensors: Tensors) -> None:
    del tensors[QKV]


def with_another_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
    tensors["lm_head.weight"][-1, -1] += 1


def with_a_larger_head(tensors: Tensors) -> None:
    wte = tensors["transformer.wte.weight"]
    tensors["lm_head.weight"] = np.concatenate([wte, wte[:1]])


def with_a_third_layer(tensors: Tensors) -> None:
    tensors["transformer.h.2.ln_1.weight"] = np.ones(48, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_other_shape, f"{QKV}: expected shape (48, 144), found (144, 48)"),
        (with_other_dtype, f"{QKV}: expected one of F32, F16, BF16, found I32"),
        (with_one_missing, f"tensor {QKV} of shape (48, 144) is missing"),
        (
            with_another_head,
            "lm_head.weight differs from transformer.wte.weight in rows 0 to 256, and ",
        ),
        (with_a_larger_head, "lm_head.weight: expected shape (257, 48), found (258, 48)"),
        (with_a_third_layer, "'transformer.h.2.ln_1.weight' (1 such) is not a tensor of a GPT-2"),
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


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model_type", "bert", "model_type is 'bert'; only 'gpt2' and 'llama' can be read"),
        ("model_type", "llama", "max_position_embeddings, hidden_size, num_hidden_"),
        ("model_type", None, "model_type is None"),
        ("model_type", ["gpt2"], "model_type is ['gpt2']"),
        ("activation_function", "relu", "activation_function is 'relu'; only 'gelu_new' or"),
        ("layer_norm_epsilon", 0.0, "layer_norm_epsilon must be a positive number, not 0.0"),
        ("layer_norm_epsilon", True, "layer_norm_epsilon must be a positive number, not True"),
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
    with pytest.raises(DataError) as caught:
        hf.open_folder(folder)
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("name", ["vocab_size", "n_positions", "n_layer", "n_embd"])
def test_huge_sizes_are_checked_against_the_file_before_any_allocation(
    name: str, folder: Path
) -> None:
    path = folder / hf.CONFIG_FILE
    values = json.loads(path.read_text())
    values[name] = 48 << 25  # fits into an int32
    values["n_head"] = max(1, values["n_embd"] >> 4)
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"expected shape|is missing"):
        hf.open_folder(folder)


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
    with pytest.raises(DataError) as caught:
        hf.open_folder(folder)
    assert str(caught.value).startswith(f"{folder / hf.CONFIG_FILE}: {message}")


@pytest.mark.parametrize("name", [hf.MODEL_FILE, hf.CONFIG_FILE])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(DataError) as caught:
        hf.open_folder(folder)
    assert str(caught.value) == f"{folder / name}: no such file"


@pytest.mark.parametrize("name", [hf.MODEL_FILE, hf.CONFIG_FILE])
def test_a_folder_in_the_place_of_a_file_is_refused(name: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(DataError, match=name):
        hf.open_folder(folder)


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
    with pytest.raises(DataError) as caught:
        hf.open_folder(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / hf.MODEL_FILE}: not a whole safetensors file: ")
    assert "\n" not in message


def test_an_extended_model_is_refused(folder: Path) -> None:
    with (folder / hf.MODEL_FILE).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DataError, match="not a whole safetensors file"):
        hf.open_folder(folder)


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
        source = hf.open_folder(folder)
        arena = load_arena(source)
    except DataError as error:
        refusal = str(error)
    if refusal is None:  # it was in the metadata, say, or in a number that no tensor tells
        free = {"n_head": 1, "layer_norm_epsilon": 1.0}
        assert replace(source.config, **free) == replace(CONFIG, **free)
        assert same_bits(arena, random_arena(CONFIG))
    else:
        assert refusal.startswith(str(folder))
        assert "\n" not in refusal


@pytest.mark.parametrize("dtype", NUMPY)
def test_transformers_opens_our_folder_in_each_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """What is written again from a 16-bit folder has the same bits, and says its dtype."""
    random_hf_model(GPT2LMHeadModel).to(dtype).save_pretrained(tmp_path / "theirs")
    hf.write_model(tmp_path / "ours", hf.open_folder(tmp_path / "theirs"))
    ours, theirs = (load_file(tmp_path / who / hf.MODEL_FILE) for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert same_bits(ours[name], tensor), name
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "ours", dtype="auto").dtype == dtype
    assert json.loads((tmp_path / "ours/config.json").read_text())["torch_dtype"] == {
        torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"
    }[dtype]  # fmt: skip


def test_mixed_dtypes_are_read_as_the_widest(folder: Path) -> None:
    tensors = load_file(folder / hf.MODEL_FILE)
    for name, dtype in ((QKV, np.float16), ("transformer.ln_f.bias", ml_dtypes.bfloat16)):
        tensors[name] = tensors[name].astype(dtype)
    save_file(tensors, folder / hf.MODEL_FILE)
    source = hf.open_folder(folder)
    assert source.dtype == np.float32
    expected = random_arena(CONFIG)
    ours = named(CONFIG, expected)
    ours["qkvw"][1] = ours["qkvw"][1].astype(np.float16)
    ours["lnfb"][:] = ours["lnfb"].astype(ml_dtypes.bfloat16)
    assert same_bits(load_arena(source), expected)
    hf.write_model(folder / "again", source)
    assert same_bits(load_arena(hf.open_folder(folder / "again")), expected)


@dataclass(frozen=True)
class Backwards:
    """A source whose pieces come last first, each in the same memory."""

    source: Arena
    folder: ClassVar[Path | None] = None
    tokenizer_path: ClassVar[Path | None] = None

    @property
    def eot(self) -> int | None:
        return self.source.eot

    @property
    def config(self) -> ModelConfig:
        return self.source.config

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.source.dtype

    def read(self) -> Iterator[tuple[Piece, Weights]]:
        memory = np.empty(self.source.weights.size, np.float32)
        for piece, values in reversed(list(self.source.read())):
            again = memory[: values.size].reshape(values.shape)
            again[...] = values
            yield piece, again
            memory[:] = np.nan


def test_pieces_may_come_in_any_order(saved: Path, tmp_path: Path) -> None:
    hf.write_model(tmp_path, Backwards(Arena(CONFIG, random_arena(CONFIG), EOT)))
    for name in (hf.MODEL_FILE, hf.CONFIG_FILE):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


@pytest.mark.parametrize("dtype", NUMPY.values())
def test_the_library_reads_what_the_writer_wrote(dtype: np.dtype[Any], tmp_path: Path) -> None:
    """Of odd shapes, from strided views, last first; the tensors begin at a multiple of 8 bytes."""
    rng = np.random.default_rng(0)
    shapes = {"a": (1,), "b": (3, 5), "c": (2, 3, 7), "d.é": (7, 1)}
    tensors = {name: rng.standard_normal(shape[::-1]).T for name, shape in shapes.items()}
    with (tmp_path / "x").open("wb") as file:
        writer = TensorWriter(file, shapes, dtype)
        for name in reversed(shapes):
            writer.write(name, tensors[name])
    found = load_file(tmp_path / "x")
    assert found.keys() == shapes.keys()
    for name, tensor in tensors.items():
        assert same_bits(found[name], tensor.astype(dtype))
    assert int.from_bytes((tmp_path / "x").read_bytes()[:8], "little") % 8 == 0


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers saved in several files."""
    folder = tmp_path_factory.mktemp("sharded")
    random_hf_model(GPT2LMHeadModel).save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def test_a_model_in_several_files_is_read(sharded: Path) -> None:
    source = hf.open_folder(sharded)
    model = GPT2LMHeadModel.from_pretrained(sharded)
    assert_same_weights(model.transformer, source.config, load_arena(source))


def shards_of(index: Any) -> dict[str, Any]:
    map_: dict[str, Any] = index["weight_map"]
    return map_


def point_elsewhere(index: Any) -> None:
    shards_of(index)[QKV] = shards_of(index)["transformer.ln_f.bias"]


def point_at(shard: Any) -> Callable[[Any], None]:
    return lambda index: shards_of(index).update({QKV: shard})


ELSEWHERE = "is said to be in {!r}, expected the name of a .safetensors file in the same folder;"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "weight_map is missing or not an object;"),
        (lambda index: index.update(weight_map=[1]), "weight_map is missing or not an object;"),
        (lambda index: shards_of(index).pop(QKV), f"tensor {QKV} of shape (48, 144) is missing"),
        (point_elsewhere, f"{QKV!r} is said to be in model-0"),
        *(
            (point_at(shard), f"{QKV!r} {ELSEWHERE.format(shard)}")
            for shard in (
                "../model.safetensors", "/etc/a.safetensors", "a/b.safetensors", "..", "", 7, None,
                "a\0.safetensors", "\ud800.safetensors", "pytorch_model.bin", "a.safetensors\n",
                ["x"],
            )
        ),
        (lambda index: shards_of(index).update(odd=shards_of(index)[QKV]), "'odd' is said to be"),
    ],
)  # fmt: skip
def test_an_index_that_lies_is_refused(
    change: Callable[[Any], None], message: str, sharded: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    path = folder / hf.INDEX_FILE
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(DataError) as caught:
        hf.open_folder(folder)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(DataError) as caught:
        hf.open_folder(folder)
    assert str(caught.value) == f"{shard}: no such file"


@dataclass(frozen=True)
class Zeros:
    """Weights that are all zero: for what is about sizes."""

    config: ModelConfig
    dtype = np.dtype(np.float16)
    eot: int | None = EOT
    folder: ClassVar[Path | None] = None
    tokenizer_path: ClassVar[Path | None] = None

    def read(self) -> Iterator[tuple[Piece, Weights]]:
        return iter(())  # the file stays as it is after the header


def test_a_single_file_is_read_with_and_without_its_config(folder: Path, tmp_path: Path) -> None:
    expected = random_arena(CONFIG)
    (folder / hf.MODEL_FILE).rename(folder / "any name.safetensors")
    source = hf.open_file(folder / "any name.safetensors")
    assert (source.folder, source.eot) == (folder, EOT)
    assert same_bits(load_arena(source), expected)
    (folder / hf.CONFIG_FILE).unlink()
    with pytest.raises(DataError, match=r"heads is not known for n_embd 48, .* config.json beside"):
        hf.open_file(folder / "any name.safetensors")


@pytest.mark.parametrize(("n_embd", "n_head"), [(768, 12), (1024, 16), (1280, 20), (1600, 25)])
def test_published_sizes_need_no_config(n_embd: int, n_head: int, tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=301, n_positions=5, n_embd=n_embd, n_layer=11 if n_embd == 768 else 1,
        n_head=n_head,
    )  # fmt: skip
    hf.write_model(tmp_path, Zeros(config))
    path = tmp_path / hf.MODEL_FILE
    with path.open("rb+") as file:
        file.truncate(8 + int.from_bytes(file.read(8), "little") + 2 * stored_count(config))
    (tmp_path / hf.CONFIG_FILE).unlink()
    source = hf.open_file(path)
    assert (source.config, source.folder) == (config, None)
    assert source.dtype == np.float16


def stored_count(c: ModelConfig) -> int:
    return parameter_count(c) - (c.padded_vocab_size - c.vocab_size) * c.n_embd


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "expected a matrix wte.weight, as every GPT-2 has, and found none"),
        ({"wte.weight": (768,), "wpe.weight": (5, 768)}, "expected a matrix wte.weight, as every"),
        ({"wte.weight": (9, 768)}, "expected a matrix wpe.weight"),
        ({"wte.weight": (9, 832), "wpe.weight": (5, 832)}, "the number of heads is not known for"),
        ({"wte.weight": (9, 768), "wpe.weight": (5, 768)}, "n_layer must be a whole number >= 1"),
        (
            {"wte.weight": (9, 768), "wpe.weight": (5, 768), "h.7.ln_1.bias": (768,)},
            "tensor h.0.attn.c_attn.weight of shape (768, 2304) is missing",
        ),
    ],
)
def test_a_single_file_that_is_no_gpt2_is_refused(
    tensors: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({name: np.zeros(shape, np.float16) for name, shape in tensors.items()}, path)
    with pytest.raises(DataError) as caught:
        hf.open_file(path)
    assert str(caught.value).startswith(f"{path}: {message}")


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_a_folder_with_a_pickle_is_refused_with_the_way_to_convert_it(
    name: str, packed: bool, folder: Path
) -> None:
    (folder / hf.MODEL_FILE).unlink()
    torch.save(Bomb(folder / "fell"), folder / name, _use_new_zipfile_serialization=packed)
    assert hf.holds_model(folder)
    with pytest.raises(DataError) as caught:
        hf.open_folder(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / name} is a pickle, which can run any program")
    assert "if you trust it, convert it with: python -c " in message
    assert not (folder / "fell").exists()


def test_the_command_for_a_pickle_works(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "it's old"
    model = random_hf_model(GPT2LMHeadModel)
    model.save_pretrained(folder)
    (folder / hf.MODEL_FILE).unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(DataError) as caught:
        hf.open_folder(folder)
    _, option, code = shlex.split(str(caught.value).partition("convert it with: ")[2])
    assert option == "-c"
    exec(code)
    source = hf.open_folder(tmp_path / "it's old-safetensors")
    assert_same_weights(model.transformer, CONFIG, load_arena(source))


@fuzz
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=5,
    ),
    name=st.sampled_from([*json.loads(transformers.GPT2Config().to_json_string()), "vocab_size"]),
)
def test_any_value_of_any_setting_is_refused_or_harmless(
    name: str, value: Any, saved: Path, folder: Path
) -> None:
    values = json.loads((saved / hf.CONFIG_FILE).read_text())
    (folder / hf.CONFIG_FILE).write_text(json.dumps(values | {name: value}))
    refusal = ""
    try:
        # No tensor tells the number of heads and epsilon.
        free = {"n_head": 3, "layer_norm_epsilon": 1.0}
        assert replace(hf.open_folder(folder).config, **free) == replace(CONFIG, **free)
    except DataError as error:
        refusal = str(error)
    assert "\n" not in refusal
