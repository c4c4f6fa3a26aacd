// GELU, the activation of the MLP, in GPT-2's tanh form.
//
//     y = 0.5 x (1 + tanh(u)),   u = s (x + c x^3),   s = sqrt(2 / pi),  c = 0.044715
//
// kernel      outputs        inputs
// gelu_fwd    y X =          x X
// gelu_bwd    dx X =         dy X, x X               dx may be dy
//
// All tensors have n elements in one row, n a multiple of WIDTH (see common.cuh). Thread i of all
// threads in the grid makes the WIDTH elements from i WIDTH on. Block: any number of threads; grid:
// enough blocks for n elements. No shared memory, no sums.
//
// Because 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)) = sigmoid(2u), one exponential does for both
// directions, and neither cancels where tanh comes close to -1:
//
//     y = x sigmoid(2u)
//     dy/dx = sigmoid(2u) + x sigmoid(2u) (1 - sigmoid(2u)) 2 u',   u' = s (1 + 3 c x^2)
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

extern "C" __global__ void gelu_fwd(floatX* y, const floatX* x, long long n) {
    long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (i >= n) {
        return;
    }
    float values[WIDTH];
    load(values, x + i);
#pragma unroll
    for (int k = 0; k < WIDTH; k++) {
        values[k] = gelu(values[k]);
    }
    store(y + i, values);
}

extern "C" __global__ void gelu_bwd(floatX* dx, const floatX* dy, const floatX* x, long long n) {
    long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (i >= n) {
        return;
    }
    float values[WIDTH];
    float gradients[WIDTH];
    load(values, x + i);
    load(gradients, dy + i);
#pragma unroll
    for (int k = 0; k < WIDTH; k++) {
        gradients[k] *= slope_of_gelu(values[k]);
    }
    store(dx + i, gradients);
}
