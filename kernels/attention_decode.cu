// Attention of one new token per sequence over a KV cache, for generation.
//
//     s[j] = q . k[j] / sqrt(D)  for j = 0 ... starts[b],    p[j] = exp(s[j] - m) / l
//     m = largest s[j],  l = sum over j of exp(s[j] - m),    y = sum over j of p[j] v[j]
//
// for each query head of each sequence b, whose query is at position starts[b].
//
// kernel                     outputs                   inputs
// attention_decode_partial   partial float32 =         qkv (B, 1, R, D) X, k, v (B, G, S, D) X,
//                            (B, H, splits, D + 2)     starts (B) int
// attention_decode_total     y (B, 1, H, D) X =        partial float32, starts (B) int
//
// A row of qkv has R = H + 2 G heads: H queries, then keys and values, which are not read, because
// kv_append (kv_cache.cu) has copied them into the cache. Each head of k and v serves a group of
// H / G neighbouring query heads.
//
// One query per sequence gives too little work to fill a GPU with a block per head. So the cache is
// split into runs of `length` positions, and the result is made in two steps:
// 1. attention_decode_partial gives each split its own block, which computes m, l and the sum acc
//    of exp(s[j] - m) v[j] over the positions of the split, and stores acc, m, l as one row of
//    `partial`. A block whose split lies behind starts[b] returns at once and writes nothing.
// 2. attention_decode_total adds acc and l of the splits up to starts[b], each times exp(m - M),
//    where M is the largest m of all splits; then y = acc / l.
// Grid and `length` follow from the sizes of the tensors, never from starts, so that a CUDA graph
// with these launches serves all positions.
//
// Who does what. Memory binds, so what matters is to read each key and value once, with wide loads.
// A block of attention_decode_partial serves QUERY_HEADS query heads of one group together: each
// key and value is loaded into registers once for all of them. (A group of more than 8 query heads
// has several blocks. They run side by side, so that all but the first find the cache's rows in
// L2.) LANES neighbouring threads, a lane group, share the D elements of a position: lane i has the
// pieces i, i + LANES ... of WIDTH elements (see common.cuh), PIECES of them, at most 8 elements in
// all (zeros beyond D). The THREADS / LANES lane groups of the block read neighbouring positions at
// the same time, each AT_ONCE positions before it computes with any of them. Each lane group runs
// the online softmax of attention.cu over its positions. At the end the block adds its lane groups
// as attention_decode_total adds the splits. Shared: THREADS / LANES x QUERY_HEADS x (LANES x
// PIECES x WIDTH + 2) floats.
//
// A block of attention_decode_total has TOTAL_WARPS warps and makes 32 elements of one query head's
// y. Each warp adds a run of consecutive splits; then warp 0 adds the sums of the warps, its own
// first. Shared: 2 x TOTAL_WARPS x 32 floats.
//
// Compile-time names (HEAD_SIZE = D, LANES, QUERY_HEADS, THREADS, TOTAL_WARPS), grid and block:
// `attention_decode_defines` and `attention_decode` in gpu_gpt2/ops/kernels.py.
//
// Order of sums: a dot product adds each lane's elements in rising d, then the lanes by group_sum's
// tree; a lane group adds its positions in rising order; then the lane groups, first to last; then
// the splits of a warp, first to last; then the warps, first to last.
//
// Cost, with P = starts[b] + 1 and X = size of floatX: in bytes per sequence 2 G P D X for the
// cache, and H (D + 2) 8 for each split, in L2; 4 P H D flops. With 16-bit elements these are H / G
// flops per byte, while a GPU does about 20 float32 flops in the time it moves one byte: memory
// binds.
//
// Source: Dao et al. 2023, "Flash-Decoding for long-context inference"; for groups, Ainslie et al.
// 2023, "GQA".

