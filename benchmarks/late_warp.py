"""Why only the warp that copies may wait for a free slot (`compile.IDLE_WAIT`), shown on a Hopper GPU:

    python benchmarks/late_warp.py

TileLang's pipelined copies have four producer warps, of which one copies. Here the last of them is held back for
0.8 ms at its third block, as a busy GPU might do. With the kernels as TileLang generates them it misses its turn and
waits for ever; with the kernels as they are built here, the same delay changes nothing. Each case is a process of its
own, which is killed after --seconds. Exit code 0 if it is as described.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LATE = "if (((int)threadIdx.x) >= 96 && k == 2) { for (int z = 0; z < 40; ++z) __nanosleep(20000); }\n"
CASES = [(source, op) for source in ("generated", "built") for op in ("decode_dense", "decode_score")]


def main() -> int:
    """Runs all cases side by side; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="a case that takes longer hangs")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        run_case(*options.case)
        return 0
    import torch

    if not torch.cuda.is_available():
        parser.error("this needs a Hopper GPU")
    running = {}
    for source, op in CASES:
        # A cache of its own: TileLang's does not know that the source was changed.
        cache = tempfile.mkdtemp(prefix="late-warp-")
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        command = [sys.executable, str(Path(__file__).resolve()), "--case", source, op]
        env = {**os.environ, "TILELANG_CACHE_DIR": cache, "PYTHONPATH": path}
        running[source, op] = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    good = True
    for (source, op), child in running.items():
        try:
            ended = "ends" if child.wait(options.seconds) == 0 else "fails"
        except subprocess.TimeoutExpired:
            child.kill()
            ended = "hangs"
        good &= ended == ("hangs" if source == "generated" else "ends")
        print(f"{op}, waits as {source}: {ended}", flush=True)
    return 0 if good else 1


def run_case(source: str, op: str) -> None:
    """One call of `op` whose last producer warp is late."""
    import torch

    from kascade_cli.kernels import get_backend
    from kascade_cli.kernels.testing import decode
    from kascade_cli.kernels.tilelang import compile as compiler

    guard = "if (((int)threadIdx.x) < 32) " if source == "built" else ""
    compiler.one_warp_waits = lambda text: compiler.IDLE_WAIT.sub(rf"\1{LATE}\1{guard}\2", text)
    ops = get_backend("tilelang", "cuda")
    # 132 rows: each CTA reads dozens of blocks, so that a warp can fall a whole ring behind.
    data = decode.make_inputs(decode.DecodeCase((5000,) * 132, 5120, heads=8, kv_heads=2), torch.device("cuda"), 1)
    arguments = [data["q"], data["k"], *([data["v"]] if op == "decode_dense" else []), data["start"], data["length"]]
    getattr(ops, op)(*arguments, scale=data["scale"])
    torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
