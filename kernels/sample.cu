// The next token of each sequence, drawn from a row of logits.
//
//     scale = log2(e) / temperature,      weight = 2^((x - max) scale),       p = weight / total
//     kept: x >= the top_k-th largest x, then the likeliest tokens up to the share top_p
//     token = the first one, in rising order of ids, whose running sum of kept weights exceeds
//             u total, with u uniform in [0, 1)
//
// kernel   outputs                               inputs
// sample   tokens (B) int =, starts (B) int +=   logits (B, Vp) X, key (2) int
//
// Rows of logits have Vp columns. The first V are the vocabulary; the rest is padding, which is
// never read. `starts` is the position of the newest token of each sequence and is increased by 1.
// scale = 0 takes the largest logit (the lowest id of equal ones), top_k = 0 and share = 0 keep all
// tokens; share is top_p times 2^63. A NaN among the logits, or a largest logit that is infinite,
// gives the token -1.
//
// Every device draws the same token from the same logits, because all sums and comparisons are
// those of integers, which have one result in any order:
//
// - A weight is an integer: 2^40 for the largest logit, and others rounded down. At most 2^22
//   weights sum to at most 2^62. A weight of less than 2^-40 of the largest becomes 0; 2^17 of them
//   would have 2^-23 of the largest one's probability. weight_of uses only operations that IEEE 754
//   rounds in one way, and none that a compiler may contract into a fused multiply-add, so the
//   float32 before it becomes an integer has the same bits everywhere (expf would not). GPUs take
//   numbers below 2^-126 for 0; scale is at most 2^75, at which that changes no weight.
// - Logits are compared by their keys: unsigned integers in the same order.
// - u is a random integer of 64 bits, and u total / 2^64 rounded down is an integer below total. No
//   probability is wrong by more than 2^-64. Philox (see philox.cuh) computes u from the position
//   of the drawn token, the index of the sequence, and the key.
//
// Who does what. One block per row. Each warp has one contiguous segment of the row, in which lanes
// stride over pieces of WIDTH columns (see common.cuh); Vp is a multiple of WIDTH, and a piece that
// V cuts is read column by column. The row is read once for the largest logit and once for the
// weights of the segments; then the warp whose segment holds the drawn token goes through its
// segment with a prefix sum over its lanes. top_k and top_p both look for the largest key c for
// which the tokens with keys from c on have a sum (of ones, or of weights) of at least a target:
// two bits of c are found per reading of the row, from the highest bits down, so each costs 8
// readings for the 16-bit types and 16 for float32. These come from cache. Blocks are a multiple of
// 32 threads; shared: 256 bytes. Grid and block: `sample` in gpu_gpt2/ops/kernels.py.
//
// Order of sums: any; see above.
//
// Cost in bytes, X = size of floatX: B V X, once from memory. A row keeps one multiprocessor busy
// with about 5 operations per element and reading, and 40 where the weight is needed; top_p needs
// the weights of only those elements whose keys agree with c so far. Latency and these operations
// bind.
//
// Source: Fan et al. 2018, "Hierarchical Neural Story Generation", section 5 (top_k); Holtzman et
// al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1 (top_p).

#include "philox.cuh"

typedef unsigned long long uint64;

#define ONE_LOG2 40          // log2 of the weight of the largest logit
#define LOWEST_LOG2 -64.0f   // logarithms of weights are not below this value; the weight is 0
#define DIGIT_BITS 2         // bits of a key that one reading of the row finds
#define DIGITS 4
#define NAN_KEY 0xffffffffu  // above the keys of all numbers
#if FLOATX == FP32
#define KEY_BITS 32
#else
#define KEY_BITS 16
#endif
#define SIGN (1u << (KEY_BITS - 1))

// The row of a block, and what its weights follow from.
struct Row {
    const floatX* logits;
    int V;
    int begin;     // first column of this thread's first piece
    int end;       // end of the warp's segment, at most V
    float max;     // the largest logit
    float scale;
};

#define PIECE_STRIDE (WARP * WIDTH)  // columns between two pieces of a thread

// values[0 ... WIDTH - 1] = the logits from column c on; -infinity from V on.
__device__ inline void load_logits(float* values, const Row& row, int c) {
    if (c + WIDTH <= row.V) {
        load(values, row.logits + c);
        return;
    }
#pragma unroll
    for (int k = 0; k < WIDTH; k++) {
        values[k] = c + k < row.V ? to_float(row.logits[c + k]) : __uint_as_float(0xff800000u);
    }
}

