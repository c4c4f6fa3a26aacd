"""Compares the losses of a run with a reference: the band of several seeds, or another run.

docs/reference-curves/README.md describes the rule by which the band is made.
"""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

import numpy as np

from gpu_gpt2.config import OPTIONS, GPT2Config, ModelConfig, TrainConfig
from gpu_gpt2.errors import CheckpointError, ConfigError, DataError
from gpu_gpt2.formats import hf
from gpu_gpt2.models.families import CONFIGS
from gpu_gpt2.training import checkpoint
from gpu_gpt2.training.history import FloatArray, IntArray, read_history, smoothed

FORMAT: Final = "gpu-gpt2 reference curve, format 1"  # first line of a reference file
COLUMNS: Final = (
    "step", "loss_low", "loss", "loss_high", "val_loss_low", "val_loss", "val_loss_high",
)  # fmt: skip
WINDOW: Final = 50  # training steps that the moving average covers
FEWEST_RUNS: Final = 3  # leaving one run out, the band of the others needs at least two
# The margin of a band is this multiple of the largest leave-one-out excess. With 3, about 1 in 100
# new seeds leaves the band of the training loss, and 1 in 30 the band of the validation loss: the
# experiment is in docs/reference-curves/README.md.
FACTOR: Final = 3.0
# Smallest margin, in nats per token: an allowance for other dtypes and devices, whose differences
# the seeds of one machine do not show.
SMALLEST_MARGIN: Final = 0.01
NEAR: Final = 2.0  # the margin at step t is decided over the steps from t / NEAR to t * NEAR
MOST_ROWS: Final = 1000  # training steps in a reference file: enough for a smoothed loss
TOLERANCE: Final = 0.05  # default half-width of the band around a single run, in nats per token
# Settings that change files and output, but no loss; and the seed, which may differ.
WITHOUT_EFFECT: Final = frozenset(
    {
        "seed", "run_dir", "hellaswag", "hellaswag_every", "sample_every", "sample_tokens",
        "sample_prompt", "save_every", "keep_last", "keep_every", "keep_best", "plot",
        "tensorboard", "wandb",
    }
)  # fmt: skip

_MODEL: Final = "model"
_FAMILY: Final = "family"  # an entry of the model; files made before there were Llamas lack it
_TOKENS: Final = "tokens per step"


@dataclass(frozen=True, slots=True)
class Band:
    """The expected losses after n numbers of steps, in nats per token, as arrays (n,)."""

    steps: IntArray
    low: FloatArray
    loss: FloatArray
    high: FloatArray


@dataclass(frozen=True, slots=True)
class Reference:
    """The expected losses of a run, with the model and batch for which they hold."""

    model: ModelConfig
    tokens_per_step: int
    training: Band  # of the smoothed training loss
    validation: Band
    description: str  # description of the band, for messages


@dataclass(frozen=True, slots=True)
class Deviation:
    """Distances of the losses of one kind from their band."""

    what: str  # "training loss (smoothed)" or "validation loss"
    steps: IntArray  # (n,) the steps compared
    excess: FloatArray  # (n,) nats per token: above the band > 0, below it < 0, inside 0

    @property
    def inside(self) -> bool:
        return not self.excess.any()

    def __str__(self) -> str:
        count = len(self.steps)
        if not count:
            return f"{self.what}: no step in common with the reference"
        if self.inside:
            last = f"step {self.steps[-1]:,}"
            where = f"all {count:,} steps compared, up to {last}" if count > 1 else last
            return f"{self.what}: inside the band at {where}"
        outside = np.flatnonzero(self.excess)
        first, worst = outside[0], np.abs(self.excess).argmax()
        return (
            f"{self.what}: outside the band from step {self.steps[first]:,} on "
            f"({_beyond(self.excess[first])}), most at step {self.steps[worst]:,} "
            f"({_beyond(self.excess[worst])}); outside at {len(outside):,} of {count:,} steps"
        )


def compare(run_dir: Path, reference: Reference) -> list[Deviation]:
    """Returns the deviations of a run's training and validation losses from the reference.

    Raises ConfigError for a run of another model or another number of tokens per step, and
    DataError if the run and the reference have no training step in common.
    """
    settings, model = _settings(run_dir)
    for name, ours, theirs in (
        (_MODEL, _model_text(model), _model_text(reference.model)),
        (_TOKENS, f"{settings.total_batch_tokens:,}", f"{reference.tokens_per_step:,}"),
    ):
        if ours != theirs:
            raise ConfigError(
                f"{run_dir} cannot be compared: {name}: {ours} in the run, {theirs} in the "
                f"reference; choose a reference with the same"
            )
    history = read_history(run_dir)
    average = smoothed(history.loss, WINDOW)
    training = _deviation("training loss (smoothed)", history.steps, average, reference.training)
    if not len(training.steps):
        raise DataError(f"{run_dir} has no training step in common with the reference")
    validation = _deviation(
        "validation loss", history.val_steps, history.val_loss, reference.validation
    )
    return [training, validation]


