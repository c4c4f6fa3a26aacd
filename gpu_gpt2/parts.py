"""Makes the parts of a run from its settings: weights, batches, model, optimizer and files."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Final

import numpy as np

from gpu_gpt2.config import ModelConfig, TrainConfig, model_config, settings_text
from gpu_gpt2.data.dataset import Dataset
from gpu_gpt2.data.loader import BatchLoader
from gpu_gpt2.data.repeat import FirstBatches
from gpu_gpt2.device.base import X_DTYPES, Device
from gpu_gpt2.errors import CheckpointError, ConfigError
from gpu_gpt2.evaluate import check_examples
from gpu_gpt2.formats.multiple_choice import Example, read_choices
from gpu_gpt2.models.families import new_model
from gpu_gpt2.models.init import InitialWeights
from gpu_gpt2.models.model import Model
from gpu_gpt2.models.weights import FloatArray, WeightSource, load_arena
from gpu_gpt2.open_model import open_model
from gpu_gpt2.ops import ops_for
from gpu_gpt2.tokenizer import vocab_size_of
from gpu_gpt2.training import checkpoint
from gpu_gpt2.training.muon import OPTIMIZERS
from gpu_gpt2.training.optimizer import AdamW
from gpu_gpt2.training.sinks import Sink, TensorBoardSink, WandbSink

SETTINGS_FILE: Final = "settings.toml"


def source_of_weights(config: TrainConfig) -> WeightSource:
    """Returns the source of a new run's initial weights, before any weight is read or drawn."""
    if config.init_from:
        return open_model(config.init_from)
    sizes = model_config(
        config.model,
        vocab_size_of(config.tokenizer),
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        context=config.context,
    )
    return InitialWeights(config=sizes, seed=config.seed)


def initial_weights(config: TrainConfig) -> FloatArray:
    """Returns the initial weights of a new run as a parameter arena (n,) float32.

    Raises ConfigError if a weight is not finite, or not finite in the dtype of the run. Raises
    CheckpointError if the files of a checkpoint do not match its manifest.
    """
    source = source_of_weights(config)
    if source.folder is not None:
        checkpoint.verify(source.folder, model_only=True)
    weights = load_arena(source)
    if not np.isfinite(weights).all():
        raise ConfigError(
            f"--init-from {config.init_from}: a weight is not a finite number; the file is damaged"
        )
    with np.errstate(over="ignore"):
        fits = np.isfinite(weights.astype(X_DTYPES[config.dtype], copy=False)).all()
    if not fits:
        raise ConfigError(
            f"--init-from {config.init_from}: its largest weight, {abs(weights).max():g}, is "
            f"beyond the range of {config.dtype}; use --dtype bf16 or fp32"
        )
    return weights


def hellaswag_examples(config: TrainConfig, sizes: ModelConfig) -> list[Example]:
    """Returns the examples of --hellaswag, checked against the model and batch; [] without it."""
    if not config.hellaswag:
        return []
    examples = read_choices(Path(config.hellaswag))
    check_examples(examples, sizes.vocab_size, config.batch_size, config.seq_len, config.hellaswag)
    return examples


def batch_loader(
    config: TrainConfig, data: Dataset, sizes: ModelConfig
) -> BatchLoader | FirstBatches:
    """Returns the training batches. Raises DataError if there is too little text for one."""
    loader = BatchLoader(
        data.train,
        config.batch_size,
        config.seq_len,
        scattered=not data.shards,
        vocab_size=sizes.vocab_size,
        seed=config.seed,
    )
    return FirstBatches(loader, config.grad_accum_steps) if config.overfit_batch else loader


def model_and_optimizer(
    config: TrainConfig, sizes: ModelConfig, device: Device
) -> tuple[Model, AdamW]:
    """Returns a model whose weights are not set yet, and its optimizer."""
    model = new_model(
        sizes,
        ops_for(device, config.dtype),
        max_batch=config.batch_size,
        max_seq_len=config.seq_len,
        recompute=config.recompute,
    )
    optimizer = OPTIMIZERS[config.optimizer](
        model,
        beta1=config.beta1,
        beta2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        max_loss_zscore=config.max_loss_zscore,
        max_grad_zscore=config.max_grad_zscore,
        halt=config.on_nan != "skip",
    )
    return model, optimizer


def sinks(run_dir: Path, config: TrainConfig) -> list[Sink]:
    """Returns the sinks of the log that the settings ask for. Raises ConfigError."""
    found: list[Sink] = []
    if config.tensorboard:
        found.append(TensorBoardSink(run_dir))
    if config.wandb:
        found.append(WandbSink(run_dir, config.to_dict()))
    return found


def make_run_dir(run_dir: Path) -> None:
    """Makes the folder of the run unless it exists. Raises CheckpointError."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the run folder {run_dir}: {error.strerror}") from error


def write_settings(run_dir: Path, config: TrainConfig) -> None:
    """Writes the settings of the run into its folder, as a file for --config."""
    path = run_dir / SETTINGS_FILE
    values = {name: value for name, value in config.to_dict().items() if name != "run_dir"}
    use = f"gpu-gpt2 train --config {shlex.quote(str(path))}"
    try:
        text = f"# Use these settings again: {use}\n{settings_text(values)}"
        path.write_text(text, "utf-8", errors="replace")  # a path may not be UTF-8
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
