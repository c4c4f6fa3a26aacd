"""Sizes of models and settings of training runs, checked when they are made.

A setting is stated once, as a field of TrainConfig: its meaning, range and default. The options of
`gpu-gpt2 train`, error messages, the rules of --resume and docs/training-options.md follow from it.
Defaults that depend on the device stand in presets/, one file for each device.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from gpu_gpt2.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GPT2_VOCAB_SIZE: Final = 50257
LAYER_NORM_EPSILON: Final = 1e-5  # GPT-2's layernorms add this to the variance
VOCAB_PADDING: Final = 128  # wte has a multiple of this many rows: aligned rows, full tiles
MAX_BATCH_TOKENS: Final = 1 << 30  # limit of one micro-batch: kernels count rows in 32 bits
MAX_RECOMPUTE: Final = 3  # highest level of activation recomputation: models/gpt2.py, activations
MAX_SEED: Final = (1 << 32) - 1  # the Mersenne Twister is seeded with one 32-bit word
MAX_HEAD_SIZE: Final = 256  # largest head that kernels/attention.cu holds in registers
PRESETS_DIR: Final = Path(__file__).parent / "presets"
AUTO: Final = "auto"  # value of an option that leaves the choice to gpu-gpt2


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of a GPT-2, under the names of Hugging Face's config.json.

    Raises ConfigError for sizes that cannot be built.
    """

    vocab_size: int = GPT2_VOCAB_SIZE
    n_positions: int = 1024  # longest context
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = LAYER_NORM_EPSILON  # added to the variance

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "layer_norm_epsilon":
                if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
                    raise ConfigError(f"{name} must be a positive number, not {value!r}")
            elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number >= 1, not {value!r}")
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"n_embd {self.n_embd} does not divide into n_head {self.n_head} equal heads; "
                f"choose a multiple of n_head"
            )
        if self.head_size > MAX_HEAD_SIZE:
            raise ConfigError(
                f"head size {self.head_size} (n_embd / n_head) is above {MAX_HEAD_SIZE}, the most "
                f"that the attention kernel holds; use more heads"
            )

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / VOCAB_PADDING) * VOCAB_PADDING


# Channels, layers and heads (C, L, H) by the number in llm.c's name of a model. It counts layers in
# names of GPT-2 (Radford et al. 2019, table 2), and channels in names of GPT-3 (Brown et al. 2020,
# table 2.1). 30M, 2.8B, 7.3B, 12B and 31M are sizes that llm.c has added.
GPT2_SIZES: Final[Mapping[int, tuple[int, int, int]]] = {
    6: (384, 6, 6),  # 30M
    12: (768, 12, 12),  # 124M
    24: (1024, 24, 16),  # 355M
    36: (1280, 36, 20),  # 774M
    48: (1600, 48, 25),  # 1558M
    60: (1920, 60, 30),  # 2.8B
    72: (2880, 72, 30),  # 7.3B
    84: (3456, 84, 36),  # 12B
}
GPT3_SIZES: Final[Mapping[int, tuple[int, int, int]]] = {
    384: (384, 6, 6),  # 31M
    768: (768, 12, 12),  # 125M
    1024: (1024, 24, 16),  # 356M
    1536: (1536, 24, 16),  # 760M
    2048: (2048, 24, 16),  # 1.3B
    2560: (2560, 32, 32),  # 2.7B
    4096: (4096, 32, 32),  # 6.7B
    12288: (12288, 96, 96),  # 175B
}
HF_SIZES: Final[Mapping[str, tuple[int, int, int]]] = {  # GPT-2 by Hugging Face's names
    "gpt2": GPT2_SIZES[12],
    "gpt2-medium": GPT2_SIZES[24],
    "gpt2-large": GPT2_SIZES[36],
    "gpt2-xl": GPT2_SIZES[48],
}
GPT3_POSITIONS: Final = 2048


def _models(
    prefix: str, sizes: Mapping[int, tuple[int, int, int]], n_positions: int
) -> dict[str, ModelConfig]:
    return {
        f"{prefix}{number}": ModelConfig(n_positions=n_positions, n_embd=C, n_layer=L, n_head=H)
        for number, (C, L, H) in sizes.items()
    }


MODELS: Final[Mapping[str, ModelConfig]] = {
    **_models("d", GPT2_SIZES, 1024),
    **_models("gpt2:d", GPT2_SIZES, 1024),
    **_models("gpt3:c", GPT3_SIZES, GPT3_POSITIONS),
    **{name: ModelConfig(n_embd=C, n_layer=L, n_head=H) for name, (C, L, H) in HF_SIZES.items()},
    "mini": ModelConfig(n_layer=2, n_head=4, n_embd=256, n_positions=64),  # the CPU's default
    "nano": ModelConfig(n_layer=2, n_head=2, n_embd=32, n_positions=32),  # the emulator's
}
MODEL_NAMES: Final = (
    f"dN or gpt2:dN with N = {', '.join(map(str, GPT2_SIZES))}; "
    f"gpt3:cN with N = {', '.join(map(str, GPT3_SIZES))}; "
    f"{', '.join(HF_SIZES)}; mini; nano"
)


