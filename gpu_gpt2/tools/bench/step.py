"""`bench step` and `bench peers`: whole training steps, ours and others', timed in one way."""

from __future__ import annotations

import gc
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from rich.table import Table

from gpu_gpt2.config import GPT2_SIZES, GPT2_VOCAB_SIZE, ModelConfig, model_config
from gpu_gpt2.device.base import Device
from gpu_gpt2.errors import ConfigError, DataError, DeviceError
from gpu_gpt2.models.batch import Batch
from gpu_gpt2.models.gpt2 import GPT2, check_seq_len, parameter_count
from gpu_gpt2.models.init import initial_weights
from gpu_gpt2.ops import ops_for
from gpu_gpt2.tools.bench.kernels import product_tflops
from gpu_gpt2.training.memory import check_fits, memory_plan
from gpu_gpt2.training.optimizer import AdamW

Tokens = npt.NDArray[np.int32]
# Enqueues a step and returns what waits for it.
Step: TypeAlias = Callable[[], Callable[[], object]]

OURS: Final = "gpu-gpt2"
PEERS: Final = ("PyTorch eager", "torch.compile")
COLUMNS: Final = (
    "ms/step", "fastest", "enqueued", "tokens/s", "MFU", "of matmul", "GB", "of plan", "speed-up"
)  # fmt: skip
# One batch again and again is soon known by heart; its gradients then fall below 1e-38, with which
# a CPU computes so slowly that PyTorch's step took five times as long. So little is learned here.
LR: Final = 1e-6
WARM_UP: Final = 3  # steps: compilation, the capture of graphs, the first replay
SKIPPED_LLMC_STEPS: Final = 5
# Dense 16-bit TFLOP/s with float32 sums, from NVIDIA's data sheets, by part of the GPU's name.
PEAK_TFLOPS: Final = {
    "H200": 989.0, "H100 80GB HBM3": 989.0, "H100 PCIe": 756.0, "A100": 312.0,
    "RTX 4090": 165.2, "RTX 3090": 71.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model and the batches it is given."""

    model: str
    batch_size: int
    seq_len: int

    def __str__(self) -> str:
        return f"{self.model}:{self.batch_size}x{self.seq_len}"


SIZES: Final = {
    device: tuple(Size(model=model, batch_size=B, seq_len=T) for model, B, T in sizes)
    for device, sizes in {
        "cuda": (
            ("d12", 4, 64),
            ("d12", 32, 1024),
            ("d12", 64, 1024),
            ("d24", 32, 1024),
            ("d48", 8, 1024),
        ),
        "cpu": (("d12", 4, 64), ("d6", 4, 256)),
    }.items()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """A training step of one program at one size, or why there is none."""

    name: str
    size: str
    step_ms: float = 0.0  # median
    fastest_ms: float = 0.0
    host_ms: float = 0.0  # median time to enqueue a step
    tokens_per_s: float = 0.0  # at the median
    peak_bytes: int = 0  # 0 where it is not known
    planned_bytes: int = 0  # of ours
    mfu: float = 0.0  # of the data sheet's peak, by llm.c's count of flops; 0 where not known
    of_products: float = 0.0  # the same flops, of what large matrix products reach on this device
    problem: str = ""


def parse_size(text: str) -> Size:
    """A size such as "d12:32x1024"; ConfigError for what is none, or too long for the model."""
    match = re.fullmatch(r"(.+):(\d+)x(\d+)", text)
    if match is None or int(match[2]) < 1 or int(match[3]) < 1:
        raise ConfigError(f"cannot read {text!r} as a size; write MODEL:BATCHxLENGTH: d12:32x1024")
    size = Size(model=match[1], batch_size=int(match[2]), seq_len=int(match[3]))
    check_seq_len(size.seq_len, model_config(size.model))
    return size


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """llm.c's count: 6 per parameter, and 6 L C T for attention."""
    return 6.0 * (parameter_count(config) + config.n_layer * config.n_embd * seq_len)


def measure_ours(
    device: Device, dtype: str, size: Size, steps: int, products: float, recompute: int = 0
) -> StepTime:
    """Our training step on random tokens; `products`: bench.kernels.product_tflops."""
    _release(device)  # for the peak is of this program alone
    config, tokens, targets = _inputs(size)
    memory = memory_plan(config, dtype, size.batch_size, size.seq_len, recompute)
    check_fits(memory, device.free_memory)
    model = GPT2(
        config,
        ops_for(device, dtype),
        max_batch=size.batch_size,
        max_seq_len=size.seq_len,
        recompute=recompute,
    )
    optimizer = AdamW(model, weight_decay=0.1)
    optimizer.load(initial_weights(config, 0))
    batch = Batch.of(tokens, targets)

    def step() -> Callable[[], object]:
        losses = model.forward_backward(batch, loss_scale=optimizer.loss_scale)
        return optimizer.step(LR, losses).result

    times, host = _timed(step, steps)
    return _result(
        OURS,
        size,
        times,
        host,
        device,
        products,
        peak_bytes=_peak_bytes(device),
        planned=memory.total,
        problem=device.graph_error,
    )


def measure_peer(
    name: str, device: Device, dtype: str, size: Size, steps: int, products: float
) -> StepTime:
    """PyTorch's training step on the same tokens; `name` is one of PEERS."""
    try:
        import torch

        from gpu_gpt2.tools.torch_gpt2 import torch_step
    except ImportError as error:
        raise DeviceError(f"PyTorch cannot be used ({error}): pip install torch") from None

    config, tokens, targets = _inputs(size)
    on_gpu = device.is_gpu
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    compiled = name == "torch.compile"
    step = torch_step(config, device.name, dtype, tokens, targets, lr=LR, compiled=compiled)
    times, host = _timed(step, steps)
    peak = int(torch.cuda.max_memory_allocated()) if on_gpu else 0
    return _result(name, size, times, host, device, products, peak_bytes=peak, planned=0)


def measure_all(
    device: Device, dtype: str, sizes: Sequence[Size], names: Sequence[str], steps: int
) -> Iterator[StepTime]:
    """Every program at every size; one that fails becomes a row that says why."""
    products = product_tflops(ops_for(device, dtype))
    for size in sizes:
        for name in names:
            try:
                if name == OURS:
                    yield measure_ours(device, dtype, size, steps, products)
                else:
                    yield measure_peer(name, device, dtype, size, steps, products)
            except Exception as error:  # a peer may fail in any way; the others still count
                reason = (str(error) or type(error).__name__).splitlines()[0]
                yield StepTime(name=name, size=str(size), problem=reason[:200])
            _release(device)


def read_llmc_log(path: Path) -> StepTime:
    """The median of the steps that llm.c's train_gpt2cu printed, and the size that it says.

    DataError for anything but the steps of one run on one GPU, with one micro-step each, of a model
    of config.GPT2_SIZES.
    """
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None

    def setting(name: str) -> str:
        found = re.findall(rf"^\| {name} +\| (\S+) +\|", text, re.MULTILINE)
        if len(found) != 1:
            raise DataError(
                f"{path} has {len(found)} lines of {name!r}, not one: is it what one run of "
                f"train_gpt2cu printed?"
            )
        return str(found[0])

    def number(name: str) -> int:
        return int(setting(name)) if setting(name).isdecimal() else 0

    B, T = number("micro batch size B"), number("sequence length T")
    L, C = number("num_layers L"), number("channels C")
    if number("num_processes") != 1:
        raise DataError(f"{path} is of {setting('num_processes')} GPUs; run train_gpt2cu on one")
    if number("total batch size") != B * T:
        raise DataError(
            f"{path} is of {setting('total batch size')} tokens a step; run train_gpt2cu with "
            f"-d {B * T}"
        )
    if L not in GPT2_SIZES or GPT2_SIZES[L][0] != C:
        raise DataError(f"{path} is of a model with {L} layers and {C} channels, which has no name")
    times = [float(ms) for ms in re.findall(r"step +\d+/\d+ \|.*?\| ([\d.]+) ms \|", text)]
    times = times[SKIPPED_LLMC_STEPS:]
    if not times or min(times) <= 0:
        raise DataError(
            f"{path}: more than {SKIPPED_LLMC_STEPS} lines of steps that took time are needed "
            f"(step n/m | loss ... | ... ms | ...)"
        )
    median = statistics.median(times)
    precision = setting("precision")
    return StepTime(
        name="llm.c" if precision == "BF16" else f"llm.c {precision}",
        size=str(parse_size(f"d{L}:{B}x{T}")),
        step_ms=median,
        fastest_ms=min(times),
        tokens_per_s=1000 * B * T / median,
    )


def table(rows: Sequence[StepTime]) -> Table:
    """The rows for the console, with our speed over each other program's of the same size."""
    head, lines = text_table(rows)
    columns = Table(box=None)
    for title in head:
        columns.add_column(title, justify="right" if title else "left", no_wrap=True)
    for line in lines:
        columns.add_row(*line)
    return columns


def text_table(rows: Sequence[StepTime]) -> tuple[list[str], list[list[str]]]:
    """Titles and lines as text, without the columns in which nothing stands."""
    lines = []
    for size in dict.fromkeys(row.size for row in rows):
        group = [row for row in rows if row.size == size]
        ours = next((row for row in group if row.name == OURS and row.step_ms), None)
        for row in group:
            lines.append([size if row is group[0] else "", *cells(row, ours)])
    head = ["", "", *COLUMNS]
    lines = [[*line, *[""] * (len(head) - len(line))] for line in lines]
    used = [i for i in range(len(head)) if i < 2 or any(line[i] for line in lines)]
    return [head[i] for i in used], [[line[i] for i in used] for line in lines]


def problems(rows: Sequence[StepTime]) -> list[str]:
    """What went wrong, a line each."""
    return [f"{row.name} at {row.size}: {row.problem}" for row in rows if row.problem]


def cells(row: StepTime, ours: StepTime | None) -> tuple[str, ...]:
    """The row as text, from its name on."""
    if not row.step_ms:
        return (row.name, "failed")
    peak, plan = row.peak_bytes, row.planned_bytes
    return (
        row.name,
        f"{row.step_ms:.2f}",
        f"{row.fastest_ms:.2f}" if row.fastest_ms else "",
        f"{row.host_ms:.2f}" if row.host_ms else "",
        f"{row.tokens_per_s:,.0f}",
        f"{row.mfu:.1%}" if row.mfu else "",
        f"{row.of_products:.1%}" if row.of_products else "",
        f"{peak / 1e9:.2f}" if peak else "",
        f"{peak / plan:.2f}" if peak and plan else "",
        f"{row.step_ms / ours.step_ms:.2f} x" if ours and ours is not row else "",
    )


def _inputs(size: Size) -> tuple[ModelConfig, Tokens, Tokens]:
    config = model_config(size.model, GPT2_VOCAB_SIZE)
    shape = (2, size.batch_size, size.seq_len)
    tokens, targets = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
    return config, tokens, targets


def _timed(step: Step, steps: int) -> tuple[list[float], list[float]]:
    """Milliseconds between the ends of steps, each enqueued while the one before it runs.

    Then the milliseconds in which each was enqueued.
    """
    for _ in range(WARM_UP):
        step()()
    times, host = [], []
    wait = step()
    last = time.perf_counter()
    for _ in range(steps + 1):
        started = time.perf_counter()
        next_wait = step()
        host.append((time.perf_counter() - started) * 1000)
        wait()
        now = time.perf_counter()
        times.append((now - last) * 1000)
        wait, last = next_wait, now
    wait()
    return times[1:], host[1:]  # the first began before the clock did


def _result(
    name: str,
    size: Size,
    times: Sequence[float],
    host: Sequence[float],
    device: Device,
    products: float,
    *,
    peak_bytes: int,
    planned: int,
    problem: str = "",
) -> StepTime:
    config = model_config(size.model, GPT2_VOCAB_SIZE)
    median = statistics.median(times)
    tokens_per_s = 1000 * size.batch_size * size.seq_len / median
    peak = peak_tflops(device)
    achieved = tokens_per_s * flops_per_token(config, size.seq_len) / 1e12
    return StepTime(
        name=name,
        size=str(size),
        step_ms=median,
        fastest_ms=min(times),
        # A device that is not asynchronous computes the step while it is enqueued.
        host_ms=statistics.median(host) if device.is_async else 0.0,
        tokens_per_s=tokens_per_s,
        peak_bytes=peak_bytes,
        planned_bytes=planned,
        mfu=achieved / peak if peak else 0.0,
        of_products=achieved / products,
        problem=problem,
    )


def peak_tflops(device: Device) -> float:
    """What the data sheet promises for this GPU, or 0 if it is not in PEAK_TFLOPS."""
    name = device.product_name
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), 0.0)


def _peak_bytes(device: Device) -> int:
    """Returns the device's peak memory, or 0 on a CPU that PyTorch has used in this process."""
    return 0 if "torch" in sys.modules and not device.is_gpu else device.peak_memory


def _release(device: Device) -> None:
    """Gives memory that was in use before back, for the next program."""
    gc.collect()
    device.release_memory()
    if device.is_gpu and "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()
