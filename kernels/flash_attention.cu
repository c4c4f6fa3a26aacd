// Causal self-attention on tensor cores, for bf16 and fp16: attention.cu, which has the formulas and
// is the one to read first, made fast.
//
// kernel                     outputs                          inputs
// flash_attention_fwd        y (B, T, H, D) X =               qkv (B, T, 3, H, D) X
//                            lse (B, H, T) float32 =
// flash_attention_bwd_dq     dqkv[:, :, 0] X =                dy, qkv, y X, lse float32
//                            delta (B, H, T) float32 =
// flash_attention_bwd_dkv    dqkv[:, :, 1] and [:, :, 2] X =  delta float32, dy, qkv X, lse float32
//
// Who does what. HEAD_SIZE = D is a multiple of 16; `flash_attention_defines` in
// gpu_gpt2/ops/kernels.py chooses the other compile-time names. A block has WARPS warps. A warp owns
// 16 rows of its head for each of its M tiles: queries in _fwd and _bwd_dq, where M = QUERY_TILES, and
// keys in _bwd_dkv, where M = 1. What belongs to these rows alone stays in registers from first to
// last, in the layouts of tensor_core.cuh. The other side's rows pass through shared memory, TILE at a
// time, in two buffers: while the warps work on one tile, the next is on its way into the other.
//     grid (ceil(T / rows of a block), B H), block 32 WARPS; shared: 4 TILE (D + 8) of X, and
//     4 TILE floats in _bwd_dkv. Rows of tiles are 8 numbers longer than D: rows below one another
//     then begin in different banks, and a warp reads 8 of them at once without conflict.
// Tiles, and parts of 16 rows of a tile, that lie wholly above the diagonal are skipped.
//
// Each product's result is, in its registers, the next product's left side: scores become p or ds
// where they are, are rounded to X, and are multiplied on. The backward pass works on transposed
// scores in _bwd_dkv (keys down, queries across), so that this holds there too.
//
// Order of sums: within 16 numbers the tensor core's; beyond that by rising d, and by rising position.
// p and ds are rounded to X before they are multiplied, which attention.cu does not do.
//
// Cost, with N = B T: the forward pass has 2 products of N T H D flops over the causal half, the
// backward pass 7: s and dp twice, as no two blocks may add to one number. Bytes: forward N H D 4X,
// backward N H D 15X. Arithmetic binds from T = 512 or so.
//
// Source: Dao 2023, "FlashAttention-2", algorithms 1 and 2.

#include "tensor_core.cuh"

#define THREADS (WARPS * WARP)
#define STRIDE (HEAD_SIZE + 8)                // numbers from one row of a tile to the next
#define PIECES (HEAD_SIZE / 8)                // of 16 bytes in a row
#define ROWS_AT_ONCE (THREADS / PIECES)       // that a block's threads can copy
#define STEPS (HEAD_SIZE / 16)                // of 16 numbers in a row
#define QUERY_ROWS (16 * QUERY_TILES * WARPS) // of a block in _fwd and _bwd_dq
#define KEY_ROWS (16 * WARPS)                 // of a block in _bwd_dkv
#define PART 32                               // keys whose scores a warp of _fwd holds at a time
#define LOG2_E 1.4426950408889634f

// A head's numbers in qkv, dqkv (three parts) or y, dy (one): position t has them at
// first + t * stride.
struct Head {
    long long first;
    long long stride;
};

__device__ inline Head head_at(int part, int parts, int T, int H) {
    int b = blockIdx.y / H;
    int h = blockIdx.y % H;
    Head head;
    head.stride = (long long)parts * H * HEAD_SIZE;
    head.first = (long long)b * T * head.stride + ((long long)part * H + h) * HEAD_SIZE;
    return head;
}

// --- rows in registers: a[m] (16 x HEAD_SIZE) holds positions first + 16 m + 0 ... 15 ---

