// Softmax along each row of V numbers.
//
//     y = exp(x - max) / sum(exp(x - max))
//     dx = y (dy - sum(dy y))
//
// kernel        outputs          inputs
// softmax_fwd   y (N, V) X =     x (N, V) X                y may be x
// softmax_bwd   dx (N, V) X =    dy, y (N, V) X            dx may be dy
//
// One block per row; its threads stride over pieces of WIDTH columns, of which V is a multiple, so
// that each read of a warp is one unbroken piece of memory. grid (N), block a multiple of 32, shared
// 32 floats.
// Sums: each thread over its columns in rising order, then block_sum. Working in place is safe: all
// reads that need the whole row are over before the barriers in block_sum, and after them each
// thread reads a column only to overwrite that same column.
//
// Cost in bytes, X = size of floatX: forward N V 3X (read twice), backward N V 5X (dy and y twice);
// the second read comes from cache while rows are short. About 20 flops per element, half of them
// in exp. Memory binds.
//
// Source: see softmax_of_row in common.cuh.

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