def open_reference(path: Path, tolerance: float | None = None) -> Reference:
    """Returns a reference file, or the band of +- `tolerance` around the run in a folder.

    Raises ConfigError if a tolerance is given for a file, and UserError if it cannot be read.
    """
    if not path.is_dir():
        if tolerance is not None:
            raise ConfigError(f"--tolerance is for comparing two runs; {path} has its own band")
        return read_reference(path)
    width = TOLERANCE if tolerance is None else tolerance
    settings, model = _settings(path)
    history = read_history(path)

    def around(steps: IntArray, loss: FloatArray) -> Band:
        return Band(steps, loss - width, loss, loss + width)

    return Reference(
        model,
        settings.total_batch_tokens,
        around(history.steps, smoothed(history.loss, WINDOW)),
        around(history.val_steps, history.val_loss),
        f"the losses of {path} +- {width:g} nats per token",
    )


def make_reference(run_dirs: Sequence[Path], out: Path) -> None:
    """Writes a reference file: the band of runs that differ only in their seeds.

    Raises ConfigError for fewer than FEWEST_RUNS runs, equal seeds or other settings that differ,
    and DataError if the logs do not have the same steps or the file cannot be written.
    """
    if len(run_dirs) < FEWEST_RUNS:
        raise ConfigError(
            f"a reference needs at least {FEWEST_RUNS} runs with different seeds, not "
            f"{len(run_dirs)}"
        )
    saved = [_settings(path) for path in run_dirs]
    _check_same(run_dirs, saved)
    histories = [read_history(path) for path in run_dirs]
    first = histories[0]
    for path, history in zip(run_dirs, histories, strict=True):
        same = np.array_equal(history.steps, first.steps)
        if not same or not np.array_equal(history.val_steps, first.val_steps):
            raise DataError(
                f"{path} and {run_dirs[0]} have not logged the same steps and validations; let "
                f"all runs end, then make the reference again"
            )
    training = _band(first.steps, [smoothed(history.loss, WINDOW) for history in histories])
    validation = _band(first.val_steps, [history.val_loss for history in histories])
    settings, model = saved[0]
    header = {
        "command": _command(settings),
        _MODEL: json.dumps({_FAMILY: model.family, **asdict(model)}),
        _TOKENS: str(settings.total_batch_tokens),
        "seeds": ", ".join(str(settings.seed) for settings, _ in saved),
        "moving average": f"{WINDOW} steps",
        "commit": _commit(),
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
    }
    text = _file_text(header, training, validation)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}") from error


