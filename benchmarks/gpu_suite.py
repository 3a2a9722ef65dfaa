"""Everything that needs a Hopper GPU, in one command and under nine minutes:

    python benchmarks/gpu_suite.py                     results under $OUT, or benchmarks/results/
    python benchmarks/gpu_suite.py --parts model,e2e   only the speed table
    python benchmarks/gpu_suite.py --dry-run           the same code on a CPU, tiny sizes, PyTorch backend

Parts: `compile` builds the kernels in parallel processes; `decode`, `prefill` (numerics against float64), `stress`
(races) and `demo` (the demo model's answers on both backends) then run side by side; `model` and `e2e` (the speed
table) have the GPU to themselves. Every part is a process with a time limit, so that one failure cannot take the
others with it, and writes its findings as it goes. The parent joins them into one JSON file and prints a summary. Exit
code 0 only if every part ended well and no check failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# name -> (stage, share of --minutes that the part may take)
PARTS = {
    "compile": (0, 0.30),
    "decode": (1, 0.28),
    "prefill": (1, 0.28),
    "stress": (1, 0.28),
    "demo": (1, 0.28),
    "model": (2, 0.36),
    "e2e": (3, 0.22),
}
# size -> (must, aim): whole-model speed-ups over the best dense attention
TARGETS = {
    "decode 64 x 32k": (4.5, 5.0),
    "decode 16 x 128k": (4.5, 5.0),
    "decode 1 x 128k": (3.0, 4.0),
    "decode 4 x 32k": (3.0, 4.0),
    "prefill 1 x 32k": (2.7, 3.2),
    "prefill 1 x 128k": (2.8, 3.4),
    "own decode": (0.97, 1.0),
    "own prefill": (0.85, 0.95),
    "e2e decode 8 x 64k": (2.0, 2.5),
}


def main() -> int:
    """Runs the stages; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="some of " + ",".join(PARTS))
    parser.add_argument("--minutes", type=float, default=8.7, help="time for everything; parts get shares of it")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU with the PyTorch backend")
    parser.add_argument("--output", "-o", type=Path, help="the JSON file to write")
    parser.add_argument("--commit", help="what to record where the tree has no git history")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        return run_part(options.part, options.into, options.seconds, options.dry_run)
    parts = options.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"unknown part {unknown[0]}: use some of {','.join(PARTS)}")
    if options.commit:
        os.environ["KASCADE_COMMIT"] = options.commit
    return Suite(parts, options).run()


class Suite:
    """Starts the parts, stage by stage, and joins what they leave."""

    def __init__(self, parts: list[str], options: argparse.Namespace):
        self.parts, self.dry = parts, options.dry_run
        self.begin, self.limit = time.monotonic(), options.minutes * 60
        folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
        folder.mkdir(parents=True, exist_ok=True)
        name = "gpu_suite_dry.json" if self.dry else "gpu_suite.json"
        self.output: Path = options.output or folder / name
        self.work = self.output.with_suffix(".parts")
        self.work.mkdir(parents=True, exist_ok=True)
        self.status: dict[str, dict[str, Any]] = {}

    def run(self) -> int:
        """Runs everything; the joined file is rewritten after every stage."""
        stages = sorted({PARTS[part][0] for part in self.parts})
        for stage in stages:
            here = [part for part in self.parts if PARTS[part][0] == stage]
            self.stage(here)
            self.join()
        result = self.join()
        summary = summarise(result)
        print("\n".join(summary["lines"]))
        print(f"wrote {self.output} after {result['seconds']:.0f} s")
        return 0 if summary["ok"] else 1

    def stage(self, parts: list[str]) -> None:
        """Runs `parts` side by side, each within its share of the time and of what is left."""
        left = self.limit - (time.monotonic() - self.begin)
        running = {}
        for part in parts:
            seconds = min(PARTS[part][1] * self.limit, left - 5)
            if seconds < 10:
                self.status[part] = {"status": "skipped", "error": "no time left"}
                continue
            (self.work / f"{part}.json").unlink(missing_ok=True)
            command = [sys.executable, str(Path(__file__).resolve()), "--part", part, "--seconds", str(seconds)]
            command += ["--into", str(self.work / f"{part}.json")] + (["--dry-run"] if self.dry else [])
            log = open(self.work / f"{part}.log", "w")  # noqa: SIM115 - closed when the part ends
            options: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT, "cwd": ROOT, "env": environment()}
            child = subprocess.Popen(command, start_new_session=True, **options)
            running[part] = (child, log, time.monotonic(), seconds)
        while running:
            for part, (child, log, begin, seconds) in list(running.items()):
                spent = time.monotonic() - begin
                late = spent > seconds + 15
                if late:
                    os.killpg(child.pid, signal.SIGKILL)  # with the compilers that it started
                if child.poll() is None and not late:
                    continue
                code = child.wait()
                log.close()
                del running[part]
                entry: dict[str, Any] = {"status": "ended" if code == 0 else "failed", "seconds": round(spent, 1)}
                if late:
                    entry |= {"status": "failed", "error": f"stopped after {spent:.0f} s"}
                elif code:
                    entry["error"] = tail(self.work / f"{part}.log")
                self.status[part] = entry
                print(f"{part}: {entry['status']} after {spent:.0f} s {entry.get('error', '')}", flush=True)
            time.sleep(0.2)

    def join(self) -> dict[str, Any]:
        """The joined result so far, written to the output."""
        result: dict[str, Any] = {"schema": "kascade-gpu-suite/v1", "seconds": round(time.monotonic() - self.begin, 1)}
        parts: dict[str, Any] = {}
        for part in self.parts:
            path = self.work / f"{part}.json"
            found = json.loads(path.read_text()) if path.exists() else {}
            result |= found.pop("machine", {})
            parts[part] = self.status.get(part, {"status": "not run"}) | found
        result["rows"] = [row for name in ("model", "e2e") for row in parts.get(name, {}).get("rows", [])]
        for name in ("model", "e2e"):
            parts.get(name, {}).pop("rows", None)
        result["parts"] = parts
        temporary = self.output.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(self.output)
        return result