__device__ inline unsigned int pair_at(const floatX* x, Head head, int t, int d, int T) {
    return t < T ? *(const unsigned int*)(x + head.first + t * head.stride + d) : 0u;
}

__device__ inline void load_rows(unsigned int (*a)[STEPS][4], int tiles, const floatX* x, Head head,
                                 int first, int T) {
    int r = threadIdx.x % WARP / 4;
    int q = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < tiles; m++) {
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int t = first + 16 * m + r + 8 * (i % 2);
                a[m][step][i] = pair_at(x, head, t, 16 * step + 2 * q + 8 * (i / 2), T);
            }
        }
    }
}

// x[first + 16 m + row] = factor[m][row half] * c[m][row], rounded.
__device__ inline void store_rows(floatX* x, float (*c)[2 * STEPS][4], float (*factor)[2], int tiles,
                                  Head head, int first, int T) {
    int r = threadIdx.x % WARP / 4;
    int q = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < tiles; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int t = first + 16 * m + r + 8 * half;
            if (t >= T) {
                continue;
            }
            unsigned int* row = (unsigned int*)(x + head.first + t * head.stride);
#pragma unroll
            for (int n = 0; n < 2 * STEPS; n++) {
                float f = factor[m][half];
                row[4 * n + q] = pack(f * c[m][n][2 * half], f * c[m][n][2 * half + 1]);
            }
        }
    }
}

// --- rows in shared memory ---

// Starts the copies of positions first, first + 1, ... first + TILE - 1 into a tile.
__device__ inline void start_tile(floatX* tile, const floatX* x, Head head, int first, int T) {
    int row = threadIdx.x / PIECES;
    int d = threadIdx.x % PIECES * 8;
    const floatX* from = x + head.first + (first + row) * head.stride + d;
    if (row >= ROWS_AT_ONCE) {
        return;
    }
#pragma unroll
    for (int pass = 0; pass < TILE; pass += ROWS_AT_ONCE) {
        if (row + pass < TILE) {
            copy_async(tile + (row + pass) * STRIDE + d, from, first + row + pass < T);
            from += ROWS_AT_ONCE * head.stride;
        }
    }
}

// c[m] (16 x 16) = a[m] (16 x HEAD_SIZE) times the transpose of 16 rows of a tile.
__device__ inline void scores_with_rows(float (*c)[2][4], unsigned int (*a)[STEPS][4], int tiles,
                                        const floatX* rows) {
    int lane = threadIdx.x % WARP;
    const floatX* from = rows + (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8;
#pragma unroll
    for (int m = 0; m < tiles; m++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            c[m][i / 4][i % 4] = 0.0f;
        }
    }
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        unsigned int b[4];
        load_matrices(b, from, 16 * step);
#pragma unroll
        for (int m = 0; m < tiles; m++) {
            multiply_add(c[m][0], a[m][step], b);
            multiply_add(c[m][1], a[m][step], b + 2);
        }
    }
}

// c[m] (16 x HEAD_SIZE) += a[m] (16 x 16) times 16 rows of a tile.
__device__ inline void add_rows(float (*c)[2 * STEPS][4], unsigned int (*a)[4], int tiles,
                                const floatX* rows) {
    int lane = threadIdx.x % WARP;
    const floatX* from = rows + lane % 16 * STRIDE + lane / 16 * 8;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        unsigned int b[4];
        load_matrices_transposed(b, from, 16 * step);
#pragma unroll
        for (int m = 0; m < tiles; m++) {
            multiply_add(c[m][2 * step], a[m], b);
            multiply_add(c[m][2 * step + 1], a[m], b + 2);
        }
    }
}

// A 16 x 16 result, rounded, as the left side of the next product.
__device__ inline void round_scores(unsigned int* a, float (*c)[4]) {
    a[0] = pack(c[0][0], c[0][1]);
    a[1] = pack(c[0][2], c[0][3]);
    a[2] = pack(c[1][0], c[1][1]);
    a[3] = pack(c[1][2], c[1][3]);
}

