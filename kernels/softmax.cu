// Softmax along each row of V elements.
//
//     y = exp(x - max) / sum(exp(x - max))
//     dx = y (dy - sum(dy y))
//
// kernel        outputs          inputs
// softmax_fwd   y (N, V) X =     x (N, V) X                y may be x
// softmax_bwd   dx (N, V) X =    dy, y (N, V) X            dx may be dy
//
// Who does what. One block per row, whose threads stride over pieces of WIDTH columns (see
// common.cuh), so that each read of a warp is one contiguous piece of memory; V is a multiple of
// WIDTH. Blocks are a multiple of 32 threads; shared: 32 floats. Grid and block: `softmax_fwd` and
// `softmax_bwd` in gpu_gpt2/ops/kernels.py.
//
// Order of sums: each thread adds its columns in rising order, then block_sum adds the threads.
//
// Outputs may overwrite inputs: all reads that need the whole row come before the barriers in
// block_sum, and after these barriers a thread reads a column only to overwrite the same column.
//
// Cost in bytes, X = size of floatX: forward N V 3X (x is read twice), backward N V 5X (dy and y
// are read twice); the second read comes from cache while rows are short. About 20 flops per
// element, half of them in exp. Memory binds.
//
// Source: see softmax_of_row in softmax_row.cuh.

#include "softmax_row.cuh"

extern "C" __global__ void softmax_fwd(floatX* y, const floatX* x, int V) {
    SHARED_ARRAY(float, scratch, MAX_WARPS);
    long long row = (long long)blockIdx.x * V;
    Softmax s = softmax_of_row(x, row, V, scratch);
    for (int c = threadIdx.x * WIDTH; c < V; c += blockDim.x * WIDTH) {
        float values[WIDTH];
        load(values, x + row + c);
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            values[k] = expf(values[k] - s.max) / s.sum;
        }
        store(y + row + c, values);
    }
}

extern "C" __global__ void softmax_bwd(floatX* dx, const floatX* dy, const floatX* y, int V) {
    SHARED_ARRAY(float, scratch, MAX_WARPS);
    long long row = (long long)blockIdx.x * V;
    float sum = 0.0f;
    for (int c = threadIdx.x * WIDTH; c < V; c += blockDim.x * WIDTH) {
        float values[WIDTH];
        float gradients[WIDTH];
        load(values, y + row + c);
        load(gradients, dy + row + c);
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            sum += gradients[k] * values[k];
        }
    }
    sum = block_sum(sum, scratch);
    for (int c = threadIdx.x * WIDTH; c < V; c += blockDim.x * WIDTH) {
        float values[WIDTH];
        float gradients[WIDTH];
        load(values, y + row + c);
        load(gradients, dy + row + c);
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            values[k] *= gradients[k] - sum;
        }
        store(dx + row + c, values);
    }
}
