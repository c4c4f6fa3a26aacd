// What every kernel file builds on: the type floatX, sums and maxima over a warp or a block, and a
// few names for what a GPU can do and a C++ compiler cannot.
//
// No headers are included, neither CUDA's nor C++'s, here or in any kernel file: one text passes
// through NVRTC, nvcc and, for the emulator, g++. The emulator defines GPU_GPT2_EMULATOR and puts
// its own definitions of CUDA's words (__global__, threadIdx, __syncthreads, __shfl_xor_sync, expf
// ...) in front of this text, so that no kernel knows which of the two it is running on.
//
// README.md beside this file says in which order to read the kernels.

// --- types ---

// Formats to store in, 16 bits wide; all arithmetic is float32, or a tensor core's. bfloat16 is the
// upper half of a float32; float16 has 5 bits of exponent (6.1e-5 to 65504 at full accuracy, and
// down to 6.0e-8 at less) and 11 significant ones.
struct bf16 {
    unsigned short bits;
};
struct fp16 {
    unsigned short bits;
};

// The type of activations and weights, chosen when the file is compiled: -DFLOATX=BF16.
#define FP32 0
#define BF16 1
#define FP16 2
#if FLOATX == BF16
typedef bf16 floatX;
#elif FLOATX == FP16
typedef fp16 floatX;
#else
typedef float floatX;
#endif

__device__ inline float to_float(float value) { return value; }

__device__ inline float to_float(bf16 value) {
    return __uint_as_float((unsigned int)value.bits << 16);
}

__device__ inline float to_float(fp16 value) {
#ifndef GPU_GPT2_EMULATOR
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#else
    unsigned int sign = (value.bits & 0x8000u) << 16;
    unsigned int magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) {  // infinity or NaN
        return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    }
    // Moved into a float32's place the exponent is 127 - 15 too small. This product repairs it, for
    // numbers below full accuracy too, and is exact.
    return __uint_as_float(sign | magnitude << 13) * __uint_as_float((127u + 112u) << 23);
#endif
}

// Rounds to nearest, ties to even. Adding 0x7fff carries into the kept half when the dropped half
// is above one half of its last place; adding that last bit too sends a tie to the even neighbour.
// A NaN must not be rounded, or its carry would make it infinite: it is cut and kept quiet.
__device__ inline bf16 to_bf16(float value) {
    unsigned int bits = __float_as_uint(value);
    bf16 result;
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        result.bits = (unsigned short)((bits >> 16) | 0x0040u);
    } else {
        result.bits = (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
    return result;
}

// Rounds to nearest, ties to even; beyond 65519 to infinity.
__device__ inline fp16 to_fp16(float value) {
    fp16 result;
#ifndef GPU_GPT2_EMULATOR
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
    unsigned int bits = __float_as_uint(value);
    unsigned int sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) {
        result.bits = (unsigned short)(sign | 0x7e00u | (bits >> 13 & 0x3ffu));
    } else if (bits >= 0x477ff000u) {  // 65520 and more
        result.bits = (unsigned short)(sign | 0x7c00u);
    } else if (bits < 0x38800000u) {  // below 2^-14: adding 0.5 leaves units of 2^-24, rounded
        bits = __float_as_uint(__uint_as_float(bits) + 0.5f) - 0x3f000000u;
        result.bits = (unsigned short)(sign | bits);
    } else {  // as in to_bf16, with 13 bits dropped and the exponent made 112 smaller
        bits = (bits - (112u << 23) + 0xfffu + (bits >> 13 & 1u)) >> 13;
        result.bits = (unsigned short)(sign | bits);
    }
#endif
    return result;
}

__device__ inline floatX to_floatX(float value) {
#if FLOATX == BF16
    return to_bf16(value);
#elif FLOATX == FP16
    return to_fp16(value);
#else
    return value;
#endif
}

// --- 16 bytes at a time ---

// Memory is fastest when each thread moves 16 bytes with one instruction. WIDTH is how many numbers
// of floatX a kernel moves at a time: as many as 16 bytes hold, where the sizes of its tensors are
// multiples of that and so all pieces begin at multiples of 16 bytes, else 1.
#ifndef WIDTH
#define WIDTH 1
#endif

#if FLOATX != FP32
// Two floats rounded to floatX in one 32-bit register, `low` in the lower half.
__device__ inline unsigned int pack(float low, float high) {
#if __CUDA_ARCH__ >= 800
    unsigned int result;
#if FLOATX == BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
#endif
    return result;
#else
    return to_floatX(low).bits | (unsigned int)to_floatX(high).bits << 16;
#endif
}

// The two numbers in a register as floats.
__device__ inline float low(unsigned int pair) {
    floatX half;
    half.bits = (unsigned short)pair;
    return to_float(half);
}

__device__ inline float high(unsigned int pair) { return low(pair >> 16); }

#endif

// values[0 ... WIDTH - 1] = x[0 ... WIDTH - 1]
__device__ inline void load(float* values, const floatX* x) {
#if WIDTH == 1
    values[0] = to_float(x[0]);
#else
    uint4 words = *(const uint4*)x;
    unsigned int word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if FLOATX == FP32
        values[i] = __uint_as_float(word[i]);
#else
        values[2 * i] = low(word[i]);
        values[2 * i + 1] = high(word[i]);
#endif
    }
