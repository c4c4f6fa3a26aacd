// GELU, the activation of the MLP, in GPT-2's tanh form, applied to the sum of x and a bias.
//
//     y = 0.5 z (1 + tanh(u)),   z = x + b,   u = s (z + c z^3),   s = sqrt(2 / pi),  c = 0.044715
//
// kernel      outputs         inputs
// gelu_fwd    y (N, O) X =    x (N, O), b (O) X
// gelu_bwd    dx (N, O) X =   dy, x (N, O), b (O) X          dx may be dy
//
// Both kernels add the bias themselves, because a separate pass over x would double the bytes that
// the forward pass moves.
//
// Who does what. One block per row, whose threads stride over pieces of WIDTH columns (see
// common.cuh); O is a multiple of WIDTH. Blocks may have any size. No shared memory, no sums. Grid
// and block: `gelu_fwd` and `gelu_bwd` in gpu_gpt2/ops/kernels.py.
//
// Because 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)) = sigmoid(2u), one exponential is enough in both
// directions, and no digits cancel where tanh comes close to -1:
//
//     y = z sigmoid(2u)
//     dy/dz = sigmoid(2u) + z sigmoid(2u) (1 - sigmoid(2u)) 2 u',   u' = s (1 + 3 c z^2)
//
// Cost per element, X = size of floatX: 2X bytes forward (x, y), 3X backward (dy, x, dx); about 20
// flops. A GPU does tens of flops in the time it moves one byte, so memory binds.
//
// Source: Hendrycks & Gimpel 2016, "Gaussian Error Linear Units", section 2.

#define GELU_SCALE 0.7978845608028654f  // sqrt(2 / pi)
#define GELU_CUBIC 0.044715f
#define GELU_FLAT 10.0f  // beyond +-10 the derivative is 0 or 1 to within 1e-35

// GELU(x) = x sigmoid(2u)
__device__ inline float gelu(float x) {
    float u = GELU_SCALE * (x + GELU_CUBIC * x * x * x);
    return x / (1.0f + expf(-2.0f * u));
}

// The derivative of GELU at x.
__device__ inline float gelu_grad(float x) {
    // Far from zero x^2 and the exponential overflow, and infinity times zero is a NaN. The
    // derivative is constant there, so x is clamped first. (fminf would turn a NaN into a finite
    // number.)
    x = x > GELU_FLAT ? GELU_FLAT : x < -GELU_FLAT ? -GELU_FLAT : x;
    float u = GELU_SCALE * (x + GELU_CUBIC * x * x * x);
    float du = GELU_SCALE * (1.0f + 3.0f * GELU_CUBIC * x * x);
    float e = expf(-2.0f * u);
    float sigmoid = 1.0f / (1.0f + e);
    return sigmoid + x * sigmoid * (e * sigmoid) * 2.0f * du;  // e sigmoid = 1 - sigmoid
}

extern "C" __global__ void gelu_fwd(floatX* y, const floatX* x, const floatX* b, int O) {
    long long row = (long long)blockIdx.x * O;
    for (int c = threadIdx.x * WIDTH; c < O; c += blockDim.x * WIDTH) {
        float values[WIDTH];
        float bias[WIDTH];
        load(values, x + row + c);
        load(bias, b + c);
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            values[k] = gelu(values[k] + bias[k]);
        }
        store(y + row + c, values);
    }
}

extern "C" __global__ void gelu_bwd(floatX* dx, const floatX* dy, const floatX* x, const floatX* b,
                                    int O) {
    long long row = (long long)blockIdx.x * O;
    for (int c = threadIdx.x * WIDTH; c < O; c += blockDim.x * WIDTH) {
        float values[WIDTH];
        float bias[WIDTH];
        float gradients[WIDTH];
        load(values, x + row + c);
        load(bias, b + c);
        load(gradients, dy + row + c);
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            gradients[k] *= gelu_grad(values[k] + bias[k]);
        }
        store(dx + row + c, gradients);
    }
}
