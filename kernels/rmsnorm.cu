// Root mean square normalization, alone and together with the residual sum that comes before it.
//
//     rstd = 1 / sqrt(sum(x^2) / C + eps)
//     y = x rstd w                                       along each row of C channels
//
// kernel                 outputs                       inputs
// rmsnorm_fwd            y (N, C) X =, rstd (N) =      x (N, C), w (C) X
// residual_rmsnorm_fwd   r (N, C) X = x1 + x2,         x1, x2 (N, C), w (C) X
//                        y, rstd = rmsnorm of r
// rmsnorm_bwd            dx (N, C) X +=                dy, x (N, C), w (C) X, rstd
//                        partial (blocks, C) =
// rmsnorm_bwd_total      dw (C) +=                     partial (blocks, C)
//
// rstd, partial and dw are float32.
//
// Who does what. The kernels are those of layernorm.cu without mean and bias; read that file first.
// A row group works on a row, see row_group.cuh: a thread reads its channels, at most 32, once and
// keeps them in registers. Compile-time names, grid and block: `row_group_defines` and the methods
// named like the ops in gpu_gpt2/ops/kernels.py.
//     rmsnorm_fwd, residual_rmsnorm_fwd: one row group per row; shared: 32 floats.
//     rmsnorm_bwd: block b takes rows_per_block rows from row b rows_per_block on, its row groups
//     in turn; shared: 32 floats and THREADS x WIDTH floats.
//     rmsnorm_bwd_total: a block makes dw of 32 channels; shared: 32 x 32 floats.
//
// residual_rmsnorm_fwd takes rstd from r as stored, rounded to X, because the backward pass reads r
// in this form.
//
// Backward, with z = x rstd and g = dy w:
//     dx += rstd (g - z mean(g z))           dw += sum over rows of dy z
// Both come from one read of dy and x: each thread adds up dw of its channels over the rows of its
// row group. Then the block adds the sums of its row groups, group 0 first, and writes them to one
// row of `partial`. rmsnorm_bwd_total adds the rows of `partial`: see add_chunks in column_sum.cuh.
//
// Order of sums along a row: each thread adds its channels in rising order, then row_sum adds the
// threads of the row group.
//
// Cost in bytes, X = size of floatX: forward N C 2X, with residual N C 4X, backward N C 4X and
// blocks C 8; about 6 flops per element. Memory binds.
//
// Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.

#include "column_sum.cuh"
#include "row_group.cuh"

// Writes rstd and y of row n, of which this thread has its channels in x.
__device__ inline void normalize_row(floatX* y, float* rstd, float (*x)[WIDTH], const floatX* w,
                                     int n, int C, float eps, float* scratch) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            squares += x[i][k] * x[i][k];  // 0 beyond the end of the row
        }
    }
    float s = 1.0f / sqrtf(row_sum(squares, scratch) / C + eps);

#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int c = CHANNEL(i);
        if (c < C) {
            float weight[WIDTH];
            load(weight, w + c);
#pragma unroll
            for (int k = 0; k < WIDTH; k++) {
                x[i][k] *= s * weight[k];
            }
            store(y + (long long)n * C + c, x[i]);
        }
    }
    if (threadIdx.x % THREADS_PER_ROW == 0) {
        rstd[n] = s;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rmsnorm_fwd(floatX* y, float* rstd, const floatX* x, const floatX* w, int N, int C, float eps) {
    SHARED_ARRAY(float, scratch, MAX_WARPS);
    int n = row_of_group();
    if (n >= N) {
        return;
    }
    float row[PIECES][WIDTH];
    load_row(row, x, n, C);
    normalize_row(y, rstd, row, w, n, C, eps, scratch);
}

// The second launch bound, 1, is the minimum of resident blocks per multiprocessor; it sets ptxas's
// register budget. Without it ptxas aims at more blocks and, for some C, spills registers.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    residual_rmsnorm_fwd(floatX* r, floatX* y, float* rstd, const floatX* x1, const floatX* x2,
                         const floatX* w, int N, int C, float eps) {
    SHARED_ARRAY(float, scratch, MAX_WARPS);
    int n = row_of_group();
    if (n >= N) {
        return;
    }
    float row[PIECES][WIDTH];
    float other[PIECES][WIDTH];
    load_row(row, x1, n, C);
    load_row(other, x2, n, C);
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int c = CHANNEL(i);
        if (c < C) {
#pragma unroll
            for (int k = 0; k < WIDTH; k++) {
                row[i][k] = to_float(to_floatX(row[i][k] + other[i][k]));
            }
            store(r + (long long)n * C + c, row[i]);
        }
    }
    normalize_row(y, rstd, row, w, n, C, eps, scratch);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rmsnorm_bwd(floatX* dx, float* partial, const floatX* dy, const floatX* x, const floatX* w,
                const float* rstd, int N, int C, int rows_per_block) {
    SHARED_ARRAY(float, scratch, MAX_WARPS);
    SHARED_ARRAY(float, sums, THREADS * WIDTH);
    int start = blockIdx.x * rows_per_block;
    int stop = min(start + rows_per_block, N);
    int group = threadIdx.x / THREADS_PER_ROW;  // row group within the block
    float dw[PIECES][WIDTH] = {};

    for (int n = start + group; n < stop; n += ROW_GROUPS) {
        float s = rstd[n];
        float z[PIECES][WIDTH];
        float g[PIECES][WIDTH];
        load_row(z, x, n, C);
        load_row(g, dy, n, C);
        float gz_sum = 0.0f;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            int c = CHANNEL(i);
            if (c < C) {
                float weight[WIDTH];
                load(weight, w + c);
#pragma unroll
                for (int k = 0; k < WIDTH; k++) {
                    z[i][k] *= s;
                    dw[i][k] += g[i][k] * z[i][k];
                    g[i][k] *= weight[k];
                    gz_sum += g[i][k] * z[i][k];
                }
            }
        }
        float gz_mean = row_sum(gz_sum, scratch) / C;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            int c = CHANNEL(i);
            if (c < C) {
                floatX* to = dx + (long long)n * C + c;
                float gradient[WIDTH];
                load(gradient, to);
#pragma unroll
                for (int k = 0; k < WIDTH; k++) {
                    gradient[k] += s * (g[i][k] - z[i][k] * gz_mean);
                }
                store(to, gradient);
            }
        }
    }
    add_row_groups(partial + (long long)blockIdx.x * C, dw, C, sums);
}

extern "C" __global__ void rmsnorm_bwd_total(float* dw, const float* partial, int blocks, int C) {
    SHARED_ARRAY(float, tile, MAX_WARPS * WARP);
    add_chunks(dw, partial, blocks, C, C, tile);
}
