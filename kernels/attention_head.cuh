// Where a head's elements lie in the tensors of attention. A position of qkv or dqkv (B, T, R, D)
// is a row of R = H + 2 G heads: first H queries, then G keys, then G values. A position of y or
// dy (B, T, H, D) has one head per query head. Query head h attends to key head and value head
// h / (H / G), which the H / G query heads of its group share. With G = H each has its own.

// Position t of the head begins at element first + t * stride of the tensor.
struct Head {
    long long first;
    long long stride;
};

// Returns head `head` of sequence b in a tensor (B, T, heads, D).
__device__ inline Head head_at(int b, int head, int heads, int T) {
    Head result;
    result.stride = (long long)heads * HEAD_SIZE;
    result.first = (long long)b * T * result.stride + (long long)head * HEAD_SIZE;
    return result;
}

// Returns query head `h` of sequence b in qkv or dqkv.
__device__ inline Head query_head(int b, int h, int T, int H, int G) {
    return head_at(b, h, H + 2 * G, T);
}

// Returns key head `g` of sequence b in qkv or dqkv.
__device__ inline Head key_head(int b, int g, int T, int H, int G) {
    return head_at(b, H + g, H + 2 * G, T);
}

// Returns value head `g` of sequence b in qkv or dqkv.
__device__ inline Head value_head(int b, int g, int T, int H, int G) {
    return head_at(b, H + G + g, H + 2 * G, T);
}
