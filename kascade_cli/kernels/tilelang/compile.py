"""Compile TileLang kernels lazily, once per configuration, and without a GPU.

A builder is a plain function from keyword arguments (ints, strings, bools) to a `T.prim_func`; `@kernel()` turns
it into a `Kernel`. Calling that with a configuration gives the compiled kernel (from TileLang's disk cache when it
has been compiled before, see `TILELANG_CACHE_DIR`); `report` says what the compiler made of it; `prebuild` fills
the cache in parallel.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tilelang
import torch
import tvm_ffi
from tilelang import tvm

from kascade_cli.errors import KascadeError

TARGET = {"kind": "cuda", "arch": "sm_90a"}
# Without this unrolling a cp.async pipeline whose trip count is read on the device does not lower: its epilogue stays
# a loop.
UNROLL = {
    "explicit_unroll": True,
    "auto_max_step": 0,
    "auto_max_depth": 8,
    "auto_max_extent": 0,
    "unroll_local_access": False,
}
BASE_CONFIG = {"tl.UnrollLoop": UNROLL, "tl.enable_fast_math": True}
# Automatic warp specialisation has all four producer warps wait for a free slot and one of them copy. Nothing waits
# for the other three: one that is late by a ring of blocks (which a GPU shared with other processes can cause) finds
# its phase over and its parity gone for good, and the kernel hangs. They must not wait at all. The define puts the
# change into TileLang's cache key.
IDLE_WAIT = re.compile(r"^( *)(\w+\[[^;\n]*\]\.wait\([^;\n]*\);\n +if \(tl::tl_shuffle_elect<128>\(\)\))", re.M)
ONE_WARP_WAITS = ["-DKASCADE_ONE_WARP_WAITS"]
POSTPROC = "tilelang_callback_cuda_postproc"
# What the report counts in the generated source: asynchronous loads and tensor-core calls, which fall back silently.
MARKS = {
    "cp_async": r"\bcp_async_gs|\bptx_cp_async|cp\.async\.c[ag]\.",
    "tma_load": r"\btma_load\b",
    "wgmma": r"\bwgmma_[sr]s\b|\bgemm_[sr]s\b|wgmma",
    "mma": r"mma_sync",
    "fence": r"fence_proxy_async",
    "setmaxnreg": r"warpgroup_reg_",
    "atomics": r"atomicAdd|AtomicAdd",
}


@dataclass(frozen=True)
class Resources:
    """What ptxas reports for one device function, plus its launch: bytes, registers per thread."""

    name: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_shared: int
    dynamic_shared: int


@dataclass(frozen=True)
class Report:
    """Generated CUDA, its marks (see MARKS), ptxas performance warnings, and each device function's resources."""

    name: str
    config: dict[str, Any]
    source: str
    marks: dict[str, int]
    warnings: list[str]
    resources: list[Resources] = field(default_factory=list)

    @property
    def spills(self) -> int:
        """Bytes spilled over all device functions of the kernel."""
        return sum(r.spill_stores + r.spill_loads for r in self.resources)

    def row(self) -> dict[str, Any]:
        """One line of the evidence table."""
        config = ",".join(f"{k}={v}" for k, v in self.config.items())
        return {
            "kernel": self.name,
            "config": config,
            "registers": [r.registers for r in self.resources],
            "shared": [r.static_shared + r.dynamic_shared for r in self.resources],
            "spills": self.spills,
            **self.marks,
        }


