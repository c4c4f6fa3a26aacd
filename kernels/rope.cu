// Rotary position embedding (RoPE) of queries and keys, in place, and the inverse rotation of their
// gradients.
//
//     a' = a cos - b sin,   b' = a sin + b cos      for each pair (a, b) = elements 2j and 2j + 1
//
// cos and sin are those of the angle p theta^(-2j / D) at position p = starts[b] + t of the
// sequence. The table `angles` holds them in the order of the elements: cos at 2j, sin at 2j + 1.
//
// kernel     outputs                      inputs
// rope_fwd   qkv (B, T, R, D) X +=        starts (B) int, angles (>=T, D) float32
// rope_bwd   dqkv (B, T, R, D) X +=       starts (B) int, angles (>=T, D) float32
//
// A row of R heads holds H queries, kv_heads keys and kv_heads values; all but the values are
// rotated. The backward pass rotates by the negative angle: the transpose of a rotation is its
// inverse.
//
// Who does what. One block per row (b, t), whose threads stride over pieces of PIECE elements of
// the rotated heads: as many as 16 bytes hold if D is a multiple of that number, WIDTH (see
// common.cuh), otherwise one pair. A piece lies within one head. Blocks may have any size. No
// shared memory, no sums. Grid and block: `rope_fwd` and `rope_bwd` in gpu_gpt2/ops/kernels.py.
//
// Cost in bytes, X = size of floatX: B T (R - kv_heads) D 2X, and D 4 for each position; 3 flops
// per element. Memory binds.
//
// Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding",
// equation 34.

#if WIDTH == 1
#define PIECE 2  // elements that a thread rotates at a time
#else
#define PIECE WIDTH
#endif

// values[0 ... PIECE - 1] = angles[0 ... PIECE - 1]
__device__ inline void load_angles(float* values, const float* angles) {
#if WIDTH == 1
    values[0] = angles[0];
    values[1] = angles[1];
#else
#pragma unroll
    for (int k = 0; k < PIECE; k += 4) {
        float4 vector = *(const float4*)(angles + k);
        values[k] = vector.x;
        values[k + 1] = vector.y;
        values[k + 2] = vector.z;
        values[k + 3] = vector.w;
    }
#endif
}

// Rotates this block's row of x (B, T, R, D) by `direction` times the angles of its position.
__device__ inline void rotate_row(floatX* x, const int* starts, const float* angles, int T, int R,
                                  int D, int kv_heads, float direction) {
    floatX* row = x + (long long)blockIdx.x * R * D;
    int position = starts[blockIdx.x / T] + blockIdx.x % T;
    const float* angle = angles + (long long)position * D;
    int rotated = (R - kv_heads) * D;
    for (int i = threadIdx.x * PIECE; i < rotated; i += blockDim.x * PIECE) {
        float values[PIECE];
        float turn[PIECE];
#pragma unroll
        for (int k = 0; k < PIECE; k += WIDTH) {
            load(values + k, row + i + k);
        }
        load_angles(turn, angle + i % D);
#pragma unroll
        for (int k = 0; k < PIECE; k += 2) {
            float a = values[k];
            float b = values[k + 1];
            float cos = turn[k];
            float sin = direction * turn[k + 1];
            values[k] = a * cos - b * sin;
            values[k + 1] = a * sin + b * cos;
        }
#pragma unroll
        for (int k = 0; k < PIECE; k += WIDTH) {
            store(row + i + k, values + k);
        }
    }
}

extern "C" __global__ void rope_fwd(floatX* qkv, const int* starts, const float* angles, int T,
                                    int R, int D, int kv_heads) {
    rotate_row(qkv, starts, angles, T, R, D, kv_heads, 1.0f);
}

extern "C" __global__ void rope_bwd(floatX* dqkv, const int* starts, const float* angles, int T,
                                    int R, int D, int kv_heads) {
    rotate_row(dqkv, starts, angles, T, R, D, kv_heads, -1.0f);
}
