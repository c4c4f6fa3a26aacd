// The squared norm of all gradients, from which AdamW decides whether to scale them down.
//
//     out = sum over i of x[i]^2
//
// kernel                 outputs                       inputs
// squared_norm_partial   partial (blocks) float32 =    x (n) float32
// squared_norm_total     out (1) float32 =             partial (count) float32
//
// The two steps keep the order of additions fixed; one atomic addition per block would not.
// 1. x is read 16 bytes at a time, so it begins at a multiple of 16 bytes. Thread i of T in the whole
//    grid takes the fours i, i + T, i + 2T ... and has one sum for each place in a four; it adds the
//    first and second, the third and fourth, and these. Of the last n % 4 elements thread i adds the
//    i-th. Then block_sum makes one number per block. The number of blocks follows from n alone, not
//    from the GPU: the same bits on any. grid (blocks), block a multiple of 32, shared 32 floats.
// 2. One block sums the partial sums: thread i adds i, i + threads ...; then block_sum. grid (1).
//
// Cost: 4 bytes and 2 flops per element. Memory binds.

extern "C" __global__ void squared_norm_partial(float* partial, const float* x, long long n) {
    SHARED_ARRAY(float, scratch, MAX_WARPS);
    long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    long long threads = (long long)gridDim.x * blockDim.x;
    float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (long long i = thread; i < n / 4; i += threads) {
        float4 four = ((const float4*)x)[i];
        sums.x += four.x * four.x;
        sums.y += four.y * four.y;
        sums.z += four.z * four.z;
        sums.w += four.w * four.w;
    }
    float sum = (sums.x + sums.y) + (sums.z + sums.w);
    if (thread < n % 4) {
        float last = x[n / 4 * 4 + thread];
        sum += last * last;
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
