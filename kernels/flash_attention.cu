// Causal self-attention for bf16 and fp16 on tensor cores: the fast version of attention.cu. Read
// attention.cu first: it has the formulas.
//
// kernel                     outputs                      inputs
// flash_attention_fwd        y (B, T, H, D) X =           qkv (B, T, R, D) X
//                            lse (B, H, T) float32 =
// flash_attention_bwd_dq     dqkv[:, :, : H] X =          dy, qkv, y X, lse float32
//                            delta (B, H, T) float32 =
// flash_attention_bwd_dkv    dqkv[:, :, H :] X =          delta float32, dy, qkv X, lse float32
//
// Who does what. A block has WARPS warps. In _fwd and _bwd_dq it works on one query head; in
// _bwd_dkv it works on one key and value head, and takes the query heads of the group one after the
// other. A warp owns one or several row tiles of 16 positions: QUERY_TILES row tiles of queries in
// _fwd and _bwd_dq, one row tile of keys in _bwd_dkv. Their rows of q and dy, or of k and v, and
// the sums that become their results stay in registers from beginning to end, in the layouts of
// tensor_core.cuh. The positions of the other side pass through shared memory, TILE at a time, in
// two buffers: while the warps work on the tile in one buffer, the next tile is copied into the
// other. Tiles, and slices of tiles, that lie wholly above the diagonal are skipped. Shared: 4 TILE
// (D + 8) elements of X, and 4 TILE floats in _bwd_dkv. Compile-time names (HEAD_SIZE = D, a
// multiple of 16; WARPS, TILE, QUERY_TILES), grid and block: `flash_attention_defines`,
// `attention_fwd` and `attention_bwd` in gpu_gpt2/ops/kernels.py.
//
// The rows of a tile in shared memory are D + 8 elements apart. Eight rows below one another, which
// ldmatrix reads at once, then lie in different banks, and there is no bank conflict.
//
// The result of one matmul is, in its registers, the left operand of the next matmul: scores
// become p or ds where they are, are rounded to X, and are multiplied by v, k, q or dy. _bwd_dkv
// works on transposed scores (keys down, queries across), so that this holds there too.
//
// Order of sums: within 16 elements the tensor core's own; beyond that in rising d, in rising
// position, and over the query heads of a group in rising order of head. p and ds are rounded to X
// before they are multiplied, which attention.cu does not do.
//
// Cost, with N = B T and X = size of floatX. The forward pass has 2 matmuls of N T H D flops over
// the causal half. The backward pass has 7: s and dp twice, as no two blocks may add to one
// element, dq, dk, dv. Bytes: forward N D (2H + 2G) X, backward N D (6H + 6G) X. With X = 2 bytes
// and G = H these are T / 4 and 7 T / 24 flops per byte, and more with G < H: on a GPU that does
// 250 flops in the time it moves one byte, arithmetic binds from about T = 1024 on.
//
// Source: Dao 2023, "FlashAttention-2", algorithms 1 and 2; for groups, Ainslie et al. 2023, "GQA".

#include "attention_head.cuh"
#include "tensor_core.cuh"

#define THREADS (WARPS * WARP)
#define STRIDE (HEAD_SIZE + 8)                 // elements from one row of a tile to the next
#define PIECES (HEAD_SIZE / 8)                 // pieces of 16 bytes in a row
#define COPY_ROWS (THREADS / PIECES)           // rows that the threads of a block copy at once
#define STEPS (HEAD_SIZE / 16)                 // steps of 16 elements, one mma each, in a row
#define QUERY_ROWS (16 * QUERY_TILES * WARPS)  // queries of a block in _fwd and _bwd_dq
#define KEY_ROWS (16 * WARPS)                  // keys of a block in _bwd_dkv
#define SLICE 32                               // keys whose scores a warp of _fwd holds at a time
#define LOG2_E 1.4426950408889634f             // log2(e): exp(x) = exp2(x LOG2_E)