#endif
}

// y[0 ... WIDTH - 1] = values[0 ... WIDTH - 1], rounded
__device__ inline void store(floatX* y, const float* values) {
#if WIDTH == 1
    y[0] = to_floatX(values[0]);
#else
    unsigned int word[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if FLOATX == FP32
        word[i] = __float_as_uint(values[i]);
#else
        word[i] = pack(values[2 * i], values[2 * i + 1]);
#endif
    }
    *(uint4*)y = make_uint4(word[0], word[1], word[2], word[3]);
#endif
}

// --- constants ---

#define WARP 32                         // threads that run in step and can trade registers
#define MAX_WARPS 32                    // a block has at most 1024 threads
#define LARGEST_FLOAT 3.402823466e+38f  // the largest finite float32

// --- shared memory ---

// An array that all threads of the block see, at a multiple of 16 bytes. Nothing is in it until a
// thread writes it.
#ifndef GPU_GPT2_EMULATOR
#define SHARED_ARRAY(type, name, count) __shared__ __align__(16) type name[count]
#endif

// --- a warp together: all 32 threads must call these, or the hardware hangs ---

// The sum of `value` over groups of `width` neighbouring threads, in each of them. Pairs at
// distance width/2, then width/4, ... 1 are added: a fixed tree, the same bits in all threads.
__device__ inline float group_sum(float value, int width) {
    for (int distance = width / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, distance);
    }
    return value;
}

__device__ inline float warp_sum(float value) { return group_sum(value, WARP); }

// The row of a matrix that this thread's warp works on, with one warp per row.
__device__ inline int row_of_warp() {
    return blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
}

__device__ inline float warp_max(float value) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
    }
    return value;
}

// --- a block together: all its threads must call these; its size is a multiple of 32 ---
// `scratch` is shared memory of MAX_WARPS floats, free again when the call returns.
// One number per warp goes through shared memory; every thread then combines these in warp order.
// First barrier: all are written before any is read. Second: all are read before the next use.

__device__ inline float block_sum(float value, float* scratch) {
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) {
        scratch[threadIdx.x / WARP] = value;
    }
    __syncthreads();
    float total = 0.0f;
    for (int warp = 0; warp < (int)blockDim.x / WARP; warp++) {
        total += scratch[warp];
    }
    __syncthreads();
    return total;
}

__device__ inline float block_max(float value, float* scratch) {
    value = warp_max(value);
    if (threadIdx.x % WARP == 0) {
        scratch[threadIdx.x / WARP] = value;
    }
    __syncthreads();
    float largest = scratch[0];
    for (int warp = 1; warp < (int)blockDim.x / WARP; warp++) {
        largest = fmaxf(largest, scratch[warp]);
    }
    __syncthreads();
    return largest;
}

// --- sums down columns ---

// out[c] += the sum over chunks of partial[chunk * stride + c] for the 32 columns of this block, by
// 32 x 32 threads: warp w adds chunks w, w + 32 ..., then warp 0 adds the warps' sums, its own first.
// `tile` is shared memory of 32 x 32 floats, still being read when the call returns.
__device__ inline void add_chunks(float* out, const float* partial, int chunks, int columns,
                                  int stride, float* tile) {
    int c = blockIdx.x * WARP + threadIdx.x;
    float sum = 0.0f;
    if (c < columns) {
#pragma unroll 4
        for (int chunk = threadIdx.y; chunk < chunks; chunk += MAX_WARPS) {
            sum += partial[(long long)chunk * stride + c];
        }
    }
    tile[threadIdx.y * WARP + threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < columns) {
        float total = 0.0f;
        for (int warp = 0; warp < MAX_WARPS; warp++) {
            total += tile[warp * WARP + threadIdx.x];
        }
        out[c] += total;
    }
}

// --- a row of softmax, by a block ---

struct Softmax {
    float max;  // of the row
    float sum;  // of exp(x - max)
};

// Both numbers of the V values from x[row] on, in one read: each thread keeps the largest value it
// has met and the sum of exponentials relative to that, and rescales the sum when it meets a larger
// one (Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3).
// Starting from the lowest finite number, not from -infinity, keeps infinity - infinity away.
// Rows begin at multiples of WIDTH numbers; the last V % WIDTH are read one by one.
__device__ inline Softmax softmax_of_row(const floatX* x, long long row, int V, float* scratch) {
    float max = -LARGEST_FLOAT;
    float sum = 0.0f;
    int whole = V / WIDTH * WIDTH;
#pragma unroll 2
    for (int c = threadIdx.x * WIDTH; c < whole; c += blockDim.x * WIDTH) {
        float values[WIDTH];
        load(values, x + row + c);
        float largest = max;
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            largest = values[k] > largest ? values[k] : largest;
        }
        if (largest > max) {
            sum *= expf(max - largest);
            max = largest;
        }
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            sum += expf(values[k] - max);
        }
    }
    for (int c = whole + threadIdx.x; c < V; c += blockDim.x) {
        float value = to_float(x[row + c]);
        if (value > max) {
            sum *= expf(max - value);
            max = value;
        }
        sum += expf(value - max);
    }
    Softmax result;
    result.max = block_max(max, scratch);
    result.sum = block_sum(sum * expf(max - result.max), scratch);
    return result;
}
