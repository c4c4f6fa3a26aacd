// One AdamW update of all parameters, with their gradient clipped to its norm.
//
//     g = grad * min(1, max_norm / sqrt(grad_sq))
//     m += (1 - beta1) (g - m)                  mean of the gradients so far
//     v += (1 - beta2) (g^2 - v)                mean of their squares
//     w -= lr ((m / c1) / (sqrt(v / c2) + eps) + decay w)
//
// with c1 = 1 - beta1^step and c2 = 1 - beta2^step, which make up for m and v having begun at 0.
//
// kernel   outputs                                    inputs
// adamw    master, m, v (n) float32, updated;         grad (n), grad_sq (1) float32
//          param (n) X = master rounded to X
//
// Weights live twice when X is bfloat16: an update is often smaller than half the last place of a
// bfloat16 weight and would be rounded away, so it is the float32 master that is updated. With X =
// float32 master and param are the same memory (hence no __restrict__ here).
// Only the first `decayed` elements (the matrices) decay. Numbers that depend on the step alone are
// made on the host in float64: 1 - 0.999f in float32 would be wrong in its fifth digit.
// If grad_sq is infinite or not a number nothing is changed: one bad batch must not end a run.
//
// Thread i of all threads in the grid updates element i. Block: any number of threads; grid: enough
// blocks for n threads. No shared memory, no sums.
//
// Cost per element: 16 bytes read, 12 + X written; about 15 flops, one division and one square root
// among them. Memory binds.
//
// Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2.

extern "C" __global__ void adamw(float* master, float* m, float* v, floatX* param,
                                 const float* grad, const float* grad_sq, long long n,
                                 long long decayed, float lr, float one_minus_beta1,
                                 float one_minus_beta2, float eps, float weight_decay,
                                 float max_norm, float c1, float c2) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    float squared = grad_sq[0];
    bool finite = squared <= LARGEST_FLOAT;  // false for a NaN too
    if (i >= n || !finite) {
        return;
    }
    float norm = sqrtf(squared);
    float g = grad[i] * (norm > max_norm ? max_norm / norm : 1.0f);

    float m_new = m[i] + one_minus_beta1 * (g - m[i]);
    float v_new = v[i] + one_minus_beta2 * (g * g - v[i]);
    m[i] = m_new;
    v[i] = v_new;

    float w = master[i];
    float decay = i < decayed ? weight_decay : 0.0f;
    w -= lr * ((m_new / c1) / (sqrtf(v_new / c2) + eps) + decay * w);
    master[i] = w;
    param[i] = to_floatX(w);
}