#define LANE_GROUPS (THREADS / LANES)                     // lane groups of a block
#define PIECES ((HEAD_SIZE / WIDTH + LANES - 1) / LANES)  // pieces of WIDTH elements of each lane
#define ELEMENTS (PIECES * WIDTH)                         // elements of a position of each lane
#define AT_ONCE 2            // positions whose k and v a lane group loads before it computes
#define ROW (HEAD_SIZE + 2)  // floats of a row of partial: acc, m, l

// values[0 ... ELEMENTS - 1] = this lane's elements of a head; zeros beyond D, or if !exists
__device__ inline void load_lane(float* values, const floatX* head, bool exists) {
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        int d = (threadIdx.x % LANES + piece * LANES) * WIDTH;
        if (exists && d < HEAD_SIZE) {
            load(values + piece * WIDTH, head + d);
        } else {
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                values[piece * WIDTH + i] = 0.0f;
            }
        }
    }
}

// The second launch bound, 1, is the minimum of resident blocks per multiprocessor; it sets ptxas's
// register budget. Without it ptxas aims at more blocks and, for some D, spills a register.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_decode_partial(float* partial, const floatX* qkv, const floatX* k, const floatX* v,
                             const int* starts, int H, int G, int S, int length) {
    SHARED_ARRAY(float, accs, LANE_GROUPS * QUERY_HEADS * ELEMENTS * LANES);
    SHARED_ARRAY(float, ms, LANE_GROUPS * QUERY_HEADS);
    SHARED_ARRAY(float, ls, LANE_GROUPS * QUERY_HEADS);
    int parts = (H / G + QUERY_HEADS - 1) / QUERY_HEADS;  // blocks that share a group's query heads
    int part = blockIdx.x % parts;
    int kv_head = blockIdx.x / parts;  // b * G + g
    int b = kv_head / G;
    int first = blockIdx.y * length;
    int stop = min(min(starts[b], S - 1) + 1, first + length);
    if (first >= stop) {
        return;
    }
    int first_head = kv_head % G * (H / G) + part * QUERY_HEADS;
    int heads = min(QUERY_HEADS, H / G - part * QUERY_HEADS);
    int lane_group = threadIdx.x / LANES;
    int lane = threadIdx.x % LANES;

    float q[QUERY_HEADS][ELEMENTS];
    float acc[QUERY_HEADS][ELEMENTS];
    float m[QUERY_HEADS];
    float l[QUERY_HEADS];
    float scale = 1.0f / sqrtf((float)HEAD_SIZE);
#pragma unroll
    for (int h = 0; h < QUERY_HEADS; h++) {
        long long row = (long long)b * (H + 2 * G) + first_head + h;
        load_lane(q[h], qkv + row * HEAD_SIZE, h < heads);
#pragma unroll
        for (int d = 0; d < ELEMENTS; d++) {
            q[h][d] *= scale;
            acc[h][d] = 0.0f;
        }
        m[h] = -LARGEST_FLOAT;
        l[h] = 0.0f;
    }

    // All lane groups make the same number of passes, because whole warps must call group_sum.
    for (int next = first + lane_group; next - lane_group < stop; next += AT_ONCE * LANE_GROUPS) {
        float keys[AT_ONCE][ELEMENTS];
        float values[AT_ONCE][ELEMENTS];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int position = next + i * LANE_GROUPS;
            long long at = ((long long)kv_head * S + position) * HEAD_SIZE;
            load_lane(keys[i], k + at, position < stop);
            load_lane(values[i], v + at, position < stop);
        }
#pragma unroll
        for (int h = 0; h < QUERY_HEADS; h++) {
            float s[AT_ONCE];
            float m_prev = m[h];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                float dot = 0.0f;
#pragma unroll
                for (int d = 0; d < ELEMENTS; d++) {
                    dot += q[h][d] * keys[i][d];
                }
                s[i] = group_sum(dot, LANES);
                if (next + i * LANE_GROUPS < stop) {
                    m[h] = fmaxf(m[h], s[i]);
                }
            }
            float rescale = expf(m_prev - m[h]);
            l[h] *= rescale;
#pragma unroll
            for (int d = 0; d < ELEMENTS; d++) {
                acc[h][d] *= rescale;
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                float p = next + i * LANE_GROUPS < stop ? expf(s[i] - m[h]) : 0.0f;
                l[h] += p;
#pragma unroll
                for (int d = 0; d < ELEMENTS; d++) {
                    acc[h][d] += p * values[i][d];
                }
            }
        }
    }

