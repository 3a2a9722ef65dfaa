"""Tests that run vLLM itself: `make test-vllm`, in an environment of its own. Elsewhere nothing is collected."""

import os

collect_ignore_glob = [] if os.environ.get("KASCADE_TEST_VLLM") else ["test_*.py"]

# One process, one thread, a small cache: an engine starts in seconds, and a test looks inside.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
