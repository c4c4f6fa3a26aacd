// Causal self-attention, forward and backward, without ever storing the T x T matrix of scores.
//
//     s[i, j] = q[i] . k[j] / sqrt(D)  for j <= i,    p[i, j] = exp(s[i, j] - lse[i])
//     lse[i] = log(sum over j of exp(s[i, j])),       y[i] = sum over j of p[i, j] v[j]
//
// for each head of each sequence; i is the position of a query, j the position of a key.
//
// kernel               outputs                      inputs
// attention_fwd        y (B, T, H, D) X =           qkv (B, T, R, D) X
//                      lse (B, H, T) float32 =
// attention_delta      delta (B, H, T) float32 =    dy, y (B, T, H, D) X
// attention_bwd_dq     dqkv[:, :, : H] X =          delta float32, dy, qkv X, lse float32
// attention_bwd_dkv    dqkv[:, :, H :] X =          delta float32, dy, qkv X, lse float32
//
// qkv holds q, k and v as the projection leaves them, and dqkv their gradients in the same places:
// rows of R = H + 2 G heads, H of queries, G of keys, G of values. With G < H (grouped-query
// attention) each key and value head serves a group of H / G neighbouring query heads.
//
// Who does what. A block of attention_fwd or attention_bwd_dq works on one query head and owns ROWS
// = THREADS / LANES of its queries. A block of attention_bwd_dkv works on one key and value head,
// owns ROWS of its keys, and takes the query heads of the group one after the other. LANES
// neighbouring threads, the lanes of a position, share the D elements of a position: lane l has
// elements l, l + LANES, l + 2 LANES ..., DIMS of them, in registers (zeros beyond D). The block
// walks over the positions of the other side TILE at a time: all threads copy a tile into shared
// memory as float32, then every position meets every row of the tile. All positions of a warp read
// the same row at the same time, LANES neighbouring words of it at once: one broadcast, no bank
// conflict. Tiles that lie wholly above the diagonal are skipped. Shared: 2 tiles of TILE x LANES x
// DIMS floats, and 2 TILE floats in attention_bwd_dkv.
//
// attention_delta has one warp per (b, t, h) and no shared memory.
//
// Compile-time names (HEAD_SIZE = D, LANES, TILE, THREADS), grid and block: `attention_defines`,
// `attention_fwd` and `attention_bwd` in gpu_gpt2/ops/kernels.py.
//
// Forward, the online softmax: each query keeps the largest score m met so far, the sum l of
// exp(s - m), and the sum acc of exp(s - m) v. A tile that raises m from m_prev first scales l and
// acc down by exp(m_prev - m). At the end y = acc / l, lse = m + log(l).
//
// Backward, with p recomputed from lse, and with delta[i] = dy[i] . y[i]:
//     dp[i, j] = dy[i] . v[j]                 ds[i, j] = p[i, j] (dp[i, j] - delta[i])
//     dq[i] = sum over j of ds[i, j] k[j] / sqrt(D)
//     dk[j] = sum over i of ds[i, j] q[i] / sqrt(D)         dv[j] = sum over i of p[i, j] dy[i]
// dq is a sum over keys. dk and dv are sums over the queries of all query heads of the group. Each
// has a kernel whose threads own the positions of the result: scores are computed twice, but no two
// threads add to one element, and no atomics are needed.
//
// Order of sums: a dot product adds each lane's elements in rising d, then the lanes by group_sum's
// tree; sums over positions run in rising order of position, and over the query heads of a group in
// rising order of head.
//
// Cost, with N = B T and X = size of floatX. The forward pass has two matmuls, of N T H D flops
// each over the causal half of all pairs; the backward pass has seven: s and dp twice, dq, dk, dv.
// Bytes: forward N D (2H + 2G) X, backward N D (7H + 6G) X; tiles are read many times, but from
// cache. Arithmetic binds, and first of all the shared memory that feeds it: each multiply-add
// reads one word from shared memory, and a multiprocessor reads only a quarter as many words as it
// can multiply. These kernels are written to be read, and use no tensor cores.
//
// Source: Dao 2023, "FlashAttention-2", algorithms 1 and 2; for groups, Ainslie et al. 2023, "GQA".