def model_config(name: str, vocab_size: int = GPT2_VOCAB_SIZE) -> ModelConfig:
    """The sizes of the model `name` in MODELS, with `vocab_size` tokens. Raises ConfigError."""
    if name == "gpt3:c5140":
        raise ConfigError(
            "gpt3:c5140 cannot be built: 5140 channels, as the paper prints, do not divide into "
            f"heads of 128; choose one of {MODEL_NAMES}"
        )
    if name not in MODELS:
        raise ConfigError(f"unknown model {name!r}; choose one of {MODEL_NAMES}")
    return replace(MODELS[name], vocab_size=vocab_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A setting of TrainConfig as the command line, error messages and the docs show it."""

    name: str  # name of the field of TrainConfig
    kind: type  # str, int, float or bool
    default: Any  # on every device; None: the presets have one for each device, or it is AUTO
    help: str
    group: str  # heading above it in the help
    metavar: str = ""  # placeholder of the value in the help: the unit of a number
    choices: tuple[str, ...] = ()
    minimum: int | None = None
    maximum: int | None = None  # only beside a minimum
    above: int | None = None  # exclusive minimum
    below: int | None = None  # exclusive maximum
    auto: str = ""  # the value that AUTO stands for, where the command line takes AUTO
    resumable: bool = False  # may change when a run is resumed

    @property
    def flag(self) -> str:
        """The name on the command line: --total-batch-tokens."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def allowed(self) -> str:
        """The range of a number (">= 0 and < 1"), or the choices; "" if there is no limit."""
        if self.choices:
            return ", ".join((*self.choices, AUTO) if self.auto else self.choices)
        if self.minimum is not None and self.maximum is not None:
            return f"from {self.minimum} to {self.maximum}"
        bounds = ((">=", self.minimum), (">", self.above), ("<", self.below))
        return " and ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)

    def check(self, value: object, *, takes_auto: bool = False) -> None:
        """Raises ConfigError, which names the option, if the setting cannot have this value.

        With `takes_auto` the message says that the command line takes AUTO too.
        """
        if not self._allows(value):
            text = f"{self._expected()}{f', or {AUTO}' if takes_auto else ''}"
            raise ConfigError(f"{self.flag} must be {text}, not {value!r}")

    def _allows(self, value: Any) -> bool:
        if type(value) is not self.kind and (self.kind, type(value)) != (float, int):
            return False
        if self.kind is float and not math.isfinite(value):
            return False
        return (
            (not self.choices or value in self.choices)
            and (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def _expected(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        kinds = {
            str: "text",
            int: "a whole number",
            float: "a finite number",
            bool: "true or false",
        }
        return f"{kinds[self.kind]} {self.allowed}".strip()


def _option(help: str, group: str, **more: Any) -> dict[str, Any]:  # noqa: A002
    """The metadata of a field of TrainConfig: fields of Option that the field itself lacks."""
    return {"help": help, "group": group, **more}


_MODEL: Final = "Model and data"
_DEVICE: Final = "Device, precision and memory"
_LENGTH: Final = "Length and batch size"
_OPTIMIZER: Final = "Optimizer (AdamW)"
_RUN: Final = "Checkpoints and run folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """All settings of a training run, resolved: every checkpoint holds them in training.json.

    Raises ConfigError for an impossible value, by the name of its option on the command line.
    """

    data: str = field(
        default="python-docs",
        metadata=_option(
            "Text to train on: python-docs (the language reference that every Python carries), a "
            "text file, or token files (a folder, or a pattern such as 'shards/train_*.bin').",
            _MODEL,
            metavar="NAME|FILE",
        ),
    )
    model: str = field(metadata=_option(f"Model size: {MODEL_NAMES}.", _MODEL, metavar="NAME"))
    device: str = field(
        metadata=_option(
            "Device to compute on.",
            _DEVICE,
            choices=("cuda", "cpu", "emulator"),
            auto="cuda if there is an NVIDIA GPU, else cpu",
            resumable=True,
        )
    )
    dtype: str = field(
        metadata=_option(
            "Data type of weights and activations.",
            _DEVICE,
            choices=("fp32", "bf16", "fp16"),
            auto="bf16 on a GPU from Ampere on, fp16 from Volta on, else fp32",
            resumable=True,
        )
    )
    tokenizer: str = field(
        metadata=_option(
            "Tokenizer: gpt2, bytes, bpe:N (a vocabulary of N tokens, trained on the text), or "
            "the file or folder of a tokenizer.",
            _MODEL,
            metavar="NAME|FILE",
        )
    )
    steps: int = field(
        metadata=_option(
            "Optimizer steps; each updates the weights once.",
            _LENGTH,
            metavar="STEPS",
            minimum=1,
            resumable=True,
        )
    )
    batch_size: int = field(
        metadata=_option(
            "Sequences in one micro-batch.",
            _LENGTH,
            metavar="SEQUENCES",
            minimum=1,
            auto="as many as fit into memory",
        )
    )
    seq_len: int = field(
        metadata=_option("Tokens in one sequence.", _LENGTH, metavar="TOKENS", minimum=1)
    )
    total_batch_tokens: int = field(
        metadata=_option(
            "Tokens in one optimizer step, which accumulates the gradients of as many "
            "micro-batches as it takes.",
            _LENGTH,
            metavar="TOKENS",
            minimum=1,
        )
    )
    lr: float = field(
        metadata=_option(
            "Peak learning rate, at the end of the warm-up.", _OPTIMIZER, metavar="RATE", above=0
        )
    )
    warmup_steps: int = field(
        metadata=_option("Steps of linear warm-up to --lr.", _OPTIMIZER, metavar="STEPS", minimum=0)
    )
    weight_decay: float = field(
        metadata=_option(
            "AdamW weight decay of the matrices; biases and layernorms have none.",
            _OPTIMIZER,
            metavar="RATE",
            minimum=0,
        )
    )
    eval_every: int = field(
        metadata=_option(
            "Steps between checkpoints, each followed by a validation; 0: only at the end.",
            _RUN,
            metavar="STEPS",
            minimum=0,
            resumable=True,
        )
    )
    sample_every: int = field(
        metadata=_option(
            "Steps between samples of generated text; 0: only at the end.",
            _RUN,
            metavar="STEPS",
            minimum=0,
            resumable=True,
        )
    )
    seed: int = field(
        default=42,  # llm.c's
        metadata=_option(
            "Seed of the initial weights and the data order.",
            _MODEL,
            metavar="SEED",
            minimum=0,
            maximum=MAX_SEED,
        ),
    )
    run_dir: str = field(
        metadata=_option(
            "Folder of the run; the default is the first unused of runs/001, runs/002, ...; with "
            "--resume, the newest of them.",
            _RUN,
            metavar="FOLDER",
        )
    )
    final_lr_fraction: float = field(
        default=0.1,
        metadata=_option(
            "Learning rate at the last step, as a fraction of --lr.",
            _OPTIMIZER,
            metavar="FRACTION",
            minimum=0,
            maximum=1,
        ),
    )
    beta1: float = field(
        default=0.9,
        metadata=_option(
            "Decay rate of AdamW's first moment, the mean of the gradients.",
            _OPTIMIZER,
            metavar="RATE",
            above=0,
            below=1,
        ),
    )
    beta2: float = field(
        default=0.95,
        metadata=_option(
            "Decay rate of AdamW's second moment, the mean of the squared gradients.",
            _OPTIMIZER,
            metavar="RATE",
            above=0,
            below=1,
        ),
    )
    eps: float = field(
        default=1e-8,
        metadata=_option(
            "Term in the denominator of AdamW's update that prevents division by zero.",
            _OPTIMIZER,
            metavar="EPS",
            above=0,
        ),
    )
    max_grad_norm: float = field(
        default=1.0,
        metadata=_option(
            "Gradient clipping: a gradient with a larger norm is scaled down to this norm.",
            _OPTIMIZER,
            metavar="NORM",
            above=0,
        ),
    )
    recompute: int = field(
        default=0,
        metadata=_option(
            "Activation recomputation in the backward pass, which saves memory: 0 none; 1 GELU; "
            "2 GELU and layernorms; 3 whole layers, about a third more work.",
            _DEVICE,
            metavar="LEVEL",
            minimum=0,
            maximum=MAX_RECOMPUTE,
            resumable=True,
        ),
    )
    tf32: bool = field(
        default=False,
        metadata=_option(
            "Compute fp32 matmuls on a GPU in TF32, on tensor cores: faster, but inputs are "
            "rounded to 10 bits of mantissa.",
            _DEVICE,
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


@functools.cache
def preset(device: str) -> Mapping[str, Any]:
    """The defaults of `gpu-gpt2 train` that differ between devices, from presets/`device`.toml."""
    values: dict[str, Any] = tomllib.loads((PRESETS_DIR / f"{device}.toml").read_text("utf-8"))
    return values


def defaults_for(device: str) -> dict[str, Any]:
    """Every default of `gpu-gpt2 train` on "cuda", "cpu" or "emulator"."""
    return {**DEFAULTS, **preset(device)}
