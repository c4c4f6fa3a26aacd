"""Compares a model on a device with PyTorch, as llm.c's test_gpt2.cu does, within tighter limits.

A debug state (formats/debug_state.py) holds the logits, the loss and all gradients that PyTorch
computes for one batch. After these, ten training steps on that batch are compared with PyTorch's
losses, where they are known. At last a checkpoint is saved and ten steps are trained twice, before
and after it is loaded: both times the losses must have the same bits.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.config import GPT2Config, ModelConfig, TrainConfig
from gpu_gpt2.device.base import FLOAT32, Device
from gpu_gpt2.errors import DataError
from gpu_gpt2.formats.debug_state import DebugState
from gpu_gpt2.models.batch import Batch
from gpu_gpt2.models.families import new_model
from gpu_gpt2.models.weights import FloatArray, WeightSource, load_arena, named
from gpu_gpt2.ops import ops_for
from gpu_gpt2.training import checkpoint
from gpu_gpt2.training.optimizer import AdamW

STEPS: Final = 10  # training steps, as in llm.c's test_gpt2.cu
# Learning rate, AdamW and clipping as in llm.c's test_gpt2.cu, so that its published losses apply.
OPTIMIZER_SETTINGS: Final[Mapping[str, Any]] = {
    "lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0
}  # fmt: skip

# Losses of ten steps that test_gpt2.cu expects of OpenAI's 124M weights on the first 4 x 64 tokens
# of tiny_shakespeare_val.bin. Weights and debug state are in llm.c's starter pack.
STARTER_PACK_LOSSES: Final = (
    5.270009, 4.060681, 3.320085, 2.717550, 2.181066, 1.653923, 1.168050, 0.736873, 0.401021,
    0.187493,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The largest errors that pass; docs/numerics.md says how they were chosen."""

    element: float  # limit of |ours - theirs| / (|theirs| + rms of the row or the tensor)
    rms: float  # limit of rms of (ours - theirs) / rms of theirs, of a whole tensor
    loss: float  # limit of the first step's loss, in nats per token
    later_loss: float  # limit of the other nine losses: differences grow with every update