#pragma unroll
    for (int h = 0; h < QUERY_HEADS; h++) {
        int row = lane_group * QUERY_HEADS + h;
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++) {
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                int d = (lane + piece * LANES) * WIDTH + i;
                accs[row * ELEMENTS * LANES + d] = acc[h][piece * WIDTH + i];
            }
        }
        if (lane == 0) {
            ms[row] = m[h];
            ls[row] = l[h];
        }
    }
    __syncthreads();

    for (int i = threadIdx.x; i < heads * HEAD_SIZE; i += THREADS) {
        int h = i / HEAD_SIZE;
        int d = i % HEAD_SIZE;
        float block_m = ms[h];
        for (int other = 1; other < LANE_GROUPS; other++) {
            block_m = fmaxf(block_m, ms[other * QUERY_HEADS + h]);
        }
        float block_l = 0.0f;
        float sum = 0.0f;
        for (int other = 0; other < LANE_GROUPS; other++) {
            int row = other * QUERY_HEADS + h;
            float factor = expf(ms[row] - block_m);  // 0 for a lane group without a position
            block_l += factor * ls[row];
            sum += factor * accs[row * ELEMENTS * LANES + d];
        }
        long long query = (long long)b * H + first_head + h;
        float* to = partial + (query * gridDim.y + blockIdx.y) * ROW;
        to[d] = sum;
        if (d == 0) {
            to[HEAD_SIZE] = block_m;
            to[HEAD_SIZE + 1] = block_l;
        }
    }
}

extern "C" __global__ void __launch_bounds__(TOTAL_WARPS * WARP)
    attention_decode_total(floatX* y, const float* partial, const int* starts, int H, int S,
                           int splits, int length) {
    SHARED_ARRAY(float, accs, TOTAL_WARPS * WARP);
    SHARED_ARRAY(float, ls, TOTAL_WARPS * WARP);
    int lane = threadIdx.x;
    int warp = threadIdx.y;
    int d = blockIdx.y * WARP + lane;
    int used = min(starts[blockIdx.x / H], S - 1) / length + 1;  // splits that have been written
    const float* rows = partial + (long long)blockIdx.x * splits * ROW;

    float m = -LARGEST_FLOAT;
    for (int split = lane; split < used; split += WARP) {
        m = fmaxf(m, rows[(long long)split * ROW + HEAD_SIZE]);
    }
    m = warp_max(m);

    int run = (used + TOTAL_WARPS - 1) / TOTAL_WARPS;
    int stop = min((warp + 1) * run, used);
    float l = 0.0f;
    float acc = 0.0f;
#pragma unroll 4
    for (int split = warp * run; split < stop; split++) {
        const float* row = rows + (long long)split * ROW;
        float factor = expf(row[HEAD_SIZE] - m);
        l += factor * row[HEAD_SIZE + 1];
        acc += factor * (d < HEAD_SIZE ? row[d] : 0.0f);
    }
    accs[warp * WARP + lane] = acc;
    ls[warp * WARP + lane] = l;
    __syncthreads();
    if (warp == 0 && d < HEAD_SIZE) {
        for (int other = 1; other < TOTAL_WARPS; other++) {
            acc += accs[other * WARP + lane];
            l += ls[other * WARP + lane];
        }
        y[(long long)blockIdx.x * HEAD_SIZE + d] = to_floatX(acc / l);
    }
}