// --- row tiles in registers ---

// Row tile `tile` (16 x HEAD_SIZE) of a warp holds positions first + 16 tile + 0 ... 15. A lane has
// its fragments of this row tile in a[tile][step] (columns 16 step + 0 ... 15) if it is the left
// operand of a matmul, and in c[tile][n] (columns 8 n + 0 ... 7) if it is the result. These are
// elements of two rows, with lane = 4 r + q: row r, called half 0, and row r + 8, called half 1.

// Returns elements d and d + 1 of position t in one register, zeros from T on.
__device__ inline unsigned int pair_at(const floatX* x, Head head, int t, int d, int T) {
    return t < T ? *(const unsigned int*)(x + head.first + t * head.stride + d) : 0u;
}

// a[tile] = row tile `tile` of a head in global memory
__device__ inline void load_rows(unsigned int (*a)[STEPS][4], int tiles, const floatX* x, Head head,
                                 int first, int T) {
    int r = threadIdx.x % WARP / 4;
    int q = threadIdx.x % 4;
#pragma unroll
    for (int tile = 0; tile < tiles; tile++) {
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int t = first + 16 * tile + r + 8 * (i % 2);
                a[tile][step][i] = pair_at(x, head, t, 16 * step + 2 * q + 8 * (i / 2), T);
            }
        }
    }
}

// Row tile `tile` of a head in global memory = c[tile], each row times factor[tile][half], rounded.
__device__ inline void store_rows(floatX* x, float (*c)[2 * STEPS][4], float (*factor)[2],
                                  int tiles, Head head, int first, int T) {
    int r = threadIdx.x % WARP / 4;
    int q = threadIdx.x % 4;
#pragma unroll
    for (int tile = 0; tile < tiles; tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int t = first + 16 * tile + r + 8 * half;
            if (t >= T) {
                continue;
            }
            unsigned int* row = (unsigned int*)(x + head.first + t * head.stride);
#pragma unroll
            for (int n = 0; n < 2 * STEPS; n++) {
                float f = factor[tile][half];
                row[4 * n + q] = pack(f * c[tile][n][2 * half], f * c[tile][n][2 * half + 1]);
            }
        }
    }
}

// --- tiles in shared memory ---

// Starts the copies of positions first ... first + TILE - 1 into a tile, and of zeros from T on.
__device__ inline void cp_async_tile(floatX* tile, const floatX* x, Head head, int first, int T) {
    int row = threadIdx.x / PIECES;
    int d = threadIdx.x % PIECES * 8;
    const floatX* from = x + head.first + (first + row) * head.stride + d;
    if (row >= COPY_ROWS) {
        return;
    }
#pragma unroll
    for (int pass = 0; pass < TILE; pass += COPY_ROWS) {
        if (row + pass < TILE) {
            cp_async(tile + (row + pass) * STRIDE + d, from, first + row + pass < T);
            from += COPY_ROWS * head.stride;
        }
    }
}

// c[tile] (16 x 16) = a[tile] (16 x HEAD_SIZE) times the transpose of 16 rows of a tile in shared
// memory, which begin at `rows`.
__device__ inline void matmul_transposed(float (*c)[2][4], unsigned int (*a)[STEPS][4], int tiles,
                                        const floatX* rows) {
    int lane = threadIdx.x % WARP;
    const floatX* from = rows + (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8;
#pragma unroll
    for (int tile = 0; tile < tiles; tile++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            c[tile][i / 4][i % 4] = 0.0f;
        }
    }
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        unsigned int b[4];
        ldmatrix(b, from, 16 * step);
#pragma unroll
        for (int tile = 0; tile < tiles; tile++) {
            mma(c[tile][0], a[tile][step], b);
            mma(c[tile][1], a[tile][step], b + 2);
        }
    }
}

