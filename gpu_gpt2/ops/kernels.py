"""Every op as launches of the files in kernels/, on a GPU or in the emulator.

All that has to agree with a kernel's text is decided in this one file: compile-time names, grid,
block, and the size of scratch memory. Blocks and chunks follow from tensor sizes alone, never from
the GPU, so sums are made in one order everywhere.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Final

from gpu_gpt2.config import MAX_HEAD_SIZE
from gpu_gpt2.device.base import BFLOAT16, FLOAT16, FLOAT32, X_DTYPES, Array, Device
from gpu_gpt2.device.launch import MAX_GRID, MAX_THREADS, Dim3
from gpu_gpt2.device.source import DTYPES, KernelSource, kernel_files, kernel_source
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.ops.interface import GROWTH_INTERVAL, AdamWSettings, Ops

WARP: Final = 32
THREADS: Final = 256  # of a block, where nothing asks for another number
ROW_THREADS: Final = 512  # at most, of a block with a row: the 4 C columns of GPT-2 124M in one go
MAX_SIZE: Final = 2**30  # of each dimension and of rows, so that int counters cannot overflow

VECTOR_BYTES: Final = 16  # that a thread moves at a time, where sizes allow it

# Sums down columns (kernels/bias.cu, layernorm.cu): rows are cut into chunks, each summed by
# itself: as many as make about CHUNK_BLOCKS blocks of work, if their sums fit.
MIN_CHUNK_ROWS: Final = 32
CHUNK_BLOCKS: Final = 1024
COLUMN_WARPS: Final = 8
SCRATCH_FLOATS: Final = 1 << 21  # for partial sums: 8 MiB

# Layernorm: channels of a row that a thread keeps in registers, in the backward pass four times.
CHANNELS_PER_THREAD: Final = 32

NORM_BLOCKS: Final = 1024  # partial sums of squared_norm

# Attention (kernels/attention.cu): 16 numbers a lane keep the backward pass within registers, and
# two tiles of 16 rows of the largest head stay under the 48 KiB of shared memory every GPU has.
ATTENTION_THREADS: Final = 128
ATTENTION_TILE: Final = 16
NUMBERS_PER_LANE: Final = 16


def attention_defines(head_size: int) -> dict[str, int]:
    """The compile-time names of kernels/attention.cu for heads of `head_size` numbers."""
    if not 1 <= head_size <= MAX_HEAD_SIZE:
        raise ConfigError(
            f"head size {head_size}: kernels/attention.cu takes 1 to {MAX_HEAD_SIZE}; "
            f"use another number of heads"
        )
    lanes = 1
    while lanes * NUMBERS_PER_LANE < head_size:
        lanes *= 2  # a power of two: lanes of one position sum by pairs within a warp
    return {
        "HEAD_SIZE": head_size,
        "LANES": lanes,
        "TILE": ATTENTION_TILE,
        "THREADS": ATTENTION_THREADS,
    }


# Flash attention (kernels/flash_attention.cu). Two row tiles a warp halve what is read from shared
# memory, and fit into registers up to D = 64; two buffers of two tiles stay within 48 KiB.
FLASH_HEAD_SIZES: Final = range(16, 129, 16)
FLASH_WARPS: Final = 4


def flash_attention_defines(head_size: int) -> dict[str, int]:
    """The compile-time names of kernels/flash_attention.cu for one of FLASH_HEAD_SIZES."""
    return {
        "HEAD_SIZE": head_size,
        "WARPS": FLASH_WARPS,
        "TILE": 64 if head_size <= 80 else 32,
        "QUERY_TILES": 2 if head_size <= 64 else 1,
    }


def layernorm_defines(C: int, width: int) -> dict[str, int]:
    """The compile-time names of kernels/layernorm.cu for rows of C channels, WIDTH included."""
    threads_per_row = WARP
    while threads_per_row * CHANNELS_PER_THREAD < C:
        threads_per_row *= 2
    if threads_per_row > MAX_THREADS:
        raise ConfigError(f"layernorm of {C} channels: at most {MAX_THREADS * CHANNELS_PER_THREAD}")
    return {
        "WIDTH": width,
        "THREADS_PER_ROW": threads_per_row,
        "PIECES": _blocks(C, threads_per_row * width),
        "THREADS": max(threads_per_row, THREADS if threads_per_row == WARP else threads_per_row),
    }


class KernelOps(Ops):
    """The ops as kernel launches, with X named by `dtype`: "fp32", "bf16" or "fp16".

    The scratch array of SCRATCH_FLOATS float32 numbers is the only memory allocated here.
    """

    def __init__(self, device: Device, dtype: str) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"kernels run in {', '.join(DTYPES)}, not {dtype!r}")
        self.device = device
        self.dtype = dtype
        self._scratch = device.empty((SCRATCH_FLOATS,), FLOAT32)

    # --- embedding ---

    def embedding_fwd(self, x: Array, tokens: Array, wte: Array, wpe: Array) -> None:
        B, T, C = _sizes(
            "embedding_fwd",
            "BTC",
            x=(x, "BTC"),
            tokens=(tokens, "BT"),
            wte=(wte, "VC"),
            wpe=(wpe, "PC"),
        )
        _at_most("embedding_fwd", "B * T", B * T, MAX_SIZE)
        _at_most("embedding_fwd", "T", T, wpe.shape[0])
        args = (x, tokens, wte, wpe, T, C)
        width = self._width(C)
        threads = _row_threads(C // width, THREADS)
        self._launch("embedding_fwd", (B * T,), (threads,), args, WIDTH=width)

    def embedding_bwd(
        self, dwte: Array, dwpe: Array, dx: Array, tokens: Array, order: Array
    ) -> None:
        B, T, C = _sizes(
            "embedding_bwd",
            "BTC",
            dwte=(dwte, "VC"),
            dwpe=(dwpe, "PC"),
            dx=(dx, "BTC"),
            tokens=(tokens, "BT"),
            order=(order, "N"),
        )
        N = _at_most("embedding_bwd", "B * T", B * T, MAX_SIZE)
        _at_most("embedding_bwd", "T", T, dwpe.shape[0])
        _at_most("embedding_bwd", "C", C, MAX_GRID[1] * THREADS)
        if order.shape[0] != N:
            raise ValueError(f"embedding_bwd: order is {order.shape}, expected ({N},) for B * T")
        width = self._width(C)
        threads = _row_threads(C // width, THREADS)
        columns = _blocks(C // width, threads)
        launch = functools.partial(self._launch, block=(threads,), WIDTH=width)
        launch("embedding_bwd_wpe", (T, columns), args=(dwpe, dx, B, T, C))
        launch("embedding_bwd_wte", (N, columns), args=(dwte, dx, tokens, order, N, C))

    # --- layernorm ---

    def layernorm_fwd(
        self, y: Array, mean: Array, rstd: Array, x: Array, w: Array, b: Array
    ) -> None:
        N, C = _sizes(
            "layernorm_fwd",
            "NC",
            y=(y, "NC"),
            mean=(mean, "N"),
            rstd=(rstd, "N"),
            x=(x, "NC"),
            w=(w, "C"),
            b=(b, "C"),
        )
        self._launch_by_row_groups("layernorm_fwd", N, C, (y, mean, rstd, x, w, b))

    def residual_layernorm_fwd(
        self,
        r: Array,
        y: Array,
        mean: Array,
        rstd: Array,
        x1: Array,
        x2: Array,
        bias: Array,
        w: Array,
        b: Array,
    ) -> None:
        N, C = _sizes(
            "residual_layernorm_fwd",
            "NC",
            r=(r, "NC"),
            y=(y, "NC"),
            mean=(mean, "N"),
            rstd=(rstd, "N"),
            x1=(x1, "NC"),
            x2=(x2, "NC"),
            bias=(bias, "C"),
            w=(w, "C"),
            b=(b, "C"),
        )
        tensors = (r, y, mean, rstd, x1, x2, bias, w, b)
        self._launch_by_row_groups("residual_layernorm_fwd", N, C, tensors)

    def layernorm_bwd(
        self,
        dx: Array,
        dw: Array,
        db: Array,
        dy: Array,
        x: Array,
        w: Array,
        mean: Array,
        rstd: Array,
    ) -> None:
        N, C = _sizes(
            "layernorm_bwd",
            "NC",
            dx=(dx, "NC"),
            dw=(dw, "C"),
            db=(db, "C"),
            dy=(dy, "NC"),
            x=(x, "NC"),
            w=(w, "C"),
            mean=(mean, "N"),
            rstd=(rstd, "N"),
        )
        defines = layernorm_defines(C, self._width(C))
        rows, blocks = _chunks("layernorm_bwd", N, 2 * C, CHUNK_BLOCKS)
        partial = self._scratch[: blocks * 2 * C]
        args = (dx, partial, dy, x, w, mean, rstd, N, C, rows)
        self._launch("layernorm_bwd", (blocks,), (defines["THREADS"],), args, **defines)
        grid = (_blocks(C, WARP), 2)
        total_args = (dw, db, partial, blocks, C)
        self._launch("layernorm_bwd_total", grid, (WARP, WARP), total_args, **defines)

    # --- attention ---

    def attention_fwd(self, y: Array, lse: Array, qkv: Array) -> None:
        B, T, H, D = _sizes(
            "attention_fwd", "BTHD", y=(y, "BTHD"), lse=(lse, "BHT"), qkv=(qkv, "BT3HD")
        )
        if self._is_flash(D):
            self._launch_flash("flash_attention_fwd", (B, T, H, D), (y, lse, qkv))
        else:
            self._launch_attention("attention_fwd", (B, T, H, D), (y, lse, qkv))

    def attention_bwd(
        self, dqkv: Array, delta: Array, dy: Array, qkv: Array, y: Array, lse: Array
    ) -> None:
        B, T, H, D = _sizes(
            "attention_bwd",
            "BTHD",
            dqkv=(dqkv, "BT3HD"),
            delta=(delta, "BHT"),
            dy=(dy, "BTHD"),
            qkv=(qkv, "BT3HD"),
            y=(y, "BTHD"),
            lse=(lse, "BHT"),
        )
        if self._is_flash(D):
            sizes = (B, T, H, D)
            self._launch_flash("flash_attention_bwd_dq", sizes, (dqkv, delta, dy, qkv, y, lse))
            self._launch_flash("flash_attention_bwd_dkv", sizes, (dqkv, delta, dy, qkv, lse))
            return
        rows = _at_most("attention_bwd", "B * T * H", B * T * H, MAX_SIZE)
        defines = attention_defines(D)
        self._launch_by_warps("attention_delta", rows, (delta, dy, y, B, T, H), **defines)
        args = (dqkv, delta, dy, qkv, lse)
        self._launch_attention("attention_bwd_dq", (B, T, H, D), args)
        self._launch_attention("attention_bwd_dkv", (B, T, H, D), args)

    # --- softmax ---

    def softmax_fwd(self, y: Array, x: Array) -> None:
        N, V = _sizes("softmax_fwd", "NV", y=(y, "NV"), x=(x, "NV"))
        width = self._width(V)
        threads = _row_threads(V // width, MAX_THREADS)
        self._launch("softmax_fwd", (N,), (threads,), (y, x, V), WIDTH=width)

    def softmax_bwd(self, dx: Array, dy: Array, y: Array) -> None:
        N, V = _sizes("softmax_bwd", "NV", dx=(dx, "NV"), dy=(dy, "NV"), y=(y, "NV"))
        width = self._width(V)
        threads = _row_threads(V // width, MAX_THREADS)
        self._launch("softmax_bwd", (N,), (threads,), (dx, dy, y, V), WIDTH=width)

    # --- GELU ---

    def gelu_fwd(self, y: Array, x: Array, b: Array) -> None:
        N, O = _sizes("gelu_fwd", "NO", y=(y, "NO"), x=(x, "NO"), b=(b, "O"))
        self._launch_with_bias("gelu_fwd", N, O, (y, x), b)

    def gelu_bwd(self, dx: Array, dy: Array, x: Array, b: Array) -> None:
        tensors = {"dx": (dx, "NO"), "dy": (dy, "NO"), "x": (x, "NO")}
        N, O = _sizes("gelu_bwd", "NO", **tensors, b=(b, "O"))
        self._launch_with_bias("gelu_bwd", N, O, (dx, dy, x), b)

    # --- bias ---

    def bias_fwd(self, y: Array, b: Array) -> None:
        N, O = _sizes("bias_fwd", "NO", y=(y, "NO"), b=(b, "O"))
        self._launch_with_bias("bias_fwd", N, O, (y,), b, COLUMN_WARPS=COLUMN_WARPS)

    def bias_bwd(self, db: Array, dy: Array) -> None:
        N, O = _sizes("bias_bwd", "NO", db=(db, "O"), dy=(dy, "NO"))
        width = self._width(O)
        columns = _blocks(O // width, WARP)
        rows, chunks = _chunks("bias_bwd", N, O, max(1, CHUNK_BLOCKS // columns))
        partial = self._scratch[: chunks * O]
        defines = {"WIDTH": width, "COLUMN_WARPS": COLUMN_WARPS}
        args = (partial, dy, N, O, rows)
        self._launch("bias_bwd_partial", (columns, chunks), (WARP, COLUMN_WARPS), args, **defines)
        total_args = (db, partial, chunks, O)
        self._launch("bias_bwd_total", (_blocks(O, WARP),), (WARP, WARP), total_args, **defines)

    # --- fused classifier ---

    def classifier_fwd(self, losses: Array, logits: Array, targets: Array, vocab_size: int) -> None:
        tensors = (losses, logits, targets)
        self._launch_classifier("classifier_fwd", tensors, vocab_size)

    def classifier_fwd_bwd(
        self,
        losses: Array,
        logits: Array,
        targets: Array,
        loss_scale: Array,
        vocab_size: int,
        dloss: float,
    ) -> None:
        _sizes("classifier_fwd_bwd", "", loss_scale=(loss_scale, "1"))
        tensors = (losses, logits, targets, loss_scale)
        self._launch_classifier("classifier_fwd_bwd", tensors, vocab_size, dloss)

    # --- optimizer ---

    def squared_norm(self, out: Array, x: Array) -> None:
        _sizes("squared_norm", "", out=(out, "1"))
        blocks = min(_blocks(x.size, 4 * THREADS), NORM_BLOCKS)
        partial = self._scratch[:blocks]
        self._launch("squared_norm_partial", (blocks,), (THREADS,), (partial, x, x.size))
        self._launch("squared_norm_total", (1,), (THREADS,), (out, partial, blocks))

    def prepare_update(
        self,
        factors: Array,
        report: Array,
        loss_scale: Array,
        counts: Array,
        losses: Array,
        grad_sq: Array,
        lr: Array,
        loss_weight: float,
        settings: AdamWSettings,
    ) -> None:
        (N,) = _sizes(
            "prepare_update",
            "N",
            factors=(factors, "5"),
            report=(report, "3"),
            loss_scale=(loss_scale, "1"),
            counts=(counts, "2"),
            losses=(losses, "N"),
            grad_sq=(grad_sq, "1"),
            lr=(lr, "1"),
        )
        tensors = (factors, report, loss_scale, counts, losses, grad_sq, lr)
        scalars = (
            loss_weight,
            math.log(settings.beta1),
            math.log(settings.beta2),
            settings.max_grad_norm,
            settings.max_loss_scale,
            GROWTH_INTERVAL,
        )
        args = (*tensors, N, *scalars)
        threads = _row_threads(N, MAX_THREADS)
        self._launch("prepare_update", (1,), (threads,), args)

    def adamw(
        self,
        master: Array,
        m: Array,
        v: Array,
        param: Array,
        grad: Array,
        factors: Array,
        decayed: int,
        settings: AdamWSettings,
    ) -> None:
        n = _one_shape("adamw", master=master, m=m, v=v, param=param, grad=grad)
        _sizes("adamw", "", factors=(factors, "5"))
        if not 0 <= decayed <= n:
            raise ValueError(f"adamw: decayed {decayed} is not within 0 to {n} elements")
        scalars = (
            1.0 - settings.beta1,
            1.0 - settings.beta2,
            settings.eps,
            settings.weight_decay,
        )
        args = (master, m, v, param, grad, factors, n, decayed, *scalars)
        self._launch("adamw", (_blocks(n, 4 * THREADS),), (THREADS,), args)

    # --- casts ---

    def cast(self, y: Array, x: Array) -> None:
        if x.dtype == y.dtype:
            _one_shape("cast", y=y, x=x)
            y[...] = x
        else:
            name = f"{_c_name(x)}_to_{_c_name(y)}"
            n = _one_shape(name, y=y, x=x)
            self._launch(name, (_blocks(n, THREADS),), (THREADS,), (y, x, n))

    # --- launches ---

    def _launch(
        self, name: str, grid: Dim3, block: Dim3, args: tuple[Any, ...], **defines: int
    ) -> None:
        source = _source(name, self.dtype, **defines)
        self.device.launch(source, name, grid, block, args)

    def _width(self, *sizes: int) -> int:
        """Numbers of X that a kernel moves at a time for tensors of these sizes: see common.cuh."""
        width = VECTOR_BYTES // X_DTYPES[self.dtype].itemsize
        return width if all(size % width == 0 for size in sizes) else 1

    def _launch_with_bias(
        self, name: str, N: int, O: int, tensors: tuple[Array, ...], b: Array, **defines: int
    ) -> None:
        """One block per row of tensors (N, O), with a bias (O,).

        Of all tensors only a bias may begin anywhere: one of 4 C numbers, if C is odd. Its address
        may decide, for there are no sums, whose order would follow it.
        """
        width = 1 if self.device.address(b) % VECTOR_BYTES else self._width(O)
        threads = _row_threads(O // width, ROW_THREADS)
        self._launch(name, (N,), (threads,), (*tensors, b, O), WIDTH=width, **defines)

    def _launch_by_row_groups(self, name: str, N: int, C: int, tensors: tuple[Array, ...]) -> None:
        """One group of THREADS_PER_ROW threads per row: see kernels/layernorm.cu."""
        defines = layernorm_defines(C, self._width(C))
        threads = defines["THREADS"]
        grid = (_blocks(N, threads // defines["THREADS_PER_ROW"]),)
        self._launch(name, grid, (threads,), (*tensors, N, C), **defines)

    def _launch_by_warps(self, name: str, rows: int, args: tuple[Any, ...], **defines: int) -> None:
        """One warp per row."""
        self._launch(name, (_blocks(rows, THREADS // WARP),), (THREADS,), args, **defines)

    def _launch_attention(
        self, name: str, sizes: tuple[int, int, int, int], tensors: tuple[Array, ...]
    ) -> None:
        B, T, H, D = sizes
        defines = attention_defines(D)
        rows = defines["THREADS"] // defines["LANES"]
        _at_most(name, "B * T * H", B * T * H, MAX_SIZE)
        _at_most(name, "T", T, MAX_GRID[1] * rows)
        grid = (B * H, _blocks(T, rows))
        self._launch(name, grid, (defines["THREADS"],), (*tensors, T, H), **defines)

    def _is_flash(self, head_size: int) -> bool:
        """Whether attention runs on tensor cores: else kernels/attention.cu, which takes all."""
        fits = self.dtype != "fp32" and head_size in FLASH_HEAD_SIZES
        return fits and self.device.has_tensor_cores

    def _launch_flash(
        self, name: str, sizes: tuple[int, int, int, int], tensors: tuple[Array, ...]
    ) -> None:
        B, T, H, D = sizes
        defines = flash_attention_defines(D)
        _at_most(name, "B * H", B * H, MAX_GRID[1])
        tiles = 1 if name == "flash_attention_bwd_dkv" else defines["QUERY_TILES"]
        rows = 16 * tiles * defines["WARPS"]
        grid = (_blocks(T, rows), B * H)
        self._launch(name, grid, (defines["WARPS"] * WARP,), (*tensors, T, H), **defines)

    def _launch_classifier(
        self,
        name: str,
        tensors: tuple[Array, ...],
        vocab_size: int,
        *scalars: float,
    ) -> None:
        losses, logits, targets = tensors[:3]
        N, Vp = _sizes(
            name, "NP", losses=(losses, "N"), logits=(logits, "NP"), targets=(targets, "N")
        )
        if not 1 <= vocab_size <= Vp:
            raise ValueError(f"{name}: vocab_size {vocab_size} is not within 1 to {Vp} columns")
        args = (*tensors, vocab_size, Vp, *scalars)
        width = self._width(Vp)
        threads = _row_threads(_blocks(vocab_size, width), MAX_THREADS)
        self._launch(name, (N,), (threads,), args, WIDTH=width)


@functools.cache
def _source(kernel: str, dtype: str, **defines: int) -> KernelSource:
    return kernel_source(_files()[kernel], dtype, **defines)


def _c_name(array: Array) -> str:
    """What the kernels call an element of the array."""
    return {FLOAT32: "float", BFLOAT16: "bf16", FLOAT16: "fp16"}[array.dtype]


@functools.cache
def _files() -> dict[str, str]:
    """The file of each kernel."""
    return {
        kernel: file for file in kernel_files() for kernel in kernel_source(file, "fp32").signatures
    }


def _blocks(size: int, per_block: int) -> int:
    return math.ceil(size / per_block)


def _row_threads(columns: int, limit: int) -> int:
    """Threads of a block that works on one row: whole warps, at most `limit`."""
    return min(_blocks(columns, WARP) * WARP, limit)


def _chunks(op: str, rows: int, sums: int, most: int) -> tuple[int, int]:
    """(rows in each chunk, number of chunks), at most `most`, for sums down `rows` rows.

    Each chunk has `sums` partial sums.
    """
    most = min(most, SCRATCH_FLOATS // _at_most(op, "column sums", sums, SCRATCH_FLOATS))
    per_chunk = max(MIN_CHUNK_ROWS, _blocks(rows, most))
    return per_chunk, _blocks(rows, per_chunk)


def _sizes(op: str, wanted: str, **tensors: tuple[Array, str]) -> list[int]:
    """The sizes named by the letters `wanted`, once all shapes agree.

    x=(array, "BT3") says that array is (B, T, 3). Raises ValueError naming op and tensor.
    """
    found: dict[str, int] = {}
    for name, (array, letters) in tensors.items():
        expected = tuple(
            int(letter) if letter.isdigit() else found.setdefault(letter, size)
            for letter, size in zip(letters, array.shape, strict=False)
        )
        if array.shape != expected or len(letters) != len(expected):
            known = ", ".join(f"{letter} = {size}" for letter, size in found.items())
            raise ValueError(
                f"{op}: {name} is {array.shape}, expected ({', '.join(letters)}) with {known}"
            )
    for letter, size in found.items():
        _at_most(op, letter, size, MAX_SIZE)
    return [found[letter] for letter in wanted]


def _one_shape(op: str, **tensors: Array) -> int:
    """The number of elements of tensors that must all have one shape."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{op}: expected one shape, got {listed}")
    n = math.prod(next(iter(shapes.values())))
    return _at_most(op, "elements", n, MAX_GRID[0] * THREADS)


def _at_most(op: str, name: str, size: int, limit: int) -> int:
    """`size`, if it is from 1 to `limit`; else raises ConfigError naming both."""
    if not 1 <= size <= limit:
        raise ConfigError(f"{op}: {name} = {size} must be 1 to {limit}")
    return size
