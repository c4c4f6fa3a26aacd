// The instructions of tensor cores, and of the copies that feed them, as small functions named like
// the PTX instructions: one instruction each on a GPU of Ampere or later, a call of the emulator
// elsewhere. floatX is bf16 or fp16 here.
//
// A warp multiplies tiles together: c (16 x 8) += a (16 x 16) b (16 x 8), with c in float32. The
// elements of a tile are distributed over the registers of the 32 lanes. The registers of one lane
// are its fragment of the tile. With lane = 4 r + q:
//
//     tile      elements of this lane                       registers
//     c         rows r and r + 8, columns 2q and 2q + 1     c[0], c[1] (row r), c[2], c[3]
//     a         rows r and r + 8, columns 2q, 2q + 1        a[0] (row r), a[1]
//               and 2q + 8, 2q + 9                          a[2] (row r), a[3]
//     b         column r, rows 2q, 2q + 1                   b[0]
//               and 2q + 8, 2q + 9                          b[1]
//
// A register of a or b holds two elements, the one of lower index in its lower half. So a lane's
// four elements of each of two neighbouring tiles c are, once rounded, exactly its fragment of a
// tile a: the result of one matmul becomes the left operand of the next without leaving its
// registers.
//
// Source: NVIDIA, "PTX ISA", sections on mma.m16n8k16, ldmatrix and cp.async.

// c += a b. The whole warp must call it.
__device__ inline void mma(float* c, const unsigned int* a, const unsigned int* b) {
#ifndef GPU_GPT2_EMULATOR
#if FLOATX == BF16
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
#else
    emulator_mma(c, a, b, FLOATX == BF16, __builtin_FILE(), __builtin_LINE());
#endif
}

// Returns a generic pointer into shared memory as the 32-bit shared address that PTX needs.
#ifndef GPU_GPT2_EMULATOR
__device__ inline unsigned int shared_address(const void* pointer) {
    unsigned int address;
    asm("{ .reg .u64 shared; cvta.to.shared.u64 shared, %1; cvt.u32.u64 %0, shared; }"
        : "=r"(address)
        : "l"(pointer));
    return address;
}
#endif

// Loads four 8 x 8 matrices from shared memory. The whole warp must call it: lane 8 m + i gives the
// address of row i of matrix m, row + offset, a multiple of 16 bytes. (`offset` is a parameter of
// its own so that it becomes part of the instruction.) words[m] of lane 4 r + q receives elements
// 2q and 2q + 1 of row r of matrix m.
__device__ inline void ldmatrix(unsigned int* words, const floatX* row, int offset) {
#ifndef GPU_GPT2_EMULATOR
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row) + offset * (int)sizeof(floatX))
                 : "memory");
#else
    emulator_ldmatrix(words, row + offset, 0, __builtin_FILE(), __builtin_LINE());
#endif
}

// Like ldmatrix, but words[m] of lane 4 r + q receives elements 2q and 2q + 1 of column r of matrix
// m.
__device__ inline void ldmatrix_transposed(unsigned int* words, const floatX* row, int offset) {
#ifndef GPU_GPT2_EMULATOR
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row) + offset * (int)sizeof(floatX))
                 : "memory");
#else
    emulator_ldmatrix(words, row + offset, 1, __builtin_FILE(), __builtin_LINE());
#endif
}

// Starts a copy of 16 bytes from global to shared memory, both at multiples of 16 bytes, or of 16
// zero bytes if not `exists`. The thread continues at once; the bytes are there after
// cp_async_wait_all.
__device__ inline void cp_async(floatX* to, const floatX* from, bool exists) {
#ifndef GPU_GPT2_EMULATOR
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(to)), "l"(from), "r"(exists ? 16 : 0)
                 : "memory");
#else
    emulator_cp_async(to, from, 16, exists);
#endif
}

// Starts a copy of one float from global to shared memory, or of zero if not `exists`.
__device__ inline void cp_async(float* to, const float* from, bool exists) {
#ifndef GPU_GPT2_EMULATOR
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :
                 : "r"(shared_address(to)), "l"(from), "r"(exists ? 4 : 0)
                 : "memory");
#else
    emulator_cp_async(to, from, 4, exists);
#endif
}

// Waits until all copies that this thread has started have arrived. Other threads see the bytes
// only after the next __syncthreads.
__device__ inline void cp_async_wait_all() {
#ifndef GPU_GPT2_EMULATOR
    asm volatile("cp.async.wait_all;" ::: "memory");
#else
    emulator_cp_async_wait_all();
#endif
}
