// Token and position embedding: the first layer of GPT-2 looks up two rows and adds them. That of
// Llama looks up the token's row only.
//
//     embedding:         x[b, t, :] = wte[token[b, t], :] + wpe[starts[b] + t, :]
//     token_embedding:   x[b, t, :] = wte[token[b, t], :]
//
// kernel                outputs                    inputs
// embedding_fwd         x (B, T, C) X =            tokens (B, T) int, starts (B) int,
//                                                  wte (Vp, C) X, wpe (>=T, C) X
// token_embedding_fwd   x (B, T, C) X =            tokens (B, T) int, wte (Vp, C) X
// embedding_bwd_wpe     dwpe (>=T, C) float32 +=   dx (B, T, C) X
// embedding_bwd_wte     dwte (Vp, C) float32 +=    dx (B, T, C) X, tokens (B, T) int,
//                                                  order (B*T) int
//
// A token below 0, which `sample` gives for damaged logits, counts as 0 in the forward kernels: a
// generated token becomes the input of the next step before the host has looked at it.
//
// embedding_bwd_wte belongs to both ops. Training begins every sequence at position 0, so
// embedding_bwd_wpe takes no starts.
//
// Who does what. Neighbouring threads take neighbouring pieces of WIDTH channels (see common.cuh),
// so that each read and write of a warp is one contiguous piece of memory; C is a multiple of
// WIDTH. Blocks may have any size; the pieces of a row may need several blocks in the backward
// kernels. No shared memory. Grid and block: the methods named like the ops in
// gpu_gpt2/ops/kernels.py.
//
// embedding_fwd, token_embedding_fwd: one block per row (b, t), whose threads stride over the
// pieces.
//
// embedding_bwd_wpe: one thread per piece of (t, :), which adds the B rows of position t, b = 0
// first.
//
// embedding_bwd_wte: a token may stand in many rows, and all these rows add to one row of dwte.
// Atomic additions would come in a different order on every run, so rows are grouped instead:
// `order` lists the rows sorted by their token, rows of one token in rising order. Block (i, j)
// looks at place i of `order` and returns unless place i is the first place of its token. Otherwise
// each of its threads takes one piece, adds all rows of the token in the order of `order`, then
// adds the sum to dwte.
//
// Cost in bytes, X = size of floatX, N = B*T: embedding_fwd N C 3X (two reads, one write) at most,
// token_embedding_fwd N C 2X, wpe N C X + T C 8, wte N C X + (different tokens) C 8. Flops: at most
// one per element. Memory binds; wte can be bound by latency instead, if one token is so frequent
// that a thread adds a long chain of rows: hence ROWS_AT_ONCE.
//
// Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.

#define ROWS_AT_ONCE 8  // rows of one token that a thread loads before it adds any of them

// out[0 ... WIDTH - 1] += sum, in float32
__device__ inline void add(float* out, const float* sum) {
#if WIDTH == 1
    out[0] += sum[0];
#else
#pragma unroll
    for (int k = 0; k < WIDTH; k += 4) {
        float4 vector = *(const float4*)(out + k);
        vector.x += sum[k];
        vector.y += sum[k + 1];
        vector.z += sum[k + 2];
        vector.w += sum[k + 3];
        *(float4*)(out + k) = vector;
    }
#endif
}

extern "C" __global__ void embedding_fwd(floatX* x, const int* tokens, const int* starts,
                                         const floatX* wte, const floatX* wpe, int T, int C) {
    int row = blockIdx.x;
    int position = starts[row / T] + row % T;
    long long to = (long long)row * C;
    long long from_wte = (long long)max(tokens[row], 0) * C;
    long long from_wpe = (long long)position * C;
    for (int c = threadIdx.x * WIDTH; c < C; c += blockDim.x * WIDTH) {
        float values[WIDTH];
        float added[WIDTH];
        load(values, wte + from_wte + c);
        load(added, wpe + from_wpe + c);
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            values[k] += added[k];
        }
        store(x + to + c, values);
    }
}

extern "C" __global__ void token_embedding_fwd(floatX* x, const int* tokens, const floatX* wte,
                                               int C) {
    long long to = (long long)blockIdx.x * C;
    long long from = (long long)max(tokens[blockIdx.x], 0) * C;
    for (int c = threadIdx.x * WIDTH; c < C; c += blockDim.x * WIDTH) {
        float values[WIDTH];
        load(values, wte + from + c);
        store(x + to + c, values);
    }
}

extern "C" __global__ void embedding_bwd_wpe(float* dwpe, const floatX* dx, int B, int T, int C) {
    int t = blockIdx.x;
    int c = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH;
    if (c >= C) {
        return;
    }
    float sum[WIDTH] = {};
#pragma unroll 4
    for (int b = 0; b < B; b++) {
        float values[WIDTH];
        load(values, dx + ((long long)b * T + t) * C + c);
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            sum[k] += values[k];
        }
    }
    add(dwpe + (long long)t * C + c, sum);
}

extern "C" __global__ void embedding_bwd_wte(float* dwte, const floatX* dx, const int* tokens,
                                             const int* order, int N, int C) {
    int first = blockIdx.x;
    int first_row = order[first];
    int token = tokens[first_row];
    bool began_before = first > 0 && tokens[order[first - 1]] == token;
    int c = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH;
    if (began_before || c >= C) {
        return;
    }
    float sum[WIDTH] = {};
    bool more = true;
    for (int place = first; more; place += ROWS_AT_ONCE) {
        // There is no branch between the loads of one loop, so that all of them are in flight
        // together: after the last row of the token, first_row is loaded again and not added.
        int rows[ROWS_AT_ONCE];
        bool ours[ROWS_AT_ONCE];
        float values[ROWS_AT_ONCE][WIDTH];
#pragma unroll
        for (int i = 0; i < ROWS_AT_ONCE; i++) {
            rows[i] = order[min(place + i, N - 1)];
        }
#pragma unroll
        for (int i = 0; i < ROWS_AT_ONCE; i++) {
            ours[i] = (tokens[rows[i]] == token) & (place + i < N);
        }
#pragma unroll
        for (int i = 0; i < ROWS_AT_ONCE; i++) {
            load(values[i], dx + (long long)(ours[i] ? rows[i] : first_row) * C + c);
        }
#pragma unroll
        for (int i = 0; i < ROWS_AT_ONCE; i++) {
#pragma unroll
            for (int k = 0; k < WIDTH; k++) {
                sum[k] += ours[i] ? values[i][k] : 0.0f;
            }
        }
        more = ours[ROWS_AT_ONCE - 1];
    }
    add(dwte + (long long)token * C + c, sum);
}
