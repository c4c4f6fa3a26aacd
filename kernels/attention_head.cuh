// Where a head's elements lie in the tensors of attention: in qkv and dqkv (B, T, 3, H, D) each
// position has three parts, 0 is q, 1 is k, 2 is v; in y and dy (B, T, H, D) it has one, part 0.

// Position t of the head begins at element first + t * stride of the tensor.
struct Head {
    long long first;
    long long stride;
};

// Returns part `part` of `parts` of head `head` of all B H heads, counted from head 0 of sequence
// 0.
__device__ inline Head head_at(unsigned int head, int part, int parts, int T, int H) {
    int b = head / H;
    int h = head % H;
    Head result;
    result.stride = (long long)parts * H * HEAD_SIZE;
    result.first = (long long)b * T * result.stride + ((long long)part * H + h) * HEAD_SIZE;
    return result;
}
