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
// prepare_update   factors (5), report (7) float32 =;         losses (N), grad_sq (1),
//                  loss_scale (1), counts (3),                lr (1) float32
//                  windows (2, 128) float32, updated
// adamw            master, m, v (n) float32, updated;         grad (n), factors (5) float32
//                  param (n) X = master rounded to X
//
// The structs below name the elements of report and counts, factors.cuh those of factors.
//
// All values that differ from step to step come from device memory, so that every step is the same
// launches with the same arguments, as a CUDA graph needs it. The host writes nothing but lr.
//
// The gradient of the loss is computed times loss_scale, which keeps small gradients within the
// range of a float16 (Micikevicius et al. 2018, "Mixed Precision Training", section 3.2). The scale
// doubles after growth_interval good steps and is halved when the gradient of a finite loss is not
// finite. The scale stays within 1 and max_scale, which is 1 where X has the range of a float32.
// Because the scale is a power of two, multiplying by it rounds nothing.
//
// A step makes no update if its loss or its gradient is not finite, or if one of them is an outlier.
// The windows hold the last 128 finite losses and the last 128 finite gradient norms, oldest first;
// NaNs fill a window that has had fewer values. The z-score of the newest value x is
//
//     z = (x - mean) / sqrt(variance)           0 if all values are equal, NaN in a window with NaNs
//
// over the window, x included, so |z| <= sqrt(127). A value is an outlier if its limit
// (max_loss_zscore or max_grad_zscore) is above 0 and z is above the limit. An outlier stays in the
// window, and changes neither the loss scale nor the count of good steps.
//
// A step has diverged if its loss is not finite, or if its gradient is not finite at the lowest loss
// scale. With `halt` it sets counts.halted, and no later step changes anything until the host has
// cleared that flag. The host reads the report of a step when the next step is already enqueued, and
// so it still finds the weights with which the step diverged.
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
// i + threads ...; then block_sum. Lane i of the first warp has the values i, i + 32, i + 64 and
// i + 96 of a window. Mean and variance are sums in float64: each lane over its values, oldest
// first, then pairs of lanes.
// adamw: thread i of the grid updates elements 4i to 4i + 3, as vectors if all arrays begin at
// multiples of four elements (ALIGNED). Parts of an arena may begin elsewhere. No shared memory, no
// sums.
// Grid and block: `prepare_update` and `adamw` in gpu_gpt2/ops/kernels.py.
//
// Cost of adamw per element: 16 bytes read, 12 written, and X where X is not float32: 30 bytes in
// 16 bits, 28 in float32; about 15 flops, two divisions and a square root among them. Memory binds.
//
// Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2; for the
// rule of outliers, the outlier detector of llm.c (llmc/outlier_detector.h), whose running sums are
// replaced by two passes over the window.

#include "factors.cuh"

#define WINDOW 128            // values of a window, as in llm.c
#define LOWEST_SCALE 1.0f     // lowest loss scale; below 1 it would lose small gradients
#define NO_ZSCORE __int_as_float(0x7fc00000)  // NaN, which NVRTC has no name for

// report: results for the host, which reads them after it has queued later launches.
struct Report {
    float loss;         // loss_weight times the sum of the losses
    float norm;         // norm of the gradient without loss_scale, before clipping
    float loss_scale;   // loss scale of the next step
    float scaled_by;    // loss scale of this step
    float loss_zscore;  // z-score of the loss in its window
    float grad_zscore;  // z-score of the norm in its window
    float skipped;      // why there is no update: one of the next values
};

// Values of Report.skipped. HALTED hides NOT_FINITE, which hides the two spikes; of these the loss
// comes first.
enum Skipped {
    UPDATED,         // the weights are updated
    LOSS_SPIKE,      // the loss is an outlier
    GRADIENT_SPIKE,  // the norm of the gradient is an outlier
    NOT_FINITE,      // the loss or the gradient is not finite
    HALTED,          // an earlier step has diverged
};

// counts: the state that prepare_update keeps from step to step.
struct Counts {
    float updates;     // t, the number of updates made
    float good_steps;  // updates made since loss_scale last changed
    float halted;      // 1 if a step has diverged and nothing may change; else 0
};

// Returns the sum of `value` over the warp, in the order of warp_sum.
__device__ inline double warp_sum_double(double value) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, distance);
    }
    return value;
}