def read_reference(path: Path) -> Reference:
    """Returns a file that make_reference wrote. Raises DataError if it is missing or damaged."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError(
            f"cannot read the reference {path}: {reason}; give a file of docs/reference-curves/ "
            f"or the folder of a run"
        ) from error
    if not lines or lines[0] != f"# {FORMAT}":
        raise DataError(f'{path} is no reference: its first line must be "# {FORMAT}"')
    comments = [line[2:].partition(": ") for line in lines if line.startswith("# ")]
    header = {name: value for name, _, value in comments}
    table = [
        (number, row)
        for number, row in enumerate(csv.reader(lines), start=1)
        if not lines[number - 1].startswith("#")
    ]
    try:
        sizes = json.loads(header[_MODEL])
        model = CONFIGS[sizes.pop(_FAMILY, GPT2Config.family)](**sizes)
        tokens_per_step = int(header[_TOKENS])
    except (KeyError, ValueError, TypeError, AttributeError, ConfigError) as error:
        raise DataError(
            f"{path}: the comments {_MODEL!r} and {_TOKENS!r} are missing or damaged; use another "
            f"copy of the file"
        ) from error
    if not table or tuple(table[0][1]) != COLUMNS:
        raise DataError(f"{path}: the columns must be {','.join(COLUMNS)}")
    training: list[list[float]] = []
    validation: list[list[float]] = []
    for number, row in table[1:]:
        try:
            if len(row) != len(COLUMNS):
                raise ValueError
            step = int(row[0])
            for band, cells in ((training, row[1:4]), (validation, row[4:])):
                if any(cells):
                    band.append([step, *map(_finite, cells)])
        except ValueError:
            raise DataError(f"{path}: line {number} is damaged: {','.join(row)[:60]!r}") from None
    seeds = header.get("seeds", "")
    return Reference(
        model,
        tokens_per_step,
        _columns(training),
        _columns(validation),
        f"the band of {path} (seeds {seeds})",
    )


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _columns(rows: list[list[float]]) -> Band:
    steps, low, loss, high = np.array(rows, np.float64).reshape(-1, 4).T
    return Band(steps.astype(np.int64), low, loss, high)


def _deviation(what: str, steps: IntArray, losses: FloatArray, band: Band) -> Deviation:
    common, ours, theirs = np.intersect1d(steps, band.steps, return_indices=True)
    above = np.maximum(losses[ours] - band.high[theirs], 0)
    below = np.maximum(band.low[theirs] - losses[ours], 0)
    return Deviation(what, common, above - below)


def _beyond(excess: float) -> str:
    return f"{abs(excess):.4f} nats {'above' if excess > 0 else 'below'} it"


def _band(steps: IntArray, runs: Sequence[FloatArray]) -> Band:
    """Returns minimum, mean and maximum of the runs' losses, widened by the margin.

    The excess at a step is the distance of the outermost run from the band of the others. The
    margin is FACTOR times the largest excess of nearby steps, and at least SMALLEST_MARGIN.
    """
    losses = np.sort(np.array(runs), axis=0)
    low, high = losses[0], losses[-1]
    excess = np.maximum(high - losses[-2], losses[1] - low)
    begins = np.searchsorted(steps, steps / NEAR)
    ends = np.searchsorted(steps, steps * NEAR, side="right")
    largest = np.array([excess[i:j].max() for i, j in zip(begins, ends, strict=True)])
    margin = np.maximum(SMALLEST_MARGIN, FACTOR * largest)
    return Band(steps, low - margin, losses.mean(axis=0), high + margin)


def _file_text(header: Mapping[str, str], training: Band, validation: Band) -> str:
    """Returns the text of a reference file: about MOST_ROWS training steps, every validation."""
    count = len(training.steps)
    chosen = np.linspace(0, count - 1, min(count, MOST_ROWS)).round().astype(int)
    steps = sorted({*training.steps[chosen].tolist(), *validation.steps.tolist()})
    cells = [_cells(band) for band in (training, validation)]
    out = io.StringIO()
    out.writelines(f"# {line}\n" for line in (FORMAT, *map(": ".join, header.items())))
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for step in steps:
        writer.writerow([step, *(cell for band in cells for cell in band.get(step, ("",) * 3))])
    return out.getvalue()


def _cells(band: Band) -> dict[int, list[str]]:
    """Returns the lowest, mean and highest loss of every step as text."""
    losses = np.stack([band.low, band.loss, band.high], axis=1)
    return {
        step: [f"{loss:.5f}" for loss in row]
        for step, row in zip(band.steps.tolist(), losses.tolist(), strict=True)
    }


def _settings(run_dir: Path) -> tuple[TrainConfig, ModelConfig]:
    """Returns the settings and the model of a run from its newest checkpoint."""
    folder = checkpoint.latest(run_dir)
    settings = checkpoint.saved_settings(folder)
    if settings is None:
        raise CheckpointError(f"{folder} is no checkpoint of a training run; give a run's folder")
    return settings, hf.open_folder(folder).config


def _check_same(run_dirs: Sequence[Path], saved: Iterable[tuple[TrainConfig, ModelConfig]]) -> None:
    """Raises ConfigError unless all seeds differ and no other setting with an effect does."""
    (first, model), *others = saved
    seeds = {first.seed: run_dirs[0]}
    for path, (settings, its_model) in zip(run_dirs[1:], others, strict=True):
        a, b = first.to_dict(), settings.to_dict()
        differing = [name for name in a if name not in WITHOUT_EFFECT and a[name] != b[name]]
        if differing or its_model != model:
            flags = ", ".join(OPTIONS[name].flag for name in differing) or "the model"
            raise ConfigError(
                f"{path} and {run_dirs[0]} must differ in --seed only, but differ in {flags}"
            )
        if settings.seed in seeds:
            raise ConfigError(
                f"{path} and {seeds[settings.seed]} have the same --seed {settings.seed}; train "
                f"one of them again with another seed"
            )
        seeds[settings.seed] = path


def _model_text(model: ModelConfig) -> str:
    text = (
        f"{model.title} with {model.n_layer} layers of {model.n_embd} with {model.n_head} heads, "
        f"vocabulary {model.vocab_size}, context {model.n_positions}"
    )
    shared = {field.name for field in fields(ModelConfig)}
    own = {name: value for name, value in asdict(model).items() if name not in shared}
    return ", ".join([text, *(f"{name} {value}" for name, value in own.items())])


def _command(settings: TrainConfig) -> str:
    """Returns the command that trains a run with these settings; paths become file names."""
    words = ["gpu-gpt2", "train"]
    for name, value in settings.to_dict().items():
        option = OPTIONS[name]
        if name in WITHOUT_EFFECT or value == option.default:
            continue
        words.append(option.flag)
        if option.kind is not bool:
            is_path = isinstance(value, str) and Path(value).is_absolute()
            words.append(Path(value).name if is_path else str(value))
    return shlex.join([*words, "--seed", "SEED"])


def _commit() -> str:
    """Returns the commit of the source tree, or "unknown" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=10", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
