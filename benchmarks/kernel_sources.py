"""Prints the sha256 of every kernel's generated CUDA, to compare two commits: `diff <(at one) <(at the other)`.

No GPU and no nvcc are needed, and no cache is read. One line a kernel, `sha256  name(configuration)`, then the number
of kernels and the hash of all lines. Takes more than eleven minutes of one core.

    python benchmarks/kernel_sources.py [--out FOLDER] [--group R ...]
"""

import argparse
import hashlib
import sys
from pathlib import Path

import tilelang
from tilelang import tvm

from kascade_cli.kernels.tilelang.compile import TARGET, Spec
from kascade_cli.kernels.tilelang.prefill_specs import prefill_specs
from kascade_cli.kernels.tilelang.specs import decode_specs, select_specs

# (query heads per KV head, head size, dtype, page size of the cache or 0, tile): the paper's shape, and every
# value of each limit at least once.
SHAPES = (
    (4, 128, "bfloat16", 0, 32),
    (4, 128, "bfloat16", 64, 16),
    (1, 128, "float16", 256, 128),
    (2, 64, "bfloat16", 0, 8),
    (7, 128, "float16", 64, 64),
    (16, 64, "float16", 16, 32),
)


def wanted(groups: list[int]) -> list[Spec]:
    """The specs of SHAPES with these groups (all if empty), each once."""
    found = select_specs()
    for group, head_dim, dtype, page, tile in SHAPES:
        if not groups or group in groups:
            found += [*decode_specs(group, head_dim, dtype, page), *prefill_specs(group, head_dim, dtype, tile)]
            found += prefill_specs(group, head_dim, dtype, tile, page)
    return list({str(spec): spec for spec in found}.values())


def source(spec: Spec) -> str:
    """The CUDA that TileLang generates for it."""
    kernel, target = spec.kernel, tvm.target.Target(TARGET)
    with tvm.transform.PassContext(opt_level=3, config=kernel.pass_configs), target:
        return tilelang.lower(kernel.build(**spec.config), target=target).kernel_source


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the sources here, one .cu a kernel")
    parser.add_argument("--group", type=int, nargs="*", default=[], help="only shapes with these heads per KV head")
    options = parser.parse_args(arguments)
    total = hashlib.sha256()
    found = wanted(options.group)
    for spec in found:
        text = source(spec)
        line = f"{hashlib.sha256(text.encode()).hexdigest()}  {spec}"
        total.update(line.encode() + b"\n")
        print(line, flush=True)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / f"{spec}.cu").write_text(text)
    print(f"{total.hexdigest()}  all {len(found)} kernels, TileLang {tilelang.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
