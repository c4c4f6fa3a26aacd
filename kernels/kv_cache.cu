// The KV cache: the keys and values of all positions so far, kept from one token to the next, so
// that generating a token computes only its own.
//
//     k[b, g, starts[b] + t, :] = qkv[b, t, H + g, :]
//     v[b, g, starts[b] + t, :] = qkv[b, t, H + G + g, :]        for starts[b] + t < S
//
// kernel      outputs                    inputs
// kv_append   k, v (B, G, S, D) X +=     qkv (B, T, R, D) X, starts (B) int
//
// R = H + 2 G heads are in a row of qkv: H queries, G keys, G values. A cache has the positions of
// one head side by side, in the order in which attention_decode.cu reads them.
//
// One block per row (b, t) of qkv, whose threads stride over the 2 G D elements of its keys and
// values in pieces of WIDTH (see common.cuh); D is a multiple of WIDTH. Blocks may have any size.
// No shared memory, no sums. The position is read from device memory, so that a CUDA graph with
// this launch serves all positions. Grid and block: `kv_append` in gpu_gpt2/ops/kernels.py.
//
// Cost in bytes, X = size of floatX: B T 2 G D 2X, read once and written once. Memory binds.

extern "C" __global__ void kv_append(floatX* k, floatX* v, const floatX* qkv, const int* starts,
                                     int T, int H, int G, int D, int S) {
    int b = blockIdx.x / T;
    int t = blockIdx.x % T;
    long long position = (long long)starts[b] + t;
    if (position >= S) {
        return;  // the cache is full
    }
    const floatX* row = qkv + ((long long)blockIdx.x * (H + 2 * G) + H) * D;
    for (int i = threadIdx.x * WIDTH; i < 2 * G * D; i += blockDim.x * WIDTH) {
        int head = i / D;  // 0 ... G - 1 are keys, G ... 2 G - 1 are values
        float values[WIDTH];
        load(values, row + i);
        floatX* cache = head < G ? k : v;
        store(cache + (((long long)b * G + head % G) * S + position) * D + i % D, values);
    }
}
