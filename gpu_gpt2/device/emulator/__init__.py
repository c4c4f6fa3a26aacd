"""Runs the CUDA C of kernels/ without a GPU, thread by thread, and reports faults of the kernels.

The host's C++ compiler builds the same text that a GPU gets, with shim.h in front, which defines
CUDA's built-in names. Every CUDA thread is a fiber; blocks run one after another; fibers wait for
each other at `__syncthreads` and in the collectives of a warp. The compiler tells the runtime of
every load and store (see runtime/runtime.cpp), and a launch raises KernelError, with kernel, block,
thread, array, index and line of the .cu file, for:

- an access outside an array, a shared variable or the dynamic shared memory, an index outside an
  array's declared size, a misaligned vector access, a write to an input (`const T*`), an access to
  another thread's local variables;
- a `__syncthreads` not reached by all threads of the block, a collective not reached by all lanes
  of its mask, a shuffle from a lane outside the mask;
- a race: two threads access one element, at least one of them writes, and nothing orders the two
  accesses; blocks are never ordered, so no block may read what another writes in the same launch;
- a read of shared memory that no thread of the block has written, or of an element of an `empty`
  array that has never been written; an output of which the kernel has written no element (both not
  in arrays of int8: every value of one byte is an ordinary value);
- `__trap`, a division by zero, a recursion without end, a loop that never reaches a barrier.

With `EmulatorDevice(sanitize=True)` the compiler's address and undefined behaviour sanitizers check
accesses instead, and end the process at a finding: they also check local arrays and the overflow of
signed integers.

The emulator cannot see: timing; the real order of memory operations between warps, and whatever
depends on this order (a volatile or a fence has no meaning here); the rounding of tensor cores;
fast-math, contraction into fused multiply-adds, and the last bits of CUDA's own expf and similar
functions; accesses that the host compiler's optimizer removed. A partial mask orders its whole
warp, so that a race with a lane outside the mask is not found. An index that leaves one shared
array and lands inside another counts as an access to the other array.

The idea comes from numba's CUDA simulator and tinygrad's Python device; this emulator runs the CUDA
text of kernels/ itself. It is a tool for tests and for learning: the CPU trainer is NumPy.
"""

from gpu_gpt2.device.emulator.device import EmulatorDevice, sanitizer_environment

__all__ = ["EmulatorDevice", "sanitizer_environment"]
