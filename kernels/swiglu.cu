// SwiGLU, the activation of Llama's MLP: the first half of a row, after silu, times the second.
//
//     y = silu(gate) up,   silu(z) = z sigmoid(z),   gate = u[:, 0],  up = u[:, 1]
//
// kernel       outputs            inputs
// swiglu_fwd   y (N, F) X =       u (N, 2, F) X
// swiglu_bwd   du (N, 2, F) X =   dy (N, F), u (N, 2, F) X
//
// Who does what. One block per row, whose threads stride over pieces of WIDTH columns (see
// common.cuh); F is a multiple of WIDTH. A thread takes the same columns of gate and up. Blocks may
// have any size. No shared memory, no sums. Grid and block: `swiglu_fwd` and `swiglu_bwd` in
// gpu_gpt2/ops/kernels.py.
//
//     dgate = dy up (sigmoid(gate) + silu(gate) (1 - sigmoid(gate)))
//     dup = dy silu(gate)
//
// Cost per element of y, X = size of floatX: 3X bytes forward (gate, up, y), 5X backward (dy, gate,
// up, dgate, dup); about 10 and 20 flops. Memory binds.
//
// Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 6.

struct Sigmoid {
    float value;  // sigmoid(z)
    float rest;   // 1 - sigmoid(z) = sigmoid(-z), with all its digits
};

// Returns the sigmoid of z. The exponential of -|z| cannot overflow; exp(-z) could, and infinity
// times zero in the derivative is a NaN.
__device__ inline Sigmoid sigmoid(float z) {
    float e = expf(-fabsf(z));
    float larger = 1.0f / (1.0f + e);  // of the two, the one that is at least one half
    float smaller = e * larger;
    Sigmoid result;
    result.value = z < 0.0f ? smaller : larger;
    result.rest = z < 0.0f ? larger : smaller;
    return result;
}

extern "C" __global__ void swiglu_fwd(floatX* y, const floatX* u, int F) {
    long long row = (long long)blockIdx.x * F;
    for (int c = threadIdx.x * WIDTH; c < F; c += blockDim.x * WIDTH) {
        float gate[WIDTH];
        float up[WIDTH];
        load(gate, u + 2 * row + c);
        load(up, u + 2 * row + F + c);
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            up[k] *= gate[k] * sigmoid(gate[k]).value;
        }
        store(y + row + c, up);
    }
}

extern "C" __global__ void swiglu_bwd(floatX* du, const floatX* dy, const floatX* u, int F) {
    long long row = (long long)blockIdx.x * F;
    for (int c = threadIdx.x * WIDTH; c < F; c += blockDim.x * WIDTH) {
        float gate[WIDTH];
        float up[WIDTH];
        float gradients[WIDTH];
        load(gate, u + 2 * row + c);
        load(up, u + 2 * row + F + c);
        load(gradients, dy + row + c);
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            Sigmoid s = sigmoid(gate[k]);
            float silu = gate[k] * s.value;
            gate[k] = gradients[k] * up[k] * (s.value + silu * s.rest);
            up[k] = gradients[k] * silu;
        }
        store(du + 2 * row + c, gate);
        store(du + 2 * row + F + c, up);
    }
}