// Returns an integer that is in the order of the logits: larger for a larger logit, and equal for
// equal ones, as 0 and -0 are. The bits of positive numbers are in order, those of negative ones in
// reverse order.
__device__ inline unsigned int key_of(float value) {
    if (value != value) {
        return NAN_KEY;
    }
#if FLOATX == FP32
    unsigned int bits = __float_as_uint(value);
#else
    unsigned int bits = to_floatX(value).bits;
#endif
    if (bits < SIGN) {
        return bits | SIGN;
    }
    return bits == SIGN ? SIGN : ~bits & (SIGN - 1);
}

// Returns the weight 2^((value - max) scale) of a logit, times 2^ONE_LOG2 and rounded down. With
// t = n + f, n the nearest integer, 2^f is its Taylor polynomial: f is at most 1/2, and the terms
// left out are below 1e-8. The coefficients are ln(2)^k / k!.
__device__ inline uint64 weight_of(float value, const Row& row) {
    float t = fmaxf(__fmul_rn(value - row.max, row.scale), LOWEST_LOG2);
    float n = rintf(t);
    float f = t - n;
    float p = 1.52527338e-5f;
    p = __fadd_rn(__fmul_rn(p, f), 1.54035304e-4f);
    p = __fadd_rn(__fmul_rn(p, f), 1.33335581e-3f);
    p = __fadd_rn(__fmul_rn(p, f), 9.61812911e-3f);
    p = __fadd_rn(__fmul_rn(p, f), 5.55041087e-2f);
    p = __fadd_rn(__fmul_rn(p, f), 2.40226507e-1f);
    p = __fadd_rn(__fmul_rn(p, f), 6.93147181e-1f);
    p = __fadd_rn(__fmul_rn(p, f), 1.0f);
    float power = __uint_as_float((unsigned int)((int)n + ONE_LOG2 + 127) << 23);  // 2^(n + 40)
    return (uint64)(p * power);
}

__device__ inline uint64 warp_sum(uint64 value) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, distance);
    }
    return value;
}

// As block_sum in common.cuh, of integers.
__device__ inline uint64 block_sum(uint64 value, uint64* scratch) {
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) {
        scratch[threadIdx.x / WARP] = value;
    }
    __syncthreads();
    uint64 total = 0;
    for (int warp = 0; warp < (int)blockDim.x / WARP; warp++) {
        total += scratch[warp];
    }
    __syncthreads();
    return total;
}

// As block_max in common.cuh, of integers.
__device__ inline uint64 block_max(uint64 value, uint64* scratch) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        value = max(value, __shfl_xor_sync(0xffffffffu, value, distance));
    }
    if (threadIdx.x % WARP == 0) {
        scratch[threadIdx.x / WARP] = value;
    }
    __syncthreads();
    uint64 largest = scratch[0];
    for (int warp = 1; warp < (int)blockDim.x / WARP; warp++) {
        largest = max(largest, scratch[warp]);
    }
    __syncthreads();
    return largest;
}

// Returns the sum over this thread's pieces of the weights of tokens with keys from `least` on.
__device__ inline uint64 weight_of_thread(const Row& row, unsigned int least) {
    uint64 sum = 0;
    for (int c = row.begin; c < row.end; c += PIECE_STRIDE) {
        float values[WIDTH];
        load_logits(values, row, c);
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            if (key_of(values[k]) >= least) {
                sum += weight_of(values[k], row);
            }
        }
    }
    return sum;
}

// Returns the largest key c for which the tokens with keys from c on are at least `target` tokens
// or, with `weighted`, have at least the weight `target`. All tokens together must have `target`.
__device__ inline unsigned int find_key(const Row& row, uint64 target, bool weighted,
                                        uint64* scratch) {
    unsigned int c = 0;
    uint64 above = 0;  // what the tokens have whose keys are larger than all that c can become
    for (int shift = KEY_BITS - DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
        uint64 sums[DIGITS] = {};  // by the next digit of the keys that agree with c so far
        for (int i = row.begin; i < row.end; i += PIECE_STRIDE) {
            float values[WIDTH];
            load_logits(values, row, i);
#pragma unroll
            for (int k = 0; k < WIDTH; k++) {
                unsigned int key = key_of(values[k]);
                unsigned int digit = (key - c) >> shift;  // large if the key is below c or above
                if (digit < DIGITS && digit > 0) {
                    uint64 one = weighted ? weight_of(values[k], row) : 1;
#pragma unroll
                    for (unsigned int d = 1; d < DIGITS; d++) {
                        sums[d] += digit == d ? one : 0;
                    }
                }
            }
        }
        unsigned int found = 0;
#pragma unroll
        for (unsigned int d = DIGITS - 1; d > 0; d--) {
            if (found == 0) {
                uint64 sum = block_sum(sums[d], scratch);
                found = above + sum >= target ? d : 0;
                above += found == 0 ? sum : 0;
            }
        }
        c += found << shift;
    }
    return c;
}

