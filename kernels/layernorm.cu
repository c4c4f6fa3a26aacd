// Layer normalization, alone and together with the residual sum that comes before it.
//
//     mean = sum(x) / C,   variance = sum((x - mean)^2) / C,   rstd = 1 / sqrt(variance + 1e-5)
//     y = (x - mean) rstd w + b                          along each row of C channels
//
// kernel                   outputs                              inputs
// layernorm_fwd            y (N, C) X =, mean, rstd (N) =       x (N, C), w, b (C) X
// residual_layernorm_fwd   r (N, C) X =, and as layernorm_fwd   x1, x2 (N, C), w, b (C) X
// layernorm_bwd_dx         dx (N, C) X +=                       dy, x (N, C), w (C) X, mean, rstd
// layernorm_bwd_partial    dw_partial, db_partial (chunks, C) = dy, x (N, C) X, mean, rstd (N)
//
// mean, rstd and the partial sums are float32.
//
// One warp per row for y and dx: lane l takes channels l, l + 32, l + 64 ..., so that each read of
// the warp is one unbroken piece of memory. Sums: each lane over its channels in rising order, then
// warp_sum's tree. grid (ceil(N / warps in a block)), block a multiple of 32, no shared memory.
//
// layernorm_fwd goes over the row three times: mean, variance around that mean, output. (The
// shorter E[x^2] - mean^2 loses its digits where the mean is large against the spread.) The second
// and third time the row comes from cache. residual_layernorm_fwd takes its statistics from r as
// stored, rounded to X, because that is what the backward pass will read.
//
// Backward, with z = (x - mean) rstd and g = dy w:
//     dx += rstd (g - mean(g) - z mean(g z))
//     dw += sum over rows of dy z            db += sum over rows of dy
// The column sums are made in two steps, as bias.cu explains: layernorm_bwd_partial, then
// add_column_sums of bias.cu, once for dw and once for db.
// grid (ceil(C / 32), chunks), block (32, warps), shared 32 x 32 floats.
//
// Cost in bytes, X = size of floatX: forward N C 2X, with residual N C 4X, backward dx N C 4X,
// partial N C 2X + chunks C 8; about 8 flops per element. Memory binds.
//
// Source: Ba, Kiros & Hinton 2016, "Layer Normalization", equations 3 and 4.

#define LAYERNORM_EPS 1e-5f

// mean, rstd and y of row n, by one warp.
__device__ inline void normalize_row(floatX* y, float* mean, float* rstd, const floatX* x,
                                     const floatX* w, const floatX* b, int n, int C) {
    int lane = threadIdx.x % WARP;
    long long row = (long long)n * C;

    float sum = 0.0f;
    for (int c = lane; c < C; c += WARP) {
        sum += to_float(x[row + c]);
    }
    float m = warp_sum(sum) / C;

    float squares = 0.0f;
    for (int c = lane; c < C; c += WARP) {
        float centred = to_float(x[row + c]) - m;
        squares += centred * centred;
    }
    float s = 1.0f / sqrtf(warp_sum(squares) / C + LAYERNORM_EPS);

    for (int c = lane; c < C; c += WARP) {
        float z = (to_float(x[row + c]) - m) * s;
        y[row + c] = to_floatX(z * to_float(w[c]) + to_float(b[c]));
    }
    if (lane == 0) {
        mean[n] = m;
        rstd[n] = s;
    }
}

extern "C" __global__ void layernorm_fwd(floatX* y, float* mean, float* rstd, const floatX* x,
                                         const floatX* w, const floatX* b, int N, int C) {
    int n = row_of_warp();
    if (n < N) {
        normalize_row(y, mean, rstd, x, w, b, n, C);
    }
}

extern "C" __global__ void residual_layernorm_fwd(floatX* r, floatX* y, float* mean, float* rstd,
                                                  const floatX* x1, const floatX* x2,
                                                  const floatX* w, const floatX* b, int N, int C) {
    int n = row_of_warp();
    if (n >= N) {
        return;
    }
    long long row = (long long)n * C;
    for (int c = threadIdx.x % WARP; c < C; c += WARP) {
        r[row + c] = to_floatX(to_float(x1[row + c]) + to_float(x2[row + c]));
    }
    // Each lane reads back only what it wrote itself, so nobody has to wait for anybody.
    normalize_row(y, mean, rstd, r, w, b, n, C);
}

extern "C" __global__ void layernorm_bwd_dx(floatX* dx, const floatX* dy, const floatX* x,
                                            const floatX* w, const float* mean, const float* rstd,
                                            int N, int C) {
    int n = row_of_warp();
    if (n >= N) {
        return;
    }
    int lane = threadIdx.x % WARP;
    long long row = (long long)n * C;
    float m = mean[n];
    float s = rstd[n];

    float g_sum = 0.0f;
    float gz_sum = 0.0f;
    for (int c = lane; c < C; c += WARP) {
        float z = (to_float(x[row + c]) - m) * s;
        float g = to_float(dy[row + c]) * to_float(w[c]);
        g_sum += g;
        gz_sum += g * z;
    }
    float g_mean = warp_sum(g_sum) / C;
    float gz_mean = warp_sum(gz_sum) / C;

    for (int c = lane; c < C; c += WARP) {
        float z = (to_float(x[row + c]) - m) * s;
        float g = to_float(dy[row + c]) * to_float(w[c]);
        dx[row + c] = to_floatX(to_float(dx[row + c]) + s * (g - g_mean - z * gz_mean));
    }
}

extern "C" __global__ void layernorm_bwd_partial(float* dw_partial, float* db_partial,
                                                 const floatX* dy, const floatX* x,
                                                 const float* mean, const float* rstd, int N, int C,
                                                 int rows_per_chunk) {
    SHARED_ARRAY(float, tile, MAX_WARPS * WARP);
    int c = blockIdx.x * WARP + threadIdx.x;
    int chunk = blockIdx.y;
    int start = chunk * rows_per_chunk;
    int stop = min(start + rows_per_chunk, N);
    float dw = 0.0f;
    float db = 0.0f;
    if (c < C) {
        for (int n = start + threadIdx.y; n < stop; n += blockDim.y) {
            float g = to_float(dy[(long long)n * C + c]);
            float z = (to_float(x[(long long)n * C + c]) - mean[n]) * rstd[n];
            dw += g * z;
            db += g;
        }
    }
    dw = sum_of_warps(dw, tile);
    db = sum_of_warps(db, tile);
    if (threadIdx.y == 0 && c < C) {
        dw_partial[(long long)chunk * C + c] = dw;
        db_partial[(long long)chunk * C + c] = db;
    }
}
