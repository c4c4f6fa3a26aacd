// The squared norm of all gradients, from which AdamW decides whether to scale them down.
//
//     out = sum over i of x[i]^2
//
// kernel                 outputs                       inputs
// squared_norm_partial   partial (blocks) float32 =    x (n) float32
// squared_norm_total     out (1) float32 =             partial (count) float32
//
// The two steps keep the order of additions fixed; one atomic addition per block would not.
// 1. Thread i of T in the whole grid adds elements i, i + T, i + 2T ...; block_sum makes one number
//    per block. The number of blocks follows from n alone, not from the GPU: the same bits on any.
//    grid (blocks), block a multiple of 32, shared 32 floats.
// 2. One block does the same with the partial sums. grid (1).
//
// Cost: 4 bytes and 2 flops per element. Memory binds.

extern "C" __global__ void squared_norm_partial(float* partial, const float* x, long long n) {
    SHARED_ARRAY(float, scratch, MAX_WARPS);
    long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    long long threads = (long long)gridDim.x * blockDim.x;
    float sum = 0.0f;
    for (long long i = thread; i < n; i += threads) {
        sum += x[i] * x[i];
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
    }
}

extern "C" __global__ void squared_norm_total(float* out, const float* partial, int count) {
    SHARED_ARRAY(float, scratch, MAX_WARPS);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        sum += partial[i];
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) {
        out[0] = sum;
    }
}
