"""What a run is: the sizes of a model and the settings of its training, checked when made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final

from gpu_gpt2.errors import ConfigError

GPT2_VOCAB_SIZE: Final = 50257
VOCAB_PADDING: Final = 128  # rows of wte are padded to a multiple of this: aligned rows, full tiles
MAX_BATCH_TOKENS: Final = 1 << 30  # in one micro-batch: kernels count rows in 32 bits
MAX_RECOMPUTE: Final = 3  # levels of activations
MAX_SEED: Final = (1 << 32) - 1  # what the Mersenne Twister starts from is one word
MAX_HEAD_SIZE: Final = 256  # what kernels/attention.cu can hold in registers


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes of a GPT-2, under the names that Hugging Face's config.json uses."""

    vocab_size: int = GPT2_VOCAB_SIZE
    n_positions: int = 1024  # longest context
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{field.name} must be a whole number >= 1, not {value!r}")
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


# C, L and H by the number in an llm.c descriptor: of layers for GPT-2 (Radford et al. 2019, table
# 2), of channels for GPT-3 (Brown et al. 2020, table 2.1), with sizes of llm.c's own between them.
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
HF_SIZES: Final[Mapping[str, tuple[int, int, int]]] = {  # under Hugging Face's names
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
    "mini": ModelConfig(n_layer=2, n_head=4, n_embd=256, n_positions=64),  # a minute on a CPU
    "nano": ModelConfig(n_layer=2, n_head=2, n_embd=32, n_positions=32),  # for the emulator
}
MODEL_NAMES: Final = (
    f"dN or gpt2:dN with N = {', '.join(map(str, GPT2_SIZES))}; "
    f"gpt3:cN with N = {', '.join(map(str, GPT3_SIZES))}; "
    f"{', '.join(HF_SIZES)}; mini; nano"
)


def model_config(name: str, vocab_size: int = GPT2_VOCAB_SIZE) -> ModelConfig:
    """The sizes of `name` in `MODELS` with the vocabulary of the tokenizer in use."""
    if name == "gpt3:c5140":
        raise ConfigError(
            "gpt3:c5140 cannot be built: 5140 channels, as the paper prints, do not divide into "
            f"heads of 128; choose one of {MODEL_NAMES}"
        )
    if name not in MODELS:
        raise ConfigError(f"unknown model {name!r}; choose one of {MODEL_NAMES}")
    return replace(MODELS[name], vocab_size=vocab_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Settings of a training run, all resolved: what is saved beside every checkpoint."""

    data: str
    model: str
    device: str
    dtype: str  # "fp32", "bf16" or "fp16"
    tokenizer: str  # "gpt2", "bytes", "bpe:N" or a path
    steps: int
    batch_size: int  # sequences in one micro-batch
    seq_len: int
    total_batch_tokens: int  # tokens in one optimizer step, over all micro-batches
    lr: float
    warmup_steps: int
    weight_decay: float
    eval_every: int  # steps; 0 = only at the end
    sample_every: int  # steps; 0 = only at the end
    seed: int
    run_dir: str
    final_lr_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    recompute: int = 0  # 0 to 3: see activations
    tf32: bool = False  # products of float32 numbers on tensor cores, which drop 13 bits of each

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kinds = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}
            if type(value) not in kinds[str(field.type)]:
                raise ConfigError(f"{field.name} must be {field.type}, not {value!r}")
        for name in ("steps", "batch_size", "seq_len", "total_batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("warmup_steps", "eval_every", "sample_every", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.recompute <= MAX_RECOMPUTE:
            raise ConfigError(f"recompute must be 0 to {MAX_RECOMPUTE}, not {self.recompute}")
        if self.seed > MAX_SEED:
            raise ConfigError(f"seed must be at most {MAX_SEED}, not {self.seed}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr must be a positive number, not {self.lr}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError(f"weight_decay must be a finite number >= 0, not {self.weight_decay}")
        if self.dtype not in ("fp32", "bf16", "fp16"):
            raise ConfigError(f"dtype must be fp32, bf16 or fp16, not {self.dtype!r}")
        if self.tf32 and (self.device, self.dtype) != ("cuda", "fp32"):
            raise ConfigError(
                f"--tf32 is for fp32 on a GPU, not {self.dtype} on {self.device}; leave it out"
            )
        micro = self.batch_size * self.seq_len
        if micro > MAX_BATCH_TOKENS:
            raise ConfigError(
                f"batch_size x seq_len = {micro:,} is too large; a batch has at most "
                f"{MAX_BATCH_TOKENS:,} tokens"
            )
        if self.total_batch_tokens % micro:
            raise ConfigError(
                f"total_batch_tokens {self.total_batch_tokens} is not a multiple of batch_size x "
                f"seq_len = {micro}; use {math.ceil(self.total_batch_tokens / micro) * micro}"
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
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown training settings: {', '.join(unknown)}")
        if missing := sorted(known - set(values)):
            raise ConfigError(f"missing training settings: {', '.join(missing)}")
        return cls(**values)


# What `gpu-gpt2 train` does without options: something worth watching on each device. The CPU's
# run takes about a minute on two cores; see docs/log.md for how it was chosen.
TRAIN_DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "cuda": {
        "model": "d12", "tokenizer": "gpt2", "steps": 300, "batch_size": 4, "seq_len": 1024,
        "total_batch_tokens": 8192, "lr": 4e-4, "warmup_steps": 30, "weight_decay": 0.1,
        "eval_every": 50, "sample_every": 100,
    },
    "cpu": {
        "model": "mini", "tokenizer": "bpe:1024", "steps": 1400, "batch_size": 8, "seq_len": 64,
        "total_batch_tokens": 512, "lr": 1e-3, "warmup_steps": 50, "weight_decay": 0.5,
        "eval_every": 350, "sample_every": 0,
    },
    "emulator": {
        "model": "nano", "tokenizer": "bytes", "steps": 5, "batch_size": 2, "seq_len": 16,
        "total_batch_tokens": 32, "lr": 1e-3, "warmup_steps": 2, "weight_decay": 0.1,
        "eval_every": 0, "sample_every": 0,
    },
}  # fmt: skip
