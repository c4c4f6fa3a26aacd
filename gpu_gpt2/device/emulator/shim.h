// CUDA's built-in names in plain C++. build.py puts this text in front of a kernel's text, so that
// a host compiler accepts the kernel unchanged. Only what CUDA C offers without any header is here,
// and no header is included, so that a kernel which needs more fails here as it would in NVRTC. The
// functions named emulator_* are in runtime/runtime.cpp.

#define GPU_GPT2_EMULATOR 1

// --- function and variable qualifiers ---

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")

// --- shared memory ---

// Blocks run one after another, so a static variable can serve as shared memory. Before each shared
// variable lies a guard array that no kernel may touch: an index past the end of one variable, or
// before the start of the next, lands in the guard and is reported.
#define EMULATOR_JOIN_(a, b) a##b
#define EMULATOR_JOIN(a, b) EMULATOR_JOIN_(a, b)
#define __shared__                                                                        \
    static char EMULATOR_JOIN(emulator_guard_, __COUNTER__)[256] __attribute__((used)); \
    static

#define SHARED_ARRAY(type, name, count) __shared__ __align__(16) type name[count]
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(emulator_dynamic_shared())

// --- vector types ---

struct uint2 { unsigned int x, y; } __align__(8);
struct uint3 { unsigned int x, y, z; };
struct uint4 { unsigned int x, y, z, w; } __align__(16);
struct int2 { int x, y; } __align__(8);
struct int4 { int x, y, z, w; } __align__(16);
struct float2 { float x, y; } __align__(8);
struct float3 { float x, y, z; };
struct float4 { float x, y, z, w; } __align__(16);

#define EMULATOR_INLINE static inline __attribute__((always_inline, unused))

EMULATOR_INLINE uint2 make_uint2(unsigned int x, unsigned int y) { return {x, y}; }
EMULATOR_INLINE uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w) {
    return {x, y, z, w};
}
EMULATOR_INLINE int2 make_int2(int x, int y) { return {x, y}; }
EMULATOR_INLINE int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
EMULATOR_INLINE float2 make_float2(float x, float y) { return {x, y}; }
EMULATOR_INLINE float3 make_float3(float x, float y, float z) { return {x, y, z}; }
EMULATOR_INLINE float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// --- the runtime ---

extern "C" {
// The runtime changes these variables when it switches threads. No thread ever sees them change, so
// they can be const here, which also keeps the compiler from reporting reads of them as memory
// accesses.
extern const uint3 threadIdx __asm__("emulator_thread_index");
extern const uint3 blockIdx __asm__("emulator_block_index");
extern const uint3 blockDim __asm__("emulator_block_size");
extern const uint3 gridDim __asm__("emulator_grid_size");

void* emulator_dynamic_shared(void);
void emulator_syncthreads(const char* file, int line);
unsigned long long emulator_collective(int kind, unsigned int mask, unsigned long long value,
                                       int operand, int width, const char* file, int line);
int emulator_atomic_add(int* address, int value);
void emulator_mma(float* c, const unsigned int* a, const unsigned int* b, int bf16,
                  const char* file, int line);
void emulator_ldmatrix(unsigned int* words, const void* row, int transposed, const char* file,
                       int line);
void emulator_cp_async(void* to, const void* from, int bytes, int exists);
void emulator_cp_async_wait_all(void);
[[noreturn]] void emulator_trap(const char* file, int line);
}

// File and line of the call, as default arguments of the functions below.
#define EMULATOR_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

EMULATOR_INLINE void __syncthreads(EMULATOR_PLACE) { emulator_syncthreads(file, line); }
[[noreturn]] EMULATOR_INLINE void __trap(EMULATOR_PLACE) { emulator_trap(file, line); }

// --- a warp together; the first argument of each call is enum Kind of runtime/state.h ---

template <typename T>
EMULATOR_INLINE T emulator_shuffle(int kind, unsigned int mask, T value, int operand, int width,
                                   const char* file, int line) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    unsigned long long bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(T));
    bits = emulator_collective(kind, mask, bits, operand, width, file, line);
    __builtin_memcpy(&value, &bits, sizeof(T));
    return value;
}

