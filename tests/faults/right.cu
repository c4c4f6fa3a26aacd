// Kernels that are right although a careless detector might complain.

// y = x transposed, tile by tile; x (N, M), y (M, N).
extern "C" __global__ void transpose(float* y, const float* x, int N, int M) {
    __shared__ float tile[32][33];
    int row = blockIdx.y * 32 + threadIdx.y;
    int column = blockIdx.x * 32 + threadIdx.x;
    if (row < N && column < M) {
        tile[threadIdx.y][threadIdx.x] = x[row * M + column];
    }
    __syncthreads();
    row = blockIdx.x * 32 + threadIdx.y;
    column = blockIdx.y * 32 + threadIdx.x;
    if (row < M && column < N) {
        y[row * N + column] = tile[threadIdx.x][threadIdx.y];
    }
}

// y (1) = sum of x (n) by one block of any number of threads, a multiple of 32.
extern "C" __global__ void total(float* y, const float* x, long long n, float scale) {
    DYNAMIC_SHARED(float, partial);
    float sum = 0.0f;
    for (long long i = threadIdx.x; i < n; i += blockDim.x) {
        sum += scale * x[i];
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    if (threadIdx.x % 32 == 0) {
        partial[threadIdx.x / 32] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        float all = 0.0f;
        for (int warp = 0; warp < blockDim.x / 32; warp++) {
            all += partial[warp];
        }
        y[0] = all;
    }
}

// y = x reversed within 64; neighbouring threads own the two halves of one word.
extern "C" __global__ void reverse_halves(bf16* y, const bf16* x) {
    __shared__ bf16 tile[64];
    __shared__ unsigned char flags[64];
    int i = threadIdx.x;
    tile[i] = x[i];
    flags[i] = i % 2;
    __syncthreads();
    y[i] = tile[63 - i];
    if (flags[i] != i % 2) {
        __trap();
    }
}

// y += x, where x may be y.
extern "C" __global__ void add(float* y, const float* x) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] += x[i];
}

// One number of each kind of exchange per lane: out (11, 32).
extern "C" __global__ void exchanges(int* out) {
    int lane = threadIdx.x;
    unsigned int all = 0xffffffffu;
    out[0 * 32 + lane] = __shfl_sync(all, lane, 5);
    out[1 * 32 + lane] = __shfl_sync(all, lane, lane + 1, 8);
    out[2 * 32 + lane] = __shfl_up_sync(all, lane, 3);
    out[3 * 32 + lane] = __shfl_up_sync(all, lane, 3, 8);
    out[4 * 32 + lane] = __shfl_down_sync(all, lane, 3);
    out[5 * 32 + lane] = __shfl_down_sync(all, lane, 3, 8);
    out[6 * 32 + lane] = __shfl_xor_sync(all, lane, 9);
    out[7 * 32 + lane] = (int)__ballot_sync(all, lane % 3 == 0);
    out[8 * 32 + lane] = __any_sync(all, lane == 31);
    out[9 * 32 + lane] = __all_sync(all, lane < 31);
    unsigned int half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    out[10 * 32 + lane] = __shfl_xor_sync(half, lane, 1);
}

// counts (2) += how many of x (n) are even and odd.
extern "C" __global__ void count(int* counts, const int* x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        atomicAdd(&counts[x[i] % 2], 1);
    }
}

// rank (threads) = which thread came first, second ...: no race, and yet not repeatable.
extern "C" __global__ void order_of_threads(int* counter, int* rank) {
    rank[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1);
}

// y = what an array nobody wrote holds, which is known to be written here.
extern "C" __global__ void write_poison(float* y) {
    int i = threadIdx.x;
    y[i] = __uint_as_float(i == 0 ? 0u : 0x7ffb7ffbu);
    __syncthreads();
    if (y[i] == 1.0f) {
        __trap();
    }
}

// y = the results of CUDA's arithmetic functions that need a definition in the emulator.
extern "C" __global__ void arithmetic(int* y, const int* x, const float* z) {
    y[0] = __dp4a(x[0], x[1], x[2]);
    unsigned long long a = (unsigned long long)(unsigned int)x[0] << 32 | (unsigned int)x[1];
    unsigned long long upper = __umul64hi(a, a);
    y[1] = (int)(upper >> 32);
    y[2] = (int)upper;
    y[3] = __float_as_int(__fadd_rn(__fmul_rn(z[0], z[1]), z[2]));
    y[4] = (int)rintf(z[3]);
    y[5] = (int)roundf(z[3]);
}
