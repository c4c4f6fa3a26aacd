// The fused classifier: softmax, cross-entropy and its gradient, in one read and one write of the
// logits, which are the largest tensor of the model.
//
//     loss = -log(p[target]) = max + log(sum(exp(x - max))) - x[target],       p = softmax(x)
//     dloss/dx = (p - [c == target]) dloss loss_scale
//
// kernel               outputs                            inputs
// classifier_fwd       losses (N) float32 +=              logits (N, Vp) X, targets (N) int
// classifier_fwd_bwd   losses (N) float32 +=,             targets (N) int,
//                      logits (N, Vp) X, overwritten      loss_scale (1) float32
//                      by their gradient
//
// Rows of logits have Vp columns. The first V are the vocabulary; the rest is padding, which must
// not learn: its logits are never read, and its gradient is 0. dloss is the gradient of each loss,
// 1 / (rows in the mean). loss_scale is a power of two: see adamw.cu. A target outside [0, V) gives
// a loss that is NaN.
//
// Who does what. One block per row, whose threads stride over pieces of WIDTH columns (see
// common.cuh); Vp is a multiple of WIDTH, and the last V % WIDTH columns are taken one by one.
// Blocks are a multiple of 32 threads; shared: 32 floats. Grid and block: `classifier_fwd` and
// `classifier_fwd_bwd` in gpu_gpt2/ops/kernels.py.
//
// Order of sums: each thread adds its pieces in rising order, then block_sum adds the threads.
//
// Cost in bytes, X = size of floatX: classifier_fwd N V X; classifier_fwd_bwd N (V + Vp) X if the
// second read of a row, which follows soon after the first, comes from cache. It does in bf16: the
// rows of the two blocks on a multiprocessor have 200 KB, and those of all multiprocessors of an
// H200 have 26 MB, half its L2 cache. About 20 flops per element, half of them in exp. Memory
// binds.
//
// Source: see softmax_of_row in softmax_row.cuh.

#include "softmax_row.cuh"

// -log of the target's probability
__device__ inline float loss_of_row(Softmax s, float target_logit) {
    return s.max + logf(s.sum) - target_logit;
}

// Returns the logit of a row's target, or NaN for a target outside the vocabulary.
__device__ inline float logit_or_nan(const floatX* logits, long long row, int target, int V) {
    bool inside = 0 <= target && target < V;
    return inside ? to_float(logits[row + target]) : __uint_as_float(0x7fc00000u);
}

extern "C" __global__ void classifier_fwd(float* losses, const floatX* logits, const int* targets,
                                          int V, int Vp) {
    SHARED_ARRAY(float, scratch, MAX_WARPS);
    long long row = (long long)blockIdx.x * Vp;
    Softmax s = softmax_of_row(logits, row, V, scratch);
    if (threadIdx.x == 0) {
        float target_logit = logit_or_nan(logits, row, targets[blockIdx.x], V);
        losses[blockIdx.x] += loss_of_row(s, target_logit);
    }
}

extern "C" __global__ void classifier_fwd_bwd(float* losses, floatX* logits, const int* targets,
                                              const float* loss_scale, int V, int Vp,
                                              float dloss) {
    SHARED_ARRAY(float, scratch, MAX_WARPS);
    long long row = (long long)blockIdx.x * Vp;
    int target = targets[blockIdx.x];
    // Thread 0 reads the target's logit before softmax_of_row, because no thread passes the
    // barriers in softmax_of_row, and so overwrites logits, until thread 0 has come there. After
    // these barriers the logit may already have become a gradient.
    float target_logit = threadIdx.x == 0 ? logit_or_nan(logits, row, target, V) : 0.0f;
    Softmax s = softmax_of_row(logits, row, V, scratch);
    if (threadIdx.x == 0) {
        losses[blockIdx.x] += loss_of_row(s, target_logit);
    }
    dloss *= loss_scale[0];
    float inverse = 1.0f / s.sum;
    int whole = V / WIDTH * WIDTH;
#pragma unroll 2
    for (int c = threadIdx.x * WIDTH; c < whole; c += blockDim.x * WIDTH) {
        float values[WIDTH];
        load(values, logits + row + c);
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            float p = expf(values[k] - s.max) * inverse;
            values[k] = (p - (c + k == target ? 1.0f : 0.0f)) * dloss;
        }
        store(logits + row + c, values);
    }
    for (int c = whole + threadIdx.x; c < Vp; c += blockDim.x) {
        float gradient = 0.0f;
        if (c < V) {
            float p = expf(to_float(logits[row + c]) - s.max) * inverse;
            gradient = (p - (c == target ? 1.0f : 0.0f)) * dloss;
        }
        logits[row + c] = to_floatX(gradient);
    }
}
