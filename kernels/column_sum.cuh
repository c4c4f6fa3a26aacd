// The second step of sums down the columns of a matrix: adds the partial sums of chunks of rows.
// bias.cu and layernorm.cu have the first step, which writes `partial`.

// out[c] += sum over chunks of partial[chunk * stride + c], for the 32 columns c of this block,
// which has 32 x 32 threads. Warp w adds chunks w, w + 32, w + 64 ... in this order; then warp 0
// adds the sums of the 32 warps, its own first. `tile` is shared memory of 32 x 32 floats; other
// threads may still be reading it when the call returns.
__device__ inline void add_chunks(float* out, const float* partial, int chunks, int columns,
                                  int stride, float* tile) {
    int c = blockIdx.x * WARP + threadIdx.x;
    float sum = 0.0f;
    if (c < columns) {
#pragma unroll 4
        for (int chunk = threadIdx.y; chunk < chunks; chunk += MAX_WARPS) {
            sum += partial[(long long)chunk * stride + c];
        }
    }
    tile[threadIdx.y * WARP + threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < columns) {
        float total = 0.0f;
        for (int warp = 0; warp < MAX_WARPS; warp++) {
            total += tile[warp * WARP + threadIdx.x];
        }
        out[c] += total;
    }
}