#include "attention_head.cuh"

#define ROWS (THREADS / LANES)                  // positions that a block owns
#define DIMS ((HEAD_SIZE + LANES - 1) / LANES)  // elements of a position that each lane has
#define TILE_ROW (DIMS * LANES)                 // floats of a tile's row: D rounded up

// Returns element d of position t, or zero beyond T or D.
__device__ inline float element_at(const floatX* x, Head head, int t, int d, int T) {
    return t < T && d < HEAD_SIZE ? to_float(x[head.first + t * head.stride + d]) : 0.0f;
}

// Copies positions first, first + 1, ... first + TILE - 1 into a tile in shared memory.
__device__ inline void copy_tile(float* tile, const floatX* x, Head head, int first, int T) {
    for (int i = threadIdx.x; i < TILE * TILE_ROW; i += THREADS) {
        tile[i] = element_at(x, head, first + i / TILE_ROW, i % TILE_ROW, T);
    }
}

// The second launch bound, 1, is the minimum of resident blocks per multiprocessor; it sets ptxas's
// register budget. Without it ptxas aims at more blocks and, for some D, spills a register.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_fwd(floatX* y, float* lse, const floatX* qkv, int T, int H, int G) {
    SHARED_ARRAY(float, k_tile, TILE * TILE_ROW);
    SHARED_ARRAY(float, v_tile, TILE * TILE_ROW);
    int b = blockIdx.x / H;
    int h = blockIdx.x % H;
    int g = h / (H / G);
    Head q_head = query_head(b, h, T, H, G);
    Head k_head = key_head(b, g, T, H, G);
    Head v_head = value_head(b, g, T, H, G);
    Head y_head = head_at(b, h, H, T);
    int lane = threadIdx.x % LANES;
    // Blocks start in rising order: the late queries, which see most keys, come first.
    int first_query = (gridDim.y - 1 - blockIdx.y) * ROWS;
    int last_query = min(first_query + ROWS, T) - 1;
    int query = first_query + threadIdx.x / LANES;  // from T on it only takes part in barriers

    float q[DIMS];
    float acc[DIMS];
    float scale = 1.0f / sqrtf((float)HEAD_SIZE);
#pragma unroll
    for (int d = 0; d < DIMS; d++) {
        q[d] = scale * element_at(qkv, q_head, query, lane + d * LANES, T);
        acc[d] = 0.0f;
    }
    float m = -LARGEST_FLOAT;
    float l = 0.0f;

    for (int first_key = 0; first_key <= last_query; first_key += TILE) {
        copy_tile(k_tile, qkv, k_head, first_key, T);
        copy_tile(v_tile, qkv, v_head, first_key, T);
        __syncthreads();

        float s[TILE];
        float m_prev = m;
#pragma unroll
        for (int j = 0; j < TILE; j++) {
            float dot = 0.0f;
#pragma unroll
            for (int d = 0; d < DIMS; d++) {
                dot += q[d] * k_tile[j * TILE_ROW + lane + d * LANES];
            }
            dot = group_sum(dot, LANES);
            s[j] = first_key + j <= query ? dot : -LARGEST_FLOAT;  // its exponential is 0
            m = fmaxf(m, s[j]);
        }

        float rescale = expf(m_prev - m);
        l *= rescale;
#pragma unroll
        for (int d = 0; d < DIMS; d++) {
            acc[d] *= rescale;
        }
#pragma unroll
        for (int j = 0; j < TILE; j++) {
            float p = expf(s[j] - m);
            l += p;
#pragma unroll
            for (int d = 0; d < DIMS; d++) {
                acc[d] += p * v_tile[j * TILE_ROW + lane + d * LANES];
            }
        }
        __syncthreads();  // no thread may overwrite the tiles while others still read them
    }

    if (query >= T) {
        return;
    }
