// Faults for the compiler's sanitizers; FAULT is 0 or the number of one of them.

extern "C" __global__ void sanitized(float* y, int* z, const float* x, int n) {
    __shared__ float tile[32];
    int i = threadIdx.x;
    float local[4] = {1.0f, 2.0f, 3.0f, 4.0f};
    float* at = local;
    if (FAULT != 7 || i > 0) {
        tile[i] = x[i];
    }
    __syncthreads();
    y[i] = tile[31 - i];
    z[i] = 0;
    y[i] += FAULT == 1 ? local[i & 7] : local[i & 3];
    y[i] += FAULT == 2 ? at[i & 7] : 0.0f;
    y[i] += FAULT == 3 ? x[i + n] : 0.0f;
    z[i] += FAULT == 4 ? 2147483647 - 10 + i : 0;
    z[i] += FAULT == 4 ? 2147483647 - 10 + i : 0;
    z[i] += FAULT == 5 ? 1 << (i + 8) : 0;
    at = tile;
    y[i] += FAULT == 6 ? at[i + 1] : 0.0f;
}
