"""Finds the first tensor of a training step with a NaN or an infinity, op by op.

A step that diverged is repeated without an update. The outputs of every op are downloaded after it,
so the search takes far longer than a step. It is meant for runs that have diverged.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Final, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from gpu_gpt2.device.base import FLOAT32, Array
from gpu_gpt2.models.batch import Batch
from gpu_gpt2.models.families import parameters
from gpu_gpt2.models.model import Model
from gpu_gpt2.ops.table import TABLE, Ops, OpTensor

NDArray = npt.NDArray[Any]
Kind: TypeAlias = Literal["weight", "gradient", "activation"]  # "gradient" is that of a weight

LARGEST: Final = 3  # number of magnitudes shown: they tell one outlier from a row of large values
# Shape of lse and delta, the only activations in which a position's elements are not contiguous.
BY_HEAD: Final = ("B", "H", "T")


@dataclass(frozen=True, slots=True, kw_only=True)
class BadTensor:
    """The first tensor of a step with a NaN or an infinity, and the first such element of it.

    An activation has one row for each position of the batch. The rows of a weight and of its
    gradient are those of the matrix; a vector is one row. If `count` is 0, every gradient is finite
    but the sum of their squares is not; the tensor is then that with the largest gradient.
    """

    op: str  # the op that wrote the tensor; "" for a weight
    kind: Kind
    tensor: str  # name in families.parameters or families.activations
    layer: int | None  # None outside of the layers
    row: int
    column: int
    count: int  # elements of the whole tensor that are not finite
    largest: tuple[float, ...]  # the largest finite magnitudes of the row, at most LARGEST of them
    micro_step: int = 0  # counted from 0
    micro_steps: int = 1  # micro-steps of the step
    sequence: int | None = None  # index of the sequence in the batch; only for activations
    position: int | None = None  # position in the sequence; only for activations
    token: int | None = None  # token at the position; only for activations

    def __str__(self) -> str:
        where = [f"micro-step {self.micro_step + 1}"] if self.micro_steps > 1 else []
        if self.position is not None:
            where += [f"sequence {self.sequence}", f"position {self.position}"]
            where += [f"token {self.token}"]
        row = f"row {self.row}" + (f" ({', '.join(where)})" if where else "")
        place = {"weight": "weight ", "gradient": "the gradient of ", "activation": ""}[self.kind]
        place += self.tensor if self.layer is None else f"{self.tensor} of layer {self.layer}"
        place += f", {row}, column {self.column}"

        values = "1 value that is" if self.count == 1 else f"{self.count} values that are"
        if self.count == 0:
            found = f"{self.op} of all gradients overflows, and the largest one is in {place}"
        elif self.op:
            found = f"{self.op} wrote {values} not finite into {place}"
        else:
            found = f"{values} not finite in {place}"
        shown = ", ".join(f"{value:.1e}" for value in self.largest)
        if not shown:
            return f"{found}; no value of that row is finite"
        return f"{found}; the largest finite values of that row are {shown}"


def first_bad_tensor(
    model: Model, batches: Sequence[Batch], *, micro_steps: int, loss_scale: float
) -> BadTensor | None:
    """Repeats the micro-steps of a step and returns the first tensor that is not finite, or None.

    `batches` are those of the step, one for each of `micro_steps`, and `loss_scale` is the scale
    of its gradients (StepResult.scaled_by). The weights are checked first, then the outputs of
    every op in the order in which the ops run, then the squared norm of all gradients. Weights and
    optimizer state do not change. The model's activations and gradients are overwritten.
    """
    ops, device = model.ops, model.ops.device
    scale = device.empty((1,), FLOAT32)
    device.upload(scale, np.array([loss_scale], np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's warnings of NaNs and infinities
        try:
            _check_weights(model)
            for i, batch in enumerate(batches):
                examiner = _Examiner(model, batch, micro_step=i, micro_steps=micro_steps)
                model.ops = cast(Ops, _CheckedOps(ops, examiner))
                _run_micro_step(model, batch, scale, first=i == 0, micro_steps=micro_steps)
                model.ops = ops
            _check_norm(model)
        except _Found as found:
            return found.bad
        finally:
            model.ops = ops
    return None


class _Found(Exception):  # noqa: N818 (not an error)
    """Ends the search, and carries the tensor that is not finite."""

    def __init__(self, bad: BadTensor) -> None:
        super().__init__(str(bad))
        self.bad = bad


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor of the model, or one layer of it."""

    kind: Kind
    tensor: str
    layer: int | None


class _CheckedOps:
    """The ops of a model, each of which checks its outputs after it has run."""

    def __init__(self, ops: Ops, examiner: _Examiner) -> None:
        self._ops = ops
        self._examiner = examiner

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._ops, name)
        if name not in TABLE:
            return attribute

        def checked(*args: Any, **kwargs: Any) -> None:
            attribute(*args, **kwargs)
            self._examiner.examine(name, args[: len(TABLE[name])])

        return checked


