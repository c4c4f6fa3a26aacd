// One AdamW update of all parameters, with their gradient clipped to a maximal norm.
//
//     g = grad * min(1, max_norm / norm) / loss_scale
//     m += (1 - beta1) (g - m)                  running mean of the gradients
//     v += (1 - beta2) (g^2 - v)                running mean of their squares
//     w -= lr ((m / c1) / (sqrt(v / c2) + eps) + decay w)
//
// with norm = sqrt(grad_sq) / loss_scale. c1 = 1 - beta1^t and c2 = 1 - beta2^t correct for m and v
// having begun at 0; t counts the updates.
//
// kernel           outputs                                    inputs
// prepare_update   factors (5), report (3) float32 =;         losses (N), grad_sq (1),
//                  loss_scale (1), counts (2) float32,        lr (1) float32
//                  updated
// adamw            master, m, v (n) float32, updated;         grad (n), factors (5) float32
//                  param (n) X = master rounded to X
//
// The structs below name the elements of factors, report and counts.
//
// All values that differ from step to step come from device memory, so that every step is the same
// launches with the same arguments, as a CUDA graph needs it. The host writes nothing but lr.
//
// The gradient of the loss is computed times loss_scale, which keeps small gradients within the
// range of a float16 (Micikevicius et al. 2018, "Mixed Precision Training", section 3.2). The scale
// doubles after growth_interval good steps and is halved when the gradient is not finite; that
// update is left out, as one bad batch must not end a run. The scale stays within 1 and max_scale,
// which is 1 where X has the range of a float32. Because the scale is a power of two, multiplying
// by it rounds nothing.
//
// c = 1 - beta^t is computed as -expm1(t log(beta)): every step of it is as exact as a float32 can
// be, while 1 - 0.999f alone is wrong in its fifth digit. log(beta) comes from the host.
//
// Weights live twice when X has 16 bits: an update is often smaller than half the last place of
// such a weight and would be rounded away, so it is the float32 master that is updated. With X =
// float32 master and param are the same memory (hence no __restrict__ here) and stored once.
// Only the first `decayed` elements (the matrices) decay.
//
// prepare_update: one block of a multiple of 32 threads; shared: 32 floats. Thread i adds losses i,
// i + threads ...; then block_sum.
// adamw: thread i of the grid updates elements 4i to 4i + 3, as float4 vectors; arrays begin at
// multiples of 16 bytes. No shared memory, no sums.
// Grid and block: `prepare_update` and `adamw` in gpu_gpt2/ops/kernels.py.
//
// Cost of adamw per element: 16 bytes read, 12 written, and X where X is not float32: 30 bytes in
// 16 bits, 28 in float32; about 15 flops, two divisions and a square root among them. Memory binds.
//
// Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2.

// factors: the scalars of the next update, from prepare_update to adamw.
struct Factors {
    float apply;        // 1, or 0 if the gradient is not finite: adamw then changes nothing
    float grad_factor;  // min(1, max_norm / norm) / loss_scale
    float lr;           // learning rate
    float c1;           // 1 - beta1^t
    float c2;           // 1 - beta2^t
};

// report: results for the host, which reads them after it has queued later launches.
struct Report {
    float loss;        // loss_weight times the sum of the losses
    float norm;        // norm of the gradient without loss_scale, before clipping
    float loss_scale;  // loss scale of the next step
};

// counts: the state that prepare_update keeps from step to step.
struct Counts {
    float updates;     // t, the number of updates made
    float good_steps;  // updates made since loss_scale last changed
};

