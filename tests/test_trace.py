"""The first tensor that is not finite is named, wherever in a step it arises."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from devices import CPU, KERNELS, every_device
from models import TINY, TINY_LLAMA, new_model, noisy_weights, random_batch, training_step

from gpu_gpt2.config import MAX_RECOMPUTE, ModelConfig
from gpu_gpt2.models.batch import Batch
from gpu_gpt2.models.model import Model
from gpu_gpt2.training.optimizer import AdamW
from gpu_gpt2.training.trace import BadTensor, first_bad_tensor

B, T = 2, 11
# Where numbers can be so large that a product of two is not within a float32: not in fp16.
wide_devices = pytest.mark.parametrize(
    ("dtype", "device"), [param for param in CPU + KERNELS if param.values[0] != "fp16"]
)
every_level = pytest.mark.parametrize("recompute", range(MAX_RECOMPUTE + 1))


def built(device: str, dtype: str, recompute: int = 0, config: ModelConfig = TINY) -> Model:
    model = new_model(config, device, dtype, B=B, T=T, recompute=recompute)
    model.load(noisy_weights(config, noise_seed=0))
    return model


def batches(count: int = 1) -> list[Batch]:
    rng = np.random.default_rng(1)
    return [random_batch(TINY, rng, B, T) for _ in range(count)]


def plant(model: Model, name: str, place: object, value: npt.ArrayLike) -> None:
    """Sets elements of a weight."""
    device, tensor = model.ops.device, getattr(model.params, name)
    values = device.download(tensor)
    values[place] = value
    device.upload(tensor, values)


def largest_number(model: Model) -> float:
    """The largest finite number of the model's dtype."""
    return float(ml_dtypes.finfo(model.x_dtype).max)


def found(model: Model, micro_steps: int = 1, loss_scale: float = 1.0) -> BadTensor | None:
    """Returns the first bad tensor, and checks that the search leaves weights and ops unchanged."""
    ops, before = model.ops, model.ops.device.download(model.param_arena).tobytes()
    bad = first_bad_tensor(
        model, batches(micro_steps), micro_steps=micro_steps, loss_scale=loss_scale
    )
    assert model.ops is ops
    assert model.ops.device.download(model.param_arena).tobytes() == before
    return bad


@every_device
@every_level
@pytest.mark.parametrize("config", [TINY, TINY_LLAMA], ids=["gpt2", "llama"])
def test_a_healthy_step_has_no_bad_tensor(
    config: ModelConfig, dtype: str, device: str, recompute: int
) -> None:
    """The trace leaves no trace: the next steps give the bits of an optimizer without one."""
    ends = []
    for traced in (False, True):
        model = built(device, dtype, recompute, config)
        optimizer = AdamW(model)
        optimizer.load(noisy_weights(config, noise_seed=0))
        for _ in range(2):
            scale = optimizer.state().loss_scale
            if traced:
                assert found(model, micro_steps=2, loss_scale=scale) is None
            assert training_step(model, optimizer, batches(2), 1e-3).updated
        ends.append(model.ops.device.download(optimizer.master).tobytes())
    assert ends[0] == ends[1]


@every_device
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_weight_that_is_not_finite(value: float, dtype: str, device: str) -> None:
    model = built(device, dtype)
    plant(model, "fcw", (1, 3, 5), value)
    plant(model, "fcw", (1, 9, 0), value)
    plant(model, "fcw", (1, 3, slice(0, 3)), [4, -8, 2])
    bad = found(model)
    assert bad is not None
    assert replace(bad, largest=()) == BadTensor(
        op="", kind="weight", tensor="fcw", layer=1, row=3, column=5, count=2, largest=()
    )
    assert bad.largest == (8.0, 4.0, 2.0)
    plant(model, "lnfb", 7, value)
    plant(model, "fcw", 1, 0.0)
    bad = found(model)
    assert bad is not None
    assert (bad.tensor, bad.layer, bad.row, bad.column, bad.count) == ("lnfb", None, 0, 7, 1)


@every_device
@every_level
def test_an_overflow_in_the_forward_pass(dtype: str, device: str, recompute: int) -> None:
    model = built(device, dtype, recompute)
    plant(model, "ln2b", (1, slice(None)), 8.0)
    plant(model, "fcw", (1, 7), largest_number(model))
    bad = found(model)
    assert bad is not None
    (batch,) = batches()
    assert replace(bad, largest=()) == BadTensor(
        op="matmul", kind="activation", tensor="fc", layer=1, row=0, column=7, count=B * T,
        largest=(), sequence=0, position=0, token=int(batch.tokens[0, 0]),
    )  # fmt: skip
    assert len(bad.largest) == 3
    assert 0 < bad.largest[2] <= bad.largest[1] <= bad.largest[0] < 100