class Kernel:
    """A kernel builder with its pass configuration; call it with a configuration to get the compiled kernel."""

    def __init__(self, build: Callable[..., Any], pass_configs: dict[str, Any]):
        functools.update_wrapper(self, build)
        self.build = build
        self.pass_configs = pass_configs
        self._compiled: dict[tuple, Any] = {}
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return f"{self.build.__module__.rsplit('.', 1)[-1]}.{self.build.__name__}"

    def __call__(self, **config: Any) -> Any:
        """The compiled kernel for `config`: call it with torch tensors; it runs on the current stream."""
        key = tuple(sorted(config.items()))
        found = self._compiled.get(key)
        if found is not None:
            return found
        with self._lock:
            if key not in self._compiled:
                try:
                    self._compiled[key] = tilelang.compile(
                        self.build(**config),
                        target=tvm.target.Target(TARGET),
                        execution_backend="tvm_ffi",
                        pass_configs=self.pass_configs,
                    )
                except Exception as error:
                    raise KascadeError(
                        f"kernel {self.name}({_text(config)}) does not compile: {_last_line(error)}; "
                        "use --backend torch, and see `kascade doctor`"
                    ) from error
            return self._compiled[key]

    def spec(self, **config: Any) -> Spec:
        """A reference to this kernel that another process can resolve."""
        return Spec(self.build.__module__, self.build.__name__, config)

    def report(self, **config: Any) -> Report:
        """Lower and run ptxas (needs nvcc, no GPU). Kept beside TileLang's cache, keyed by the program's text."""
        func = self.build(**config)
        text = func.script() + json.dumps(
            [self.pass_configs, tilelang.__version__, list(MARKS.items())], sort_keys=True
        )
        path = cache_dir() / "kascade-reports" / (hashlib.sha256(text.encode()).hexdigest() + ".json")
        if path.exists():
            raw = json.loads(path.read_text())
            return Report(**{**raw, "resources": [Resources(**r) for r in raw["resources"]]})
        report = _inspect(self.name, config, func, self.pass_configs)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(asdict(report)))
        part.replace(path)
        return report


@dataclass(frozen=True)
class Spec:
    """Where a kernel lives and how it is configured."""

    module: str
    name: str
    config: dict[str, Any]

    @property
    def kernel(self) -> Kernel:
        return getattr(importlib.import_module(self.module), self.name)

    def __str__(self) -> str:
        return f"{self.module.rsplit('.', 1)[-1]}.{self.name}({_text(self.config)})"


