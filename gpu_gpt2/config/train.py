"""The settings of a training run, checked when they are made.

Each setting is declared once, as a field of TrainConfig with its meaning, range and default. The
options of `gpu-gpt2 train`, error messages, the rules of --resume and docs/training-options.md are
made from these fields.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Final

from gpu_gpt2.config.named_models import MODEL_NAMES
from gpu_gpt2.config.option import Option, declare
from gpu_gpt2.errors import ConfigError

MAX_BATCH_TOKENS: Final = 1 << 30  # limit of one micro-batch: kernels count rows in 32 bits
MAX_RECOMPUTE: Final = 3  # highest level of activation recomputation, defined in models/model.py
MAX_SEED: Final = (1 << 32) - 1  # the Mersenne Twister is seeded with one 32-bit word

_MODEL: Final = "Model and data"
_DEVICE: Final = "Device, precision and memory"
_LENGTH: Final = "Length and batch size"
_SCHEDULE: Final = "Learning rate"
_OPTIMIZER: Final = "Optimizer"
_SAFETY: Final = "When numbers go wrong"
_EVALUATION: Final = "Validation and samples"
_RUN: Final = "Checkpoints and run folder"
_WATCH: Final = "Plots and dashboards"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """All settings of a training run, with every default filled in. training.json saves them.

    Raises ConfigError for an impossible value; the message names the option of the command line.
    """

    data: str = field(
        default="python-docs",
        metadata=declare(
            "Text to train on: python-docs (the language reference that comes with Python), a text "
            "file, or token files (a folder, or a pattern such as 'shards/train_*.bin'). A resumed "
            "run needs the same tokens, but their files may have moved.",
            _MODEL,
            metavar="NAME|FILE",
            resumable=True,
        ),
    )
    val_data: str = field(
        default="",
        metadata=declare(
            "Text or token files for validation. Default: the *_val*.bin files beside token files; "
            "of a text, the last tenth, which is held out.",
            _MODEL,
            metavar="FILE",
            resumable=True,
        ),
    )
    init_from: str = field(
        default="",
        metadata=declare(
            "Model to start from, instead of random weights: a run, a checkpoint, a Hugging Face "
            "folder, a .safetensors file, or a .bin file of llm.c or llama2.c. The run takes over "
            "the sizes and the tokenizer of the model.",
            _MODEL,
            metavar="MODEL",
        ),
    )
    model: str = field(metadata=declare(f"Model size: {MODEL_NAMES}.", _MODEL, metavar="NAME"))
    n_layer: int = field(
        default=0,
        metadata=declare(
            "Number of layers (transformer blocks); 0: as many as --model has.",
            _MODEL,
            metavar="LAYERS",
            minimum=0,
        ),
    )
    n_head: int = field(
        default=0,
        metadata=declare(
            "Number of attention heads in each layer; 0: as many as --model has.",
            _MODEL,
            metavar="HEADS",
            minimum=0,
        ),
    )
    n_embd: int = field(
        default=0,
        metadata=declare(
            "Number of channels, the length of an embedding; 0: as many as --model has.",
            _MODEL,
            metavar="CHANNELS",
            minimum=0,
        ),
    )
    context: int = field(
        default=0,
        metadata=declare(
            "Context of the model, the longest sequence that it can take; 0: that of --model.",
            _MODEL,
            metavar="TOKENS",
            minimum=0,
        ),
    )
    tokenizer: str = field(
        metadata=declare(
            "Tokenizer: gpt2, bytes, bpe:N (a vocabulary of N tokens, trained on the text), "
            "llama2c:N (the same of llama2.c's kind), or the file or folder of a tokenizer.",
            _MODEL,
            metavar="NAME|FILE",
        )
    )
    seed: int = field(
        default=42,  # the seed of llm.c
        metadata=declare(
            "Seed of the initial weights and the data order.",
            _MODEL,
            metavar="SEED",
            minimum=0,
            maximum=MAX_SEED,
        ),
    )
    steps: int = field(
        metadata=declare(
            "Number of optimizer steps, each of which updates the weights once; or a number of "
            "epochs (passes over the training text), as in 3epochs.",
            _LENGTH,
            metavar="STEPS",
            minimum=1,
            in_epochs=True,
            resumable=True,
        )
    )
    batch_size: int = field(
        metadata=declare(
            "Sequences in one micro-batch.",
            _LENGTH,
            metavar="SEQUENCES",
            minimum=1,
            auto="as many as fit into memory",
        )
    )
    seq_len: int = field(
        metadata=declare("Tokens in one sequence.", _LENGTH, metavar="TOKENS", minimum=1)
    )
    total_batch_tokens: int = field(
        metadata=declare(
            "Tokens in one optimizer step, a multiple of --batch-size x --seq-len. The step "
            "accumulates the gradients of its micro-batches.",
            _LENGTH,
            metavar="TOKENS",
            minimum=1,
        )
    )
    overfit_batch: bool = field(
        default=False,
        metadata=declare(
            "Test of the whole program: train on the batches of the first step in every step. The "
            "loss must approach 0.",
            _LENGTH,
        ),
    )
    lr: float = field(
        metadata=declare(
            "Peak learning rate, at the end of the warm-up.", _SCHEDULE, metavar="RATE", above=0
        )
    )
    lr_schedule: str = field(
        default="cosine",
        metadata=declare(
            "Learning rate after the warm-up: cosine or linear falls to the final rate over the "
            "whole run; constant stays at --lr; wsd (warm-up, stable, decay) stays at --lr until a "
            "linear decay at the end of the run.",
            _SCHEDULE,
            choices=("cosine", "linear", "constant", "wsd"),
        ),
    )
    warmup_steps: int = field(
        metadata=declare("Steps of linear warm-up to --lr.", _SCHEDULE, metavar="STEPS", minimum=0)
    )
    final_lr_fraction: float = field(
        default=0.1,
        metadata=declare(
            "Learning rate at the end of the run, as a fraction of --lr; for wsd the default is 0.",
            _SCHEDULE,
            metavar="FRACTION",
            minimum=0,
            maximum=1,
        ),
    )
    decay_fraction: float = field(
        default=0.2,  # the share of llm.c
        metadata=declare(
            "Share of --steps, at the end of the run, over which wsd lowers the learning rate.",
            _SCHEDULE,
            metavar="FRACTION",
            minimum=0,
            maximum=1,
            resumable=True,
        ),
    )
    optimizer: str = field(
        default="adamw",
        metadata=declare(
            "Optimizer: adamw for all weights; or muon for the matrices of the layers, and adamw "
            "for embeddings, biases and norms. The same --lr and --weight-decay suit both.",
            _OPTIMIZER,
            choices=("adamw", "muon"),
        ),
    )
    weight_decay: float = field(
        metadata=declare(
            "Weight decay of the matrices; biases and norms have none.",
            _OPTIMIZER,
            metavar="RATE",
            minimum=0,
        )
    )
    beta1: float = field(
        default=0.9,
        metadata=declare(
            "Decay rate of AdamW's first moment, the mean of the gradients.",
            _OPTIMIZER,
            metavar="RATE",
            above=0,
            below=1,
        ),
    )
    beta2: float = field(
        default=0.95,
        metadata=declare(
            "Decay rate of AdamW's second moment, the mean of the squared gradients.",
            _OPTIMIZER,
            metavar="RATE",
            above=0,
            below=1,
        ),
    )
    eps: float = field(
        default=1e-8,
        metadata=declare(
            "Term in the denominator of AdamW's update that prevents division by zero.",
            _OPTIMIZER,
            metavar="EPS",
            above=0,
        ),
    )
    max_grad_norm: float = field(
        default=1.0,
        metadata=declare(
            "Gradient clipping: a gradient with a larger norm is scaled down to this norm.",
            _OPTIMIZER,
            metavar="NORM",
            above=0,
        ),
    )
    max_loss_zscore: float = field(
        default=0.0,
        metadata=declare(
            "Skip the update of a step whose loss is more than this many standard deviations above "
            "the mean of the last 128 steps; 0: never skip.",
            _SAFETY,
            metavar="DEVIATIONS",
            minimum=0,
        ),
    )
    max_grad_zscore: float = field(
        default=0.0,
        metadata=declare(
            "Skip the update of a step whose gradient norm is more than this many standard "
            "deviations above the mean of the last 128 steps; 0: never skip.",
            _SAFETY,
            metavar="DEVIATIONS",
            minimum=0,
        ),
    )
    on_nan: str = field(
        default="stop",
        metadata=declare(
            "Reaction to a loss or gradient that is not finite: stop ends the run; skip continues "
            "without the update; rollback returns to the newest checkpoint and continues with the "
            "data that comes next. All three name the first tensor that is not finite.",
            _SAFETY,
            choices=("stop", "skip", "rollback"),
            resumable=True,
        ),
    )
    device: str = field(
        metadata=declare(
            "Device to compute on.",
            _DEVICE,
            choices=("cuda", "cpu", "emulator"),
            auto="cuda if there is an NVIDIA GPU, else cpu",
            resumable=True,
        )
    )
    dtype: str = field(
        metadata=declare(
            "Data type of weights and activations.",
            _DEVICE,
            choices=("fp32", "bf16", "fp16"),
            auto="bf16 on a GPU from Ampere on, fp16 from Volta on, else fp32",
            resumable=True,
        )
    )
    recompute: int = field(
        default=0,
        metadata=declare(
            "Level of activation recomputation in the backward pass, which saves memory: 0 none; "
            "1 GELU or SwiGLU; 2 also the norms; 3 whole layers, about a third more work.",
            _DEVICE,
            metavar="LEVEL",
            minimum=0,
            maximum=MAX_RECOMPUTE,
            resumable=True,
        ),
    )
    tf32: bool = field(
        default=False,
        metadata=declare(
            "Compute the fp32 matmuls of a GPU in TF32 on tensor cores: faster, but the inputs are "
            "rounded to 10 bits of mantissa.",
            _DEVICE,
            resumable=True,
        ),
    )
    eval_every: int = field(
        metadata=declare(
            "Steps between validations; the first takes place before training. 0: only at the end.",
            _EVALUATION,
            metavar="STEPS",
            minimum=0,
            resumable=True,
        )
    )
    eval_batches: int = field(
        default=0,
        metadata=declare(
            "Batches of --batch-size x --seq-len tokens in a validation; 0: the whole validation "
            "text. A validation has at most 1,048,576 tokens.",
            _EVALUATION,
            metavar="BATCHES",
            minimum=0,
            resumable=True,
        ),
    )
    hellaswag: str = field(
        default="",
        metadata=declare(
            "HellaSwag file to measure the accuracy on, such as data/hellaswag/hellaswag_val.bin.",
            _EVALUATION,
            metavar="FILE",
            resumable=True,
        ),
    )
    hellaswag_every: int = field(
        default=0,
        metadata=declare(
            "Steps between measurements of the accuracy on --hellaswag; 0: only at the end.",
            _EVALUATION,
            metavar="STEPS",
            minimum=0,
            resumable=True,
        ),
    )
    sample_every: int = field(
        metadata=declare(
            "Steps between samples of generated text; 0: only at the end.",
            _EVALUATION,
            metavar="STEPS",
            minimum=0,
            resumable=True,
        )
    )
    sample_tokens: int = field(
        default=160,  # about a paragraph, which is enough to judge the text
        metadata=declare(
            "Number of tokens to generate for a sample; 0: no samples.",
            _EVALUATION,
            metavar="TOKENS",
            minimum=0,
            resumable=True,
        ),
    )
    sample_prompt: str = field(
        default="",
        metadata=declare(
            "Text that the samples continue.", _EVALUATION, metavar="TEXT", resumable=True
        ),
    )
    run_dir: str = field(
        metadata=declare(
            "Folder of the run. Default: the first unused one of runs/001, runs/002, ...; with "
            "--resume, the newest one.",
            _RUN,
            metavar="FOLDER",
        )
    )
    save_every: int = field(
        metadata=declare(
            "Steps between checkpoints; 0: only at the end.",
            _RUN,
            metavar="STEPS",
            minimum=0,
            resumable=True,
        )
    )
    keep_last: int = field(
        default=2,  # the newest, and the one before in case the newest is damaged
        metadata=declare(
            "Number of newest checkpoints to keep; 0: all.",
            _RUN,
            metavar="CHECKPOINTS",
            minimum=0,
            resumable=True,
        ),
    )
    keep_every: int = field(
        default=0,
        metadata=declare(
            "Steps between checkpoints to keep forever; a multiple of --save-every. 0: none.",
            _RUN,
            metavar="STEPS",
            minimum=0,
            resumable=True,
        ),
    )
    keep_best: bool = field(
        default=False,
        metadata=declare(
            "Also save and keep the checkpoint with the lowest validation loss so far.",
            _RUN,
            resumable=True,
        ),
    )
    plot: bool = field(
        default=False,
        metadata=declare(
            "When the run ends, draw its curves into plot.png in the run folder.",
            _WATCH,
            resumable=True,
        ),
    )
    tensorboard: bool = field(
        default=False,
        metadata=declare(
            "Also log to TensorBoard, in the folder tensorboard of the run folder.",
            _WATCH,
            resumable=True,
        ),
    )
    wandb: bool = field(
        default=False,
        metadata=declare(
            "Also log to Weights & Biases, in the project gpu-gpt2.",
            _WATCH,
            resumable=True,
        ),
    )

    def __post_init__(self) -> None:
        for option in OPTIONS.values():
            option.check(getattr(self, option.name))
        if self.tf32 and (self.device, self.dtype) != ("cuda", "fp32"):
            raise ConfigError(
                f"--tf32 is for fp32 on a GPU, not {self.dtype} on {self.device}; leave it out"
            )
        micro = self.batch_size * self.seq_len
        if micro > MAX_BATCH_TOKENS:
            raise ConfigError(
                f"--batch-size x --seq-len = {micro:,} is too large; a micro-batch has at most "
                f"{MAX_BATCH_TOKENS:,} tokens"
            )
        if self.total_batch_tokens % micro:
            raise ConfigError(
                f"--total-batch-tokens {self.total_batch_tokens} is not a multiple of --batch-size "
                f"x --seq-len = {micro}; use "
                f"{math.ceil(self.total_batch_tokens / micro) * micro}"
            )
        if self.hellaswag_every and not self.hellaswag:
            raise ConfigError("--hellaswag-every needs a file: name it with --hellaswag FILE")
        if self.keep_every and (not self.save_every or self.keep_every % self.save_every):
            raise ConfigError(
                f"--keep-every {self.keep_every} is not a multiple of --save-every "
                f"{self.save_every}, so no checkpoint would be kept"
            )

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches in one optimizer step."""
        return self.total_batch_tokens // (self.batch_size * self.seq_len)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Rebuilds a saved configuration; unknown and missing keys are refused by name."""
        if unknown := sorted(set(values) - set(OPTIONS)):
            raise ConfigError(f"unknown training settings: {', '.join(unknown)}")
        if missing := sorted(set(OPTIONS) - set(values)):
            raise ConfigError(f"missing training settings: {', '.join(missing)}")
        return cls(**values)


# Every setting of TrainConfig by its name, in the order of the fields.
OPTIONS: Final[Mapping[str, Option]] = {
    f.name: Option(
        name=f.name,
        kind={"str": str, "int": int, "float": float, "bool": bool}[str(f.type)],
        default=None if f.default is MISSING else f.default,
        **f.metadata,
    )
    for f in fields(TrainConfig)
}
# Defaults that are the same on every device.
DEFAULTS: Final[Mapping[str, Any]] = {
    name: option.default for name, option in OPTIONS.items() if option.default is not None
}
