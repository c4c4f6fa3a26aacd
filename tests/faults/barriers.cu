// Barriers and collectives that not all threads reach. Lines marked "there" are reported too.

// <<<1, 64>>> __syncthreads is not reached by all threads of the block: block (0, 0, 0): 40
// threads from thread (0, 0, 0) on wait in __syncthreads at HERE; 24 from thread (40, 0, 0) on
// have ended
extern "C" __global__ void early_exit(float* y, const float* x) {
    int i = threadIdx.x;
    y[i] = x[i];
    if (FAULT && i >= 40) {
        return;
    }
    __syncthreads();  // here: early_exit
}

// <<<1, 64>>> __syncthreads is not reached by all threads of the block: block (0, 0, 0): 32
// threads from thread (0, 0, 0) on wait in __syncthreads at HERE; 32 from thread (32, 0, 0) on
// wait in __syncthreads at THERE
extern "C" __global__ void two_barriers(float* y, const float* x) {
    int i = threadIdx.x;
    y[i] = x[i];
    if (FAULT && i < 32) {
        __syncthreads();  // here: two_barriers
    } else {
        __syncthreads();  // there: two_barriers
    }
}

// <<<1, 64>>> __shfl_xor_sync at HERE is not reached by all lanes of its mask 0xffffffff: block
// (0, 0, 0), warp 1: 16 threads from thread (32, 0, 0) on wait in __shfl_xor_sync with mask
// 0xffffffff at HERE; 16 from thread (48, 0, 0) on have ended
extern "C" __global__ void lanes_exit(float* y, const float* x) {
    int i = threadIdx.x;
    y[i] = x[i];
    if (FAULT && i >= 48) {
        return;
    }
    y[i] += __shfl_xor_sync(0xffffffffu, x[i], 1);  // here: lanes_exit
}

// <<<1, 32>>> __shfl_down_sync at HERE is not reached by all lanes of its mask 0xffffffff: block
// (0, 0, 0), warp 0: 16 threads from thread (0, 0, 0) on wait in __shfl_down_sync with mask
// 0xffffffff at HERE; 16 from thread (1, 0, 0) on wait in __syncthreads at THERE
extern "C" __global__ void lanes_elsewhere(float* y, const float* x) {
    int i = threadIdx.x;
    y[i] = x[i];
    if (FAULT && i % 2) {
        __syncthreads();  // there: lanes_elsewhere
    } else {
        y[i] += __shfl_down_sync(0xffffffffu, x[i], 1);  // here: lanes_elsewhere
        __syncthreads();
    }
}

// <<<1, 32>>> 16 threads from thread (0, 0, 0) on wait in __any_sync with mask 0xffffffff at
// HERE; 16 from thread (1, 0, 0) on wait in __syncwarp with mask 0xffffffff at THERE
extern "C" __global__ void different_collectives(float* y, const float* x) {
    int i = threadIdx.x;
    y[i] = x[i];
    if (FAULT && i % 2) {
        __syncwarp();  // there: different_collectives
    } else {
        y[i] += __any_sync(0xffffffffu, i == 3);  // here: different_collectives
    }
}

// <<<1, 20>>> __shfl_xor_sync has lanes that the block lacks in its mask 0xffffffff at
// HERE: block (0, 0, 0), thread (0, 0, 0), lane 0 of the 20 lanes in its warp
extern "C" __global__ void partial_warp(float* y, const float* x) {
    int i = threadIdx.x;
    unsigned int mask = FAULT ? 0xffffffffu : 0x000fffffu;
    y[i] = x[i] + __shfl_xor_sync(mask, x[i], 1);  // here: partial_warp
}

// <<<1, 32>>> __shfl_sync has not the calling lane in its mask 0x0000ffff at HERE: block
// (0, 0, 0), thread (16, 0, 0)
extern "C" __global__ void not_in_own_mask(float* y, const float* x) {
    int i = threadIdx.x;
    y[i] = x[i];
    if (i % 32 < 16 || FAULT) {
        y[i] += __shfl_sync(0x0000ffffu, x[i], 0);  // here: not_in_own_mask
    }
}

// <<<1, 32>>> __shfl_sync takes the value of lane 20, which is not in the mask 0x0000ffff at
// HERE: block (0, 0, 0), thread (0, 0, 0)
extern "C" __global__ void source_not_in_mask(float* y, const float* x) {
    int i = threadIdx.x;
    y[i] = x[i];
    if (i % 32 < 16) {
        y[i] += __shfl_sync(0x0000ffffu, x[i], FAULT ? 20 : 15);  // here: source_not_in_mask
    }
}
