// Layer normalization, alone and together with the residual sum and the bias that come before it.
//
//     mean = sum(x) / C,   variance = sum((x - mean)^2) / C,   rstd = 1 / sqrt(variance + eps)
//     y = (x - mean) rstd w + b                          along each row of C channels
//
// kernel                   outputs                              inputs
// layernorm_fwd            y (N, C) X =, mean, rstd (N) =       x (N, C), w, b (C) X
// residual_layernorm_fwd   r (N, C) X = x1 + (x2 + bias),       x1, x2 (N, C), bias, w, b (C) X
//                          y, mean, rstd = layernorm of r
// layernorm_bwd            dx (N, C) X +=                       dy, x (N, C), w (C) X, mean, rstd
//                          partial (blocks, 2, C) =
// layernorm_bwd_total      dw, db (C) +=                        partial (blocks, 2, C)
//
// mean, rstd, partial, dw and db are float32.
//
// Who does what. A row group works on a row, see row_group.cuh: a thread reads its channels, at
// most 32, once and keeps them in registers. Compile-time names, grid and block:
// `row_group_defines` and the methods named like the ops in gpu_gpt2/ops/kernels.py.
//     layernorm_fwd, residual_layernorm_fwd: one row group per row; shared: 32 floats.
//     layernorm_bwd: block b takes rows_per_block rows from row b rows_per_block on, its row groups
//     in turn; shared: 32 floats and THREADS x WIDTH floats.
//     layernorm_bwd_total: blocks (i, 0) make dw, blocks (i, 1) make db, for 32 channels each;
//     shared: 32 x 32 floats.
//
// The variance is taken around the mean. (The shorter E[x^2] - mean^2 loses its digits where the
// mean is large compared with the spread.) residual_layernorm_fwd takes its statistics from r as
// stored, rounded to X, because the backward pass reads r in this form.
//
// Backward, with z = (x - mean) rstd and g = dy w:
//     dx += rstd (g - mean(g) - z mean(g z))
//     dw += sum over rows of dy z            db += sum over rows of dy
// All three come from one read of dy and x: each thread adds up dw and db of its channels over the
// rows of its row group. Then the block adds the sums of its row groups, group 0 first, and writes
// them to one row of `partial`. layernorm_bwd_total adds the rows of `partial`: see add_chunks in
// column_sum.cuh.
//
// Order of sums along a row: each thread adds its channels in rising order, then row_sum adds the
// threads of the row group.
//
// Cost in bytes, X = size of floatX: forward N C 2X, with residual N C 4X, backward N C 4X and
// blocks C 16; about 8 flops per element. Memory binds.
//
// Source: Ba, Kiros & Hinton 2016, "Layer Normalization", equations 3 and 4.

#include "column_sum.cuh"
#include "row_group.cuh"

// Writes mean, rstd and y of row n, of which this thread has its channels in x.
__device__ inline void normalize_row(floatX* y, float* mean, float* rstd, float (*x)[WIDTH],
                                     const floatX* w, const floatX* b, int n, int C, float eps,
                                     float* scratch) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            sum += x[i][k];  // 0 beyond the end of the row
        }
    }
    float m = row_sum(sum, scratch) / C;

    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            float centred = x[i][k] - m;
            squares += CHANNEL(i) < C ? centred * centred : 0.0f;
        }
    }
    float s = 1.0f / sqrtf(row_sum(squares, scratch) / C + eps);

#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int c = CHANNEL(i);
        if (c < C) {
            float weight[WIDTH];
            float bias[WIDTH];
            load(weight, w + c);
            load(bias, b + c);
#pragma unroll
            for (int k = 0; k < WIDTH; k++) {
                x[i][k] = (x[i][k] - m) * s * weight[k] + bias[k];
            }
            store(y + (long long)n * C + c, x[i]);
        }
    }
    if (threadIdx.x % THREADS_PER_ROW == 0) {
        mean[n] = m;
        rstd[n] = s;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    layernorm_fwd(floatX* y, float* mean, float* rstd, const floatX* x, const floatX* w,
                  const floatX* b, int N, int C, float eps) {
    SHARED_ARRAY(float, scratch, MAX_WARPS);
    int n = row_of_group();
    if (n >= N) {
        return;
    }
    float row[PIECES][WIDTH];
    load_row(row, x, n, C);
    normalize_row(y, mean, rstd, row, w, b, n, C, eps, scratch);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    residual_layernorm_fwd(floatX* r, floatX* y, float* mean, float* rstd, const floatX* x1,
                           const floatX* x2, const floatX* bias, const floatX* w,
                           const floatX* b, int N, int C, float eps) {
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
            float added[WIDTH];
            load(added, bias + c);
#pragma unroll
            for (int k = 0; k < WIDTH; k++) {
                row[i][k] = to_float(to_floatX(row[i][k] + (other[i][k] + added[k])));
            }
            store(r + (long long)n * C + c, row[i]);
        }
    }
    normalize_row(y, mean, rstd, row, w, b, n, C, eps, scratch);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    layernorm_bwd(floatX* dx, float* partial, const floatX* dy, const floatX* x, const floatX* w,
                  const float* mean, const float* rstd, int N, int C, int rows_per_block) {
    SHARED_ARRAY(float, scratch, MAX_WARPS);
    SHARED_ARRAY(float, sums, THREADS * WIDTH);
    int start = blockIdx.x * rows_per_block;
    int stop = min(start + rows_per_block, N);
    int group = threadIdx.x / THREADS_PER_ROW;  // row group within the block
    float dw[PIECES][WIDTH] = {};
    float db[PIECES][WIDTH] = {};

    for (int n = start + group; n < stop; n += ROW_GROUPS) {
        float m = mean[n];
        float s = rstd[n];
        float z[PIECES][WIDTH];
        float g[PIECES][WIDTH];
        load_row(z, x, n, C);
        load_row(g, dy, n, C);
        float g_sum = 0.0f;
        float gz_sum = 0.0f;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            int c = CHANNEL(i);
            if (c < C) {
                float weight[WIDTH];
                load(weight, w + c);
#pragma unroll
                for (int k = 0; k < WIDTH; k++) {
                    z[i][k] = (z[i][k] - m) * s;
                    dw[i][k] += g[i][k] * z[i][k];
                    db[i][k] += g[i][k];
                    g[i][k] *= weight[k];
                    g_sum += g[i][k];
                    gz_sum += g[i][k] * z[i][k];
                }
            }
        }
        float g_mean = row_sum(g_sum, scratch) / C;
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
                    gradient[k] += s * (g[i][k] - g_mean - z[i][k] * gz_mean);
                }
                store(to, gradient);
            }
        }
    }

    float* out = partial + (long long)blockIdx.x * 2 * C;
    add_row_groups(out, dw, C, sums);
    add_row_groups(out + C, db, C, sums);
}

extern "C" __global__ void layernorm_bwd_total(float* dw, float* db, const float* partial,
                                               int blocks, int C) {
    SHARED_ARRAY(float, tile, MAX_WARPS * WARP);
    bool of_dw = blockIdx.y == 0;
    add_chunks(of_dw ? dw : db, partial + (of_dw ? 0 : C), blocks, C, 2 * C, tile);
}
