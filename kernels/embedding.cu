// Token and position embedding: the first layer looks two rows up and adds them.
//
//     x[b, t, :] = wte[token[b, t], :] + wpe[t, :]
//
// kernel              outputs                    inputs
// embedding_fwd       x (B, T, C) X =            tokens (B, T) int, wte (Vp, C) X, wpe (>=T, C) X
// embedding_bwd_wpe   dwpe (>=T, C) float32 +=   dx (B, T, C) X
// embedding_bwd_wte   dwte (Vp, C) float32 +=    dx (B, T, C) X, tokens (B, T) int, order (B*T) int
//
// Neighbouring threads take neighbouring pieces of WIDTH channels, of which C is a multiple, so that
// each warp reads and writes one unbroken piece of memory.
// embedding_fwd: one block per row (b, t); its threads stride over the pieces.
//     grid (B*T), any block.
// embedding_bwd_wpe: one thread per piece of (t, :), which adds up the B rows of position t, b = 0
//     first. grid (T, ceil(C / (block WIDTH))), any block.
// embedding_bwd_wte: a token may stand in many rows, and all of them add to one row of dwte.
//     Atomic additions would come in a different order on every run, so rows are grouped instead:
//     `order` lists the rows sorted by their token, rows of one token in rising order. There is
//     one block per place in `order`; only a block at the first place of its token goes on, and
//     its threads, one per piece, add up all rows of the token in that order, then add to dwte.
//     grid (B*T, ceil(C / (block WIDTH))), any block.
// No shared memory.
//
// Cost in bytes, X = size of floatX, N = B*T: forward N C 3X (two reads, one write) at most, wpe
// N C X + T C 8, wte N C X + (different tokens) C 8; flops: one per element. Memory binds; for wte
// it can be the latency of one very frequent token's long chain of rows, hence ROWS_AT_ONCE.
//
// Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.

#define ROWS_AT_ONCE 8  // rows whose loads are in flight together

// out[0 ... WIDTH - 1] += sum, in float32
__device__ inline void add(float* out, const float* sum) {
#if WIDTH == 1
    out[0] += sum[0];
#else
#pragma unroll
    for (int k = 0; k < WIDTH; k += 4) {
        float4 four = *(const float4*)(out + k);
        four.x += sum[k];
        four.y += sum[k + 1];
        four.z += sum[k + 2];
        four.w += sum[k + 3];
        *(float4*)(out + k) = four;
    }
#endif
}

extern "C" __global__ void embedding_fwd(floatX* x, const int* tokens, const floatX* wte,
                                         const floatX* wpe, int T, int C) {
    int row = blockIdx.x;
    int t = row % T;
    long long to = (long long)row * C;
    long long from_wte = (long long)tokens[row] * C;
    long long from_wpe = (long long)t * C;
    for (int c = threadIdx.x * WIDTH; c < C; c += blockDim.x * WIDTH) {
        float values[WIDTH];
        float position[WIDTH];
        load(values, wte + from_wte + c);
        load(position, wpe + from_wpe + c);
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            values[k] += position[k];
        }
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
        // No branch stands between these loads, so that all of one loop are in flight together:
        // where the rows of the token have ended, first_row is read again and not added.
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
