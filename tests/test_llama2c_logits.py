"""Logits of small models against those that llama2.c's run and runq compute, on every device."""

from __future__ import annotations

from pathlib import Path

import llama2c_models
import numpy as np
import pytest

from gpu_gpt2.device import open_device
from gpu_gpt2.formats import llama2c
from gpu_gpt2.models.decoder import Decoder
from gpu_gpt2.models.families import new_model
from gpu_gpt2.models.llama_int8 import LlamaInt8
from gpu_gpt2.models.model import Model
from gpu_gpt2.models.weights import load_arena
from gpu_gpt2.ops import ops_for

TOKENS = np.array([1, 260, 17, 263, 5, 287, 100, 42], np.int32)
ARGMAX = {
    "A": [204, 204, 240, 24, 28, 25, 130, 107],
    "B": [196, 191, 133, 191, 147, 261, 55, 178],
}
# By model, group size (0 for float32) and position: the likeliest token with its logit, the next
# one, sum and norm of all logits, and the first eight, as llama2.c's programs compute them.
EXPECTED = {
    ("A", 0, 0): ((204, 15.764443), (20, 11.964710), 67.76714, 80.62665,
        (-0.766602, 10.226465, -10.540013, 1.418731, -1.815302, -4.945362, 2.088670, 6.522126)),
    ("A", 0, 3): ((24, 12.736447), (263, 10.151836), 40.52054, 75.46942,
        (-4.963116, 5.390605, 0.216571, -3.427521, -1.845303, 3.341302, -8.179523, 3.654131)),
    ("A", 0, 7): ((107, 13.604941), (123, 10.808619), 25.10375, 74.22254,
        (5.561991, 5.169609, -1.045133, 7.265559, -5.138434, 1.523735, -0.196927, 0.863704)),
    ("B", 0, 0): ((196, 10.014319), (5, 9.123344), 80.01020, 67.68916,
        (-4.268561, 6.687299, 4.535637, -0.407194, 6.738134, 9.123344, -5.158603, 4.851227)),
    ("B", 0, 3): ((191, 10.417066), (261, 9.140170), 130.73531, 62.47167,
        (1.242397, 0.324283, 5.477911, 0.007097, 4.409948, 0.453679, 1.711015, 0.400393)),
    ("B", 0, 7): ((178, 11.575723), (156, 8.400950), 45.74391, 66.37454,
        (1.439948, 5.764609, -0.470039, -0.658558, 0.300384, -2.344806, 2.041005, -3.010952)),
    ("A", 64, 0): ((204, 15.575517), (20, 12.062667), 67.28383, 80.57942,
        (-0.646269, 10.356723, -10.423450, 1.327242, -1.856283, -4.909612, 2.033167, 6.435315)),
    ("A", 64, 7): ((107, 13.535471), (123, 10.816252), 19.09820, 74.22867,
        (5.494007, 5.115782, -1.193049, 7.187543, -5.098636, 1.549066, -0.200428, 0.680159)),
    ("A", 32, 7): ((107, 13.698380), (123, 10.790945), 26.70129, 74.26248,
        (5.556465, 5.182438, -0.975605, 7.281344, -5.181055, 1.505284, -0.184874, 0.826919)),
    ("B", 16, 7): ((178, 11.666533), (156, 8.493309), 44.43053, 66.52138,
        (1.318902, 5.798520, -0.531100, -0.628981, 0.454068, -2.305190, 2.133269, -3.028185)),
}  # fmt: skip
FILES = [("A", 0), ("B", 0), ("A", 64), ("A", 32), ("B", 16)]
# An activation that lies on the edge of two int8 values may round to either.
TOLERANCE = {"float": 1e-4, "int8": 1e-3}

devices = pytest.mark.parametrize(
    "device", ["cpu", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]
)


def opened(folder: Path, name: str, group_size: int, device: str, version: int = 0) -> Model:
    """Model A or B from a file of llama2.c, with int8 matmuls if it has a group size."""
    config = {"A": llama2c_models.A, "B": llama2c_models.B}[name]
    path = llama2c_models.model_file(
        folder / "model.bin", config, 2 if group_size else version, group_size or 64
    )
    source = llama2c.open_model(path)
    ops = ops_for(open_device(device), "fp32")
    T = config.n_positions
    if group_size:
        assert source.group_size == group_size
        return LlamaInt8(source, ops, max_batch=1, max_seq_len=T)
    model = new_model(config, ops, max_batch=1, max_seq_len=T, training=False)
    model.load(load_arena(source))
    return model


def logits_one_by_one(model: Model) -> np.ndarray:
    """The logits (8, V) after each of TOKENS, which are read one at a time, as llama2.c does."""
    decoder = Decoder(model, batch=1, length=model.max_seq_len)
    decoder.prefill([TOKENS[:1]])
    rows = [decoder.read_logits()[0]]
    for token in TOKENS[1:]:
        decoder.feed(np.array([token], np.int32))
        decoder.decode()
        rows.append(decoder.read_logits()[0])
    return np.array(rows)


@devices
@pytest.mark.parametrize(("name", "group_size"), FILES)
def test_logits_are_those_of_llama2c(
    tmp_path: Path, name: str, group_size: int, device: str
) -> None:
    model = opened(tmp_path, name, group_size, device)
    limit = TOLERANCE["int8" if group_size else "float"]
    logits = logits_one_by_one(model)
    assert logits.argmax(axis=1).tolist() == ARGMAX[name]
    compared = 0
    for (model_name, size, position), expected in EXPECTED.items():
        if (model_name, size) != (name, group_size):
            continue
        best, second, total, norm, first = expected
        row = logits[position].astype(np.float64)
        assert row.argsort()[::-1][:2].tolist() == [best[0], second[0]]
        assert np.allclose(row[[best[0], second[0]]], [best[1], second[1]], rtol=0, atol=limit)
        assert np.allclose(row[:8], first, rtol=0, atol=limit)
        assert abs(row.sum() - total) < 20 * limit  # 288 errors of any sign
        assert abs(np.sqrt((row**2).sum()) - norm) < 5 * limit
        compared += 1
    assert compared >= 1
    whole = model.ops.device.download(model.forward(TOKENS[None]))[:, : model.config.vocab_size]
    assert np.abs(whole - logits).max() < limit


def test_version_1_holds_the_same_model(tmp_path: Path) -> None:
    for name in ("A", "B"):
        first, second = (
            logits_one_by_one(opened(tmp_path, name, 0, "cpu", version)) for version in (0, 1)
        )
        assert np.array_equal(first, second)
