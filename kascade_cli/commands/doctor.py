"""`kascade doctor`: what this machine can run, what is missing, and what the kernels compile to."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from typing import Annotated, Any

import typer

from kascade_cli.commands import options as shared
from kascade_cli.console import note, out, print_json, progress, say
from kascade_cli.errors import KascadeError, UsageError, plain, require_extra
from kascade_cli.help import examples
from kascade_cli.provenance import version
from kascade_cli.version import __version__

# package -> (import name, what it is for, how to get it); None: a dependency that must be there
_PACKAGES: dict[str, tuple[str, str, str | None]] = {
    "torch": ("torch", "everything", None),
    "transformers": ("transformers", "models", None),
    "numpy": ("numpy", "analysis", None),
    "scipy": ("scipy", "analysis", None),
    "h5py": ("h5py", "captures", None),
    "tilelang": ("tilelang", "Hopper kernels", "kernels"),
    "apache-tvm-ffi": ("tvm_ffi", "Hopper kernels", "kernels"),
    "matplotlib": ("matplotlib", "pictures", "plot"),
    "accelerate": ("accelerate", "models spread over several GPUs", "accelerate"),
    "gguf": ("gguf", "models in .gguf files", "gguf"),
    "lm-eval": ("lm_eval", "kascade lm-eval", "eval"),
    "datasets": ("datasets", "dev sets from the hub", "hub"),
    "pyarrow": ("pyarrow", "dev sets in parquet", "parquet"),
}
# Dense attention that `kascade bench` compares with where it is installed.
_BASELINES = ("flash-attn-4", "flash-attn-3", "flashinfer-python")
_KERNELS = "Kernels"
_VARIABLES = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_ENDPOINT",
    "HF_TOKEN",
    "CUDA_VISIBLE_DEVICES",
    "TILELANG_CACHE_DIR",
)


@examples("kascade doctor", "kascade doctor --kernels --jobs 4   # compile the kernels; no GPU needed")
def doctor(
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels",
            help="Compile the kernels for sm_90a (no GPU needed) and show what came out.",
            rich_help_panel=_KERNELS,
        ),
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=1024,
            help="Compile in this many processes.",
            show_default="one per core",
            rich_help_panel=_KERNELS,
        ),
    ] = None,
    as_json: shared.AsJson = False,
) -> None:
    """Say what this machine can run and what is missing. Exit code 1 if something that every command needs is."""
    if jobs is not None and not kernels:
        raise UsageError("--jobs goes with --kernels")
    document: dict[str, Any] = examine()
    if kernels:
        document["kernels"] = compile_kernels(jobs)
    print_json(document) if as_json else _render(document)
    broken = [name for name, entry in document["packages"].items() if entry["needed"] and not entry["version"]]
    if broken:
        raise KascadeError(f"{', '.join(broken)} cannot be found: pip install --force-reinstall kascade-cli")
    if failed := [row for row in document.get("kernels", []) if "error" in row]:
        raise KascadeError(f"{len(failed)} kernels do not compile; the first: {failed[0]['error']}")


def examine() -> dict[str, Any]:
    """Versions, devices, settings, and per ability whether it works here and if not why."""
    packages = {
        name: {"version": _version(name, module), "for": purpose, "needed": extra is None, "extra": extra}
        for name, (module, purpose, extra) in _PACKAGES.items()
    }
    devices, trouble = _devices()
    nvcc = _nvcc()
    return {
        "kascade": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "packages": packages,
        "baselines": {name: _version(name) for name in _BASELINES},
        "cuda": {"devices": devices, "note": trouble, "nvcc": nvcc},
        "settings": {name: _setting(name) for name in _VARIABLES if name in os.environ},
        "abilities": _abilities(packages, devices, nvcc),
    }


def _version(package: str, module: str | None = None) -> str | None:
    found = version(package)
    return found if module is None or importlib.util.find_spec(module) else None


def _devices() -> tuple[list[dict[str, Any]], str | None]:
    """CUDA devices as torch sees them, and why there are none."""
    try:
        import torch
    except ImportError:
        return [], "torch is not installed"
    if torch.version.cuda is None:
        return [], f"this torch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return [], f"torch {torch.__version__} finds no CUDA device (driver, or CUDA_VISIBLE_DEVICES)"
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        about = {"name": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        found.append(about | {"memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda})
    return found, None


def _nvcc() -> dict[str, str] | None:
    path = shutil.which("nvcc")
    if path is None:
        return None
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    release = re.search(r"release ([\d.]+)", text)
    return {"path": path, "version": release.group(1) if release else "unknown"}


def _setting(name: str) -> str:
    return "set" if name == "HF_TOKEN" else os.environ[name]


def _abilities(packages: dict[str, Any], devices: list[dict[str, Any]], nvcc: dict[str, str] | None) -> dict[str, str]:
    """What works: `yes`, or the reason why not and what to do."""
    tilelang = packages["tilelang"]["version"] and packages["apache-tvm-ffi"]["version"]
    install = "pip install 'kascade-cli[kernels]'"
    if not tilelang:
        building = f"no: tilelang is not installed ({install})"
    elif nvcc is None:
        building = "no: nvcc is not on PATH (install the CUDA toolkit; 13.0 was tested)"
    else:
        building = "yes"
    hopper = [device["name"] for device in devices if device["capability"] == "9.0"]
    if not devices:
        running = "no: there is no CUDA device; --backend torch runs everything"
    elif not hopper:
        found = ", ".join(f"{device['name']} ({device['capability']})" for device in devices)
        running = f"no: they need compute capability 9.0 (H100, H200), and here is {found}; use --backend torch"
    else:
        running = "yes" if building == "yes" else building
    where = f"yes, on {devices[0]['name']}" if devices else "yes, on the CPU"
    return {
        "PyTorch backend": where,
        "compile the kernels": building,
        "run the kernels": running,
        "offline": "yes: hub names resolve from the cache only" if _offline() else "no: hub names may be downloaded",
    }


def _offline() -> bool:
    return any(os.environ.get(name, "0").upper() in ("1", "TRUE", "YES", "ON") for name in _VARIABLES[2:4])


def compile_kernels(jobs: int | None = None) -> list[dict[str, Any]]:
    """One row per kernel of the corners: registers, spills, shared memory and asynchronous forms, or `error`.

    Compiles in `jobs` processes; what was compiled before comes from the cache. Raises KascadeError without tilelang
    or nvcc.
    """
    require_extra("tilelang", "kernels")
    if shutil.which("nvcc") is None:
        raise KascadeError("nvcc is not on PATH: install the CUDA toolkit (13.0 was tested)")
    from kascade_cli.benchmarking.kernel_list import corner_specs
    from kascade_cli.kernels.tilelang.compile import prebuild

    found = corner_specs()
    with progress("compiling", total=len(found)) as bar:
        failed = prebuild(found, jobs=jobs, task="report", done=lambda *_: bar.advance(bar.first))
    rows = []
    for spec in found:
        error = failed.get(str(spec))
        if error is None:
            try:
                rows.append(spec.kernel.report(**spec.config).row())
                continue
            except Exception as caught:  # one kernel must not hide the others
                error = f"{type(caught).__name__}: {plain(caught, 200)}"
        rows.append({"kernel": str(spec), "config": "", "error": error})
    return rows


def _render(document: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    say(f"kascade {document['kascade']}, Python {document['python']}, {document['system']}")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("package", "version", "for"):
        table.add_column(name)
    for name, entry in document["packages"].items():
        missing = "MISSING" if entry["needed"] else f"not installed: pip install 'kascade-cli[{entry['extra']}]'"
        table.add_row(name, entry["version"] or missing, entry["for"])
    for name, found in document["baselines"].items():
        if found:
            table.add_row(name, found, "bench baseline")
    out.print(table)
    cuda = document["cuda"]
    for device in cuda["devices"]:
        line = f"{device['name']}, {device['memory_gib']} GiB, compute capability {device['capability']}"
        say(f"{line}, CUDA {device['cuda']}")
    if cuda["note"]:
        say(f"no GPU: {cuda['note']}")
    nvcc = cuda["nvcc"]
    say(f"nvcc {nvcc['version']} ({nvcc['path']})" if nvcc else "nvcc: not on PATH")
    for name, value in document["settings"].items():
        say(f"{name}={value}")
    for name, answer in document["abilities"].items():
        say(f"{name}: {answer}")
    if "kernels" in document:
        _render_kernels(document["kernels"])


def _render_kernels(rows: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="kernels for sm_90a", title_justify="left")
    for name in ("kernel", "registers", "spills", "shared", "cp.async", "TMA", "WGMMA"):
        left = name == "kernel"
        table.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for row in rows:
        if "error" in row:
            continue
        numbers = [",".join(map(str, row["registers"])), str(row["spills"]), _kilobytes(row["shared"])]
        marks = [str(row[name] or "-") for name in ("cp_async", "tma_load", "wgmma")]
        table.add_row(f"{row['kernel']} {_short(row['config'])}", *numbers, *marks)
    out.print(table)
    say("registers per thread; spills in bytes; shared memory per CTA; the rest counts calls in the source")
    for row in rows:
        if "error" in row:
            note(f"{row['kernel']}: {row['error']}")


def _short(config: str) -> str:
    """`group=4,head_dim=128,dtype=bfloat16,page=0,write=True` -> `R4 D128 bf16 write`."""
    names = {"group": "R", "head_dim": "D"}
    words = []
    for name, value in (part.split("=") for part in config.split(",")):
        if name == "dtype":
            words.append(value.replace("bfloat", "bf").replace("float", "fp"))
        elif value in ("True", "False"):
            words += [name] if value == "True" else []
        elif (name, value) != ("page", "0"):
            words.append(names.get(name, name) + value)
    return " ".join(words)


def _kilobytes(sizes: list[int]) -> str:
    return ",".join(f"{size / 1024:.0f} KB" for size in sizes)
