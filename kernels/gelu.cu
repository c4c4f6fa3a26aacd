// GELU, the activation of the MLP, in GPT-2's tanh form, of a sum with a bias.
//
//     y = 0.5 z (1 + tanh(u)),   z = x + b,   u = s (z + c z^3),   s = sqrt(2 / pi),  c = 0.044715
//
// kernel      outputs         inputs
// gelu_fwd    y (N, O) X =    x (N, O), b (O) X
// gelu_bwd    dx (N, O) X =   dy, x (N, O), b (O) X          dx may be dy
//
// The bias comes in here, and again in the backward pass, so that no pass over x is spent on adding
// it. One block per row, whose threads stride over its pieces of WIDTH columns (see common.cuh), of
// which O is a multiple. grid (N), any block. No shared memory, no sums.
//
// Because 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)) = sigmoid(2u), one exponential does for both
// directions, and neither cancels where tanh comes close to -1:
//
//     y = z sigmoid(2u)
//     dy/dx = sigmoid(2u) + z sigmoid(2u) (1 - sigmoid(2u)) 2 u',   u' = s (1 + 3 c z^2)
//
// Cost per element in bytes of X: forward 2 moves (x, y), backward 3 (dy, x, dx); about 20 flops.
// A GPU does tens of flops in the time it moves one byte: memory binds.
//
// Source: Hendrycks & Gimpel 2016, "Gaussian Error Linear Units", section 2.

#define GELU_SCALE 0.7978845608028654f  // sqrt(2 / pi)
#define GELU_CUBIC 0.044715f
#define GELU_FLAT 10.0f  // beyond +-10 the slope is 0 or 1 to the last bit of float32

__device__ inline float gelu(float x) {
    float u = GELU_SCALE * (x + GELU_CUBIC * x * x * x);
    return x / (1.0f + expf(-2.0f * u));
}

__device__ inline float slope_of_gelu(float x) {
    // Further out x^2 and the exponential overflow, and infinity times zero is not a number. The
    // slope is flat there, so it is taken at the edge. (fminf would turn a NaN into a number.)
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
            gradients[k] *= slope_of_gelu(values[k] + bias[k]);
        }
        store(dx + row + c, gradients);
    }
}
