"""Cases and bounds for the ops of any backend, shared by the GPU suite, the benchmarks and the tests."""
