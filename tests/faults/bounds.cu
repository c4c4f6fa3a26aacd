// Accesses outside an array, or of an array that must not be touched so.

// <<<2, 32>>> reads x[64] out of bounds (x has 64 elements of float32) at HERE: block (1, 0, 0),
// thread (31, 0, 0)
extern "C" __global__ void read_past_end(float* y, const float* x) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x[i + FAULT];  // here: read_past_end
}

// <<<2, 32>>> writes y[-1] out of bounds (y has 64 elements of float32) at HERE: block (0, 0,
// 0), thread (0, 0, 0)
extern "C" __global__ void write_before_start(float* y, const float* x) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i - FAULT] = x[i];  // here: write_before_start
}

// <<<2, 32>>> which is in none of the kernel's arrays at HERE: block (0, 0, 0), thread (0, 0, 0)
extern "C" __global__ void read_far_away(float* y, const float* x) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x[i + (FAULT ? 1LL << 40 : 0)];  // here: read_far_away
}

// <<<1, 33>>> reads x[33] out of bounds (x has 33 elements of bfloat16) at HERE: block (0, 0,
// 0), thread (32, 0, 0)
extern "C" __global__ void read_half(bf16* y, const bf16* x) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x[i + FAULT];  // here: read_half
}

// <<<1, 32>>> at x[1], an address that is not a multiple of 16, at HERE
extern "C" __global__ void misaligned(float* y, const float* x) {
    int i = threadIdx.x;
    y[i] = ((const float4*)(x + i / 4 * 4 + FAULT))->x;  // here: misaligned
}

// <<<2, 32>>> writes x[0] through a pointer to const: x is an input at HERE
extern "C" __global__ void write_input(float* y, const float* x) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x[i];
    if (FAULT) {
        ((float*)x)[i] = 0.0f;  // here: write_input
    }
}

// <<<1, 32>>> writes 4 bytes at byte 128 of shared 'tile' (128 bytes) out of bounds at HERE:
// block (0, 0, 0), thread (31, 0, 0)
extern "C" __global__ void shared_past_end(float* y, const float* x) {
    __shared__ float before[32];
    __shared__ float tile[32];
    int i = threadIdx.x;
    float* after = tile;
    before[i] = x[i];
    after[i + FAULT] = x[i];  // here: shared_past_end
    __syncthreads();
    y[i] = tile[i] + before[i];
}

// <<<1, 32>>> writes 4 bytes at byte -80 of shared 'tile' (128 bytes) out of bounds at HERE:
// block (0, 0, 0), thread (0, 0, 0)
extern "C" __global__ void shared_before_start(float* y, const float* x) {
    __shared__ float first[32];
    __shared__ float tile[32];
    int i = threadIdx.x;
    float* at = tile;
    first[i] = x[i];
    at[i - 20 * FAULT] = x[i];  // here: shared_before_start
    __syncthreads();
    y[i] = tile[i] + first[i];
}

// <<<1, 32>>> uses index 32 at HERE, out of bounds of 'float
extern "C" __global__ void shared_inner_index(float* y, const float* x) {
    __shared__ float tile[2][32];
    int i = threadIdx.x;
    tile[0][i] = x[i];
    tile[1][i] = x[i];
    __syncthreads();
    y[i] = tile[0][i + FAULT];  // here: shared_inner_index
}

// <<<1, 32, 128>>> writes 4 bytes at byte 128 of the dynamic shared memory (128 bytes) out of
// bounds at HERE: block (0, 0, 0), thread (31, 0, 0)
extern "C" __global__ void dynamic_past_end(float* y, const float* x) {
    DYNAMIC_SHARED(float, tile);
    int i = threadIdx.x;
    tile[i + FAULT] = x[i];  // here: dynamic_past_end
    __syncthreads();
    y[i] = tile[FAULT ? 31 : i];
}

// <<<1, 32>>> uses index 4 at HERE, out of bounds of 'float
extern "C" __global__ void local_index(float* y, const float* x) {
    int i = threadIdx.x;
    float local[4];
    for (int k = 0; k < 4; k++) {
        local[k] = x[i];
    }
    y[i] = local[(i & 3) + 4 * FAULT];  // here: local_index
}

// <<<1, 32>>> which is a local variable of another thread at HERE: block (0, 0, 0), thread (1,
// 0, 0)
extern "C" __global__ void local_of_another(float* y, const float* x) {
    __shared__ const float* first;
    int i = threadIdx.x;
    float local = x[i];
    if (i == 0) {
        first = &local;
    }
    __syncthreads();
    y[i] = *(FAULT ? first : &local);  // here: local_of_another
    __syncthreads();
}

// <<<2, 32>>> reads x[64] out of bounds (x has 64 elements of int8) at HERE: block (1, 0, 0),
// thread (31, 0, 0)
extern "C" __global__ void read_byte(signed char* y, const signed char* x) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x[i + FAULT];  // here: read_byte
}

// <<<1, 32>>> at x[2], an address that is not a multiple of 4, at HERE
extern "C" __global__ void misaligned_word(signed char* y, const signed char* x) {
    int i = threadIdx.x;
    y[i] = (signed char)*((const int*)(x + i / 4 * 4 + 2 * FAULT));  // here: misaligned_word
}
