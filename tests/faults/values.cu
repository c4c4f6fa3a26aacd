// Values that nobody wrote, outputs that nobody writes, and kernels that cannot end well.

// <<<1, 32>>> reads y[0], which nobody has written since the array was created (y has 32
// elements of float32) at HERE: block (0, 0, 0), thread (0, 0, 0)
extern "C" __global__ void read_uninitialised(float* y, const float* x) {
    int i = threadIdx.x;
    y[i] = FAULT ? y[i] + x[i] : x[i];  // here: read_uninitialised
}

// <<<1, 32>>> reads y[0], which nobody has written since the array was created (y has 32
// elements of bfloat16) at HERE
extern "C" __global__ void read_uninitialised_half(bf16* y, const bf16* x) {
    int i = threadIdx.x;
    if (FAULT && y[i].bits == 0) {  // here: read_uninitialised_half
        return;
    }
    y[i] = x[i];
}

// <<<1, 32>>> reads 4 bytes at byte 0 of shared 'tile' (128 bytes), which no thread of the block
// has written yet at HERE: block (0, 0, 0), thread (31, 0, 0)
extern "C" __global__ void read_uninitialised_shared(float* y, const float* x) {
    __shared__ float tile[32];
    int i = threadIdx.x;
    if (i > 0 || !FAULT) {
        tile[i] = x[i];
    }
    __syncthreads();
    y[i] = tile[31 - i];  // here: read_uninitialised_shared
}

// The first block writes what the second, in the same memory, does not.
// <<<2, 32>>> which no thread of the block has written yet at HERE: block (1, 0, 0), thread (0, 0,
// 0)
extern "C" __global__ void read_other_blocks_shared(float* y, const float* x) {
    __shared__ float tile[32];
    int i = threadIdx.x;
    if (blockIdx.x == 0 || !FAULT) {
        tile[i] = x[i];
    }
    y[32 * blockIdx.x + i] = tile[i];  // here: read_other_blocks_shared
}

// <<<1, 32>>> has ended without writing z (z has 32 elements of float32)
extern "C" __global__ void unwritten_output(float* y, float* z, const float* x) {
    int i = threadIdx.x;
    y[i] = x[i];
    if (!FAULT) {
        z[i] = x[i];
    }
}

// <<<1, 32>>> calls __trap at HERE: block (0, 0, 0), thread (3, 0, 0)
extern "C" __global__ void trap(float* y, const float* x) {
    int i = threadIdx.x;
    y[i] = x[i];
    if (FAULT && i == 3) {
        __trap();  // here: trap
    }
}

// <<<1, 32>>> divides by zero at HERE: block (0, 0, 0), thread (5, 0, 0)
extern "C" __global__ void divide_by_zero(float* y, const float* x) {
    int i = threadIdx.x;
    int zero = FAULT ? i - 5 : 1;
    y[i] = x[i] + 1 / zero;  // here: divide_by_zero
}

__device__ float depth(const float* x, int n) {
    return n == 0 ? 0.0f : x[0] + depth(x, n - 1);
}

// <<<1, 32>>> has used up its stack: local arrays too large, or a recursion without end
extern "C" __global__ void recursion(float* y, const float* x) {
    y[threadIdx.x] = depth(x, FAULT ? -1 : 10);
}

// <<<1, 32>>> makes 100000 memory accesses without a barrier or an end: a loop that never stops?
extern "C" __global__ void endless(float* y, const float* x) {
    int i = threadIdx.x;
    y[i] = x[i];
    while (FAULT && y[i] == x[i]) {  // here: endless
        y[i] = x[i];
    }
}
