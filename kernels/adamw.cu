// One AdamW update of all parameters, with their gradient clipped to its norm.
//
//     g = grad * min(1, max_norm / norm) / loss_scale
//     m += (1 - beta1) (g - m)                  mean of the gradients so far
//     v += (1 - beta2) (g^2 - v)                mean of their squares
//     w -= lr ((m / c1) / (sqrt(v / c2) + eps) + decay w)
//
// with norm = sqrt(grad_sq) / loss_scale, and c1 = 1 - beta1^t and c2 = 1 - beta2^t, which make up
// for m and v having begun at 0; t counts the updates.
//
// kernel           outputs                                    inputs
// prepare_update   factors (5), report (3) float32 =;         losses (N), grad_sq (1),
//                  loss_scale (1), counts (2) float32,        lr (1) float32
//                  updated
// adamw            master, m, v (n) float32, updated;         grad (n), factors (5) float32
//                  param (n) X = master rounded to X
//
// factors  apply (1, or 0: change nothing), gradient factor, lr, c1, c2
// report   mean loss, norm, the next loss scale: what the host reads when it has the time
// counts   t, and how many updates in a row were made since loss_scale last changed
//
// What differs from step to step comes from device memory, so that a step is the same launches with
// the same arguments every time, as a CUDA graph wants it. The host writes nothing but lr.
//
// The gradient of the loss is computed times loss_scale, which keeps small gradients within the
// range of a float16 (Micikevicius et al. 2018, "Mixed Precision Training", section 3.2). The scale
// doubles after growth_interval updates and is halved when the gradient is not finite; that update
// is left out, as one bad batch must not end a run. It stays within 1 and max_scale, which is 1
// where X has the range of a float32. Powers of two change no digit.
//
// c = 1 - beta^t is computed as -expm1(t log(beta)): every step of it is as exact as a float32 can
// be, while 1 - 0.999f alone is wrong in its fifth digit. log(beta) comes from the host.
//
// Weights live twice when X has 16 bits: an update is often smaller than half the last place of
// such a weight and would be rounded away, so it is the float32 master that is updated. With X =
// float32 master and param are the same memory (hence no __restrict__ here) and stored once.
// Only the first `decayed` elements (the matrices) decay.
//
// prepare_update: one block of a multiple of 32 threads, shared 32 floats. Thread i adds losses i,
// i + threads ...; then block_sum. adamw: thread i of the grid updates elements 4i to 4i + 3, read
// and written 16 bytes at a time; arrays begin at multiples of 16 bytes. No shared memory, no sums.
//
// Cost of adamw per element: 16 bytes read, 12 written, and X where X is not float32: 30 bytes in
// 16 bits, 28 in float32; about 15 flops, two divisions and a square root among them. Memory binds.
//
// Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2.

#define APPLY 0
#define GRAD_FACTOR 1
#define LR 2
#define C1 3
#define C2 4

#define UPDATES 0
#define IN_A_ROW 1

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

    float updates = counts[UPDATES] + (finite ? 1.0f : 0.0f);
    factors[APPLY] = finite ? 1.0f : 0.0f;
    factors[GRAD_FACTOR] = (norm > max_norm ? max_norm / norm : 1.0f) / scale;
    factors[LR] = lr[0];
    factors[C1] = -expm1f(updates * log_beta1);
    factors[C2] = -expm1f(updates * log_beta2);

    float in_a_row = finite ? counts[IN_A_ROW] + 1.0f : 0.0f;
    if (!finite) {
        scale *= 0.5f;
    } else if (in_a_row >= growth_interval) {
        scale *= 2.0f;
        in_a_row = 0.0f;
    }
    scale = fminf(fmaxf(scale, 1.0f), max_scale);

    report[0] = loss * loss_weight;
    report[1] = norm;
    report[2] = scale;
    loss_scale[0] = scale;
    counts[UPDATES] = updates;
    counts[IN_A_ROW] = in_a_row;
}

// Four float32 numbers; `count`, below 4 at the very end of an array alone, says how many exist.
struct __align__(16) Four {
    float at[4];
};

__device__ inline Four load_four(const float* x, int count) {
    Four four = {};
    if (count == 4) {
        four = *(const Four*)x;
    } else {
        for (int k = 0; k < 4; k++) {
            four.at[k] = k < count ? x[k] : 0.0f;
        }
    }
    return four;
}

__device__ inline void store_four(float* x, Four four, int count) {
    if (count == 4) {
        *(Four*)x = four;
    } else {
        for (int k = 0; k < 4; k++) {
            if (k < count) {
                x[k] = four.at[k];
            }
        }
    }
}

extern "C" __global__ void adamw(float* master, float* m, float* v, floatX* param,
                                 const float* grad, const float* factors, long long n,
                                 long long decayed, float one_minus_beta1, float one_minus_beta2,
                                 float eps, float weight_decay) {
    long long i = 4 * ((long long)blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n || factors[APPLY] == 0.0f) {
        return;
    }
    float grad_factor = factors[GRAD_FACTOR];
    float lr = factors[LR];
    float c1 = factors[C1];
    float c2 = factors[C2];

    int count = (int)min(n - i, 4ll);
    Four g4 = load_four(grad + i, count);
    Four m4 = load_four(m + i, count);
    Four v4 = load_four(v + i, count);
    Four w4 = load_four(master + i, count);
    for (int k = 0; k < 4; k++) {
        float g = g4.at[k] * grad_factor;
        m4.at[k] += one_minus_beta1 * (g - m4.at[k]);
        v4.at[k] += one_minus_beta2 * (g * g - v4.at[k]);
        float decay = i + k < decayed ? weight_decay : 0.0f;
        float update = (m4.at[k] / c1) / (sqrtf(v4.at[k] / c2) + eps);
        w4.at[k] -= lr * (update + decay * w4.at[k]);
    }
    store_four(m + i, m4, count);
    store_four(v + i, v4, count);
    store_four(master + i, w4, count);
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
