// Bias: one number per column, added to every row; its gradient is the sum of the rows.
//
//     y[n, :] += b[:]              db[:] += sum over n of dy[n, :]
//
// kernel               outputs                            inputs
// bias_fwd             y (N, O) X +=                      b (O) X
// bias_bwd_partial     partial (chunks, O) float32 =      dy (N, O) X
// add_column_sums      out (columns) float32 +=           partial (chunks, columns) float32
//
// Sums down the columns are made in two steps, here and in layernorm.cu, because the number of
// columns alone is too small to fill a GPU and because the order of additions must be fixed:
// 1. `bias_bwd_partial` cuts the rows into chunks of rows_per_chunk and sums each chunk. A block
//    is a tile of 32 columns wide and as many rows high as it has warps: warp w adds rows w,
//    w + warps, w + 2 warps ... of the chunk, then warp 0 adds the warps' sums, warp 0's first.
//    grid (ceil(O / 32), chunks), block (32, warps), shared 32 x 32 floats.
// 2. `add_column_sums` has one thread per column, which adds the chunks' sums, chunk 0 first.
//    grid (ceil(columns / block)), any block.
// bias_fwd: one block per row, its threads stride over the columns; grid (N), any block.
//
// Cost in bytes, X = size of floatX: forward N O 2X, backward N O X + chunks O 8; one flop per
// element. Memory binds.

extern "C" __global__ void bias_fwd(floatX* y, const floatX* b, int O) {
    long long row = (long long)blockIdx.x * O;
    for (int c = threadIdx.x; c < O; c += blockDim.x) {
        y[row + c] = to_floatX(to_float(y[row + c]) + to_float(b[c]));
    }
}

extern "C" __global__ void bias_bwd_partial(float* partial, const floatX* dy, int N, int O,
                                            int rows_per_chunk) {
    SHARED_ARRAY(float, tile, MAX_WARPS * WARP);
    int c = blockIdx.x * WARP + threadIdx.x;
    int chunk = blockIdx.y;
    int start = chunk * rows_per_chunk;
    int stop = min(start + rows_per_chunk, N);
    float sum = 0.0f;
    if (c < O) {
        for (int n = start + threadIdx.y; n < stop; n += blockDim.y) {
            sum += to_float(dy[(long long)n * O + c]);
        }
    }
    sum = sum_of_warps(sum, tile);
    if (threadIdx.y == 0 && c < O) {
        partial[(long long)chunk * O + c] = sum;
    }
}

extern "C" __global__ void add_column_sums(float* out, const float* partial, int chunks,
                                           int columns) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= columns) {
        return;
    }
    float sum = 0.0f;
    for (int chunk = 0; chunk < chunks; chunk++) {
        sum += partial[(long long)chunk * columns + c];
    }
    out[c] += sum;
}