class _Examiner:
    """Checks the outputs of the ops of one micro-step; raises _Found for the first bad one.

    Tensors are identified by address and size. Where layers share a buffer, the layer is that of
    the last weight or gradient among the arguments of the op. An op without weights, such as
    attention, belongs to the layer of the op before it.
    """

    def __init__(self, model: Model, batch: Batch, *, micro_step: int, micro_steps: int) -> None:
        self._device = model.ops.device
        self._tokens = batch.tokens
        self._micro_step, self._micro_steps = micro_step, micro_steps
        self._layer: int | None = None  # of the current op
        self._places: defaultdict[tuple[int, int], list[_Place]] = defaultdict(list)
        for place, array in (*_of_parameters(model, "weight"), *_of_parameters(model, "gradient")):
            self._places[self._key(array)].append(place)
        B, T = batch.tokens.shape
        a = model.views_of(B, T)
        for spec in model.act_specs(B, T):
            if not spec.stacked:
                key = self._key(getattr(a, spec.name))
                self._places[key].append(_Place("activation", spec.name, None))
                continue
            for l, layer in enumerate(a.layers):
                key = self._key(getattr(layer, spec.name))
                self._places[key].append(_Place("activation", spec.name, l))

    def examine(self, op: str, arrays: tuple[Array, ...]) -> None:
        """Checks the outputs among the tensors of a call of `op`."""
        for array in arrays:
            for place in self._places[self._key(array)]:
                if place.kind != "activation":
                    self._layer = place.layer
        for tensor, array in zip(TABLE[op], arrays, strict=True):
            if tensor.role != "in":
                values = self._device.download_view(array)
                if not np.isfinite(values).all():
                    raise _Found(self._bad(op, tensor, self._place(tensor, array), values))

    def _key(self, array: Array) -> tuple[int, int]:
        return self._device.address(array), array.nbytes

    def _place(self, tensor: OpTensor, array: Array) -> _Place:
        """Returns the model's name of the tensor into which the current op wrote."""
        places = self._places[self._key(array)]
        if not places:
            return _Place("activation", tensor.name, self._layer)
        place = places[0]
        shared = len(places) > 1 or (place.kind == "activation" and place.layer is None)
        return replace(place, layer=self._layer) if shared else place

    def _bad(self, op: str, tensor: OpTensor, place: _Place, values: NDArray) -> BadTensor:
        if place.kind != "activation":
            bad = _bad_tensor(op, place, _rows(values))
            return replace(bad, micro_step=self._micro_step, micro_steps=self._micro_steps)
        if tensor.shape == BY_HEAD:
            values = values.swapaxes(1, 2)
        bad = _bad_tensor(op, place, values.reshape(self._tokens.size, -1))
        sequence, position = divmod(bad.row, self._tokens.shape[1])
        return replace(
            bad,
            micro_step=self._micro_step,
            micro_steps=self._micro_steps,
            sequence=sequence,
            position=position,
            token=int(self._tokens[sequence, position]),
        )


def _run_micro_step(
    model: Model, batch: Batch, scale: Array, *, first: bool, micro_steps: int
) -> None:
    """Runs a micro-step as Model.forward_backward does, but never as a captured graph."""
    device = model.ops.device
    a: SimpleNamespace = model.views_of(*batch.tokens.shape)
    device.upload(a.tokens, batch.tokens)
    device.upload(a.targets, batch.targets.reshape(-1))
    device.upload(a.order, batch.order)
    # The first call of a graph runs its work without capturing it. A graph is used nevertheless,
    # because the matmuls inside and outside of a graph may round differently on a GPU.
    device.graph(lambda: model._micro_step(a, scale, first=first, micro_steps=micro_steps))()


def _check_weights(model: Model) -> None:
    """Raises _Found if a weight is not finite."""
    for place, array in _of_parameters(model, "weight"):
        values = model.ops.device.download_view(array)
        if not np.isfinite(values).all():
            raise _Found(_bad_tensor("", place, _rows(values)))


def _check_norm(model: Model) -> None:
    """Raises _Found with the largest gradient if the sum of squared gradients is not finite."""
    device = model.ops.device
    grad_sq = device.empty((1,), FLOAT32)
    model.ops.squared_norm(grad_sq, model.grad_arena)
    if np.isfinite(device.download(grad_sq)).all():
        return
    largest, found = -1.0, None
    for place, array in _of_parameters(model, "gradient"):
        rows = np.abs(_rows(device.download_view(array)))
        if rows.max() > largest:
            largest = rows.max()
            found = _bad_tensor("squared_norm", place, rows, rows == largest)
    assert found is not None
    raise _Found(found)


def _of_parameters(
    model: Model, kind: Literal["weight", "gradient"]
) -> Iterator[tuple[_Place, Array]]:
    """Yields all weights, or all gradients; tensors of the layers one layer at a time."""
    named = model.params if kind == "weight" else model.grads
    for spec in parameters(model.config):
        tensor = getattr(named, spec.name)
        if spec.stacked:
            for l in range(model.config.n_layer):
                yield _Place(kind, spec.name, l), tensor[l]
        else:
            yield _Place(kind, spec.name, None), tensor


def _rows(values: NDArray) -> NDArray:
    """Returns a matrix as it is, and a vector as one row."""
    return values.reshape(-1, values.shape[-1])


def _bad_tensor(
    op: str, place: _Place, rows: NDArray, where: npt.NDArray[np.bool_] | None = None
) -> BadTensor:
    """Describes a tensor at its first element in `where`; by default the first not finite."""
    infinite = ~np.isfinite(rows)
    row, column = np.unravel_index((infinite if where is None else where).argmax(), rows.shape)
    magnitudes = np.sort(np.abs(rows[row][~infinite[row]].astype(np.float64)))[::-1]
    return BadTensor(
        op=op,
        kind=place.kind,
        tensor=place.tensor,
        layer=place.layer,
        row=int(row),
        column=int(column),
        count=int(infinite.sum()),
        largest=tuple(magnitudes[:LARGEST].tolist()),
    )
