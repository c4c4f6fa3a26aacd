// The squared norm of all gradients: AdamW clips the gradient to a norm, and leaves out an update
// whose gradient is not finite (see adamw.cu).
//
//     out = sum over i of x[i]^2
//
// kernel                 outputs                       inputs
// squared_norm_partial   partial (blocks) float32 =    x (n) float32
// squared_norm_total     out (1) float32 =             partial (count) float32
//
// The sum is made in two steps to fix the order of additions, which one atomic addition per block
// would not. Blocks are a multiple of 32 threads; shared: 32 floats. Grid and block: `squared_norm`
// in gpu_gpt2/ops/kernels.py, where the number of blocks follows from n alone, not from the GPU, so
// that every GPU gives the same bits.
//
// 1. squared_norm_partial reads x, which begins at a multiple of 16 bytes, as float4 vectors.
//    Thread i of the T threads of the grid reads vectors i, i + T, i + 2T ... and keeps four sums,
//    one per component, which it then adds as (x + y) + (z + w). If i < n % 4, it also adds one of
//    the last n % 4 elements. Then block_sum adds the threads of a block.
// 2. squared_norm_total has one block: thread i adds the partial sums i, i + threads ...; then
//    block_sum.
//
// Cost: 4 bytes and 2 flops per element. Memory binds.

extern "C" __global__ void squared_norm_partial(float* partial, const float* x, long long n) {
    SHARED_ARRAY(float, scratch, MAX_WARPS);
    long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    long long threads = (long long)gridDim.x * blockDim.x;
    float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (long long i = thread; i < n / 4; i += threads) {
        float4 v = ((const float4*)x)[i];
        sums.x += v.x * v.x;
        sums.y += v.y * v.y;
        sums.z += v.z * v.z;
        sums.w += v.w * v.w;
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
