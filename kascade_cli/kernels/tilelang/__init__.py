"""The Hopper kernels: one op per file, each a kernel builder and the wrapper with the reference's signature."""