// c[tile] (16 x HEAD_SIZE) += a[tile] (16 x 16) times 16 rows of a tile in shared memory, which
// begin at `rows`.
__device__ inline void matmul_accumulate(float (*c)[2 * STEPS][4], unsigned int (*a)[4], int tiles,
                                const floatX* rows) {
    int lane = threadIdx.x % WARP;
    const floatX* from = rows + lane % 16 * STRIDE + lane / 16 * 8;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        unsigned int b[4];
        ldmatrix_transposed(b, from, 16 * step);
#pragma unroll
        for (int tile = 0; tile < tiles; tile++) {
            mma(c[tile][2 * step], a[tile], b);
            mma(c[tile][2 * step + 1], a[tile], b + 2);
        }
    }
}

// a = c (16 x 16), rounded to X: the result of one matmul becomes the left operand of the next. The
// lane keeps its own elements (see tensor_core.cuh).
__device__ inline void to_a_fragment(unsigned int* a, float (*c)[4]) {
    a[0] = pack(c[0][0], c[0][1]);
    a[1] = pack(c[0][2], c[0][3]);
    a[2] = pack(c[1][0], c[1][1]);
    a[3] = pack(c[1][2], c[1][3]);
}

__device__ inline void set_zero(float (*c)[2 * STEPS][4], int tiles) {
#pragma unroll
    for (int tile = 0; tile < tiles; tile++) {
#pragma unroll
        for (int n = 0; n < 2 * STEPS; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                c[tile][n][i] = 0.0f;
            }
        }
    }
}

// --- scores of _fwd: s (16 QUERY_TILES queries x SLICE keys) ---
//
// Of each 16 x 8 block of scores, lane 4 r + q has two elements of row r and two of row r + 8:
//
//     column     0  1     2  3     4  5     6  7
//     row 0      lane 0   lane 1   lane 2   lane 3      registers 0, 1: half 0
//     row 1      lane 4   lane 5   lane 6   lane 7
//     ...
//     row 7      lane 28  lane 29  lane 30  lane 31
//     row 8      lane 0   lane 1   lane 2   lane 3      registers 2, 3: half 1
//     ...
//     row 15     lane 28  lane 29  lane 30  lane 31
//
// A row tile has SLICE / 8 = 4 such blocks side by side. So a lane has SLICE / 4 = 8 scores of a
// row, which SCORE counts from left to right:
//
//     column     2q, 2q + 1     8 + 2q, 9 + 2q     16 + 2q, 17 + 2q     24 + 2q, 25 + 2q
//     c          0, 1           2, 3               4, 5                 6, 7
//     block      s[0][tile][0]  s[0][tile][1]      s[1][tile][0]        s[1][tile][1]

// Address of score c of this lane, of row r + 8 half of row tile `tile`.
#define SCORE(s, tile, half, c) (&s[(c) / 4][tile][(c) / 2 % 2][2 * (half) + (c) % 2])

// Removes the scores of keys that come after their query.
__device__ inline void mask_scores(float (*s)[QUERY_TILES][2][4], int first_key, int first_query) {
    int r = threadIdx.x % WARP / 4;
    int q = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2 * QUERY_TILES; i++) {
        int tile = i / 2, half = i % 2;
#pragma unroll
        for (int c = 0; c < SLICE / 4; c++) {
            int key = first_key + 16 * (c / 4) + 8 * (c / 2 % 2) + 2 * q + c % 2;
            if (key > first_query + 16 * tile + r + 8 * half) {
                *SCORE(s, tile, half, c) = -LARGEST_FLOAT;  // its exponential is 0
            }
        }
    }
}

// Returns the larger of m and the largest score of a row, to all four lanes that have scores of it.
__device__ inline float row_max(float m, float (*s)[QUERY_TILES][2][4], int tile, int half) {
#pragma unroll
    for (int c = 0; c < SLICE / 4; c++) {
        m = fmaxf(m, *SCORE(s, tile, half, c));
    }
    m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
    return fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
}

