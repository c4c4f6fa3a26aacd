// The base of every kernel file: the type floatX, 16-byte loads and stores, sums and maxima over a
// warp or a block. gpu_gpt2/device/source.py puts this text in front of each .cu file.
//
// No CUDA or C++ header is included here or in any kernel file, so that one text passes through
// NVRTC, nvcc and, for the emulator, g++. The emulator defines GPU_GPT2_EMULATOR and puts its own
// definitions of CUDA's names (__global__, threadIdx, __syncthreads, __shfl_xor_sync, expf ...) in
// front of this text, so that no kernel depends on whether a GPU or the emulator runs it.
//
// README.md beside this file gives an order to read the kernels in.

// --- types ---

// The two 16-bit formats. Values are only stored in them: arithmetic is done in float32, or by a
// tensor core. bfloat16 is the upper half of a float32. float16 has 5 bits of exponent and 11
// significant bits: 6.1e-5 to 65504 at full accuracy, down to 6.0e-8 at less.
struct bf16 {
    unsigned short bits;
};
struct fp16 {
    unsigned short bits;
};

// floatX, the X of the tables in all kernel files, is the type of activations and weights: float32,
// bfloat16 or float16. It is chosen when a file is compiled: -DFLOATX=FP32, BF16 or FP16.
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
    // Shifted to where a float32 has its exponent and digits, the bits of a float16 mean a value
    // that is 2^112 times too small, as the two exponents count from 15 and 127. The multiplication
    // corrects this, for subnormal values too, and is exact.
    return __uint_as_float(sign | magnitude << 13) * __uint_as_float((127u + 112u) << 23);
#endif
}

// Rounds to nearest, ties to even. The upper 16 bits are kept. Adding 0x7fff carries into them when
// the lower 16 bits are above one half of the last kept place; adding the last kept bit as well
// rounds a tie to the even neighbour. A NaN is not rounded, because the carry could make it
// infinite: its lower bits are dropped and its quiet bit is set.
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

// Rounds to nearest, ties to even. Magnitudes of 65520 and more become infinite.
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
    } else if (bits >= 0x477ff000u) {  // magnitude 65520 or more
        result.bits = (unsigned short)(sign | 0x7c00u);
    } else if (bits < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
        bits = __float_as_uint(__uint_as_float(bits) + 0.5f) - 0x3f000000u;
        result.bits = (unsigned short)(sign | bits);
    } else {  // rounded as in to_bf16, but 13 bits are dropped and the exponent is 112 smaller
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

// Memory is fastest when each thread moves 16 bytes with one instruction. WIDTH is the number of
// floatX elements that a thread moves at a time: as many as 16 bytes hold if the sizes of the
// kernel's tensors are multiples of that number, so that all pieces begin at multiples of 16 bytes;
// otherwise 1.
#ifndef WIDTH
#define WIDTH 1
#endif

#if FLOATX != FP32
// Returns two floats, rounded to floatX, in one 32-bit register, `low` in its lower half.
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

// Returns the lower floatX of a register as a float.
__device__ inline float low(unsigned int pair) {
    floatX half;
    half.bits = (unsigned short)pair;
    return to_float(half);
}

// Returns the upper floatX of a register as a float.
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

// y[0 ... WIDTH - 1] = values[0 ... WIDTH - 1], rounded to floatX
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

#define WARP 32                         // threads of a warp, which can exchange registers
#define MAX_WARPS 32                    // warps of a block of 1024 threads, the largest there is
#define LARGEST_FLOAT 3.402823466e+38f  // the largest finite float32

// --- shared memory ---

// Declares an array in shared memory, which all threads of the block see. It begins at a multiple
// of 16 bytes and is not initialized. (The emulator has its own definition.)
#ifndef GPU_GPT2_EMULATOR
#define SHARED_ARRAY(type, name, count) __shared__ __align__(16) type name[count]
#endif

// --- a warp together: all 32 threads must call these functions, or the GPU hangs ---

// Returns to each thread the sum of `value` over its group of `width` neighbouring threads. Pairs
// at distance width / 2, then width / 4, ... 1 are added: a fixed tree, so that all threads of a
// group get the same bits.
__device__ inline float group_sum(float value, int width) {
    for (int distance = width / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, distance);
    }
    return value;
}

__device__ inline float warp_sum(float value) { return group_sum(value, WARP); }

// Returns the row that this thread's warp works on, in kernels with one warp per row.
__device__ inline int row_of_warp() {
    return blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
}

__device__ inline float warp_max(float value) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
    }
    return value;
}

// --- a block together: all threads must call these functions; blocks are a multiple of 32 ---
// `scratch` is shared memory of MAX_WARPS floats, which may be used again when the call returns.
// Each warp writes its result to shared memory; then every thread combines the results in the order
// of the warps. The first barrier lets no thread read before all warps have written. The second
// lets no thread use `scratch` again before all have read.

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
