"""How fast it is, beside the limits of the device and beside others; how large the kernels are."""