@wide_devices
@every_level
@pytest.mark.parametrize("layer", [0, 1])
def test_an_op_without_weights_has_the_layer_of_the_op_before(
    layer: int, dtype: str, device: str, recompute: int
) -> None:
    """Large queries and keys at channel 1 are finite; their products are not."""
    model = built(device, dtype, recompute)
    C = TINY.n_embd
    plant(model, "qkvb", (layer, [1, C + 1]), 1e25)
    bad = found(model)
    assert bad is not None
    assert (bad.op, bad.tensor, bad.layer) == ("attention_fwd", "att", layer)
    assert (bad.row, bad.sequence, bad.position) == (0, 0, 0)


@wide_devices
@every_level
@pytest.mark.parametrize("layer", [0, 1])
def test_an_overflow_of_swiglu(layer: int, dtype: str, device: str, recompute: int) -> None:
    """Large gates and up projections of channel 3 are finite; their products are not."""
    model = built(device, dtype, recompute, TINY_LLAMA)
    plant(model, "fcw", (layer, [3, TINY_LLAMA.n_inner + 3]), 1e25)
    bad = found(model)
    assert bad is not None
    assert (bad.op, bad.kind, bad.tensor) == ("swiglu_fwd", "activation", "swiglu")
    assert (bad.layer, bad.column) == (layer, 3)


@wide_devices
def test_a_gradient_of_an_untied_head(dtype: str, device: str) -> None:
    """The head's row of the first target is large, and its gradient is not finite."""
    model = built(device, dtype, config=replace(TINY_LLAMA, tie_word_embeddings=False))
    plant(model, "lnfw", slice(None), 1e30)
    plant(model, "head", slice(None), 0.0)
    bad = found(model, loss_scale=2.0**40)
    assert bad is not None
    assert (bad.op, bad.kind, bad.tensor, bad.layer) == ("matmul", "gradient", "head", None)


@every_device
@every_level
def test_an_overflow_in_the_backward_pass_only(dtype: str, device: str, recompute: int) -> None:
    """A neuron that GELU turns off is multiplied with a large weight, and so is its gradient."""
    model = built(device, dtype, recompute)
    plant(model, "fcb", (0, 5), -60.0)
    plant(model, "fcprojw", (0, slice(None), 5), largest_number(model))
    bad = found(model, loss_scale=2.0**20)
    assert bad is not None
    assert (bad.op, bad.kind, bad.tensor) == ("matmul", "activation", "dfc")
    assert (bad.layer, bad.column) == (0, 5)
    assert bad.row == T * bad.sequence + bad.position
    assert bad.token == batches()[0].tokens[bad.sequence, bad.position]


@pytest.mark.parametrize(("dtype", "device"), [("fp16", "emulator")])
def test_a_loss_scale_that_is_too_large(dtype: str, device: str) -> None:
    model = built(device, dtype)
    assert found(model, loss_scale=2.0**16) is None
    bad = found(model, loss_scale=2.0**24)
    assert bad is not None
    assert (bad.op, bad.tensor, bad.layer, bad.row) == ("classifier_fwd_bwd", "logits", None, 0)
    assert bad.column == batches()[0].targets[0, 0]
    assert bad.count == B * T


@wide_devices
@every_level
def test_a_gradient_of_a_weight(dtype: str, device: str, recompute: int) -> None:
    """A large neuron whose outgoing weights are 0 changes nothing but their gradients."""
    model = built(device, dtype, recompute)
    plant(model, "fcb", (0, 5), 1e30)
    plant(model, "fcprojw", (0, slice(None), 5), 0.0)
    bad = found(model, loss_scale=2.0**60)
    assert bad is not None
    assert replace(bad, largest=()) == BadTensor(
        op="matmul", kind="gradient", tensor="fcprojw", layer=0, row=0, column=5,
        count=TINY.n_embd, largest=(),
    )  # fmt: skip


