"""The Hopper kernels: one op per file, each a TileLang kernel builder plus the wrapper with the reference's signature."""