// Appends `value` to a window, whose oldest value leaves it, and returns the z-score of `value`.
// All threads of one warp call it with the same value.
__device__ inline float append(float* window, float value) {
    float mine[WINDOW / WARP];
    double sum = 0.0;
    for (int k = 0; k < WINDOW / WARP; k++) {
        int i = threadIdx.x % WARP + k * WARP;
        mine[k] = i + 1 < WINDOW ? window[i + 1] : value;
        sum += mine[k];
    }
    double mean = warp_sum_double(sum) / WINDOW;
    double squares = 0.0;
    for (int k = 0; k < WINDOW / WARP; k++) {
        double deviation = mine[k] - mean;
        squares += deviation * deviation;
    }
    double variance = warp_sum_double(squares) / WINDOW;
    __syncwarp();  // all lanes have read the window
    for (int k = 0; k < WINDOW / WARP; k++) {
        window[threadIdx.x % WARP + k * WARP] = mine[k];
    }
    // The square of z is at most 127, while the variance of large floats is not within a float.
    double deviation = value - mean;
    float z = variance == 0.0 ? 0.0f : sqrtf((float)(deviation * deviation / variance));
    return deviation < 0.0 ? -z : z;
}

extern "C" __global__ void prepare_update(float* factors, float* report, float* loss_scale,
                                          float* counts, float* windows, const float* losses,
                                          const float* grad_sq, const float* lr, int N,
                                          float loss_weight, float log_beta1, float log_beta2,
                                          float max_norm, float max_scale, int growth_interval,
                                          float max_loss_zscore, float max_grad_zscore,
                                          int halt) {
    SHARED_ARRAY(float, scratch, MAX_WARPS);
    float loss = 0.0f;
    for (int i = threadIdx.x; i < N; i += blockDim.x) {
        loss += losses[i];
    }
    loss = block_sum(loss, scratch) * loss_weight;
    if (threadIdx.x >= WARP) {
        return;
    }
    Counts* made = (Counts*)counts;
    float scale = loss_scale[0];
    float norm = sqrtf(grad_sq[0]) / scale;
    bool halted = made->halted != 0.0f;
    bool loss_finite = fabsf(loss) <= LARGEST_FLOAT;  // false for a NaN too
    bool grad_finite = grad_sq[0] <= LARGEST_FLOAT;

    float loss_zscore = NO_ZSCORE;
    float grad_zscore = NO_ZSCORE;
    if (!halted && loss_finite) {
        loss_zscore = append(windows, loss);
    }
    if (!halted && grad_finite) {
        grad_zscore = append(windows + WINDOW, norm);
    }
    __syncwarp();  // all lanes have read what the first one changes now
    if (threadIdx.x != 0) {
        return;
    }

    Skipped skipped = UPDATED;
    if (halted) {
        skipped = HALTED;
    } else if (!loss_finite || !grad_finite) {
        skipped = NOT_FINITE;
    } else if (max_loss_zscore > 0.0f && loss_zscore > max_loss_zscore) {  // false for a NaN
        skipped = LOSS_SPIKE;
    } else if (max_grad_zscore > 0.0f && grad_zscore > max_grad_zscore) {
        skipped = GRADIENT_SPIKE;
    }
    bool apply = skipped == UPDATED;
    float updates = made->updates + (apply ? 1.0f : 0.0f);

    Factors* next = (Factors*)factors;
    next->apply = apply ? 1.0f : 0.0f;
    next->grad_factor = (norm > max_norm ? max_norm / norm : 1.0f) / scale;
    next->lr = lr[0];
    next->c1 = -expm1f(updates * log_beta1);
    next->c2 = -expm1f(updates * log_beta2);

    float next_scale = scale;
    float good_steps = made->good_steps;
    if (apply) {
        good_steps += 1.0f;
        if (good_steps >= growth_interval) {
            next_scale *= 2.0f;
            good_steps = 0.0f;
        }
    } else if (!halted && loss_finite && !grad_finite) {
        next_scale *= 0.5f;
        good_steps = 0.0f;
    }
    next_scale = fminf(fmaxf(next_scale, LOWEST_SCALE), max_scale);

    Report* result = (Report*)report;
    result->loss = loss;
    result->norm = norm;
    result->loss_scale = next_scale;
    result->scaled_by = scale;
    result->loss_zscore = loss_zscore;
    result->grad_zscore = grad_zscore;
    result->skipped = skipped;

    bool diverged = !loss_finite || (!grad_finite && scale <= LOWEST_SCALE);
    loss_scale[0] = next_scale;
    made->updates = updates;
    made->good_steps = good_steps;
    made->halted = halted || (halt != 0 && diverged) ? 1.0f : 0.0f;
}

// 1 if four elements can be loaded and stored as one vector, 0 if an array is not aligned to that.
#ifndef ALIGNED
#define ALIGNED 1
#endif

// A float4 vector whose components can be reached by index.
struct __align__(16) Vector {
    float at[4];
};

// In the next two functions `count` is the number of components that the array still has: 4, or
// fewer at its very end.

__device__ inline Vector load_vector(const float* x, int count) {
    Vector vector = {};
    if (ALIGNED && count == 4) {
        vector = *(const Vector*)x;
    } else {
        for (int k = 0; k < 4; k++) {
            vector.at[k] = k < count ? x[k] : 0.0f;
        }
    }
    return vector;
}

__device__ inline void store_vector(float* x, Vector vector, int count) {
    if (ALIGNED && count == 4) {
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
    if (ALIGNED && count == 4) {
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