__device__ inline void set_zero(float (*c)[2 * STEPS][4], int tiles) {
#pragma unroll
    for (int m = 0; m < tiles; m++) {
#pragma unroll
        for (int n = 0; n < 2 * STEPS; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                c[m][n][i] = 0.0f;
            }
        }
    }
}

// --- scores of _fwd: 16 QUERY_TILES rows, PART columns ---

// Number c of the PART / 4 that this lane has of a row, which is row r + 8 half of tile m; it is in
// column 16 (c / 4) + 8 (c / 2 % 2) + 2q + c % 2.
#define SCORE(s, m, half, c) (&s[(c) / 4][m][(c) / 2 % 2][2 * (half) + (c) % 2])

__device__ inline void mask_scores(float (*s)[QUERY_TILES][2][4], int first_key, int first_query) {
    int r = threadIdx.x % WARP / 4;
    int q = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2 * QUERY_TILES; i++) {
        int m = i / 2, half = i % 2;
#pragma unroll
        for (int c = 0; c < PART / 4; c++) {
            int key = first_key + 16 * (c / 4) + 8 * (c / 2 % 2) + 2 * q + c % 2;
            if (key > first_query + 16 * m + r + 8 * half) {
                *SCORE(s, m, half, c) = -LARGEST_FLOAT;  // exp of that is 0
            }
        }
    }
}

__device__ inline float largest_in_row(float largest, float (*s)[QUERY_TILES][2][4], int m,
                                       int half) {
#pragma unroll
    for (int c = 0; c < PART / 4; c++) {
        largest = fmaxf(largest, *SCORE(s, m, half, c));
    }
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    return fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
}