def environment() -> dict[str, str]:
    """One kernel cache for all parts, and quiet libraries."""
    cache = os.environ.get("TILELANG_CACHE_DIR", str(Path.home() / ".cache" / "kascade-tilelang"))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **quiet, "TILELANG_CACHE_DIR": cache, "PYTHONPATH": path}


def tail(path: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """Lines for people, and whether all is well."""
    where = result.get("gpu") or result.get("device") or "no machine"
    lines = [f"{where}, commit {result.get('commit')}, {result.get('date')}"]
    ok = True
    for name, part in result["parts"].items():
        text = part.get("summary", "")
        problem = part.get("error")
        good = part["status"] == "ended" and not part.get("failures")
        ok &= good
        lines.append(
            f"{name:8} {'ok' if good else 'FAILED'} ({part.get('seconds', 0):.0f} s) {text} {problem or ''}".rstrip()
        )
        lines += [f"         {line}" for line in part.get("failures", [])[:8]]
    lines += speed_lines(result["rows"])
    return {"ok": ok, "lines": lines}


def speed_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The speed table, each line beside its targets where it has some."""
    lines = []
    for row in rows:
        if row.get("strategy", "kascade") != "kascade":
            if "speedup" in row and row["name"] in ("model", "sparse"):
                what = "whole model" if row["kind"] == "e2e" else "attention"
                lines.append(f"{row['strategy']} {row['phase']} {row['size']}, {what}: {row['speedup']:.2f}x")
        elif row["kind"] == "model" and "speedup" in row:
            key = f"{row['phase']} {row['size']}"
            parts = " ".join(f"{name} {row[f'{name}_ms']:.4g}" for name in ("dense", "layer0", "anchor", "reuse"))
            lines.append(f"{key:18} {row['speedup']:.2f}x{target(key)}  {parts} ms (dense: {row['baseline']})")
        elif row["kind"] == "e2e" and row["name"] == "sparse":
            key = f"e2e {row['phase']} {row['size']}"
            lines.append(f"{key:18} {row['speedup']:.2f}x{target(key)}  {row['tokens_s']:.0f} tokens/s")
        elif row["kind"] == "failed":
            lines.append(f"{row['phase']} {row['size']}: {row['error']}")
    for phase in ("decode", "prefill"):
        for size in dict.fromkeys(row["size"] for row in rows if row["phase"] == phase and row["kind"] == "dense"):
            timed = {
                row["name"]: row["ms_p50"]
                for row in rows
                if row["kind"] == "dense"
                and row.get("strategy", "kascade") == "kascade"
                and (row["phase"], row["size"]) == (phase, size)
                and "ms_p50" in row
            }
            others = [ms for name, ms in timed.items() if name != "own"]
            if "own" in timed and others:
                key = f"own {phase}"
                lines.append(f"{key} {size}: {min(others) / timed['own']:.2f} of the best dense{target(key)}")
    return lines


def target(key: str) -> str:
    """`(must 4.5, aim 5)` or nothing."""
    return "" if key not in TARGETS else " (must {:g}, aim {:g})".format(*TARGETS[key])


def run_part(name: str, into: Path, seconds: float, dry: bool) -> int:
    """One part in this process: writes its findings to `into` as it goes."""
    import importlib

    deadline = time.monotonic() + seconds
    parts, speed = (importlib.import_module(f"benchmarks.{module}") for module in ("gpu_parts", "gpu_speed"))
    ctx = parts.Context(into, deadline, dry)
    ctx.save()
    getattr(speed if hasattr(speed, f"part_{name}") else parts, f"part_{name}")(ctx)
    ctx.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