# fp32: 5 to 20 times the errors measured on a CPU. "16 bits", where the device computes in bf16 or
# fp16 or the model's file holds them: an estimate until these errors are measured on a GPU.
LIMITS: Final[Mapping[str, Limits]] = {
    "fp32": Limits(element=1e-4, rms=1e-5, loss=1e-5, later_loss=2e-4),
    "16 bits": Limits(element=0.5, rms=0.05, loss=0.02, later_loss=0.05),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one comparison: of a tensor, of a loss, or of two runs that must agree."""

    what: str  # the name of what was compared, such as "logits" or "dqkvw"
    passed: bool
    detail: str  # both values and the limits, for the user


def verify(
    source: WeightSource, state: DebugState, losses: Sequence[float], device: Device, dtype: str
) -> Iterator[Finding]:
    """Compares the model on `device`, in one of its dtypes, with the debug state; yields findings.

    losses: PyTorch's in nats of STEPS steps with OPTIMIZER_SETTINGS, or () if they are not known.
    """
    config = source.config
    limits = LIMITS["fp32" if dtype == "fp32" and source.dtype == FLOAT32 else "16 bits"]
    trainer = _Trainer(config, state, device, dtype)
    trainer.optimizer.load(load_arena(source))

    download = device.download
    logits = download(trainer.model.forward(state.tokens)).astype(np.float32)
    yield compare_tensor("logits", logits[:, : config.vocab_size], state.logits, limits)
    ours = [trainer.forward_backward()]
    yield compare_loss("loss", ours[0], state.loss, limits.loss)
    scaled = download(trainer.model.grad_arena)
    grads = named(config, scaled / download(trainer.optimizer.loss_scale))
    for name, expected in state.grads.items():
        yield compare_tensor(f"d{name}", grads[name], expected, limits)

    trainer.update()
    ours += [trainer.step() for _ in range(STEPS - 1)]
    for step, loss in enumerate(ours[: len(losses)]):
        limit = limits.later_loss if step else limits.loss
        yield compare_loss(f"loss, step {step}", loss, losses[step], limit)
    if not losses:
        falling = all(later < earlier for earlier, later in pairwise(ours))
        yield Finding(
            what=f"{STEPS} steps",
            passed=falling,
            detail=f"losses {ours[0]:.6f} to {ours[-1]:.6f}, which must fall; none to compare with",
        )

    with tempfile.TemporaryDirectory(prefix="gpu-gpt2-verify-") as folder:
        saved = trainer.save(Path(folder))
        before = [trainer.step() for _ in range(STEPS)]
        trainer.restore(saved)
        after = [trainer.step() for _ in range(STEPS)]
    yield Finding(
        what="written and read back",
        passed=before == after,
        detail=f"{STEPS} more steps, twice: "
        + ("the same bits" if before == after else f"losses {before} and then {after}"),
    )


def expected_losses(path: Path, config: ModelConfig, state: DebugState) -> tuple[float, ...]:
    """Returns PyTorch's losses of ten steps for the debug state in the file `path`, or ().

    They are read from a JSON file beside `path`, which `verify --make` writes. Without that file
    the published losses are returned if the state is that of llm.c's starter pack. Raises DataError
    for a damaged JSON file.
    """
    beside = losses_path(path)
    if beside.exists():
        try:
            losses = tuple(float(loss) for loss in json.loads(beside.read_bytes())["losses"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise DataError(f"{beside}: expected a JSON object with a list of losses ({e})") from e
        if len(losses) != STEPS or not all(map(math.isfinite, losses)):
            raise DataError(f"{beside}: expected {STEPS} losses, found {losses}")
        return losses
    starter_pack = (
        config == GPT2Config()
        and state.tokens.shape == (4, 64)
        and abs(state.loss - STARTER_PACK_LOSSES[0]) < 1e-4
    )
    return STARTER_PACK_LOSSES if starter_pack else ()


def losses_path(debug_state: Path) -> Path:
    """Returns the path of the losses for a debug state: X_losses.json for X_debug_state.bin."""
    return debug_state.with_name(debug_state.stem.removesuffix("_debug_state") + "_losses.json")


class _Trainer:
    """A model and its optimizer, trained on the same batch in every step."""

    def __init__(self, config: ModelConfig, state: DebugState, device: Device, dtype: str) -> None:
        B, T = state.tokens.shape
        self.model = new_model(config, ops_for(device, dtype), max_batch=B, max_seq_len=T)
        settings = dict(OPTIMIZER_SETTINGS)
        self._lr = settings.pop("lr")
        self.optimizer = AdamW(self.model, **settings)
        self._batch = Batch.of(state.tokens, state.targets)
        self._steps = 0
        self._settings = TrainConfig(
            data="", model="", device=device.name, dtype=dtype, tokenizer="", steps=1,
            batch_size=B, seq_len=T, total_batch_tokens=B * T, warmup_steps=0, eval_every=0,
            save_every=0, sample_every=0, seed=0, run_dir="", **OPTIMIZER_SETTINGS,
        )  # fmt: skip

    def forward_backward(self) -> float:
        """Returns the mean loss in nats and leaves the gradients in the model."""
        scale = self.optimizer.loss_scale
        self._losses = self.model.forward_backward(self._batch, loss_scale=scale)
        losses = self.model.ops.device.download(self._losses)
        return float(losses.mean(dtype="float64"))

    def update(self) -> None:
        self._steps += 1
        self.optimizer.step(self._lr, self._losses)

    def step(self) -> float:
        loss = self.forward_backward()
        self.update()
        return loss

    def save(self, run_dir: Path) -> Path:
        download = self.model.ops.device.download
        state = checkpoint.TrainingState(
            model=self.model.config,
            train=self._settings,
            step=self._steps,
            tokens=0,
            loader={},
            weights=download(self.optimizer.master),
            m=download(self.optimizer.m),
            v=download(self.optimizer.v),
            update=self.optimizer.state(),
        )
        return checkpoint.save(run_dir, state, _NoTokenizer())

    def restore(self, folder: Path) -> None:
        state = checkpoint.load(folder)
        self.optimizer.load(state.weights, state.m, state.v)
        self.optimizer.load_state(state.update)
        self._steps = state.step


class _NoTokenizer:
    """Stands for the tokenizer in a checkpoint from which no text is generated."""

    eot = 0

    def save(self, folder: Path) -> None:
        pass


def compare_tensor(what: str, ours: FloatArray, theirs: FloatArray, limits: Limits) -> Finding:
    """Compares two float32 tensors of one shape element by element, and by their rms.

    An element's error is relative to its size plus the rms of its row or of the tensor, whichever
    is larger. Rows count because the gradient of wte is large only in rows of frequent tokens. The
    tensors are read in slices, because they may be memory maps.
    """
    square_sum = sum(float(np.square(part, dtype=np.float64).sum()) for part in _parts(theirs))
    rms = math.sqrt(square_sum / theirs.size)
    worst, worst_at, error_sum, start = -1.0, 0, 0.0, 0
    for mine, other in zip(_parts(ours), _parts(theirs), strict=True):
        difference = np.abs(mine.astype(np.float64) - other)
        error_sum += float(np.square(difference).sum())
        row_rms = np.sqrt(np.square(other, dtype=np.float64).mean(axis=-1, keepdims=True))
        score = difference / ((np.abs(other) + np.maximum(rms, row_rms)) if rms else 1.0)
        first = int(np.nan_to_num(score, nan=np.inf).argmax())
        if (value := float(score.flat[first])) > worst or math.isnan(value):
            worst, worst_at = value, start + first
        start += mine.size
    error_rms = math.sqrt(error_sum / theirs.size) / (rms or 1.0)
    index = tuple(int(i) for i in np.unravel_index(worst_at, theirs.shape))
    position = "[" + ", ".join(map(str, index)) + "]"
    return Finding(
        what=what,
        passed=worst <= limits.element and error_rms <= limits.rms,
        detail=f"worst {worst:.1e} of {limits.element:.0e} at {position}: "
        f"{float(ours[index]):+.6e}, expected {float(theirs[index]):+.6e}; "
        f"rms {error_rms:.1e} of {limits.rms:.0e}",
    )


def _parts(array: FloatArray) -> Iterator[npt.NDArray[np.float32]]:
    """Yields slices along the first axis of about a million elements each."""
    rows = max(1, (1 << 20) // max(1, array[0].size))
    for first in range(0, len(array), rows):
        yield array[first : first + rows]


def compare_loss(what: str, ours: float, theirs: float, limit: float) -> Finding:
    """Compares two losses in nats per token."""
    return Finding(
        what=what,
        passed=abs(ours - theirs) <= limit,
        detail=f"{ours:.6f}, expected {theirs:.6f}; off by {abs(ours - theirs):.1e} of {limit:.0e}",
    )