@wide_devices
def test_a_norm_that_overflows(dtype: str, device: str) -> None:
    """Every gradient is within a float32, but its square is not."""
    model = built(device, dtype)
    bad = found(model, loss_scale=2.0**83)
    assert bad is not None
    assert (bad.op, bad.kind, bad.tensor) == ("squared_norm", "gradient", "wte")
    assert (bad.layer, bad.count) == (None, 0)
    gradient = model.ops.device.download(model.grads.wte)
    assert abs(gradient[bad.row, bad.column]) == abs(gradient).max() == bad.largest[0]


@pytest.mark.parametrize(("dtype", "device"), [("fp16", "emulator")])
def test_the_micro_step_and_the_token_of_a_row(dtype: str, device: str) -> None:
    """Channel 0 overflows where one token stands at the last position, in the second batch."""
    model = built(device, dtype)
    second = batches(2)[1]
    token = int(second.tokens[1, T - 1])
    plant(model, "wpe", (T - 1, 0), largest_number(model))
    plant(model, "wte", (token, 0), 100.0)
    assert found(model) is None
    bad = found(model, micro_steps=2)
    assert bad is not None
    assert replace(bad, largest=()) == BadTensor(
        op="embedding_fwd", kind="activation", tensor="embedded", layer=None, row=2 * T - 1,
        column=0, count=1, largest=(), micro_step=1, micro_steps=2, sequence=1, position=T - 1,
        token=token,
    )  # fmt: skip


def test_a_statistic_that_lies_by_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a fault of a kernel makes lse bad while y is fine."""
    model = built("cpu", "fp32")
    attention_fwd = model.ops.attention_fwd

    def faulty(y: np.ndarray, lse: np.ndarray, qkv: np.ndarray) -> None:
        attention_fwd(y, lse, qkv)
        lse[1, 0, 3] = np.nan

    monkeypatch.setattr(model.ops, "attention_fwd", faulty)
    bad = found(model)
    assert bad is not None
    assert (bad.op, bad.tensor, bad.layer, bad.count) == ("attention_fwd", "lse", 0, 1)
    assert (bad.row, bad.column, bad.sequence, bad.position) == (T + 3, 0, 1, 3)
    assert len(bad.largest) == TINY.n_head - 1


def test_after_an_error_the_model_has_its_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("cpu", "fp32")
    ops = model.ops

    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "gelu_fwd", fails)
    with pytest.raises(KeyboardInterrupt):
        first_bad_tensor(model, batches(), micro_steps=1, loss_scale=1.0)
    assert model.ops is ops


ACTIVATION = BadTensor(
    op="gelu_fwd", kind="activation", tensor="gelu", layer=3, row=17, column=40, count=12,
    largest=(61000.0, 59000.0, 4012.0), sequence=0, position=17, token=262,
)  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (
            ACTIVATION,
            "gelu_fwd wrote 12 values that are not finite into gelu of layer 3, row 17 (sequence "
            "0, position 17, token 262), column 40; the largest finite values of that row are "
            "6.1e+04, 5.9e+04, 4.0e+03",
        ),
        (
            replace(ACTIVATION, layer=None, count=1, largest=(), micro_step=1, micro_steps=4),
            "gelu_fwd wrote 1 value that is not finite into gelu, row 17 (micro-step 2, sequence "
            "0, position 17, token 262), column 40; no value of that row is finite",
        ),
        (
            BadTensor(
                op="", kind="weight", tensor="fcw", layer=1, row=3, column=5, count=1, largest=(8,)
            ),
            "1 value that is not finite in weight fcw of layer 1, row 3, column 5; the largest "
            "finite values of that row are 8.0e+00",
        ),
        (
            BadTensor(
                op="bias_bwd", kind="gradient", tensor="fcb", layer=1, row=0, column=5, count=2,
                largest=(8, 0.25),
            ),
            "bias_bwd wrote 2 values that are not finite into the gradient of fcb of layer 1, row "
            "0, column 5; the largest finite values of that row are 8.0e+00, 2.5e-01",
        ),
        (
            BadTensor(
                op="squared_norm", kind="gradient", tensor="wte", layer=None, row=8, column=1,
                count=0, largest=(2e24,),
            ),
            "squared_norm of all gradients overflows, and the largest one is in the gradient of "
            "wte, row 8, column 1; the largest finite values of that row are 2.0e+24",
        ),
    ],
)  # fmt: skip
def test_the_line_of_a_bad_tensor(bad: BadTensor, text: str) -> None:
    assert str(bad) == text