// Returns 64 random bits for the token at `position` of a sequence.
__device__ inline uint64 random_bits(int position, int sequence, const int* key) {
    uint4 counter = make_uint4((unsigned int)position, (unsigned int)sequence, 0u, 0u);
    uint4 words = philox(counter, (unsigned int)key[0], (unsigned int)key[1]);
    return (uint64)words.y << 32 | words.x;
}

// Returns the token of this warp's segment with which the running sum of kept weights exceeds
// `drawn`, to one lane; -1 to the others. The whole warp calls this function.
__device__ inline int token_in_segment(const Row& row, unsigned int least, uint64 drawn) {
    int lane = threadIdx.x % WARP;
    for (int c = row.begin; c - lane * WIDTH < row.end; c += PIECE_STRIDE) {
        float values[WIDTH];
        uint64 weights[WIDTH];
        load_logits(values, row, c);
        uint64 sum = 0;  // of this lane's piece
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            weights[k] = key_of(values[k]) >= least ? weight_of(values[k], row) : 0;
            sum += weights[k];
        }
        uint64 running = sum;  // of the pieces up to this lane's
        for (int distance = 1; distance < WARP; distance *= 2) {
            uint64 other = __shfl_up_sync(0xffffffffu, running, distance);
            running += lane >= distance ? other : 0;
        }
        bool mine = running - sum <= drawn && drawn < running;
        if (__any_sync(0xffffffffu, mine)) {
            int token = -1;
            uint64 before = running - sum;
#pragma unroll
            for (int k = 0; k < WIDTH; k++) {
                if (mine && before <= drawn && drawn < before + weights[k]) {
                    token = c + k;
                }
                before += weights[k];
            }
            return token;
        }
        drawn -= __shfl_sync(0xffffffffu, running, WARP - 1);
    }
    return -1;  // not reached if the segment's weight is above `drawn`
}

extern "C" __global__ void sample(int* tokens, int* starts, const floatX* logits, const int* key,
                                  int V, int Vp, float scale, int top_k, long long share) {
    SHARED_ARRAY(uint64, scratch, MAX_WARPS);
    int b = blockIdx.x;
    int warp = threadIdx.x / WARP;
    int warps = blockDim.x / WARP;
    int position = starts[b] + 1;
    int pieces = (V + PIECE_STRIDE - 1) / PIECE_STRIDE;
    int segment = (pieces + warps - 1) / warps * PIECE_STRIDE;
    Row row;
    row.logits = logits + (long long)b * Vp;
    row.V = V;
    row.begin = warp * segment + threadIdx.x % WARP * WIDTH;
    row.end = min(V, (warp + 1) * segment);
    row.scale = scale;

    uint64 likeliest = 0;  // key, and below it the id, so that the lowest of equal tokens is largest
    for (int c = row.begin; c < row.end; c += PIECE_STRIDE) {
        float values[WIDTH];
        load_logits(values, row, c);
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            likeliest = max(likeliest, (uint64)key_of(values[k]) << 32 | (0xffffffffu - (c + k)));
        }
    }
    likeliest = block_max(likeliest, scratch);
    int argmax = (int)(0xffffffffu - (unsigned int)likeliest);
    row.max = to_float(row.logits[argmax]);
    bool damaged = !(fabsf(row.max) <= LARGEST_FLOAT);  // a NaN has the largest key
    if (damaged || scale == 0.0f) {
        if (threadIdx.x == 0) {
            tokens[b] = damaged ? -1 : argmax;
            starts[b] = position;
        }
        return;
    }

    unsigned int least = 0;  // the smallest key that is kept
    if (top_k > 0) {
        least = find_key(row, top_k, false, scratch);
    }
    if (share > 0) {
        // The target is top_p total, rounded up; share times 2 is top_p times 2^64. The tokens that
        // top_k keeps have the target together, so the key found is not below theirs.
        uint64 total = block_sum(weight_of_thread(row, least), scratch);
        uint64 target = __umul64hi(total, (uint64)share * 2);
        target += total * ((uint64)share * 2) != 0;
        least = find_key(row, target, true, scratch);
    }

    uint64 sum = warp_sum(weight_of_thread(row, least));
    if (threadIdx.x % WARP == 0) {
        scratch[warp] = sum;
    }
    __syncthreads();
    uint64 total = 0;
    for (int i = 0; i < warps; i++) {
        total += scratch[i];
    }
    uint64 drawn = __umul64hi(random_bits(position, b, key), total);
    int owner = 0;
    for (; drawn >= scratch[owner]; owner++) {
        drawn -= scratch[owner];
    }
    if (warp == owner) {
        int token = token_in_segment(row, least, drawn);
        if (token >= 0) {
            tokens[b] = token;
            starts[b] = position;
        }
    }
}
