// Layer normalization, alone and together with the residual sum and the bias that come before it.
//
//     mean = sum(x) / C,   variance = sum((x - mean)^2) / C,   rstd = 1 / sqrt(variance + 1e-5)
//     y = (x - mean) rstd w + b                          along each row of C channels
//
// kernel                   outputs                              inputs
// layernorm_fwd            y (N, C) X =, mean, rstd (N) =       x (N, C), w, b (C) X
// residual_layernorm_fwd   r (N, C) X = x1 + (x2 + bias),       x1, x2 (N, C), bias, w, b (C) X
//                          and as layernorm_fwd of r
// layernorm_bwd            dx (N, C) X +=                       dy, x (N, C), w (C) X, mean, rstd
//                          partial (blocks, 2, C) =
// layernorm_bwd_total      dw, db (C) +=                        partial (blocks, 2, C)
//
// mean, rstd, partial, dw and db are float32.
//
// Who does what. A team of TEAM neighbouring threads, whole warps, works on a row: each thread takes
// PIECES pieces of WIDTH channels (see common.cuh), TEAM pieces apart, so that each read of a warp is
// one unbroken piece of memory. `layernorm_defines` in gpu_gpt2/ops/kernels.py chooses TEAM so that
// a thread has at most 32 channels: it reads them once and keeps them in registers. A block has
// THREADS threads: as many teams as fit, or one.
//     _fwd: one team per row. grid (ceil(N / teams in a block)), shared 32 floats.
//     layernorm_bwd: block b takes the rows from b rows_per_block on, its teams in turn.
//     grid (blocks), shared 32 floats and THREADS x WIDTH floats.
//     layernorm_bwd_total: grid (ceil(C / 32), 2), block (32, 32), shared 32 x 32 floats.
//
// The variance is taken around the mean. (The shorter E[x^2] - mean^2 loses its digits where the mean
// is large against the spread.) residual_layernorm_fwd takes its statistics from r as stored,
// rounded to X, because that is what the backward pass will read.
//
// Backward, with z = (x - mean) rstd and g = dy w:
//     dx += rstd (g - mean(g) - z mean(g z))
//     dw += sum over rows of dy z            db += sum over rows of dy
// Both come from one read of dy and x: a thread adds the dw and db of its channels over the rows of
// its team; then the block adds its teams' sums, team 0 first, into one row of `partial`, and
// layernorm_bwd_total adds the blocks' rows: see add_chunks in common.cuh.
//
// Sums along a row: each thread over its channels in rising order, then team_sum.
//
// Cost in bytes, X = size of floatX: forward N C 2X, with residual N C 4X, backward N C 4X and
// blocks C 16; about 8 flops per element. Memory binds.
//
// Source: Ba, Kiros & Hinton 2016, "Layer Normalization", equations 3 and 4.

#define LAYERNORM_EPS 1e-5f
#define TEAMS (THREADS / TEAM)  // in a block

// The first channel of this thread's piece i; from C on there are none.
#define CHANNEL(i) ((((i) * TEAM) + (int)threadIdx.x % TEAM) * WIDTH)

// The sum of `value` over the threads of a team, in each of them.
__device__ inline float team_sum(float value, float* scratch) {
#if TEAM == WARP
    return warp_sum(value);
#else
    return block_sum(value, scratch);
#endif
}

// The row of this thread's team, in kernels with one team per row. A block of several teams needs no
// barriers, so that teams without a row may leave.
__device__ inline int row_of_team() { return blockIdx.x * TEAMS + threadIdx.x / TEAM; }

// mean, rstd and y of row n, whose channels this thread has in x.
__device__ inline void normalize_row(floatX* y, float* mean, float* rstd, float (*x)[WIDTH],
                                     const floatX* w, const floatX* b, int n, int C,
                                     float* scratch) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            sum += x[i][k];  // 0 beyond the row
        }
    }
    float m = team_sum(sum, scratch) / C;

    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            float centred = x[i][k] - m;
            squares += CHANNEL(i) < C ? centred * centred : 0.0f;
        }
    }
    float s = 1.0f / sqrtf(team_sum(squares, scratch) / C + LAYERNORM_EPS);

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
    if (threadIdx.x % TEAM == 0) {
        mean[n] = m;
        rstd[n] = s;
    }
}

__device__ inline void load_row(float (*values)[WIDTH], const floatX* x, int n, int C) {
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int c = CHANNEL(i);
        if (c < C) {
            load(values[i], x + (long long)n * C + c);
        } else {
#pragma unroll
            for (int k = 0; k < WIDTH; k++) {
                values[i][k] = 0.0f;
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    layernorm_fwd(floatX* y, float* mean, float* rstd, const floatX* x, const floatX* w,
                  const floatX* b, int N, int C) {
    SHARED_ARRAY(float, scratch, MAX_WARPS);
    int n = row_of_team();
    if (n >= N) {
        return;
    }
    float row[PIECES][WIDTH];
    load_row(row, x, n, C);
    normalize_row(y, mean, rstd, row, w, b, n, C, scratch);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    residual_layernorm_fwd(floatX* r, floatX* y, float* mean, float* rstd, const floatX* x1,
                           const floatX* x2, const floatX* bias, const floatX* w,
                           const floatX* b, int N, int C) {
    SHARED_ARRAY(float, scratch, MAX_WARPS);
    int n = row_of_team();
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
    normalize_row(y, mean, rstd, row, w, b, n, C, scratch);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    layernorm_bwd(floatX* dx, float* partial, const floatX* dy, const floatX* x, const floatX* w,
                  const float* mean, const float* rstd, int N, int C, int rows_per_block) {
    SHARED_ARRAY(float, scratch, MAX_WARPS);
    SHARED_ARRAY(float, sums, THREADS * WIDTH);
    int start = blockIdx.x * rows_per_block;
    int stop = min(start + rows_per_block, N);
    int team = threadIdx.x / TEAM;
    float dw[PIECES][WIDTH] = {};
    float db[PIECES][WIDTH] = {};

    for (int n = start + team; n < stop; n += TEAMS) {
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
        float g_mean = team_sum(g_sum, scratch) / C;
        float gz_mean = team_sum(gz_sum, scratch) / C;
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
#pragma unroll
    for (int i = 0; i < 2 * PIECES; i++) {
        bool of_dw = i < PIECES;
        float* sum = of_dw ? dw[i % PIECES] : db[i % PIECES];
        __syncthreads();
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            sums[threadIdx.x * WIDTH + k] = sum[k];
        }
        __syncthreads();
        for (int j = threadIdx.x; j < TEAM * WIDTH; j += THREADS) {
            int c = i % PIECES * TEAM * WIDTH + j;
            if (c < C) {
                float total = 0.0f;
                for (int t = 0; t < TEAMS; t++) {
                    total += sums[t * TEAM * WIDTH + j];
                }
                out[(of_dw ? 0 : C) + c] = total;
            }
        }
    }
}

extern "C" __global__ void layernorm_bwd_total(float* dw, float* db, const float* partial,
                                               int blocks, int C) {
    SHARED_ARRAY(float, tile, MAX_WARPS * WARP);
    bool of_dw = blockIdx.y == 0;
    add_chunks(of_dw ? dw : db, partial + (of_dw ? 0 : C), blocks, C, 2 * C, tile);
}