// The second launch bound is the minimum of resident blocks per multiprocessor; it sets ptxas's
// register budget. Without it the kernel spills registers.
extern "C" __global__ void __launch_bounds__(THREADS, 4 - QUERY_TILES)
    flash_attention_fwd(floatX* y, float* lse, const floatX* qkv, int T, int H, int G) {
    SHARED_ARRAY(floatX, k_tiles, 2 * TILE * STRIDE);
    SHARED_ARRAY(floatX, v_tiles, 2 * TILE * STRIDE);
    int b = blockIdx.y / H;
    int h = blockIdx.y % H;
    int g = h / (H / G);
    Head k_head = key_head(b, g, T, H, G);
    Head v_head = value_head(b, g, T, H, G);
    // Blocks start in rising order: the late queries, which see most keys, come first.
    int block = gridDim.x - 1 - blockIdx.x;
    int stop_key = min((block + 1) * QUERY_ROWS, T);
    int first_query = block * QUERY_ROWS + threadIdx.x / WARP * 16 * QUERY_TILES;  // of this warp
    int r = threadIdx.x % WARP / 4;
    int q = threadIdx.x % 4;

    cp_async_tile(k_tiles, qkv, k_head, 0, T);
    cp_async_tile(v_tiles, qkv, v_head, 0, T);
    unsigned int query[QUERY_TILES][STEPS][4];
    load_rows(query, QUERY_TILES, qkv, query_head(b, h, T, H, G), first_query, T);
    float acc[QUERY_TILES][2 * STEPS][4];
    set_zero(acc, QUERY_TILES);
    float m[QUERY_TILES][2];  // largest score of each row so far, not yet scaled by 1 / sqrt(D)
    float l[QUERY_TILES][2];  // sum of exponentials of each row so far, over this lane's columns
#pragma unroll
    for (int tile = 0; tile < QUERY_TILES; tile++) {
        m[tile][0] = m[tile][1] = -LARGEST_FLOAT;
        l[tile][0] = l[tile][1] = 0.0f;
    }
    float scale = 1.0f / sqrtf((float)HEAD_SIZE);
    float to_exponent = scale * LOG2_E;  // exp(scale s) = exp2(to_exponent s)

    int buffer = 0;
    for (int first_key = 0; first_key < stop_key; first_key += TILE) {
        cp_async_wait_all();
        __syncthreads();  // all see this tile, and all have finished reading the other buffer
        const floatX* k_tile = k_tiles + buffer * TILE * STRIDE;
        const floatX* v_tile = v_tiles + buffer * TILE * STRIDE;
        buffer = 1 - buffer;
        if (first_key + TILE < stop_key) {
            cp_async_tile(k_tiles + buffer * TILE * STRIDE, qkv, k_head, first_key + TILE, T);
            cp_async_tile(v_tiles + buffer * TILE * STRIDE, qkv, v_head, first_key + TILE, T);
        }

        for (int slice = first_key; slice < first_key + TILE; slice += SLICE) {
            if (slice >= first_query + 16 * QUERY_TILES) {
                break;  // this slice and all later ones are above the diagonal
            }
            float s[SLICE / 16][QUERY_TILES][2][4];
#pragma unroll
            for (int i = 0; i < SLICE / 16; i++) {
                const floatX* rows = k_tile + (slice - first_key + 16 * i) * STRIDE;
                matmul_transposed(s[i], query, QUERY_TILES, rows);
            }
            if (slice + SLICE - 1 > first_query) {  // the slice crosses the diagonal
                mask_scores(s, slice, first_query);
            }
            float m_prev[QUERY_TILES][2];
            bool changed = false;
#pragma unroll
            for (int i = 0; i < 2 * QUERY_TILES; i++) {
                int tile = i / 2, half = i % 2;
                m_prev[tile][half] = m[tile][half];
                m[tile][half] = row_max(m[tile][half], s, tile, half);
                changed = changed || m[tile][half] > m_prev[tile][half];
            }
            if (__any_sync(0xffffffffu, changed)) {  // otherwise the factor is 1 in all rows
#pragma unroll
                for (int i = 0; i < 2 * QUERY_TILES; i++) {
                    int tile = i / 2, half = i % 2;
                    float factor = exp2f((m_prev[tile][half] - m[tile][half]) * to_exponent);
                    l[tile][half] *= factor;
#pragma unroll
                    for (int n = 0; n < 2 * STEPS; n++) {
                        acc[tile][n][2 * half] *= factor;
                        acc[tile][n][2 * half + 1] *= factor;
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < 2 * QUERY_TILES; i++) {
                int tile = i / 2, half = i % 2;
                float shift = m[tile][half] * to_exponent;
#pragma unroll
                for (int c = 0; c < SLICE / 4; c++) {
                    float* score = SCORE(s, tile, half, c);
                    *score = exp2f(*score * to_exponent - shift);  // now p, not yet divided by l
                    l[tile][half] += *score;
                }
            }
#pragma unroll
            for (int i = 0; i < SLICE / 16; i++) {
                unsigned int p[QUERY_TILES][4];
#pragma unroll
                for (int tile = 0; tile < QUERY_TILES; tile++) {
                    to_a_fragment(p[tile], s[i][tile]);
                }
                const floatX* rows = v_tile + (slice - first_key + 16 * i) * STRIDE;
                matmul_accumulate(acc, p, QUERY_TILES, rows);
            }
        }
    }

    float inverse[QUERY_TILES][2];
#pragma unroll
    for (int tile = 0; tile < QUERY_TILES; tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float row_l = group_sum(l[tile][half], 4);  // over the columns of all four lanes
            inverse[tile][half] = 1.0f / row_l;
            int t = first_query + 16 * tile + r + 8 * half;
            if (q == 0 && t < T) {
                lse[(long long)blockIdx.y * T + t] = scale * m[tile][half] + logf(row_l);
            }
        }
    }
    store_rows(y, acc, inverse, QUERY_TILES, head_at(b, h, H, T), first_query, T);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    flash_attention_bwd_dq(floatX* dqkv, float* delta, const floatX* dy, const floatX* qkv,
                           const floatX* y, const float* lse, int T, int H, int G) {
    SHARED_ARRAY(floatX, k_tiles, 2 * TILE * STRIDE);
    SHARED_ARRAY(floatX, v_tiles, 2 * TILE * STRIDE);
    int b = blockIdx.y / H;
    int h = blockIdx.y % H;
    int g = h / (H / G);
    Head q_head = query_head(b, h, T, H, G);
    Head k_head = key_head(b, g, T, H, G);
    Head v_head = value_head(b, g, T, H, G);
    Head y_head = head_at(b, h, H, T);
    int block = gridDim.x - 1 - blockIdx.x;
    int stop_key = min((block + 1) * QUERY_ROWS, T);
    int first_query = block * QUERY_ROWS + threadIdx.x / WARP * 16 * QUERY_TILES;
    int r = threadIdx.x % WARP / 4;
    int q = threadIdx.x % 4;

    cp_async_tile(k_tiles, qkv, k_head, 0, T);
    cp_async_tile(v_tiles, qkv, v_head, 0, T);
    unsigned int query[QUERY_TILES][STEPS][4];
    unsigned int dout[QUERY_TILES][STEPS][4];
    load_rows(query, QUERY_TILES, qkv, q_head, first_query, T);
    load_rows(dout, QUERY_TILES, dy, y_head, first_query, T);
    float dq[QUERY_TILES][2 * STEPS][4];
    set_zero(dq, QUERY_TILES);
    float scale = 1.0f / sqrtf((float)HEAD_SIZE);
    float factor[QUERY_TILES][2];        // scale, for every row
    float row_delta[QUERY_TILES][2];     // delta of each row
    float row_exponent[QUERY_TILES][2];  // lse of each row, times LOG2_E
#pragma unroll
    for (int tile = 0; tile < QUERY_TILES; tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int t = first_query + 16 * tile + r + 8 * half;
            float dot = 0.0f;
#pragma unroll
            for (int i = 0; i < 2 * STEPS; i++) {
                unsigned int out = pair_at(y, y_head, t, 8 * i + 2 * q, T);
                unsigned int gradient = dout[tile][i / 2][i % 2 * 2 + half];
                dot += low(gradient) * low(out) + high(gradient) * high(out);
            }
            dot = group_sum(dot, 4);
            row_delta[tile][half] = dot;
            factor[tile][half] = scale;
            row_exponent[tile][half] = 0.0f;
            if (t < T) {
                long long row = (long long)blockIdx.y * T + t;
                row_exponent[tile][half] = lse[row] * LOG2_E;
                if (q == 0) {
                    delta[row] = dot;
                }
            }
        }
    }

    int buffer = 0;
    for (int first_key = 0; first_key < stop_key; first_key += TILE) {
        cp_async_wait_all();
        __syncthreads();
        const floatX* k_tile = k_tiles + buffer * TILE * STRIDE;
        const floatX* v_tile = v_tiles + buffer * TILE * STRIDE;
        buffer = 1 - buffer;
        if (first_key + TILE < stop_key) {
            cp_async_tile(k_tiles + buffer * TILE * STRIDE, qkv, k_head, first_key + TILE, T);
            cp_async_tile(v_tiles + buffer * TILE * STRIDE, qkv, v_head, first_key + TILE, T);
        }

        for (int slice = 0; slice < TILE; slice += 16) {
            if (first_key + slice >= first_query + 16 * QUERY_TILES) {
                break;  // this slice and all later ones are above the diagonal
            }
            float s[QUERY_TILES][2][4];
            float dp[QUERY_TILES][2][4];
            matmul_transposed(s, query, QUERY_TILES, k_tile + slice * STRIDE);
            matmul_transposed(dp, dout, QUERY_TILES, v_tile + slice * STRIDE);
            unsigned int ds[QUERY_TILES][4];
            bool on_diagonal = first_key + slice + 15 > first_query;
#pragma unroll
            for (int tile = 0; tile < QUERY_TILES; tile++) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    int half = i / 2 % 2;
                    float* score = &s[tile][i / 4][i % 4];
                    float p = exp2f(*score * (scale * LOG2_E) - row_exponent[tile][half]);
                    int key = first_key + slice + i / 4 * 8 + 2 * q + i % 2;
                    if (on_diagonal && key > first_query + 16 * tile + r + 8 * half) {
                        p = 0.0f;
                    }
                    *score = p * (dp[tile][i / 4][i % 4] - row_delta[tile][half]);
                }
                to_a_fragment(ds[tile], s[tile]);
            }
            matmul_accumulate(dq, ds, QUERY_TILES, k_tile + slice * STRIDE);
        }
    }
    store_rows(dqkv, dq, factor, QUERY_TILES, q_head, first_query, T);
}

