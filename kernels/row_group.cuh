// Row groups: how the threads of a block share the rows of a matrix (N, C) whose channels they keep
// in registers. layernorm.cu and rmsnorm.cu use them.
//
// A row group works on a row: THREADS_PER_ROW neighbouring threads, which are one or several whole
// warps. Each thread takes PIECES pieces of WIDTH channels (see common.cuh) that lie
// THREADS_PER_ROW pieces apart, so that each read of a warp is one contiguous piece of memory. A
// block has THREADS threads: several row groups of one warp each, or one larger row group.

#define ROW_GROUPS (THREADS / THREADS_PER_ROW)  // row groups of a block

// The first channel of this thread's piece i. The row has no such piece if this is C or more.
#define CHANNEL(i) ((((i) * THREADS_PER_ROW) + (int)threadIdx.x % THREADS_PER_ROW) * WIDTH)

// Returns the sum of `value` over the threads of a row group to each of them.
__device__ inline float row_sum(float value, float* scratch) {
#if THREADS_PER_ROW == WARP
    return warp_sum(value);
#else
    return block_sum(value, scratch);
#endif
}

// Returns the row of this thread's row group, in kernels with one row group per row. A row group
// without a row may return early: if a block has several row groups, they need no barriers.
__device__ inline int row_of_group() {
    return blockIdx.x * ROW_GROUPS + threadIdx.x / THREADS_PER_ROW;
}

// Loads this thread's channels of row n, and zeros for pieces beyond the end of the row.
__device__ inline void load_row(float (*values)[WIDTH], const floatX* x, int n, int C) {
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int c = CHANNEL(i);
        if (c < C) {
            load(values[i], x + (long long)n * C + c);
        } else {
#pragma unroll
            for (int k = 0; k < WIDTH; k++) {
                values[i][k] = 0.0f;
            }
        }
    }
}

// out[c] = the sum of each row group's `sum` for channel c, group 0 first, for all C channels. All
// threads of the block must call this. `sums` is shared memory of THREADS x WIDTH floats; other
// threads may still be reading it when the call returns.
__device__ inline void add_row_groups(float* out, const float (*sum)[WIDTH], int C, float* sums) {
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        __syncthreads();
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            sums[threadIdx.x * WIDTH + k] = sum[i][k];
        }
        __syncthreads();
        for (int j = threadIdx.x; j < THREADS_PER_ROW * WIDTH; j += THREADS) {
            int c = i * THREADS_PER_ROW * WIDTH + j;
            if (c < C) {
                float total = 0.0f;
                for (int group = 0; group < ROW_GROUPS; group++) {
                    total += sums[group * THREADS_PER_ROW * WIDTH + j];
                }
                out[c] = total;
            }
        }
    }
}
