"""Captures, verifications and evaluations shared out over the GPUs of one host, against one GPU; under five minutes.

    python benchmarks/scale.py [MODEL] -o benchmarks/results/scale.json [--num-prompts 32] [--max-length 16k]
    python benchmarks/scale.py --dry -o scale.json        # on the CPU with the small demo model

Runs the commands as a user would: one process on the first GPU, then `torchrun --nproc-per-node N`. Each pair is
checked for equality (the capture array by array and byte by byte; the profile and the table of answers entry by
entry), and the capture must be 1.8 times as fast on 2 GPUs (0.9 N on N): exit code 3 if it is not, 1 if anything
differs. Without MODEL a random one of a billion parameters is made: it captures and verifies as a real one, and has no
answers to evaluate.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MUST = 0.9  # of the number of processes
VOLATILE = ("created", "date", "command", "seconds", "output", "profile")  # when and where, not what


class Job:
    """One comparison after the other; rows and failures as they come."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.deadline = time.monotonic() + 60 * options.minutes
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []

    def run(self, name: str, processes: int, *arguments: Any) -> dict[str, Any]:
        """A command under so many processes: what it printed as JSON, and the seconds that it took in all."""
        launch = [sys.executable, "-m"]
        if processes > 1:
            launch += [
                "torch.distributed.run",
                "--nproc-per-node",
                str(processes),
                "--master-port",
                str(self.options.port),
            ]
            launch.append("-m")
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        changes = {"PYTHONPATH": paths, "OMP_NUM_THREADS": self.options.threads, "HF_HUB_OFFLINE": "1"}
        if processes == 1 and not self.options.dry:
            changes["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        began = time.perf_counter()
        done = subprocess.run(
            [*launch, "kascade_cli", *map(str, arguments), "--json"],
            env=os.environ | changes,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            text=True,
            timeout=max(1.0, self.deadline - time.monotonic()),
        )
        wall = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(f"{name} in {processes} processes: exit {done.returncode}")
        return {"document": json.loads(done.stdout), "wall": wall}

    def compare(self, name: str, equal: bool, one: dict, many: dict, seconds: tuple[float, float]) -> None:
        processes = self.options.processes
        row = {
            "what": name,
            "processes": processes,
            "seconds_one": round(seconds[0], 2),
            "seconds_many": round(seconds[1], 2),
            "speedup": round(seconds[0] / seconds[1], 3),
            "wall_one": round(one["wall"], 2),
            "wall_many": round(many["wall"], 2),
            "wall_speedup": round(one["wall"] / many["wall"], 3),
            "equal": equal,
        }
        self.rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if not equal:
            self.failures.append(f"{name}: {processes} processes give something else than one")

    # -- what is compared --

    def profile(self) -> None:
        options = self.options
        arguments = [
            "profile",
            options.model,
            "--num-prompts",
            options.num_prompts,
            "--max-length",
            options.max_length,
        ]
        arguments += ["--dtype", options.dtype, "--tiles-per-prompt", options.tiles, *self.device]
        one = self.run("profile", 1, *arguments, "-o", "one.h5")
        many = self.run("profile", options.processes, *arguments, "-o", "many.h5")
        differing = differences(self.folder / "one.h5", self.folder / "many.h5")
        for line in differing:
            self.failures.append(f"profile: {line}")
        self.compare("profile", not differing, one, many, tuple(run["document"]["seconds"] for run in (one, many)))

    def verify(self) -> None:
        options = self.options
        arguments = [
            "select-anchors",
            "one.h5",
            "--dtype",
            options.dtype,
            "--bootstrap",
            "0",
            "--verify",
            *self.device,
        ]
        arguments += ["--verify-prompts", options.verify_prompts, "--verify-length", options.verify_length]
        arguments += ["--max-anchors", options.max_anchors, "--min-keys", options.min_keys, "--model", options.model]
        one = self.run("verification", 1, *arguments, "-o", "one.yaml")
        many = self.run("verification", options.processes, *arguments, "-o", "many.yaml")
        equal = still(one["document"]) == still(many["document"])
        self.compare("verification", equal, one, many, (one["wall"], many["wall"]))

    def evaluate(self) -> None:
        options = self.options
        profile = options.profile.resolve() if options.profile else "one.yaml"
        arguments = ["evaluate", options.model, "--profile", profile, "--strategies", "dense,kascade", *self.device]
        arguments += ["--num-prompts", options.verify_prompts, "--max-length", options.verify_length]
        arguments += ["--dtype", options.dtype]
        one = self.run("evaluation", 1, *arguments)
        many = self.run("evaluation", options.processes, *arguments)
        equal = still(one["document"]) == still(many["document"])
        seconds = (sum(row["seconds"] for row in run["document"]["rows"]) for run in (one, many))
        self.compare("evaluation", equal, one, many, tuple(seconds))

    @property
    def device(self) -> list[str]:
        return ["--device", "cpu"] if self.options.dry else []


def still(document: Any) -> Any:
    """A document without what changes from run to run."""
    if isinstance(document, dict):
        return {key: still(value) for key, value in document.items() if key not in VOLATILE}
    return [still(entry) for entry in document] if isinstance(document, list) else document


def differences(first: Path, second: Path) -> list[str]:
    """A line for every array of the captures that is not the same to the last byte."""
    import h5py

    found = []
    with h5py.File(first) as one, h5py.File(second) as other:
        names: dict[str, set[str]] = {}
        for which, file in (("one", one), ("many", other)):
            names[which] = set()
            file.visititems(lambda name, node, which=which: names[which].add(name) if hasattr(node, "shape") else None)
        if names["one"] != names["many"]:
            return ["they hold other arrays"]
        for name in sorted(names["one"]):
            a, b = one[name][()], other[name][()]
            if a.shape != b.shape or a.tobytes() != b.tobytes():
                found.append(f"{name} differs by up to {abs(a.astype(float) - b.astype(float)).max():g}")
    return found


def random_model(folder: Path) -> str:
    """A Llama of a billion random weights with the demo's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kascade_cli.models import load_tokenizer

    tokenizer = load_tokenizer("demo-small")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
    )  # fmt: skip
    with torch.device("cuda"):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "random")
    tokenizer.save_pretrained(folder / "random")
    return str(folder / "random")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--max-length", default="16k")
    parser.add_argument("--tiles", default="32")
    parser.add_argument("--verify-prompts", type=int, default=8)
    parser.add_argument("--verify-length", default="4k")
    parser.add_argument("--max-anchors", type=int, default=4)
    parser.add_argument("--min-keys", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", default="8", help="OMP_NUM_THREADS of every process")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--port", type=int, default=29617)
    parser.add_argument("--only", default="profile,verify,evaluate")
    parser.add_argument("--profile", type=Path, help="to evaluate, instead of the one that verification leaves")
    parser.add_argument("--dry", action="store_true", help="on the CPU, small: checks equality, not speed")
    options = parser.parse_args()
    if options.model and Path(options.model).exists():
        options.model = str(Path(options.model).resolve())
    if options.dry:
        options.model, options.num_prompts, options.max_length, options.tiles = "demo-small", 4, "256", "8"
        options.verify_prompts, options.verify_length, options.min_keys, options.threads = 2, "256", 16, "1"
        options.max_anchors, options.dtype = 3, "float32"
    return options


def main() -> int:
    options = parse()
    import torch

    found = torch.cuda.device_count()
    if not options.dry and found < options.processes:
        print(
            f"error: {options.processes} GPUs are needed and {found} are here (--dry runs on the CPU)", file=sys.stderr
        )
        return 2
    with tempfile.TemporaryDirectory() as name:
        job = Job(options, Path(name))
        made = options.model is None
        if made:
            options.model = random_model(job.folder)
        for step in options.only.split(","):
            if not (step == "evaluate" and made):
                try:
                    getattr(job, step)()
                except subprocess.TimeoutExpired:
                    job.failures.append(f"{step}: the {options.minutes:g} minutes were over")
                write(job, made)
    for line in job.failures:
        print("FAILED", line, file=sys.stderr)
    missed = [row for row in job.rows if not row.get("met", True)]
    for row in missed:
        print(f"missed: {row['what']} {row['speedup']}x, must {row['must']}x", file=sys.stderr)
    return 1 if job.failures else 3 if missed else 0


def write(job: Job, made: bool) -> None:
    """The document with what there is so far."""
    import torch

    from kascade_cli import provenance
    from kascade_cli.benchmarking import report

    options = job.options
    if not options.dry:
        wanted = MUST * options.processes
        for row in job.rows:
            if row["what"] == "profile":
                row["must"], row["met"] = wanted, row["speedup"] >= wanted
    model = "random Llama, 1B" if made else provenance.portable_name(options.model)
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("output", "model", "port")}
    document = {
        "model": model,
        "machine": report.machine(torch.device("cpu" if options.dry else "cuda")),
        "gpus": torch.cuda.device_count(),
        "settings": settings,
        "created": provenance.now(),
        "commit": provenance.commit(),
        "versions": provenance.versions(("torch", "transformers", "h5py", "numpy")),
        "rows": job.rows,
        "failures": job.failures,
    }
    options.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