// The second number is of blocks that a multiprocessor shall hold: it makes ptxas use as many
// registers as that leaves, and no fewer, so that nothing has to go to memory.
extern "C" __global__ void __launch_bounds__(THREADS, 4 - QUERY_TILES)
    flash_attention_fwd(floatX* y, float* lse, const floatX* qkv, int T, int H) {
    SHARED_ARRAY(floatX, k_tiles, 2 * TILE * STRIDE);
    SHARED_ARRAY(floatX, v_tiles, 2 * TILE * STRIDE);
    Head k_head = head_at(1, 3, T, H);
    Head v_head = head_at(2, 3, T, H);
    int block = gridDim.x - 1 - blockIdx.x;  // late queries have most work: first
    int stop_key = min((block + 1) * QUERY_ROWS, T);
    int first_query = block * QUERY_ROWS + threadIdx.x / WARP * 16 * QUERY_TILES;  // of the warp
    int r = threadIdx.x % WARP / 4;
    int q = threadIdx.x % 4;

    start_tile(k_tiles, qkv, k_head, 0, T);
    start_tile(v_tiles, qkv, v_head, 0, T);
    unsigned int query[QUERY_TILES][STEPS][4];
    load_rows(query, QUERY_TILES, qkv, head_at(0, 3, T, H), first_query, T);
    float acc[QUERY_TILES][2 * STEPS][4];
    set_zero(acc, QUERY_TILES);
    float largest[QUERY_TILES][2];  // score of each row so far: m of the formula
    float sum[QUERY_TILES][2];      // of this lane's columns: l of the formula
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m++) {
        largest[m][0] = largest[m][1] = -LARGEST_FLOAT;
        sum[m][0] = sum[m][1] = 0.0f;
    }
    float scale = 1.0f / sqrtf((float)HEAD_SIZE);
    float to_exponent = scale * LOG2_E;  // exp(scale s) = exp2(to_exponent s)

    int buffer = 0;
    for (int first_key = 0; first_key < stop_key; first_key += TILE) {
        wait_for_copies();
        __syncthreads();  // this tile is there for all, and all have left the other buffer
        const floatX* k_tile = k_tiles + buffer * TILE * STRIDE;
        const floatX* v_tile = v_tiles + buffer * TILE * STRIDE;
        buffer = 1 - buffer;
        if (first_key + TILE < stop_key) {
            start_tile(k_tiles + buffer * TILE * STRIDE, qkv, k_head, first_key + TILE, T);
            start_tile(v_tiles + buffer * TILE * STRIDE, qkv, v_head, first_key + TILE, T);
        }

        for (int part = first_key; part < first_key + TILE; part += PART) {
            if (part >= first_query + 16 * QUERY_TILES) {
                break;  // above the diagonal
            }
            float s[PART / 16][QUERY_TILES][2][4];
#pragma unroll
            for (int i = 0; i < PART / 16; i++) {
                const floatX* rows = k_tile + (part - first_key + 16 * i) * STRIDE;
                scores_with_rows(s[i], query, QUERY_TILES, rows);
            }
            if (part + PART - 1 > first_query) {  // on the diagonal
                mask_scores(s, part, first_query);
            }
            float before[QUERY_TILES][2];
            bool changed = false;
#pragma unroll
            for (int i = 0; i < 2 * QUERY_TILES; i++) {
                int m = i / 2, half = i % 2;
                before[m][half] = largest[m][half];
                largest[m][half] = largest_in_row(largest[m][half], s, m, half);
                changed = changed || largest[m][half] > before[m][half];
            }
            if (__any_sync(0xffffffffu, changed)) {  // else the factor is 1 in all rows
#pragma unroll
                for (int i = 0; i < 2 * QUERY_TILES; i++) {
                    int m = i / 2, half = i % 2;
                    float factor = exp2f((before[m][half] - largest[m][half]) * to_exponent);
                    sum[m][half] *= factor;
#pragma unroll
                    for (int n = 0; n < 2 * STEPS; n++) {
                        acc[m][n][2 * half] *= factor;
                        acc[m][n][2 * half + 1] *= factor;
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < 2 * QUERY_TILES; i++) {
                int m = i / 2, half = i % 2;
                float shift = largest[m][half] * to_exponent;
#pragma unroll
                for (int c = 0; c < PART / 4; c++) {
                    float* score = SCORE(s, m, half, c);
                    *score = exp2f(*score * to_exponent - shift);  // p of the formula
                    sum[m][half] += *score;
                }
            }
#pragma unroll
            for (int i = 0; i < PART / 16; i++) {
                unsigned int p[QUERY_TILES][4];
#pragma unroll
                for (int m = 0; m < QUERY_TILES; m++) {
                    round_scores(p[m], s[i][m]);
                }
                add_rows(acc, p, QUERY_TILES, v_tile + (part - first_key + 16 * i) * STRIDE);
            }
        }
    }

    float inverse[QUERY_TILES][2];
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float l = group_sum(sum[m][half], 4);
            inverse[m][half] = 1.0f / l;
            int t = first_query + 16 * m + r + 8 * half;
            if (q == 0 && t < T) {
                lse[(long long)blockIdx.y * T + t] = scale * largest[m][half] + logf(l);
            }
        }
    }
    store_rows(y, acc, inverse, QUERY_TILES, head_at(0, 1, T, H), first_query, T);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    flash_attention_bwd_dq(floatX* dqkv, float* delta, const floatX* dy, const floatX* qkv,
                           const floatX* y, const float* lse, int T, int H) {
    SHARED_ARRAY(floatX, k_tiles, 2 * TILE * STRIDE);
    SHARED_ARRAY(floatX, v_tiles, 2 * TILE * STRIDE);
    Head q_head = head_at(0, 3, T, H);
    Head k_head = head_at(1, 3, T, H);
    Head v_head = head_at(2, 3, T, H);
    Head y_head = head_at(0, 1, T, H);
    int block = gridDim.x - 1 - blockIdx.x;
    int stop_key = min((block + 1) * QUERY_ROWS, T);
    int first_query = block * QUERY_ROWS + threadIdx.x / WARP * 16 * QUERY_TILES;
    int r = threadIdx.x % WARP / 4;
    int q = threadIdx.x % 4;

    start_tile(k_tiles, qkv, k_head, 0, T);
    start_tile(v_tiles, qkv, v_head, 0, T);
    unsigned int query[QUERY_TILES][STEPS][4];
    unsigned int dout[QUERY_TILES][STEPS][4];
    load_rows(query, QUERY_TILES, qkv, q_head, first_query, T);
    load_rows(dout, QUERY_TILES, dy, y_head, first_query, T);
    float dq[QUERY_TILES][2 * STEPS][4];
    set_zero(dq, QUERY_TILES);
    float scale = 1.0f / sqrtf((float)HEAD_SIZE);
    float factor[QUERY_TILES][2];       // scale, for every row
    float row_delta[QUERY_TILES][2];    // dy . y
    float row_exponent[QUERY_TILES][2]; // lse, for exp2
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int t = first_query + 16 * m + r + 8 * half;
            float dot = 0.0f;
#pragma unroll
            for (int i = 0; i < 2 * STEPS; i++) {
                unsigned int out = pair_at(y, y_head, t, 8 * i + 2 * q, T);
                unsigned int gradient = dout[m][i / 2][i % 2 * 2 + half];
                dot += low(gradient) * low(out) + high(gradient) * high(out);
            }
            dot = group_sum(dot, 4);
            row_delta[m][half] = dot;
            factor[m][half] = scale;
            row_exponent[m][half] = 0.0f;
            if (t < T) {
                long long row = (long long)blockIdx.y * T + t;
                row_exponent[m][half] = lse[row] * LOG2_E;
                if (q == 0) {
                    delta[row] = dot;
                }
            }
        }
    }

    int buffer = 0;
    for (int first_key = 0; first_key < stop_key; first_key += TILE) {
        wait_for_copies();
        __syncthreads();
        const floatX* k_tile = k_tiles + buffer * TILE * STRIDE;
        const floatX* v_tile = v_tiles + buffer * TILE * STRIDE;
        buffer = 1 - buffer;
        if (first_key + TILE < stop_key) {
            start_tile(k_tiles + buffer * TILE * STRIDE, qkv, k_head, first_key + TILE, T);
            start_tile(v_tiles + buffer * TILE * STRIDE, qkv, v_head, first_key + TILE, T);
        }

        for (int part = 0; part < TILE; part += 16) {
            if (first_key + part >= first_query + 16 * QUERY_TILES) {
                break;  // above the diagonal
            }
            float s[QUERY_TILES][2][4];
            float dp[QUERY_TILES][2][4];
            scores_with_rows(s, query, QUERY_TILES, k_tile + part * STRIDE);
            scores_with_rows(dp, dout, QUERY_TILES, v_tile + part * STRIDE);
            unsigned int ds[QUERY_TILES][4];
            bool on_diagonal = first_key + part + 15 > first_query;
#pragma unroll
            for (int m = 0; m < QUERY_TILES; m++) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    int half = i / 2 % 2;
                    float* score = &s[m][i / 4][i % 4];
                    float p = exp2f(*score * (scale * LOG2_E) - row_exponent[m][half]);
                    int key = first_key + part + i / 4 * 8 + 2 * q + i % 2;
                    if (on_diagonal && key > first_query + 16 * m + r + 8 * half) {
                        p = 0.0f;
                    }
                    *score = p * (dp[m][i / 4][i % 4] - row_delta[m][half]);
                }
                round_scores(ds[m], s[m]);
            }
            add_rows(dq, ds, QUERY_TILES, k_tile + part * STRIDE);
        }
    }
    store_rows(dqkv, dq, factor, QUERY_TILES, q_head, first_query, T);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    flash_attention_bwd_dkv(floatX* dqkv, const float* delta, const floatX* dy, const floatX* qkv,
                            const float* lse, int T, int H) {
    SHARED_ARRAY(floatX, q_tiles, 2 * TILE * STRIDE);
    SHARED_ARRAY(floatX, dout_tiles, 2 * TILE * STRIDE);
    SHARED_ARRAY(float, lse_tiles, 2 * TILE);
    SHARED_ARRAY(float, delta_tiles, 2 * TILE);
    Head q_head = head_at(0, 3, T, H);
    Head k_head = head_at(1, 3, T, H);
    Head v_head = head_at(2, 3, T, H);
    Head y_head = head_at(0, 1, T, H);
    int first_key = blockIdx.x * KEY_ROWS + threadIdx.x / WARP * 16;  // of the warp
    int first_tile = blockIdx.x * KEY_ROWS / TILE * TILE;  // queries before it see no key of the block
    int r = threadIdx.x % WARP / 4;
    int q = threadIdx.x % 4;
    const float* head_lse = lse + (long long)blockIdx.y * T;
    const float* head_delta = delta + (long long)blockIdx.y * T;

    unsigned int key[1][STEPS][4];
    unsigned int value[1][STEPS][4];
    load_rows(key, 1, qkv, k_head, first_key, T);
    load_rows(value, 1, qkv, v_head, first_key, T);
    float dk[1][2 * STEPS][4];
    float dv[1][2 * STEPS][4];
    set_zero(dk, 1);
    set_zero(dv, 1);
    float scale = 1.0f / sqrtf((float)HEAD_SIZE);

    int buffer = 1;
    for (int next = first_tile; next - TILE < T; next += TILE) {
        int first_query = next - TILE;
        wait_for_copies();
        __syncthreads();
        const floatX* q_tile = q_tiles + buffer * TILE * STRIDE;
        const floatX* dout_tile = dout_tiles + buffer * TILE * STRIDE;
        const float* lse_tile = lse_tiles + buffer * TILE;
        const float* delta_tile = delta_tiles + buffer * TILE;
        buffer = 1 - buffer;
        if (next < T) {
            start_tile(q_tiles + buffer * TILE * STRIDE, qkv, q_head, next, T);
            start_tile(dout_tiles + buffer * TILE * STRIDE, dy, y_head, next, T);
            for (int i = threadIdx.x; i < TILE; i += THREADS) {
                int t = next + i < T ? next + i : 0;
                copy_async(lse_tiles + buffer * TILE + i, head_lse + t, next + i < T);
                copy_async(delta_tiles + buffer * TILE + i, head_delta + t, next + i < T);
            }
        }
        if (next == first_tile) {
            continue;  // nothing has been copied yet
        }

        for (int part = 0; part < TILE; part += 16) {  // a query from T on is all zeros and adds none
            if (first_query + part + 15 < first_key) {
                continue;  // above the diagonal
            }
            float s[1][2][4];  // transposed: keys down, queries across
            float dp[1][2][4];
            scores_with_rows(s, key, 1, q_tile + part * STRIDE);
            scores_with_rows(dp, value, 1, dout_tile + part * STRIDE);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                int column = part + i / 4 * 8 + 2 * q + i % 2;
                bool sees = first_key + r + 8 * (i / 2 % 2) <= first_query + column;
                float exponent = s[0][i / 4][i % 4] * (scale * LOG2_E) - lse_tile[column] * LOG2_E;
                float p = sees ? exp2f(exponent) : 0.0f;
                s[0][i / 4][i % 4] = p;
                dp[0][i / 4][i % 4] = p * (dp[0][i / 4][i % 4] - delta_tile[column]);
            }
            unsigned int p[1][4];
            unsigned int ds[1][4];
            round_scores(p[0], s[0]);
            round_scores(ds[0], dp[0]);
            add_rows(dv, p, 1, dout_tile + part * STRIDE);
            add_rows(dk, ds, 1, q_tile + part * STRIDE);
        }
    }
    float scales[1][2] = {{scale, scale}};
    float ones[1][2] = {{1.0f, 1.0f}};
    store_rows(dqkv, dk, scales, 1, k_head, first_key, T);
    store_rows(dqkv, dv, ones, 1, v_head, first_key, T);
}