#pragma unroll
    for (int d = 0; d < DIMS; d++) {
        if (lane + d * LANES < HEAD_SIZE) {
            long long to = y_head.first + query * y_head.stride + lane + d * LANES;
            y[to] = to_floatX(acc[d] / l);
        }
    }
    if (lane == 0) {
        lse[(long long)blockIdx.x * T + query] = m + logf(l);
    }
}

extern "C" __global__ void attention_delta(float* delta, const floatX* dy, const floatX* y, int B,
                                           int T, int H) {
    int row = row_of_warp();  // (b * T + t) * H + h
    if (row >= B * T * H) {
        return;
    }
    float sum = 0.0f;
    for (int d = threadIdx.x % WARP; d < HEAD_SIZE; d += WARP) {
        long long at = (long long)row * HEAD_SIZE + d;
        sum += to_float(dy[at]) * to_float(y[at]);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) {
        int h = row % H;
        int t = row / H % T;
        int b = row / H / T;
        delta[((long long)b * H + h) * T + t] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_bwd_dq(floatX* dqkv, const float* delta, const floatX* dy, const floatX* qkv,
                     const float* lse, int T, int H, int G) {
    SHARED_ARRAY(float, k_tile, TILE * TILE_ROW);
    SHARED_ARRAY(float, v_tile, TILE * TILE_ROW);
    int b = blockIdx.x / H;
    int h = blockIdx.x % H;
    int g = h / (H / G);
    Head q_head = query_head(b, h, T, H, G);
    Head k_head = key_head(b, g, T, H, G);
    Head v_head = value_head(b, g, T, H, G);
    Head y_head = head_at(b, h, H, T);
    int lane = threadIdx.x % LANES;
    int first_query = (gridDim.y - 1 - blockIdx.y) * ROWS;
    int last_query = min(first_query + ROWS, T) - 1;
    int query = first_query + threadIdx.x / LANES;

    float q[DIMS];
    float dout[DIMS];
    float dq[DIMS];
    float scale = 1.0f / sqrtf((float)HEAD_SIZE);
#pragma unroll
    for (int d = 0; d < DIMS; d++) {
        q[d] = scale * element_at(qkv, q_head, query, lane + d * LANES, T);
        dout[d] = element_at(dy, y_head, query, lane + d * LANES, T);
        dq[d] = 0.0f;
    }
    long long statistics = (long long)blockIdx.x * T + query;
    float query_lse = query < T ? lse[statistics] : 0.0f;
    float query_delta = query < T ? delta[statistics] : 0.0f;

    for (int first_key = 0; first_key <= last_query; first_key += TILE) {
        copy_tile(k_tile, qkv, k_head, first_key, T);
        copy_tile(v_tile, qkv, v_head, first_key, T);
        __syncthreads();

        for (int j = 0; j < TILE; j++) {
            float s = 0.0f;
            float dp = 0.0f;
#pragma unroll
            for (int d = 0; d < DIMS; d++) {
                s += q[d] * k_tile[j * TILE_ROW + lane + d * LANES];
                dp += dout[d] * v_tile[j * TILE_ROW + lane + d * LANES];
            }
            s = group_sum(s, LANES);
            dp = group_sum(dp, LANES);
            float p = first_key + j <= query ? expf(s - query_lse) : 0.0f;
            float ds = p * (dp - query_delta);
#pragma unroll
            for (int d = 0; d < DIMS; d++) {
                dq[d] += ds * k_tile[j * TILE_ROW + lane + d * LANES];
            }
        }
        __syncthreads();
    }

    if (query >= T) {
        return;
    }
#pragma unroll
    for (int d = 0; d < DIMS; d++) {
        if (lane + d * LANES < HEAD_SIZE) {
            long long to = q_head.first + query * q_head.stride + lane + d * LANES;
            dqkv[to] = to_floatX(scale * dq[d]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_bwd_dkv(floatX* dqkv, const float* delta, const floatX* dy, const floatX* qkv,
                      const float* lse, int T, int H, int G) {
    SHARED_ARRAY(float, q_tile, TILE * TILE_ROW);
    SHARED_ARRAY(float, dout_tile, TILE * TILE_ROW);
    SHARED_ARRAY(float, lse_tile, TILE);
    SHARED_ARRAY(float, delta_tile, TILE);
    int b = blockIdx.x / G;
    int g = blockIdx.x % G;
    Head k_head = key_head(b, g, T, H, G);
    Head v_head = value_head(b, g, T, H, G);
    int lane = threadIdx.x % LANES;
    // Blocks start in rising order: the early keys, which most queries see, come first.
    int first_key = blockIdx.y * ROWS;
    int key = first_key + threadIdx.x / LANES;

    float k[DIMS];
    float v[DIMS];
    float dk[DIMS];
    float dv[DIMS];
    float scale = 1.0f / sqrtf((float)HEAD_SIZE);
#pragma unroll
    for (int d = 0; d < DIMS; d++) {
        k[d] = scale * element_at(qkv, k_head, key, lane + d * LANES, T);
        v[d] = element_at(qkv, v_head, key, lane + d * LANES, T);
        dk[d] = 0.0f;
        dv[d] = 0.0f;
    }

    for (int h = g * (H / G); h < (g + 1) * (H / G); h++) {  // the query heads of the group
        Head q_head = query_head(b, h, T, H, G);
        Head y_head = head_at(b, h, H, T);
        // Begins with the first tile that has a query at or after the block's first key.
        for (int first_query = first_key / TILE * TILE; first_query < T; first_query += TILE) {
            copy_tile(q_tile, qkv, q_head, first_query, T);
            copy_tile(dout_tile, dy, y_head, first_query, T);
            for (int i = threadIdx.x; i < TILE; i += THREADS) {
                bool exists = first_query + i < T;
                long long statistics = ((long long)b * H + h) * T + first_query + i;
                lse_tile[i] = exists ? lse[statistics] : 0.0f;
                delta_tile[i] = exists ? delta[statistics] : 0.0f;
            }
            __syncthreads();

            for (int i = 0; i < TILE; i++) {  // queries from T on are zeros and add nothing
                int query = first_query + i;
                float s = 0.0f;
                float dp = 0.0f;
#pragma unroll
                for (int d = 0; d < DIMS; d++) {
                    s += k[d] * q_tile[i * TILE_ROW + lane + d * LANES];
                    dp += v[d] * dout_tile[i * TILE_ROW + lane + d * LANES];
                }
                s = group_sum(s, LANES);
                dp = group_sum(dp, LANES);
                float p = key <= query ? expf(s - lse_tile[i]) : 0.0f;
                float ds = p * (dp - delta_tile[i]);
#pragma unroll
                for (int d = 0; d < DIMS; d++) {
                    dk[d] += ds * q_tile[i * TILE_ROW + lane + d * LANES];
                    dv[d] += p * dout_tile[i * TILE_ROW + lane + d * LANES];
                }
            }
            __syncthreads();
        }
    }

    if (key >= T) {
        return;
    }
#pragma unroll
    for (int d = 0; d < DIMS; d++) {
        if (lane + d * LANES < HEAD_SIZE) {
            long long to_k = k_head.first + key * k_head.stride + lane + d * LANES;
            long long to_v = v_head.first + key * v_head.stride + lane + d * LANES;
            dqkv[to_k] = to_floatX(scale * dk[d]);
            dqkv[to_v] = to_floatX(dv[d]);
        }
    }
}
