"""One self-contained HTML page of captures, profiles, evaluations, sweeps and benchmarks."""