// The registers of a multiprocessor hold three blocks up to D = 80, and two above. Without the
// second launch bound ptxas aims at four blocks for D = 48 and spills registers.
extern "C" __global__ void __launch_bounds__(THREADS, HEAD_SIZE <= 80 ? 3 : 2)
    flash_attention_bwd_dkv(floatX* dqkv, const float* delta, const floatX* dy, const floatX* qkv,
                            const float* lse, int T, int H, int G) {
    SHARED_ARRAY(floatX, q_tiles, 2 * TILE * STRIDE);
    SHARED_ARRAY(floatX, dout_tiles, 2 * TILE * STRIDE);
    SHARED_ARRAY(float, lse_tiles, 2 * TILE);
    SHARED_ARRAY(float, delta_tiles, 2 * TILE);
    int b = blockIdx.y / G;
    int g = blockIdx.y % G;
    Head k_head = key_head(b, g, T, H, G);
    Head v_head = value_head(b, g, T, H, G);
    int first_key = blockIdx.x * KEY_ROWS + threadIdx.x / WARP * 16;  // of this warp
    // Queries before the first tile see no key of this block.
    int first_tile = blockIdx.x * KEY_ROWS / TILE * TILE;
    int r = threadIdx.x % WARP / 4;
    int q = threadIdx.x % 4;

    unsigned int key[1][STEPS][4];
    unsigned int value[1][STEPS][4];
    load_rows(key, 1, qkv, k_head, first_key, T);
    load_rows(value, 1, qkv, v_head, first_key, T);
    float dk[1][2 * STEPS][4];
    float dv[1][2 * STEPS][4];
    set_zero(dk, 1);
    set_zero(dv, 1);
    float scale = 1.0f / sqrtf((float)HEAD_SIZE);

    for (int h = g * (H / G); h < (g + 1) * (H / G); h++) {  // the query heads of the group
        Head q_head = query_head(b, h, T, H, G);
        Head y_head = head_at(b, h, H, T);
        const float* head_lse = lse + ((long long)b * H + h) * T;
        const float* head_delta = delta + ((long long)b * H + h) * T;
        int buffer = 1;
        for (int next = first_tile; next - TILE < T; next += TILE) {
            int first_query = next - TILE;
            cp_async_wait_all();
            __syncthreads();
            const floatX* q_tile = q_tiles + buffer * TILE * STRIDE;
            const floatX* dout_tile = dout_tiles + buffer * TILE * STRIDE;
            const float* lse_tile = lse_tiles + buffer * TILE;
            const float* delta_tile = delta_tiles + buffer * TILE;
            buffer = 1 - buffer;
            if (next < T) {
                cp_async_tile(q_tiles + buffer * TILE * STRIDE, qkv, q_head, next, T);
                cp_async_tile(dout_tiles + buffer * TILE * STRIDE, dy, y_head, next, T);
                for (int i = threadIdx.x; i < TILE; i += THREADS) {
                    int t = next + i < T ? next + i : 0;
                    cp_async(lse_tiles + buffer * TILE + i, head_lse + t, next + i < T);
                    cp_async(delta_tiles + buffer * TILE + i, head_delta + t, next + i < T);
                }
            }
            if (next == first_tile) {
                continue;  // the first pass only starts copies
            }

            // Queries from T on are zeros and add nothing.
            for (int slice = 0; slice < TILE; slice += 16) {
                if (first_query + slice + 15 < first_key) {
                    continue;  // all of this slice is above the diagonal
                }
                float s[1][2][4];  // transposed: keys down, queries across
                float dp[1][2][4];
                matmul_transposed(s, key, 1, q_tile + slice * STRIDE);
                matmul_transposed(dp, value, 1, dout_tile + slice * STRIDE);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    int column = slice + i / 4 * 8 + 2 * q + i % 2;
                    bool sees = first_key + r + 8 * (i / 2 % 2) <= first_query + column;
                    float row_exponent = lse_tile[column] * LOG2_E;
                    float exponent = s[0][i / 4][i % 4] * (scale * LOG2_E) - row_exponent;
                    float p = sees ? exp2f(exponent) : 0.0f;
                    s[0][i / 4][i % 4] = p;
                    dp[0][i / 4][i % 4] = p * (dp[0][i / 4][i % 4] - delta_tile[column]);
                }
                unsigned int p[1][4];
                unsigned int ds[1][4];
                to_a_fragment(p[0], s[0]);
                to_a_fragment(ds[0], dp[0]);
                matmul_accumulate(dv, p, 1, dout_tile + slice * STRIDE);
                matmul_accumulate(dk, ds, 1, q_tile + slice * STRIDE);
            }
        }
    }
    float scales[1][2] = {{scale, scale}};
    float ones[1][2] = {{1.0f, 1.0f}};
    store_rows(dqkv, dk, scales, 1, k_head, first_key, T);
    store_rows(dqkv, dv, ones, 1, v_head, first_key, T);
}
