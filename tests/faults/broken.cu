// Does not compile, with FAULT=0 and FAULT=1 for different reasons.

__device__ int nothing() {
#if !FAULT
    return undeclared;
#endif
}

extern "C" __global__ void broken(float* y) { y[threadIdx.x] = nothing(); }
