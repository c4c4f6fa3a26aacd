// Muon: the update of a matrix is its momentum with all singular values brought close to 1. These
// kernels are the elementwise parts; the matmuls between them are the library's.
//
//     m += (1 - mu) (g - m)                  g = grad * grad_factor; running mean of the gradients
//     u = m + (1 - mu) (g - m)               Nesterov: one more step of the mean towards g
//     x = u / max(norm of u, eps)            Frobenius norm: no singular value is above 1
//     five times:
//         gram = x x^T                       or x^T x, whichever is smaller
//         p = a I + b gram + c gram gram
//         x = p x                            or x p
//     w -= lr (scale x + decay w)
//
// The five steps leave the singular vectors of x as they are, and turn each singular value s into
// a s + b s^3 + c s^5. In the end, those that were 0.002 or more are between 0.68 and 1.21.
//
// kernel                   outputs                             inputs
// muon_momentum_partial    m (O, I), updated;                  grad (O, I), factors (5) float32
//                          partial (blocks) float32 =
// muon_normalize           x (O, I) X =                        partial (blocks), m, grad (O, I),
//                                                              factors (5) float32
// muon_polynomial          p (K, K) X =                        gram (K, K) X,
//                                                              square (K, K) float32
// muon_update              master (n) float32, updated;        x (n) X, factors (5) float32
//                          param (n) X = master rounded to X
//
// factors.cuh names the elements of factors. If factors.apply is 0, m, master and param stay as
// they are and x is 0: the gradient, which may not be finite, is not read.
//
// muon_momentum_partial, muon_normalize: thread i of the T threads of the grid takes elements i,
// i + T, i + 2T ... of a matrix of n = O I elements. The first kernel writes the sum of u^2 of each
// block to `partial`. Each block of the second adds all of `partial`, thread t the sums t,
// t + blockDim.x ...; then block_sum. So all blocks get the same bits. Both have the same grid.
// Blocks are a multiple of 32 threads; shared: 32 floats.
// muon_polynomial: blockIdx.x is the row; thread t of block y takes column y blockDim.x + t.
// muon_update: thread i of the grid updates element i.
// Elements are loaded one by one, because a matrix may begin anywhere in its arena. Grid and block:
// `muon_momentum`, `muon_polynomial` and `muon_update` in gpu_gpt2/ops/kernels.py.
//
// Cost per element of a matrix, with X of 2 bytes: 12 bytes for m and the norm, 10 for x, 12 for
// the update; 8 bytes per element of p. Memory binds. The matmuls of the five steps take
// 10 min(O, I)^2 (2 max(O, I) + min(O, I)) flops, and most of the time.
//
// Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". The mean
// of the gradients, where they have a sum, is that of torch.optim.Muon; x is the same with both.

#include "factors.cuh"

// Returns m moved towards g by a share of the distance.
__device__ inline float moved(float m, float g, float share) { return m + share * (g - m); }

extern "C" __global__ void muon_momentum_partial(float* m, float* partial, const float* grad,
                                                 const float* factors, long long n,
                                                 float one_minus_momentum) {
    SHARED_ARRAY(float, scratch, MAX_WARPS);
    const Factors* update = (const Factors*)factors;
    bool apply = update->apply != 0.0f;
    float sum = 0.0f;
    long long threads = (long long)gridDim.x * blockDim.x;
    long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (long long i = first; apply && i < n; i += threads) {
        float g = grad[i] * update->grad_factor;
        float mean = moved(m[i], g, one_minus_momentum);
        m[i] = mean;
        float u = moved(mean, g, one_minus_momentum);
        sum += u * u;
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
    }
}

extern "C" __global__ void muon_normalize(floatX* x, const float* partial, const float* m,
                                          const float* grad, const float* factors, long long n,
                                          float one_minus_momentum, float eps) {
    SHARED_ARRAY(float, scratch, MAX_WARPS);
    const Factors* update = (const Factors*)factors;
    bool apply = update->apply != 0.0f;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < (int)gridDim.x; i += blockDim.x) {
        sum += partial[i];
    }
    float norm = fmaxf(sqrtf(block_sum(sum, scratch)), eps);
    long long threads = (long long)gridDim.x * blockDim.x;
    long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (long long i = first; i < n; i += threads) {
        float u = apply ? moved(m[i], grad[i] * update->grad_factor, one_minus_momentum) : 0.0f;
        x[i] = to_floatX(u / norm);
    }
}

extern "C" __global__ void muon_polynomial(floatX* p, const floatX* gram, const float* square,
                                           int K, float a, float b, float c) {
    int row = blockIdx.x;
    int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= K) {
        return;
    }
    long long i = (long long)row * K + column;
    float identity = row == column ? a : 0.0f;
    p[i] = to_floatX(identity + (b * to_float(gram[i]) + c * square[i]));
}

extern "C" __global__ void muon_update(float* master, floatX* param, const floatX* x,
                                       const float* factors, long long n, float scale,
                                       float weight_decay) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const Factors* update = (const Factors*)factors;
    if (i >= n || update->apply == 0.0f) {
        return;
    }
    float w = master[i];
    w -= update->lr * (scale * to_float(x[i]) + weight_decay * w);
    master[i] = w;
#if FLOATX != FP32
    param[i] = to_floatX(w);
#endif
}