extern "C" __global__ void prepare_update(float* factors, float* report, float* loss_scale,
                                          float* counts, const float* losses,
                                          const float* grad_sq, const float* lr, int N,
                                          float loss_weight, float log_beta1, float log_beta2,
                                          float max_norm, float max_scale,
                                          int growth_interval) {
    SHARED_ARRAY(float, scratch, MAX_WARPS);
    float loss = 0.0f;
    for (int i = threadIdx.x; i < N; i += blockDim.x) {
        loss += losses[i];
    }
    loss = block_sum(loss, scratch);
    if (threadIdx.x != 0) {
        return;
    }
    float scale = loss_scale[0];
    float norm = sqrtf(grad_sq[0]) / scale;
    bool finite = grad_sq[0] <= LARGEST_FLOAT;  // false for a NaN too

    Counts* made = (Counts*)counts;
    Factors* next = (Factors*)factors;
    float updates = made->updates + (finite ? 1.0f : 0.0f);
    next->apply = finite ? 1.0f : 0.0f;
    next->grad_factor = (norm > max_norm ? max_norm / norm : 1.0f) / scale;
    next->lr = lr[0];
    next->c1 = -expm1f(updates * log_beta1);
    next->c2 = -expm1f(updates * log_beta2);

    float good_steps = finite ? made->good_steps + 1.0f : 0.0f;
    if (!finite) {
        scale *= 0.5f;
    } else if (good_steps >= growth_interval) {
        scale *= 2.0f;
        good_steps = 0.0f;
    }
    scale = fminf(fmaxf(scale, 1.0f), max_scale);

    Report* result = (Report*)report;
    result->loss = loss * loss_weight;
    result->norm = norm;
    result->loss_scale = scale;
    loss_scale[0] = scale;
    made->updates = updates;
    made->good_steps = good_steps;
}

// A float4 vector whose components can be reached by index.
struct __align__(16) Vector {
    float at[4];
};

// In the next two functions `count` is the number of components that the array still has: 4, or
// fewer at its very end.

__device__ inline Vector load_vector(const float* x, int count) {
    Vector vector = {};
    if (count == 4) {
        vector = *(const Vector*)x;
    } else {
        for (int k = 0; k < 4; k++) {
            vector.at[k] = k < count ? x[k] : 0.0f;
        }
    }
    return vector;
}

__device__ inline void store_vector(float* x, Vector vector, int count) {
    if (count == 4) {
        *(Vector*)x = vector;
    } else {
        for (int k = 0; k < 4; k++) {
            if (k < count) {
                x[k] = vector.at[k];
            }
        }
    }
}

extern "C" __global__ void adamw(float* master, float* m, float* v, floatX* param,
                                 const float* grad, const float* factors, long long n,
                                 long long decayed, float one_minus_beta1, float one_minus_beta2,
                                 float eps, float weight_decay) {
    long long i = 4 * ((long long)blockIdx.x * blockDim.x + threadIdx.x);
    const Factors* update = (const Factors*)factors;
    if (i >= n || update->apply == 0.0f) {
        return;
    }
    float grad_factor = update->grad_factor;
    float lr = update->lr;
    float c1 = update->c1;
    float c2 = update->c2;

    int count = (int)min(n - i, 4ll);
    Vector g4 = load_vector(grad + i, count);
    Vector m4 = load_vector(m + i, count);
    Vector v4 = load_vector(v + i, count);
    Vector w4 = load_vector(master + i, count);
    for (int k = 0; k < 4; k++) {
        float g = g4.at[k] * grad_factor;
        m4.at[k] += one_minus_beta1 * (g - m4.at[k]);
        v4.at[k] += one_minus_beta2 * (g * g - v4.at[k]);
        float decay = i + k < decayed ? weight_decay : 0.0f;
        float step = (m4.at[k] / c1) / (sqrtf(v4.at[k] / c2) + eps);
        w4.at[k] -= lr * (step + decay * w4.at[k]);
    }
    store_vector(m + i, m4, count);
    store_vector(v + i, v4, count);
    store_vector(master + i, w4, count);
#if FLOATX != FP32
    if (count == 4) {
        *(uint2*)(param + i) = make_uint2(pack(w4.at[0], w4.at[1]), pack(w4.at[2], w4.at[3]));
    } else {
        for (int k = 0; k < 4; k++) {
            if (k < count) {
                param[i + k] = to_floatX(w4.at[k]);
            }
        }
    }
#endif
}
