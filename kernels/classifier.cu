// The fused classifier: softmax, cross-entropy and its gradient, in one read and one write of the
// logits, which are the largest tensor of the model.
//
//     loss = -log(p[target]) = max + log(sum(exp(x - max))) - x[target]
//     dloss/dx = (p - [c == target]) dloss loss_scale
//
// kernel               outputs                                    inputs
// classifier_fwd       losses (N) float32 +=                      logits (N, Vp) X, targets (N) int
// classifier_fwd_bwd   losses (N) float32 +=, logits (N, Vp) X    targets (N) int,
//                      become their own gradient                  loss_scale (1) float32
//
// Rows of logits have Vp columns, of which the first V are the vocabulary; the rest is padding that
// nothing may learn from: it is never read, and its gradient is 0. dloss is the gradient of each
// loss, 1 / (rows in the mean); loss_scale, a power of two, is explained in adamw.cu. A target
// outside [0, V) gives a loss that is not a number.
//
// One block per row; its threads stride over pieces of WIDTH columns (see common.cuh), of which Vp is
// a multiple; the last columns are taken one by one. grid (N), block a multiple of 32, shared 32
// floats. Sums: each thread over its pieces in rising order, then block_sum.
//
// Cost in bytes, X = size of floatX: classifier_fwd N V X; classifier_fwd_bwd N (V + Vp) X if the
// second read of a row, right after the first, comes from cache: two blocks on a multiprocessor
// have 200 KB of rows between them in bf16, and all of an H200's have 26 MB, half its L2. About 20
// flops per element, half of them in exp. Memory binds.
//
// Source: see softmax_of_row in common.cuh for the sums.

__device__ inline float loss_of_row(Softmax s, float target_logit) {
    return s.max + logf(s.sum) - target_logit;
}

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
    // Must stand before softmax_of_row, whose barriers keep every thread from overwriting logits
    // until thread 0 has read this one. Read later, it may be a gradient already.
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
