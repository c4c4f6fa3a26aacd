// Bias: one element per column, added to every row. Its gradient is the sum of the rows.
//
//     y[n, :] += b[:]              db[:] += sum over n of dy[n, :]
//
// kernel               outputs                            inputs
// bias_fwd             y (N, O) X +=                      b (O) X
// bias_bwd_partial     partial (chunks, O) float32 =      dy (N, O) X
// bias_bwd_total       db (O) float32 +=                  partial (chunks, O) float32
//
// O is a multiple of WIDTH (see common.cuh). Grid and block: `bias_fwd` and `bias_bwd` in
// gpu_gpt2/ops/kernels.py.
//
// bias_fwd: one block per row, whose threads stride over pieces of WIDTH columns. Blocks may have
// any size. No shared memory, no sums.
//
// The sums down the columns are made in two steps, because the columns alone are too few to fill a
// GPU, and because the order of additions must be fixed:
// 1. bias_bwd_partial cuts the rows into chunks of rows_per_chunk and adds the rows of each chunk.
//    Block (i, j) takes columns 32 WIDTH i to 32 WIDTH (i + 1) of chunk j. It has 32 x COLUMN_WARPS
//    threads: warp w adds rows w, w + COLUMN_WARPS ... of the chunk, then the sums of the warps are
//    added, warp 0's first. Shared: 32 WIDTH COLUMN_WARPS floats.
// 2. bias_bwd_total adds the sums of the chunks: see add_chunks in column_sum.cuh. Shared: 32 x 32
//    floats.
//
// Cost in bytes, X = size of floatX: forward N O 2X, backward N O X + chunks O 8; one flop per
// element. Memory binds.

#include "column_sum.cuh"

extern "C" __global__ void bias_fwd(floatX* y, const floatX* b, int O) {
    long long row = (long long)blockIdx.x * O;
    for (int c = threadIdx.x * WIDTH; c < O; c += blockDim.x * WIDTH) {
        float values[WIDTH];
        float bias[WIDTH];
        load(values, y + row + c);
        load(bias, b + c);
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            values[k] += bias[k];
        }
        store(y + row + c, values);
    }
}

// out[c] = the sum over the warps of this block of their `sum` for column c, warp 0's first, for
// each column c of this block. Thread (l, w) has in `sum` the sums of warp w for the WIDTH columns
// from (32 blockIdx.x + l) WIDTH on. `sums` is shared memory of COLUMN_WARPS x 32 WIDTH floats;
// other threads may still be reading it when the call returns.
__device__ inline void store_sums_of_warps(float* out, const float* sum, float* sums, int columns) {
    int width = WARP * WIDTH;
#pragma unroll
    for (int k = 0; k < WIDTH; k++) {
        sums[threadIdx.y * width + threadIdx.x * WIDTH + k] = sum[k];
    }
    __syncthreads();
    for (int i = threadIdx.y * WARP + threadIdx.x; i < width; i += COLUMN_WARPS * WARP) {
        int c = blockIdx.x * width + i;
        if (c < columns) {
            float total = 0.0f;
            for (int warp = 0; warp < COLUMN_WARPS; warp++) {
                total += sums[warp * width + i];
            }
            out[c] = total;
        }
    }
}

extern "C" __global__ void bias_bwd_partial(float* partial, const floatX* dy, int N, int O,
                                            int rows_per_chunk) {
    SHARED_ARRAY(float, sums, COLUMN_WARPS * WARP * WIDTH);
    int c = (blockIdx.x * WARP + threadIdx.x) * WIDTH;
    int start = blockIdx.y * rows_per_chunk;
    int stop = min(start + rows_per_chunk, N);
    float sum[WIDTH] = {};
    if (c < O) {
#pragma unroll 4
        for (int n = start + threadIdx.y; n < stop; n += COLUMN_WARPS) {
            float values[WIDTH];
            load(values, dy + (long long)n * O + c);
#pragma unroll
            for (int k = 0; k < WIDTH; k++) {
                sum[k] += values[k];
            }
        }
    }
    store_sums_of_warps(partial + (long long)blockIdx.y * O, sum, sums, O);
}

extern "C" __global__ void bias_bwd_total(float* db, const float* partial, int chunks, int O) {
    SHARED_ARRAY(float, tile, MAX_WARPS * WARP);
    add_chunks(db, partial, chunks, O, O, tile);
}
