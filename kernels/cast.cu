// Casts between float32 and the two 16-bit formats.
//
//     y = x in the type of y, rounded to nearest, ties to even
//
// kernel           outputs       inputs
// float_to_bf16    y bf16 =      x float32
// float_to_fp16    y fp16 =      x float32
// bf16_to_float    y float32 =   x bf16      exact: every bfloat16 is a float32
// fp16_to_float    y float32 =   x fp16      exact: every float16 is a float32
//
// All tensors have n elements. Thread i of the grid casts element i. Blocks may have any size. No
// shared memory, no sums. Grid and block: `cast` in gpu_gpt2/ops/kernels.py.
//
// Cost per element: 6 bytes moved and a few integer operations. Memory binds.
//
// Source: IEEE 754 binary32 and binary16; bfloat16 is the upper half of binary32. The rounding is
// explained at to_bf16 in common.cuh.

extern "C" __global__ void float_to_bf16(bf16* y, const float* x, long long n) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        y[i] = to_bf16(x[i]);
    }
}

extern "C" __global__ void float_to_fp16(fp16* y, const float* x, long long n) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        y[i] = to_fp16(x[i]);
    }
}

extern "C" __global__ void bf16_to_float(float* y, const bf16* x, long long n) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        y[i] = to_float(x[i]);
    }
}

extern "C" __global__ void fp16_to_float(float* y, const fp16* x, long long n) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        y[i] = to_float(x[i]);
    }
}