template <typename T>
EMULATOR_INLINE T __shfl_sync(unsigned int mask, T value, int lane, int width = 32,
                              EMULATOR_PLACE) {
    return emulator_shuffle(0, mask, value, lane, width, file, line);
}
template <typename T>
EMULATOR_INLINE T __shfl_up_sync(unsigned int mask, T value, unsigned int delta, int width = 32,
                                 EMULATOR_PLACE) {
    return emulator_shuffle(1, mask, value, (int)delta, width, file, line);
}
template <typename T>
EMULATOR_INLINE T __shfl_down_sync(unsigned int mask, T value, unsigned int delta, int width = 32,
                                   EMULATOR_PLACE) {
    return emulator_shuffle(2, mask, value, (int)delta, width, file, line);
}
template <typename T>
EMULATOR_INLINE T __shfl_xor_sync(unsigned int mask, T value, int lane_mask, int width = 32,
                                  EMULATOR_PLACE) {
    return emulator_shuffle(3, mask, value, lane_mask, width, file, line);
}
EMULATOR_INLINE unsigned int __ballot_sync(unsigned int mask, int predicate, EMULATOR_PLACE) {
    return (unsigned int)emulator_collective(4, mask, predicate != 0, 0, 32, file, line);
}
EMULATOR_INLINE int __any_sync(unsigned int mask, int predicate, EMULATOR_PLACE) {
    return emulator_collective(5, mask, predicate != 0, 0, 32, file, line) != 0;
}
EMULATOR_INLINE int __all_sync(unsigned int mask, int predicate, EMULATOR_PLACE) {
    return emulator_collective(6, mask, predicate != 0, 0, 32, file, line) == mask;
}
EMULATOR_INLINE void __syncwarp(unsigned int mask = 0xffffffffu, EMULATOR_PLACE) {
    emulator_collective(7, mask, 0, 0, 32, file, line);
}

// --- atomics: integers only, because a sum of floats in no fixed order is not reproducible ---

EMULATOR_INLINE int atomicAdd(int* address, int value) {
    return emulator_atomic_add(address, value);
}
EMULATOR_INLINE unsigned int atomicAdd(unsigned int* address, unsigned int value) {
    return (unsigned int)emulator_atomic_add((int*)address, (int)value);
}

// --- arithmetic ---

extern "C" {
float expf(float);
float expm1f(float);
float exp2f(float);
float logf(float);
float log2f(float);
float log1pf(float);
float tanhf(float);
float erff(float);
float powf(float, float);
float sqrtf(float);
float fmaf(float, float, float);
float fmaxf(float, float);
float fminf(float, float);
float fabsf(float);
float floorf(float);
float ceilf(float);
float rintf(float);
float roundf(float);
}

// A product and a sum that are rounded one after the other, never contracted into a fused
// multiply-add.
EMULATOR_INLINE float __fmul_rn(float a, float b) { return a * b; }
EMULATOR_INLINE float __fadd_rn(float a, float b) { return a + b; }

// The upper 64 bits of a product of 128.
EMULATOR_INLINE unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}

// c + the sum of the products of the four signed bytes of a and of b.
EMULATOR_INLINE int __dp4a(int a, int b, int c) {
    unsigned int sum = (unsigned int)c;
    for (int shift = 0; shift < 32; shift += 8) {
        sum += (unsigned int)((signed char)(a >> shift) * (signed char)(b >> shift));
    }
    return (int)sum;
}

EMULATOR_INLINE float rsqrtf(float value) { return 1.0f / sqrtf(value); }
EMULATOR_INLINE bool isfinite(float value) { return __builtin_isfinite(value); }
EMULATOR_INLINE bool isinf(float value) { return __builtin_isinf(value); }
EMULATOR_INLINE bool isnan(float value) { return __builtin_isnan(value); }

EMULATOR_INLINE unsigned int __float_as_uint(float value) {
    unsigned int bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}
EMULATOR_INLINE float __uint_as_float(unsigned int bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
EMULATOR_INLINE int __float_as_int(float value) { return (int)__float_as_uint(value); }
EMULATOR_INLINE float __int_as_float(int bits) { return __uint_as_float((unsigned int)bits); }

#define EMULATOR_MIN_MAX(type)                                              \
    EMULATOR_INLINE type min(type a, type b) { return b < a ? b : a; } \
    EMULATOR_INLINE type max(type a, type b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned int)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(unsigned long long)
EMULATOR_INLINE float min(float a, float b) { return fminf(a, b); }
EMULATOR_INLINE float max(float a, float b) { return fmaxf(a, b); }
// CUDA accepts one signed and one unsigned argument, and compares both as unsigned.
EMULATOR_INLINE unsigned int min(int a, unsigned int b) { return min((unsigned int)a, b); }
EMULATOR_INLINE unsigned int min(unsigned int a, int b) { return min(a, (unsigned int)b); }
EMULATOR_INLINE unsigned int max(int a, unsigned int b) { return max((unsigned int)a, b); }
EMULATOR_INLINE unsigned int max(unsigned int a, int b) { return max(a, (unsigned int)b); }
