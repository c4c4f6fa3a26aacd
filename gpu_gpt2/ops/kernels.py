"""Every op as launches of the files in kernels/, on a GPU or in the emulator.

Everything that must agree with the text of a kernel is decided in this one file: compile-time
names, grid, block, and the size of scratch memory. A method checks its tensors against the row of
its op in `table`, then any constraint that the row cannot express, then launches. Blocks and chunks
follow from tensor sizes alone, never from the GPU, so that a kernel adds in one order on every GPU.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Final

from gpu_gpt2.config import MAX_HEAD_SIZE
from gpu_gpt2.device.base import FLOAT32, X_DTYPES, Array, Device
from gpu_gpt2.device.launch import ELEMENT_DTYPES, MAX_GRID, MAX_THREADS, Dim3
from gpu_gpt2.device.source import DTYPES, KernelSource, kernel_files, kernel_source
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.ops.table import (
    GROWTH_INTERVAL,
    MAX_SIZE,
    MUON_COEFFICIENTS,
    MUON_EPS,
    AdamWSettings,
    Ops,
    at_most,
    check_heads,
    kv_heads,
    sample_scalars,
    sizes,
)

WARP: Final = 32  # threads of a warp
THREADS: Final = 256  # threads of a block, unless the op needs another number
# Most threads of a row of an elementwise op: enough for 4 C of GPT-2 124M in bf16.
ROW_THREADS: Final = 512
VECTOR_BYTES: Final = 16  # widest load or store of one thread

# Column sums (kernels/bias.cu, kernels/layernorm.cu, kernels/rmsnorm.cu) cut the rows into chunks
# and sum each chunk by itself. There are as many chunks as make about CHUNK_BLOCKS blocks, several
# for each multiprocessor of the largest GPUs, unless chunks would have fewer than MIN_CHUNK_ROWS
# rows or their sums would not fit into scratch memory.
MIN_CHUNK_ROWS: Final = 32
CHUNK_BLOCKS: Final = 1024
COLUMN_WARPS: Final = 8  # warps of a block of column sums: 256 threads
SCRATCH_FLOATS: Final = 1 << 21  # float32 elements of scratch memory for partial sums: 8 MiB

# Most channels of a row that one thread of a row group keeps in registers; the backward pass of
# layernorm keeps four such sets (z, g, dw and db), that of RMSNorm three.
CHANNELS_PER_THREAD: Final = 32

NORM_BLOCKS: Final = 1024  # most blocks, and so partial sums, of squared_norm and muon_momentum

# Attention (kernels/attention.cu): 16 elements of a head per lane keep the backward pass within
# registers, and two tiles of 16 rows of the largest head stay below the 48 KiB of shared memory
# that every GPU has.
ATTENTION_THREADS: Final = 128
ATTENTION_TILE: Final = 16
ELEMENTS_PER_LANE: Final = 16


def attention_defines(head_size: int) -> dict[str, int]:
    """The compile-time names of kernels/attention.cu for heads of `head_size` elements."""
    if not 1 <= head_size <= MAX_HEAD_SIZE:
        raise ConfigError(
            f"head size {head_size}: kernels/attention.cu takes 1 to {MAX_HEAD_SIZE}; "
            f"use another number of heads"
        )
    lanes = 1
    while lanes * ELEMENTS_PER_LANE < head_size:
        lanes *= 2  # a power of two, because the lanes of one position sum by pairs within a warp
    return {
        "HEAD_SIZE": head_size,
        "LANES": lanes,
        "TILE": ATTENTION_TILE,
        "THREADS": ATTENTION_THREADS,
    }


# Flash attention (kernels/flash_attention.cu). Two tiles of query rows per warp halve the reads
# from shared memory and fit into registers up to D = 64; two buffers of two tiles of keys and
# values stay within 48 KiB of shared memory.
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


# Decoding (kernels/attention_decode.cu). The cache is cut into splits of at least MIN_SPLIT
# positions: these give 192 blocks to one sequence of GPT-2 124M, and the cache's bytes of a split
# are still several times those of its partial results. Splits are longer where they would make more
# than DECODE_BLOCKS blocks, about two for each that a large GPU holds at once.
DECODE_THREADS: Final = 128
MAX_QUERY_HEADS: Final = 8  # query heads that a block holds in registers without spills
MIN_SPLIT: Final = 64
DECODE_BLOCKS: Final = 2048
DECODE_TOTAL_WARPS: Final = 8  # warps that combine the splits: runs of 16 for 8192 positions


def attention_decode_defines(head_size: int, group: int, width: int) -> dict[str, int]:
    """The compile-time names of kernels/attention_decode.cu, WIDTH included.

    `group` is the number of query heads that share a key/value head.
    """
    at_most("attention_decode", "D", head_size, MAX_HEAD_SIZE)
    lanes = 1
    while lanes < WARP and lanes * width < head_size:
        lanes *= 2
    return {
        "HEAD_SIZE": head_size,
        "WIDTH": width,
        "LANES": lanes,
        "QUERY_HEADS": _blocks(group, _blocks(group, MAX_QUERY_HEADS)),
        "THREADS": DECODE_THREADS,
        "TOTAL_WARPS": DECODE_TOTAL_WARPS,
    }


# Sampling (kernels/sample.cu): four warps for each scheduler of a multiprocessor hide the latency
# of arithmetic. More would only lengthen the sums over the block.
SAMPLE_THREADS: Final = 512

# Matmuls of int8 (kernels/matmul_int8.cu): blocks of few warps spread the rows of a small matrix
# over all multiprocessors, and up to 8 rows of x the loads of w from memory bind.
MATMUL_INT8_WARPS: Final = 4
MATMUL_INT8_ROWS: Final = 8
PIECES: Final = (16, 4, 1)  # elements of int8 that a thread loads at once: 16 bytes, 4 or 1


def matmul_int8_defines(N: int, group_size: int) -> dict[str, int]:
    """The compile-time names of matmul_int8 for N rows of x and groups of `group_size`."""
    rows = 1
    while rows < min(N, MATMUL_INT8_ROWS):
        rows *= 2
    return {"ROWS": rows, "PIECE": next(size for size in PIECES if group_size % size == 0)}


def row_group_defines(op: str, C: int, width: int) -> dict[str, int]:
    """The compile-time names of kernels/row_group.cuh for rows of C channels, WIDTH included."""
    threads_per_row = WARP
    while threads_per_row * CHANNELS_PER_THREAD < C:
        threads_per_row *= 2
    if threads_per_row > MAX_THREADS:
        raise ConfigError(f"{op}: C = {C} must be 1 to {MAX_THREADS * CHANNELS_PER_THREAD}")
    return {
        "WIDTH": width,
        "THREADS_PER_ROW": threads_per_row,
        "PIECES": _blocks(C, threads_per_row * width),
        "THREADS": max(threads_per_row, THREADS if threads_per_row == WARP else threads_per_row),
    }


class KernelOps(Ops):
    """The ops as kernel launches, with X named by `dtype`: "fp32", "bf16" or "fp16".

    The scratch array of SCRATCH_FLOATS float32 elements is the only memory allocated here.
    """

    def __init__(self, device: Device, dtype: str) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"kernels run in {', '.join(DTYPES)}, not {dtype!r}")
        self.device = device
        self.dtype = dtype
        self._scratch = device.empty((SCRATCH_FLOATS,), FLOAT32)

    # --- embedding ---

    def embedding_fwd(self, x: Array, tokens: Array, starts: Array, wte: Array, wpe: Array) -> None:
        B, T, C = self._sizes("embedding_fwd", "B T C", x, tokens, starts, wte, wpe)
        N = at_most("embedding_fwd", "B * T", B * T, MAX_SIZE)
        width = self._width(C)
        threads = _row_threads(C // width, THREADS)
        args = (x, tokens, starts, wte, wpe, T, C)
        self._launch("embedding_fwd", (N,), (threads,), args, WIDTH=width)

    def embedding_bwd(
        self, dwte: Array, dwpe: Array, dx: Array, tokens: Array, order: Array
    ) -> None:
        B, T, C = self._sizes("embedding_bwd", "B T C", dwte, dwpe, dx, tokens, order)
        wpe_args = (dwpe, dx, B, T, C)
        self._launch_by_columns("embedding_bwd", "embedding_bwd_wpe", T, C, wpe_args)
        wte_args = (dwte, dx, tokens, order, B * T, C)
        self._launch_by_columns("embedding_bwd", "embedding_bwd_wte", B * T, C, wte_args)

    # --- token embedding without positions ---

    def token_embedding_fwd(self, x: Array, tokens: Array, wte: Array) -> None:
        op = "token_embedding_fwd"
        B, T, C = self._sizes(op, "B T C", x, tokens, wte)
        N = at_most(op, "B * T", B * T, MAX_SIZE)
        width = self._width(C)
        threads = _row_threads(C // width, THREADS)
        self._launch(op, (N,), (threads,), (x, tokens, wte, C), WIDTH=width)

    def token_embedding_bwd(self, dwte: Array, dx: Array, tokens: Array, order: Array) -> None:
        op = "token_embedding_bwd"
        B, T, C = self._sizes(op, "B T C", dwte, dx, tokens, order)
        args = (dwte, dx, tokens, order, B * T, C)
        self._launch_by_columns(op, "embedding_bwd_wte", B * T, C, args)

    # --- layernorm ---

    def layernorm_fwd(
        self, y: Array, mean: Array, rstd: Array, x: Array, w: Array, b: Array, eps: float
    ) -> None:
        self._launch_by_row_groups("layernorm_fwd", (y, mean, rstd, x, w, b), eps)

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
        eps: float,
    ) -> None:
        tensors = (r, y, mean, rstd, x1, x2, bias, w, b)
        self._launch_by_row_groups("residual_layernorm_fwd", tensors, eps)

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
        N, C = self._sizes("layernorm_bwd", "N C", dx, dw, db, dy, x, w, mean, rstd)
        defines = row_group_defines("layernorm_bwd", C, self._width(C))
        rows, blocks = _chunks("layernorm_bwd", N, 2 * C, CHUNK_BLOCKS)
        partial = self._scratch[: blocks * 2 * C]
        args = (dx, partial, dy, x, w, mean, rstd, N, C, rows)
        self._launch("layernorm_bwd", (blocks,), (defines["THREADS"],), args, **defines)
        grid = (_blocks(C, WARP), 2)
        total_args = (dw, db, partial, blocks, C)
        self._launch("layernorm_bwd_total", grid, (WARP, WARP), total_args, **defines)

    # --- RMSNorm ---

    def rmsnorm_fwd(self, y: Array, rstd: Array, x: Array, w: Array, eps: float) -> None:
        self._launch_by_row_groups("rmsnorm_fwd", (y, rstd, x, w), eps)

    def residual_rmsnorm_fwd(
        self, r: Array, y: Array, rstd: Array, x1: Array, x2: Array, w: Array, eps: float
    ) -> None:
        self._launch_by_row_groups("residual_rmsnorm_fwd", (r, y, rstd, x1, x2, w), eps)

    def rmsnorm_bwd(self, dx: Array, dw: Array, dy: Array, x: Array, w: Array, rstd: Array) -> None:
        N, C = self._sizes("rmsnorm_bwd", "N C", dx, dw, dy, x, w, rstd)
        defines = row_group_defines("rmsnorm_bwd", C, self._width(C))
        rows, blocks = _chunks("rmsnorm_bwd", N, C, CHUNK_BLOCKS)
        partial = self._scratch[: blocks * C]
        args = (dx, partial, dy, x, w, rstd, N, C, rows)
        self._launch("rmsnorm_bwd", (blocks,), (defines["THREADS"],), args, **defines)
        total_args = (dw, partial, blocks, C)
        grid = (_blocks(C, WARP),)
        self._launch("rmsnorm_bwd_total", grid, (WARP, WARP), total_args, **defines)

    # --- rotary position embedding ---

    def rope_fwd(self, qkv: Array, starts: Array, angles: Array, kv_heads: int) -> None:
        self._launch_rope("rope_fwd", qkv, starts, angles, kv_heads)

    def rope_bwd(self, dqkv: Array, starts: Array, angles: Array, kv_heads: int) -> None:
        self._launch_rope("rope_bwd", dqkv, starts, angles, kv_heads)

    # --- attention ---

    def attention_fwd(self, y: Array, lse: Array, qkv: Array) -> None:
        B, T, H, D, R = self._sizes("attention_fwd", "B T H D R", y, lse, qkv)
        shape = (B, T, H, kv_heads("attention_fwd", R, H), D)
        if self._is_flash(D):
            self._launch_flash("flash_attention_fwd", shape, (y, lse, qkv))
        else:
            self._launch_attention("attention_fwd", shape, (y, lse, qkv))

    def attention_bwd(
        self, dqkv: Array, delta: Array, dy: Array, qkv: Array, y: Array, lse: Array
    ) -> None:
        tensors = (dqkv, delta, dy, qkv, y, lse)
        B, T, H, D, R = self._sizes("attention_bwd", "B T H D R", *tensors)
        shape = (B, T, H, kv_heads("attention_bwd", R, H), D)
        args = (dqkv, delta, dy, qkv, lse)
        if self._is_flash(D):
            self._launch_flash("flash_attention_bwd_dq", shape, tensors)
            self._launch_flash("flash_attention_bwd_dkv", shape, args)
            return
        rows = at_most("attention_bwd", "B * T * H", B * T * H, MAX_SIZE)
        defines = attention_defines(D)
        self._launch_by_warps("attention_delta", rows, (delta, dy, y, B, T, H), **defines)
        self._launch_attention("attention_bwd_dq", shape, args)
        self._launch_attention("attention_bwd_dkv", shape, args)

    # --- decoding with a KV cache ---

    def kv_append(self, k: Array, v: Array, qkv: Array, starts: Array) -> None:
        B, T, G, S, D, R = self._sizes("kv_append", "B T G S D R", k, v, qkv, starts)
        check_heads("kv_append", R, R - 2 * G, G)
        rows = at_most("kv_append", "B * T", B * T, MAX_SIZE)
        elements = at_most("kv_append", "2 * G * D", 2 * G * D, MAX_SIZE)
        width = self._width(D)
        threads = _row_threads(elements // width, THREADS)
        args = (k, v, qkv, starts, T, R - 2 * G, G, D, S)
        self._launch("kv_append", (rows,), (threads,), args, WIDTH=width)

    def attention_decode(self, y: Array, qkv: Array, k: Array, v: Array, starts: Array) -> None:
        """The splits are as short as MIN_SPLIT, DECODE_BLOCKS and the scratch memory allow.

        They depend on S, not on the positions, so that a CUDA graph serves all positions.
        """
        op = "attention_decode"
        B, H, D, R, G, S = self._sizes(op, "B H D R G S", y, qkv, k, v, starts)
        check_heads(op, R, H, G)
        defines = attention_decode_defines(D, H // G, self._width(D))
        blocks = B * G * _blocks(H // G, defines["QUERY_HEADS"])  # of one split
        floats = at_most(op, "B * H * (D + 2)", B * H * (D + 2), SCRATCH_FLOATS)  # of one split
        most = min(max(1, DECODE_BLOCKS // blocks), SCRATCH_FLOATS // floats)  # splits
        length = max(MIN_SPLIT, _blocks(S, most))
        splits = _blocks(S, length)
        partial = self._scratch[: splits * floats]
        args = (partial, qkv, k, v, starts, H, G, S, length)
        threads = (defines["THREADS"],)
        self._launch("attention_decode_partial", (blocks, splits), threads, args, **defines)
        grid, block = (B * H, _blocks(D, WARP)), (WARP, defines["TOTAL_WARPS"])
        total_args = (y, partial, starts, H, S, splits, length)
        self._launch("attention_decode_total", grid, block, total_args, **defines)

    # --- softmax ---

    def softmax_fwd(self, y: Array, x: Array) -> None:
        N, V = self._sizes("softmax_fwd", "N V", y, x)
        width = self._width(V)
        threads = _row_threads(V // width, MAX_THREADS)
        self._launch("softmax_fwd", (N,), (threads,), (y, x, V), WIDTH=width)

    def softmax_bwd(self, dx: Array, dy: Array, y: Array) -> None:
        N, V = self._sizes("softmax_bwd", "N V", dx, dy, y)
        width = self._width(V)
        threads = _row_threads(V // width, MAX_THREADS)
        self._launch("softmax_bwd", (N,), (threads,), (dx, dy, y, V), WIDTH=width)

    # --- GELU ---

    def gelu_fwd(self, y: Array, x: Array, b: Array) -> None:
        self._launch_with_bias("gelu_fwd", y, x, b)

    def gelu_bwd(self, dx: Array, dy: Array, x: Array, b: Array) -> None:
        self._launch_with_bias("gelu_bwd", dx, dy, x, b)

    # --- SwiGLU ---

    def swiglu_fwd(self, y: Array, u: Array) -> None:
        self._launch_swiglu("swiglu_fwd", y, u)

    def swiglu_bwd(self, du: Array, dy: Array, u: Array) -> None:
        self._launch_swiglu("swiglu_bwd", du, dy, u)

    # --- bias ---

    def bias_fwd(self, y: Array, b: Array) -> None:
        self._launch_with_bias("bias_fwd", y, b, COLUMN_WARPS=COLUMN_WARPS)

    def bias_bwd(self, db: Array, dy: Array) -> None:
        N, O = self._sizes("bias_bwd", "N O", db, dy)
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
        self._launch_classifier("classifier_fwd", (losses, logits, targets), vocab_size)

    def classifier_fwd_bwd(
        self,
        losses: Array,
        logits: Array,
        targets: Array,
        loss_scale: Array,
        vocab_size: int,
        dloss: float,
    ) -> None:
        tensors = (losses, logits, targets, loss_scale)
        self._launch_classifier("classifier_fwd_bwd", tensors, vocab_size, dloss)

    # --- sampling ---

    def sample(
        self,
        tokens: Array,
        starts: Array,
        logits: Array,
        key: Array,
        vocab_size: int,
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> None:
        tensors = (tokens, starts, logits, key)
        B, Vp = self._sizes("sample", "B Vp", *tensors)
        _check_vocabulary("sample", vocab_size, Vp)
        scalars = sample_scalars(vocab_size, temperature, top_k, top_p)
        width = self._width(Vp)
        threads = _row_threads(_blocks(vocab_size, width), SAMPLE_THREADS)
        args = (*tensors, vocab_size, Vp, *scalars)
        self._launch("sample", (B,), (threads,), args, WIDTH=width)

    # --- int8 matmuls ---

    def quantize_rows(self, q: Array, scales: Array, x: Array) -> None:
        N, I, J = self._sizes("quantize_rows", "N I J", q, scales, x)
        group_size = _group_size("quantize_rows", I, J)
        groups = at_most("quantize_rows", "N * J", N * J, MAX_SIZE)
        self._launch_by_warps("quantize_rows", groups, (q, scales, x, groups, group_size))

    def matmul_int8(self, y: Array, x: Array, x_scales: Array, w: Array, w_scales: Array) -> None:
        tensors = (y, x, x_scales, w, w_scales)
        N, O, I, J = self._sizes("matmul_int8", "N O I J", *tensors)
        defines = matmul_int8_defines(N, _group_size("matmul_int8", I, J))
        blocks = _blocks(O, MATMUL_INT8_WARPS) * _blocks(N, defines["ROWS"])
        at_most("matmul_int8", "blocks", blocks, MAX_GRID[0])
        args = (*tensors, N, O, I, J)
        self._launch("matmul_int8", (blocks,), (MATMUL_INT8_WARPS * WARP,), args, **defines)

    # --- optimizer ---

    def squared_norm(self, out: Array, x: Array) -> None:
        (n,) = self._sizes("squared_norm", "n", out, x)
        blocks = min(_blocks(n, 4 * THREADS), NORM_BLOCKS)
        partial = self._scratch[:blocks]
        self._launch("squared_norm_partial", (blocks,), (THREADS,), (partial, x, n))
        self._launch("squared_norm_total", (1,), (THREADS,), (out, partial, blocks))

    def prepare_update(
        self,
        factors: Array,
        report: Array,
        loss_scale: Array,
        counts: Array,
        windows: Array,
        losses: Array,
        grad_sq: Array,
        lr: Array,
        loss_weight: float,
        settings: AdamWSettings,
    ) -> None:
        tensors = (factors, report, loss_scale, counts, windows, losses, grad_sq, lr)
        (N,) = self._sizes("prepare_update", "N", *tensors)
        scalars = (
            loss_weight,
            math.log(settings.beta1),
            math.log(settings.beta2),
            settings.max_grad_norm,
            settings.max_loss_scale,
            GROWTH_INTERVAL,
            settings.max_loss_zscore,
            settings.max_grad_zscore,
            int(settings.halt),
        )
        threads = _row_threads(N, MAX_THREADS)
        self._launch("prepare_update", (1,), (threads,), (*tensors, N, *scalars))

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
        tensors = (master, m, v, param, grad, factors)
        (n,) = self._sizes("adamw", "n", *tensors)
        if not 0 <= decayed <= n:
            raise ValueError(f"adamw: decayed {decayed} is not within 0 to {n} elements")
        scalars = (
            1.0 - settings.beta1,
            1.0 - settings.beta2,
            settings.eps,
            settings.weight_decay,
        )
        grid = (_blocks(n, 4 * THREADS),)
        # A part of an arena may begin anywhere if C is odd, and then not with a vector of four
        # elements. The address may decide because nothing is summed.
        aligned = all(
            self.device.address(tensor) % (4 * tensor.dtype.itemsize) == 0
            for tensor in tensors[:-1]
        )
        defines = {} if aligned else {"ALIGNED": 0}
        self._launch("adamw", grid, (THREADS,), (*tensors, n, decayed, *scalars), **defines)

    # --- Muon ---

    def muon_momentum(
        self, x: Array, m: Array, grad: Array, factors: Array, momentum: float
    ) -> None:
        O, I = self._sizes("muon_momentum", "O I", x, m, grad, factors)
        n = O * I
        grid = (min(_blocks(n, 4 * THREADS), NORM_BLOCKS),)
        partial = self._scratch[: grid[0]]
        share = 1.0 - momentum
        partial_args = (m, partial, grad, factors, n, share)
        self._launch("muon_momentum_partial", grid, (THREADS,), partial_args)
        args = (x, partial, m, grad, factors, n, share, MUON_EPS)
        self._launch("muon_normalize", grid, (THREADS,), args)

    def muon_polynomial(self, p: Array, gram: Array, square: Array) -> None:
        (K,) = self._sizes("muon_polynomial", "K", p, gram, square)
        at_most("muon_polynomial", "K", K, MAX_GRID[1] * THREADS)
        threads = _row_threads(K, THREADS)
        args = (p, gram, square, K, *MUON_COEFFICIENTS)
        self._launch("muon_polynomial", (K, _blocks(K, threads)), (threads,), args)

    def muon_update(
        self,
        master: Array,
        param: Array,
        x: Array,
        factors: Array,
        scale: float,
        weight_decay: float,
    ) -> None:
        tensors = (master, param, x, factors)
        (n,) = self._sizes("muon_update", "n", *tensors)
        args = (*tensors, n, scale, weight_decay)
        self._launch("muon_update", (_blocks(n, THREADS),), (THREADS,), args)

    # --- casts ---

    def cast(self, y: Array, x: Array) -> None:
        (n,) = self._sizes("cast", "n", y, x)
        if x.dtype == y.dtype:
            y[...] = x
        else:
            name = f"{_c_name(x)}_to_{_c_name(y)}"
            self._launch(name, (_blocks(n, THREADS),), (THREADS,), (y, x, n))

    # --- launches ---

    def _launch(
        self, name: str, grid: Dim3, block: Dim3, args: tuple[Any, ...], **defines: int
    ) -> None:
        source = _source(name, self.dtype, **defines)
        self.device.launch(source, name, grid, block, args)

    def _sizes(self, op: str, letters: str, *tensors: Array) -> tuple[int, ...]:
        """Checks all tensors against the row of `op` and returns the sizes that `letters` name."""
        layout = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        return sizes(op, letters, X_DTYPES[self.dtype], layout)

    def _width(self, columns: int) -> int:
        """Elements of X that a thread loads or stores at once in rows of `columns`: WIDTH."""
        width = VECTOR_BYTES // X_DTYPES[self.dtype].itemsize
        return width if columns % width == 0 else 1

    def _launch_with_bias(self, op: str, *tensors: Array, **defines: int) -> None:
        """One block per row of tensors (N, O), the last of which is a bias (O).

        Only a bias can be misaligned, when O is odd, so its address is checked. The vector width
        may depend on an address here because these ops sum nothing.
        """
        N, O = self._sizes(op, "N O", *tensors)
        width = 1 if self.device.address(tensors[-1]) % VECTOR_BYTES else self._width(O)
        threads = _row_threads(O // width, ROW_THREADS)
        self._launch(op, (N,), (threads,), (*tensors, O), WIDTH=width, **defines)

    def _launch_by_row_groups(self, op: str, tensors: tuple[Array, ...], eps: float) -> None:
        """One group of THREADS_PER_ROW threads per row: see kernels/row_group.cuh."""
        N, C = self._sizes(op, "N C", *tensors)
        defines = row_group_defines(op, C, self._width(C))
        threads = defines["THREADS"]
        grid = (_blocks(N, threads // defines["THREADS_PER_ROW"]),)
        self._launch(op, grid, (threads,), (*tensors, N, C, eps), **defines)

    def _launch_by_columns(
        self, op: str, name: str, rows: int, C: int, args: tuple[Any, ...]
    ) -> None:
        """One or several blocks per row, whose threads take one piece each."""
        at_most(op, "C", C, MAX_GRID[1] * THREADS)
        width = self._width(C)
        threads = _row_threads(C // width, THREADS)
        grid = (rows, _blocks(C // width, threads))
        self._launch(name, grid, (threads,), args, WIDTH=width)

    def _launch_rope(
        self, op: str, qkv: Array, starts: Array, angles: Array, kv_heads: int
    ) -> None:
        """One block per row (b, t): see kernels/rope.cu."""
        B, T, R, D = self._sizes(op, "B T R D", qkv, starts, angles)
        N = at_most(op, "B * T", B * T, MAX_SIZE)
        at_most(op, "R * D", R * D, MAX_SIZE)
        if D % 2:
            raise ValueError(f"{op}: D = {D} is odd, but pairs of elements are rotated")
        check_heads(op, R, R - 2 * kv_heads, kv_heads)
        width = self._width(D)
        pieces = (R - kv_heads) * D // max(width, 2)
        args = (qkv, starts, angles, T, R, D, kv_heads)
        self._launch(op, (N,), (_row_threads(pieces, ROW_THREADS),), args, WIDTH=width)

    def _launch_swiglu(self, op: str, *tensors: Array) -> None:
        """One block per row of tensors (N, F) and (N, 2, F)."""
        N, F = self._sizes(op, "N F", *tensors)
        width = self._width(F)
        threads = _row_threads(F // width, ROW_THREADS)
        self._launch(op, (N,), (threads,), (*tensors, F), WIDTH=width)

    def _launch_by_warps(self, name: str, rows: int, args: tuple[Any, ...], **defines: int) -> None:
        """One warp per row."""
        self._launch(name, (_blocks(rows, THREADS // WARP),), (THREADS,), args, **defines)

    def _launch_attention(
        self, name: str, shape: tuple[int, int, int, int, int], tensors: tuple[Array, ...]
    ) -> None:
        """One group of LANES threads per query or key: see kernels/attention.cu."""
        B, T, H, G, D = shape
        defines = attention_defines(D)
        rows = defines["THREADS"] // defines["LANES"]
        at_most(name, "B * T * H", B * T * H, MAX_SIZE)
        at_most(name, "T", T, MAX_GRID[1] * rows)
        grid = (B * (G if name.endswith("_dkv") else H), _blocks(T, rows))
        self._launch(name, grid, (defines["THREADS"],), (*tensors, T, H, G), **defines)

    def _is_flash(self, head_size: int) -> bool:
        """True if kernels/flash_attention.cu takes this head size here, on tensor cores.

        kernels/attention.cu takes everything else.
        """
        fits = self.dtype != "fp32" and head_size in FLASH_HEAD_SIZES
        return fits and self.device.has_tensor_cores

    def _launch_flash(
        self, name: str, shape: tuple[int, int, int, int, int], tensors: tuple[Array, ...]
    ) -> None:
        """One tile of queries or keys per block: see kernels/flash_attention.cu."""
        B, T, H, G, D = shape
        defines = flash_attention_defines(D)
        of_keys = name.endswith("_dkv")
        heads = at_most(name, "B * heads", B * (G if of_keys else H), MAX_GRID[1])
        rows = 16 * (1 if of_keys else defines["QUERY_TILES"]) * defines["WARPS"]
        grid = (_blocks(T, rows), heads)
        self._launch(name, grid, (defines["WARPS"] * WARP,), (*tensors, T, H, G), **defines)

    def _launch_classifier(
        self, op: str, tensors: tuple[Array, ...], vocab_size: int, *scalars: float
    ) -> None:
        """One block per row of logits (N, Vp)."""
        N, Vp = self._sizes(op, "N Vp", *tensors)
        _check_vocabulary(op, vocab_size, Vp)
        width = self._width(Vp)
        threads = _row_threads(_blocks(vocab_size, width), MAX_THREADS)
        self._launch(op, (N,), (threads,), (*tensors, vocab_size, Vp, *scalars), WIDTH=width)


@functools.cache
def _source(kernel: str, dtype: str, **defines: int) -> KernelSource:
    return kernel_source(_files()[kernel], dtype, **defines)


def _c_name(array: Array) -> str:
    """The name of the array's dtype in kernels/cast.cu: "float", "bf16" or "fp16"."""
    return next(name for name, dtype in ELEMENT_DTYPES.items() if dtype == array.dtype)


