// Two threads, one place, and nothing that says who comes first.

// <<<1, 64>>> race on byte 0 of shared 'tile' (256 bytes): thread (0, 0, 0) writes it at
// THERE and thread (32, 0, 0) reads it at HERE with no barrier between: block (0, 0, 0), after 0
// __syncthreads
extern "C" __global__ void shared_write_read(float* y, const float* x) {
    __shared__ float tile[64];
    int i = threadIdx.x;
    tile[i] = x[i];  // there: shared_write_read
#if !FAULT
    __syncthreads();
#endif
    y[i] = tile[i % 32];  // here: shared_write_read
}

// <<<1, 64>>> race on byte 4 of shared 'tile' (256 bytes): thread (0, 0, 0) reads it at THERE and
// thread (1, 0, 0) writes it at HERE with no barrier between: block (0, 0, 0), after 1
// __syncthreads
extern "C" __global__ void shared_read_write(float* y, const float* x) {
    __shared__ float tile[64];
    int i = threadIdx.x;
    tile[i] = x[i];
    __syncthreads();
    float other = tile[(i + 1) % 64];  // there: shared_read_write
#if !FAULT
    __syncthreads();
#endif
    tile[i] = other;  // here: shared_read_write
    y[i] = other;
}

// Every thread reads the place before one of them writes it.
// <<<1, 64>>> race on byte 0 of shared 'total' (4 bytes): thread (0, 0, 0) reads it at THERE and
// thread (17, 0, 0) writes it at HERE with no barrier between
extern "C" __global__ void shared_many_readers(float* y, const float* x) {
    __shared__ float total;
    int i = threadIdx.x;
    if (i == 0) {
        total = x[0];
    }
    __syncthreads();
    y[i] = total;  // there: shared_many_readers
#if !FAULT
    __syncthreads();
#endif
    if (i == 17) {
        total = 0.0f;  // here: shared_many_readers
    }
}

// <<<1, 64>>> race on byte 28 of shared 'tile' (256 bytes): thread (7, 0, 0) writes it at HERE
// and thread (40, 0, 0) writes it at HERE
extern "C" __global__ void shared_two_writers(float* y, const float* x) {
    __shared__ float tile[64];
    int i = threadIdx.x;
    tile[FAULT && i == 40 ? 7 : i] = x[i];  // here: shared_two_writers
    __syncthreads();
    y[i] = tile[FAULT ? 7 : i];
}

// <<<1, 64>>> race on byte 0 of shared 'tile' (256 bytes): thread (0, 0, 0) writes it at THERE
// and thread (1, 0, 0) reads it at HERE
extern "C" __global__ void warp_write_read(float* y, const float* x) {
    __shared__ float tile[64];
    int i = threadIdx.x;
    tile[i] = x[i];  // there: warp_write_read
#if !FAULT
    __syncwarp();
#endif
    y[i] = tile[i & ~1];  // here: warp_write_read
}

// Lane 0 reads before the warp meets, which orders it; lane 1 reads after that.
// <<<1, 32>>> race on byte 0 of shared 'total' (4 bytes): thread (1, 0, 0) reads it at THERE and
// thread (2, 0, 0) writes it at HERE
extern "C" __global__ void warp_read_write(float* y, const float* x) {
    __shared__ float total;
    int i = threadIdx.x;
    if (i == 0) {
        total = x[0];
    }
    __syncwarp();
    if (i == 0) {
        y[0] = total;
    }
    __syncwarp();
    if (i > 0) {
        y[i] = FAULT && i > 1 ? 0.0f : total;  // there: warp_read_write
    }
#if !FAULT
    __syncwarp();
#endif
    if (i == 2) {
        total = 0.0f;  // here: warp_read_write
    }
}

// A collective orders the lanes of its own warp, and no others.
// <<<1, 64>>> thread (0, 0, 0) writes it at THERE and thread (32, 0, 0) reads it at HERE
extern "C" __global__ void collective_is_no_barrier(float* y, const float* x) {
    __shared__ float tile[64];
    int i = threadIdx.x;
    tile[i] = x[i];  // there: collective_is_no_barrier
    float neighbour = __shfl_xor_sync(0xffffffffu, x[i], 1);
    y[i] = neighbour + tile[FAULT ? i % 32 : i ^ 1];  // here: collective_is_no_barrier
}

// <<<1, 64, 256>>> race on byte 0 of the dynamic shared memory (256 bytes): thread (0, 0, 0)
// writes it at THERE and thread (32, 0, 0) reads it at HERE
extern "C" __global__ void dynamic_write_read(float* y, const float* x) {
    DYNAMIC_SHARED(float, tile);
    int i = threadIdx.x;
    tile[i] = x[i];  // there: dynamic_write_read
#if !FAULT
    __syncthreads();
#endif
    y[i] = tile[i % 32];  // here: dynamic_write_read
}

// <<<1, 64>>> race on y[0]: thread (0, 0, 0) writes it at THERE and thread (32, 0, 0) reads it
// at HERE with no barrier between: block (0, 0, 0), after 0 __syncthreads
extern "C" __global__ void global_write_read(float* y, const float* x) {
    int i = threadIdx.x;
    y[i] = x[i];  // there: global_write_read
#if !FAULT
    __syncthreads();
#endif
    float other = y[i % 32];  // here: global_write_read
    __syncthreads();
    y[i] = other;
}

// <<<2, 64>>> race on y[0]: block (0, 0, 0), thread (0, 0, 0) writes it at HERE and block (1, 0,
// 0), thread (0, 0, 0) writes it at HERE in one launch, where blocks have no order
extern "C" __global__ void blocks_write_one(float* y, const float* x) {
    int i = threadIdx.x;
    y[FAULT ? i : 64 * blockIdx.x + i] = x[i];  // here: blocks_write_one
}

// <<<2, 64>>> race on y[0]: block (0, 0, 0), thread (0, 0, 0) writes it at HERE and block (1, 0,
// 0), thread (0, 0, 0) reads it at HERE in one launch
extern "C" __global__ void block_reads_other(float* y, const float* x) {
    int i = 64 * blockIdx.x + threadIdx.x;
    y[i] = x[i % 64];  // there: block_reads_other
    y[i] += y[FAULT ? threadIdx.x : i];  // here: block_reads_other
}

// The first block reads what the last one writes; the block between reads it too.
// <<<3, 64>>> race on z_in_out[5]: block (0, 0, 0), thread (5, 0, 0) reads it at THERE and block
// (2, 0, 0), thread (5, 0, 0) writes it at HERE in one launch, where blocks have no order
extern "C" __global__ void block_overwrites_read(float* y, float* z_in_out, const float* x) {
    int i = threadIdx.x;
    y[64 * blockIdx.x + i] = x[i] + z_in_out[i];  // there: block_overwrites_read
    if (FAULT && blockIdx.x == gridDim.x - 1 && i == 5) {
        z_in_out[i] = 0.0f;  // here: block_overwrites_read
    }
    if (!FAULT && blockIdx.x == 0) {
        z_in_out[64 + i] = 0.0f;
    }
}

// <<<1, 64>>> race on counts[0]: an atomic operation changes it at THERE and thread (63, 0, 0)
// reads it at HERE
extern "C" __global__ void atomic_and_plain(int* counts, const float* x) {
    int i = threadIdx.x;
    atomicAdd(&counts[x[i] < 0.0f], 1);  // there: atomic_and_plain
#if !FAULT
    __syncthreads();
#endif
    if (i == 63) {
        counts[2] = counts[0];  // here: atomic_and_plain
    }
}
