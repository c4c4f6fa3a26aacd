// Maximum and sum of exponentials of a row, from which its softmax and its cross-entropy follow,
// computed by one block.

struct Softmax {
    float max;  // the largest x of the row
    float sum;  // the sum of exp(x - max) over the row
};

// Returns maximum and sum of the V values from x[row] on and reads each value once. A thread keeps
// the largest value it has met and the sum of exponentials relative to that value, and rescales the
// sum when it meets a larger value (Milakov & Gimelshein 2018, "Online normalizer calculation for
// softmax", algorithm 3). The maximum begins at the lowest finite float, not at -infinity, because
// -infinity minus -infinity is a NaN. `row` is a multiple of WIDTH; the last V % WIDTH values are
// read one by one. `scratch` is shared memory of MAX_WARPS floats.
__device__ inline Softmax softmax_of_row(const floatX* x, long long row, int V, float* scratch) {
    float max = -LARGEST_FLOAT;
    float sum = 0.0f;
    int whole = V / WIDTH * WIDTH;
#pragma unroll 2
    for (int c = threadIdx.x * WIDTH; c < whole; c += blockDim.x * WIDTH) {
        float values[WIDTH];
        load(values, x + row + c);
        float largest = max;
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            largest = values[k] > largest ? values[k] : largest;
        }
        if (largest > max) {
            sum *= expf(max - largest);
            max = largest;
        }
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            sum += expf(values[k] - max);
        }
    }
    for (int c = whole + threadIdx.x; c < V; c += blockDim.x) {
        float value = to_float(x[row + c]);
        if (value > max) {
            sum *= expf(max - value);
            max = value;
        }
        sum += expf(value - max);
    }
    Softmax result;
    result.max = block_max(max, scratch);
    result.sum = block_sum(sum * expf(max - result.max), scratch);
    return result;
}