@functools.cache
def _files() -> dict[str, str]:
    """The file of each kernel."""
    return {
        kernel: file for file in kernel_files() for kernel in kernel_source(file, "fp32").signatures
    }


def _blocks(size: int, per_block: int) -> int:
    return math.ceil(size / per_block)


def _row_threads(columns: int, limit: int) -> int:
    """Threads of a block that works on one row of `columns`: whole warps, at most `limit`."""
    return min(_blocks(columns, WARP) * WARP, limit)


def _check_vocabulary(op: str, vocab_size: int, columns: int) -> None:
    """Raises ValueError if rows of logits have no column, or fewer, for `vocab_size` tokens."""
    if not 1 <= vocab_size <= columns:
        raise ValueError(f"{op}: vocab_size {vocab_size} is not within 1 to {columns} columns")


def _group_size(op: str, I: int, J: int) -> int:
    """The elements of each of J groups of a row of I; raises ValueError if I is not a multiple."""
    if I % J:
        raise ValueError(f"{op}: rows of I = {I} elements cannot be cut into J = {J} equal groups")
    return I // J


def _chunks(op: str, rows: int, sums: int, most: int) -> tuple[int, int]:
    """(rows in each chunk, number of chunks), at most `most`, for sums down `rows` rows.

    Each chunk has `sums` partial sums.
    """
    most = min(most, SCRATCH_FLOATS // at_most(op, "column sums", sums, SCRATCH_FLOATS))
    per_chunk = max(MIN_CHUNK_ROWS, _blocks(rows, most))
    return per_chunk, _blocks(rows, per_chunk)
