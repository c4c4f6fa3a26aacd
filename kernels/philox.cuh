// Philox4x32-10, a random number generator without state: a counter of four words and a key of two
// give four random words (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3").
// gpu_gpt2/rng/philox.py is the same in Python.

#define PHILOX_ROUNDS 10
#define PHILOX_MULTIPLIER_0 0xd2511f53u
#define PHILOX_MULTIPLIER_1 0xcd9e8d57u
#define PHILOX_KEY_STEP_0 0x9e3779b9u  // golden ratio times 2^32
#define PHILOX_KEY_STEP_1 0xbb67ae85u  // sqrt(3) - 1, times 2^32

// Returns the four words of `counter` under the key (key_0, key_1).
__device__ inline uint4 philox(uint4 counter, unsigned int key_0, unsigned int key_1) {
    for (int round = 0; round < PHILOX_ROUNDS; round++) {
        unsigned long long product_0 = (unsigned long long)PHILOX_MULTIPLIER_0 * counter.x;
        unsigned long long product_1 = (unsigned long long)PHILOX_MULTIPLIER_1 * counter.z;
        counter = make_uint4((unsigned int)(product_1 >> 32) ^ counter.y ^ key_0,
                             (unsigned int)product_1,
                             (unsigned int)(product_0 >> 32) ^ counter.w ^ key_1,
                             (unsigned int)product_0);
        key_0 += PHILOX_KEY_STEP_0;
        key_1 += PHILOX_KEY_STEP_1;
    }
    return counter;
}
