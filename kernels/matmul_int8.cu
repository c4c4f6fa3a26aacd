// Matmuls of int8 matrices that are quantized in groups, for the few rows of text generation.
//
//     scale = max |x| / 127,   q = round(x / scale)                in each group of a row
//     y[n, o] = sum over groups of (x . w over the group) w_scale x_scale
//
// kernel          outputs                                   inputs
// quantize_rows   q (N, I) int8 =, scales (N, J) float32 =  x (N, I) X
// matmul_int8     y (N, O) X =                              x (N, I) int8, x_scales (N, J) float32,
//                                                           w (O, I) int8, w_scales (O, J) float32
//
// A row has J groups of I / J elements. round takes halves away from zero. A group whose scale is 0
// or not finite has q = 0: a NaN or an infinity among its elements makes the scale a NaN or
// infinite, and 0 times that scale is a NaN in every output of the row.
//
// Who does what. quantize_rows: one warp per group, whose lanes stride over its elements.
// matmul_int8: one warp per output column o and up to ROWS rows of x. Its lanes stride over pieces
// of PIECE elements of the row w[o, :], of which each warp reads neighbouring pieces, and multiply
// each piece by the same piece of each row of x, which come from cache. PIECE is 16, or else 4 or
// 1: the largest that divides the size of a group, so that every piece lies in one group. If N is
// above ROWS, the blocks that share columns of w follow each other in the grid, so that all but the
// first read w from L2. Blocks are a multiple of 32 threads; no shared memory. Grid and block:
// `quantize_rows` and `matmul_int8` in gpu_gpt2/ops/kernels.py.
//
// Order of sums: products of int8 are summed exactly in int32 within a piece. Each lane adds its
// pieces in rising order in float32; then warp_sum adds the lanes. The order depends on I and J
// only, so a row of y does not depend on the other rows of x.
//
// Cost in bytes: quantize_rows N I (2X + 1), X = size of floatX, x is read twice; matmul_int8
// O I + 4 O J, w and its scales, read once. A multiprocessor multiplies and adds 64 x 4 elements at
// a time (__dp4a), and reads about 15 bytes of w in that time on an H200: memory binds up to about
// 8 rows of x, the loads of x from cache and __dp4a beyond.
//
// Source: the quantization and the sum over groups of llama2.c's runq.c; __dp4a: CUDA C++
// Programming Guide, "DPX and integer intrinsics" (compute capability 6.1 and above).

#ifndef PIECE
#define PIECE 1
#endif
#ifndef ROWS
#define ROWS 1
#endif
#define WORDS ((PIECE + 3) / 4)  // registers of a piece, each with four elements

#define LARGEST_INT8 127.0f

// words = the PIECE elements from p on. A single element fills one byte of a word, beside zeros.
__device__ inline void load_piece(int* words, const signed char* p) {
#if PIECE == 16
    int4 vector = *(const int4*)p;
    words[0] = vector.x;
    words[1] = vector.y;
    words[2] = vector.z;
    words[3] = vector.w;
#elif PIECE == 4
    words[0] = *(const int*)p;
#else
    words[0] = p[0] & 0xff;
#endif
}

extern "C" __global__ void quantize_rows(signed char* q, float* scales, const floatX* x, int groups,
                                         int group_size) {
    int group = row_of_warp();
    int lane = threadIdx.x % WARP;
    if (group >= groups) {
        return;
    }
    long long start = (long long)group * group_size;
    // The bits of positive floats are in the order of the floats, and NaNs are above infinity.
    // (fmaxf would drop a NaN.)
    unsigned int largest = 0;
    for (int i = lane; i < group_size; i += WARP) {
        largest = max(largest, __float_as_uint(to_float(x[start + i])) & 0x7fffffffu);
    }
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
    }
    float scale = __uint_as_float(largest) / LARGEST_INT8;
    bool usable = scale > 0.0f && scale <= LARGEST_FLOAT;
    for (int i = lane; i < group_size; i += WARP) {
        float ratio = usable ? roundf(to_float(x[start + i]) / scale) : 0.0f;
        // A scale below the normal float32 numbers is so inexact that a ratio can exceed 127.
        ratio = fminf(fmaxf(ratio, -LARGEST_INT8), LARGEST_INT8);
        q[start + i] = (signed char)ratio;
    }
    if (lane == 0) {
        scales[group] = scale;
    }
}

extern "C" __global__ void matmul_int8(floatX* y, const signed char* x, const float* x_scales,
                                       const signed char* w, const float* w_scales, int N, int O,
                                       int I, int J) {
    int row_blocks = (N + ROWS - 1) / ROWS;
    int first = blockIdx.x % row_blocks * ROWS;
    int o = blockIdx.x / row_blocks * (blockDim.x / WARP) + threadIdx.x / WARP;
    int lane = threadIdx.x % WARP;
    if (o >= O) {
        return;
    }
    int group_size = I / J;
    const signed char* w_row = w + (long long)o * I;
    const float* w_row_scales = w_scales + (long long)o * J;
    float sums[ROWS] = {};
#pragma unroll 2
    for (int i = lane * PIECE; i < I; i += WARP * PIECE) {
        int w_words[WORDS];
        load_piece(w_words, w_row + i);
        int group = i / group_size;
        float w_scale = w_row_scales[group];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            int n = min(first + r, N - 1);  // beyond the last row, the last row is computed again
            int x_words[WORDS];
            load_piece(x_words, x + (long long)n * I + i);
            int dot = 0;
#pragma unroll
            for (int k = 0; k < WORDS; k++) {
                dot = __dp4a(w_words[k], x_words[k], dot);
            }
            sums[r] += (float)dot * w_scale * x_scales[(long long)n * J + group];
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float sum = warp_sum(sums[r]);
        if (lane == 0 && first + r < N) {
            y[(long long)(first + r) * O + o] = to_floatX(sum);
        }
    }
}