def kernel(**pass_configs: Any) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorate a builder; `pass_configs` join BASE_CONFIG (dots written as `__`: `tl__enable_fast_math=False`)."""
    merged = {**BASE_CONFIG, **{k.replace("__", "."): v for k, v in pass_configs.items()}}
    return lambda build: Kernel(build, merged)


def one_warp_waits(source: str) -> str:
    """Generated CUDA in which only the warp that copies waits for a slot, in kernels that ask for it (IDLE_WAIT)."""
    return IDLE_WAIT.sub(r"\1if (((int)threadIdx.x) < 32) \2", source)


def _install_postproc() -> None:
    before = tvm_ffi.get_global_func(POSTPROC, allow_missing=True)

    def change(source: str, target: Any) -> str:
        source = source if before is None else before(source, target)
        flags = tvm.transform.PassContext.current().config.get("tl.device_compile_flags") or []
        return one_warp_waits(source) if ONE_WARP_WAITS[0] in map(str, flags) else source

    tvm_ffi.register_global_func(POSTPROC, f=change, override=True)


_install_postproc()


@functools.cache
def require_hopper(device: torch.device) -> int:
    """Number of SMs of `device`; raises KascadeError unless it is a Hopper GPU (compute capability 9.0)."""
    if device.type != "cuda" or not torch.cuda.is_available():
        raise KascadeError(
            f"the tilelang backend runs on a Hopper GPU (H100, H200), and these tensors are on {device}: "
            "use --backend torch"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        name = torch.cuda.get_device_name(device)
        raise KascadeError(
            f"the tilelang backend needs compute capability 9.0; {name} has {capability[0]}.{capability[1]}: "
            "use --backend torch"
        )
    return torch.cuda.get_device_properties(device).multi_processor_count


def prebuild(
    specs: Iterable[Spec],
    *,
    jobs: int | None = None,
    task: str = "compile",
    done: Callable[[Spec, float, str], None] | None = None,
) -> dict[str, str]:
    """Compile `specs` in `jobs` processes so that later calls find them on disk; returns {str(spec): error}.

    task: "compile" (for running) or "report" (for `Kernel.report`). done(spec, seconds, error): called as each ends.
    """
    waiting = list(specs)
    failed: dict[str, str] = {}
    lock = threading.Lock()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    command = [sys.executable, "-c", "from kascade_cli.kernels.tilelang.compile import work; work()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}

    def follow() -> None:
        with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stderr=log, **pipes) as child:
            while True:
                with lock:
                    if not waiting:
                        break
                    item = waiting.pop(0)
                seconds, error = _ask(child, item, task)
                if error is None:
                    log.seek(0)
                    error = f"the compiling process ended: {(log.read().strip().splitlines() or ['no message'])[-1]}"
                if error:
                    failed[str(item)] = error
                if done:
                    done(item, seconds, error)
                if child.poll() is not None:
                    break
            child.stdin.close()

    threads = [threading.Thread(target=follow) for _ in range(min(jobs or _cores(), len(waiting)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for item in waiting:  # every process died
        failed[str(item)] = "not compiled: the compiling processes ended early"
    return failed


def _ask(child: subprocess.Popen, item: Spec, task: str) -> tuple[float, str | None]:
    """Hand one kernel to a compiling process; (seconds, error), the error None when the process died over it."""
    try:
        child.stdin.write(json.dumps([task, item.module, item.name, item.config]) + "\n")
        child.stdin.flush()
    except OSError:
        return 0.0, None
    for line in child.stdout:
        if line.startswith("KERNEL "):
            seconds, error = json.loads(line[len("KERNEL ") :])
            return seconds, error
    child.wait()
    return 0.0, None


def work() -> None:
    """The body of a compiling process: one JSON job a line on stdin, one `KERNEL [seconds, error]` line for each."""
    for line in sys.stdin:
        task, module, name, config = json.loads(line)
        start, error = time.perf_counter(), ""
        try:
            found = Spec(module, name, config).kernel
            found.report(**config) if task == "report" else found(**config)
        except Exception as caught:
            error = _last_line(caught)
        print("KERNEL " + json.dumps([time.perf_counter() - start, error]), flush=True)


def _inspect(name: str, config: dict[str, Any], func: Any, pass_configs: dict[str, Any]) -> Report:
    target = tvm.target.Target(TARGET)
    with tvm.transform.PassContext(opt_level=3, config=pass_configs), target:
        artifact = tilelang.lower(func, target=target)
    source = artifact.kernel_source
    shared = {
        str(var.name_hint): int(fn.attrs.get("dyn_shared_memory_buf", 0) or 0)
        for var, fn in artifact.device_mod.functions.items()
    }
    root = Path(tilelang.__file__).parent
    fast = ["--use_fast_math"] if pass_configs.get("tl.enable_fast_math") else []
    with tempfile.TemporaryDirectory() as folder:
        cu = Path(folder) / "kernel.cu"
        cu.write_text(source)
        command = [
            "nvcc",
            "-std=c++20",
            "-O3",
            *fast,
            "-gencode=arch=compute_90a,code=sm_90a",
            f"-I{root / 'src'}",
            f"-I{root / '3rdparty/cutlass/include'}",
            "-Xptxas",
            "-v",
            "-cubin",
            "-o",
            str(cu.with_suffix(".cubin")),
            str(cu),
        ]
        try:
            run = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise KascadeError("nvcc is not on PATH: install the CUDA toolkit (13.0 was tested)") from error
    if run.returncode:
        raise KascadeError(
            f"nvcc rejects {name}({_text(config)}): {(run.stderr.strip().splitlines() or ['no message'])[-1]}"
        )
    warnings = sorted(
        {line.strip() for line in run.stderr.splitlines() if "Potential Performance Loss" in line or "C7508" in line}
    )
    marks = {mark: len(re.findall(pattern, source)) for mark, pattern in MARKS.items()}
    return Report(name, config, source, marks, warnings, _resources(run.stderr, shared))


def _resources(log: str, shared: dict[str, int]) -> list[Resources]:
    """Parse `ptxas -v`; `shared` maps a device function to the dynamic shared memory of its launch."""
    found = []
    for entry in re.split(r"Compiling entry function '", log)[1:]:
        entry_name = entry.split("'", 1)[0]
        used = re.search(r"Used (\d+) registers", entry)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        static = re.search(r"(\d+) bytes smem", entry)
        stack, stores, loads = (int(x) for x in frame.groups()) if frame else (0, 0, 0)
        found.append(
            Resources(
                entry_name,
                int(used.group(1)) if used else 0,
                stack,
                stores,
                loads,
                int(static.group(1)) if static else 0,
                shared.get(entry_name, 0),
            )
        )
    return sorted(found, key=lambda r: r.name)


def _cores() -> int:
    """Cores that this process may use: a container has fewer than its host."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_dir() -> Path:
    return Path(tilelang.env.TILELANG_CACHE_DIR)


def _text(config: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in config.items())


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else 'no message'}"
