"""Runs the CUDA C of kernels/ without a GPU, thread by thread, and reports what goes wrong.

The host's C++ compiler builds the very text that a GPU gets, with shim.h in front, which gives it
CUDA's words. Every CUDA thread is a fiber; blocks run one after another; `__syncthreads` and the
collectives of a warp are where fibers wait for each other. The compiler tells the runtime of every
load and store (see runtime/runtime.cpp), and the runtime raises KernelError, with kernel, block,
thread, array, index and line of the .cu file, for:

- an access outside an array, a shared variable or the dynamic shared memory, an index outside an
  array's declared size, a misaligned vector access, a write to an input (`const T*`), an access to
  another thread's local variables;
- a `__syncthreads` not reached by all threads of the block, a collective not reached by all lanes
  of its mask, a shuffle from a lane outside the mask;
- a race: two threads touch one element, at least one writes, and nothing orders them; blocks are
  never ordered, so none may read what another writes in the same launch;
- a read of shared memory that no thread of the block has written, or of an element of `empty` that
  nobody has written; an output that still is as `empty` made it when the kernel has ended;
- `__trap`, a division by zero, a recursion without end, a loop that never reaches a barrier.

With `EmulatorDevice(sanitize=True)` the compiler's address and undefined behaviour sanitizers judge
instead, and end the process: they also see local arrays and the overflow of signed numbers.

What it cannot see: timing; the real order of memory operations between warps, and whatever else
depends on it (a volatile or a fence has no meaning here); the rounding of tensor cores; fast-math,
contraction into fused multiply-adds and CUDA's own last bits of expf and its like; what a kernel
does with bytes that the optimizer removed. A partial mask orders its whole warp, so that a race
with a lane outside the mask goes unseen. An index that leaves one shared array and lands far
inside another is taken for an access to that other.

Its ancestors are numba's CUDA simulator and tinygrad's Python device; ours runs the product's own
CUDA text. It is a tool for tests and for learning: the CPU trainer is NumPy.
"""

from gpu_gpt2.device.emulator.device import EmulatorDevice, sanitizer_environment

__all__ = ["EmulatorDevice", "sanitizer_environment"]
