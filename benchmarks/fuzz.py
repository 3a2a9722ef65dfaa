"""Damaged captures and profiles against `select-anchors`, `show` and `Profile.load`: nothing may crash, hang or lie.

    python benchmarks/fuzz.py                                    # 2,000 captures and 2,000 profiles
    python benchmarks/fuzz.py --captures 60 --profiles 60 --seed 7 --offenders offenders

Every case is a process of its own with limits on time and memory, forked from one that has imported everything.
Outcomes: `unmade` (the damage could not be done, no case); `unchanged` result; `refused` in one line; `told`
(another result, and the output says that the capture is unfinished); `valid` (another result from a file that is a
capture or profile of its own: an edited profile, a capture with new checksums and seals); and the offences
`changed` (another result without a word), `library` (an error of Python or a library reached the user), `crash` (a
signal), `hang`.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from fuzz_mutations import make_capture, mutate_capture, mutate_profile, v2_profile

OUTCOMES = ("unmade", "unchanged", "refused", "told", "valid", "changed", "library", "crash", "hang")
OFFENCES = OUTCOMES[5:]
ROOT = Path(__file__).parents[1]
_LEAK = re.compile(
    r"error: (?:[a-z_][a-z0-9_]*\.)*[A-Z]\w*(?:Error|Exception|Warning|Iteration|Interrupt)\b:|Traceback"
)
_SECONDS, _MEMORY = 15, 1 << 30  # of CPU; beyond what is mapped already
_WORDS = ("dense", "anchor", "reuse", "passthrough", "kascade")
_MADE = ("created", "capture_sha256", "bytes", "file", "seconds")


def preload() -> None:
    """Imports what the commands import, so that a fork has it."""
    import scipy.optimize  # noqa: F401

    import kascade_cli.analysis.anchors
    import kascade_cli.analysis.selection
    import kascade_cli.analysis.similarity
    import kascade_cli.analysis.stability
    import kascade_cli.commands.select_anchors
    import kascade_cli.commands.show
    import kascade_cli.schema  # noqa: F401


def commands(kind: str, file: Path, number: int) -> list[str]:
    """What a case runs; its result is stdout, or the profile that it writes."""
    if kind == "profile" or number % 3 == 2:
        return ["show", str(file), *(["--json"] if number % 2 else [])]
    return ["select-anchors", str(file), "-o", str(file.parent / "out.yaml"), "--top-k", "5", "--overwrite"]


def bare(node: Any) -> Any:
    """A result without its texts, which may be renamed; roles and the like stay, as they decide."""
    if isinstance(node, dict):
        return {k: bare(v) for k, v in node.items() if k not in _MADE and k not in ("options", "versions")}
    if isinstance(node, list):
        return [bare(value) for value in node]
    return (
        node if not isinstance(node, str) or node in ("dense", "anchor", "reuse", "passthrough", "kascade") else "text"
    )


def result(arguments: list[str], folder: Path, out: str) -> Any:
    import yaml

    if arguments[0] == "select-anchors":
        return bare(yaml.safe_load((folder / "out.yaml").read_text()))
    if "--json" in arguments:
        return bare(json.loads(out))
    return re.sub(r"\(\S+ k?B", "(", re.sub(r"\S*/\S*", "", out))


def child(arguments: list[str], folder: Path) -> None:
    """Runs one command with limits; never returns."""
    os.dup2(os.open(folder / "stdout", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code = 70
    try:
        from kascade_cli.app import main as run

        run(arguments)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 71)


def run_case(arguments: list[str], folder: Path) -> tuple[str | int, str, str]:
    """(exit code, or `crash` or `hang`, stdout, stderr) of a command in a fork of this process."""
    (folder / "out.yaml").unlink(missing_ok=True)
    pid = os.fork()
    if not pid:
        child(arguments, folder)
    deadline = time.monotonic() + 6 * _SECONDS  # the machine may be busy; a hang without CPU time is one, too
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hang", *read(folder)
        time.sleep(0.002)
    if os.WIFSIGNALED(status):
        return ("hang" if os.WTERMSIG(status) == signal.SIGXCPU else "crash"), *read(folder)
    return os.WEXITSTATUS(status), *read(folder)


def read(folder: Path) -> tuple[str, str]:
    return tuple((folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))  # type: ignore[return-value]


def judge(code: str | int, out: str, err: str, arguments: list[str], folder: Path, wanted: Any, crafted: bool) -> str:
    if isinstance(code, str):
        return code
    if code:
        said = [line for line in err.splitlines() if line.startswith("error: ")]
        whole = err.splitlines()[-1:] == said  # one line, and the last; notes may come before it
        return "refused" if whole and code in (1, 2) and not _LEAK.search(err) else "library"
    if _LEAK.search(err):
        return "library"
    if result(arguments, folder, out) == wanted:
        return "unchanged"
    if "unfinished" in out + err or '"complete": false' in out or re.search("[0-9] of 3 prompts", out + err):
        return "told"
    return "valid" if crafted else "changed"


def in_a_fork(mutate: Any, rng: np.random.Generator, file: Path) -> tuple[str, bool]:
    """What `mutate` did; `nothing` if HDF5 crashed or raised while the damage was made."""
    said = file.parent.parent / "said.json"
    said.unlink(missing_ok=True)
    pid = os.fork()
    if not pid:
        try:
            signal.alarm(60)
            said.write_text(json.dumps(mutate(rng, file)))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    return tuple(json.loads(said.read_text())) if said.exists() else ("nothing", False)


def fuzz(kind: str, cases: range, seed: int, scratch: Path, offenders: Path, until: float) -> list[dict]:
    """Runs the cases of this process, none after the time `until`; one row for each."""
    bases = []
    if kind == "capture":
        for name, joined in (("joined", True), ("parts", False)):
            (scratch / name).mkdir()
            make_capture(scratch / name / "c.h5", joined=joined)
            bases.append(scratch / name)
    else:
        for name, text in (("profile", (ROOT / "profiles" / "demo-small.yaml").read_text()), ("v2", v2_profile())):
            (scratch / name).mkdir()
            (scratch / name / "c.yaml").write_text(text)
            bases.append(scratch / name)
    file, mutate = ("c.h5", mutate_capture) if kind == "capture" else ("c.yaml", mutate_profile)
    wanted: dict[tuple, Any] = {}
    rows = []
    for number in cases:
        if time.monotonic() > until:
            break
        rng = np.random.default_rng([seed, number, kind == "capture"])
        # Not in step with what `commands` goes by.
        base = bases[number // 2 % 2 if kind == "profile" else number % 4 == 0]
        folder = scratch / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder)
        arguments = commands(kind, folder / file, number)
        like = (base, arguments[0], "--json" in arguments)
        if like not in wanted:
            code, out, err = run_case(arguments, folder)
            if code:
                raise SystemExit(f"{' '.join(arguments)} fails on an undamaged file: {err}")
            wanted[like] = result(arguments, folder, out)
        what, crafted = in_a_fork(mutate, rng, folder / file)
        if what == "nothing":
            rows.append({"case": number, "what": what, "command": arguments[0], "outcome": "unmade"})
            continue
        code, out, err = run_case(arguments, folder)
        outcome = judge(code, out, err, arguments, folder, wanted[like], crafted)
        row = {"case": number, "what": what, "command": arguments[0], "outcome": outcome}
        if outcome in OFFENCES:
            row["line"] = (err.strip().splitlines() or [""])[-1][:300]
            keep = offenders / f"{kind}-{number:05d}-{outcome}"
            shutil.rmtree(keep, ignore_errors=True)
            with contextlib.suppress(shutil.Error):
                shutil.copytree(folder, keep, symlinks=True, ignore=_pipes)
        rows.append(row)
    return rows


def _pipes(folder: str, names: list[str]) -> list[str]:
    """What would block a copy."""
    paths = [Path(folder) / name for name in names]
    return [path.name for path in paths if path.exists() and not (path.is_file() or path.is_dir())]


def in_parallel(kind: str, count: int, seed: int, jobs: int, offenders: Path, until: float) -> list[dict]:
    """The rows of all cases, from `jobs` forked processes that take turns."""
    with tempfile.TemporaryDirectory() as folder:
        pids = []
        for job in range(jobs):
            pid = os.fork()
            if not pid:
                status = 1
                try:
                    scratch = Path(folder) / f"job{job}"
                    scratch.mkdir()
                    rows = fuzz(kind, range(job, count, jobs), seed, scratch, offenders, until)
                    (Path(folder) / f"{job}.json").write_text(json.dumps(rows))
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            pids.append(pid)
        if any([os.waitpid(pid, 0)[1] for pid in pids]):
            raise SystemExit("a process of the fuzzer itself failed")
        rows = [row for job in range(jobs) for row in json.loads((Path(folder) / f"{job}.json").read_text())]
    return sorted(rows, key=lambda row: row["case"])


def summary(rows: list[dict]) -> dict[str, Any]:
    counts = Counter(row["outcome"] for row in rows)
    by_what: dict[str, Counter] = {}
    for row in rows:
        by_what.setdefault(row["what"], Counter())[row["outcome"]] += 1
    return {
        "cases": len(rows),
        "outcomes": {name: counts[name] for name in OUTCOMES},
        "by_mutation": {name: dict(sorted(by_what[name].items())) for name in sorted(by_what)},
        "offenders": [row for row in rows if row["outcome"] in OFFENCES][:100],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captures", type=int, default=2000)
    parser.add_argument("--profiles", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="start no case of a kind after this time")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--offenders", type=Path, default=Path(tempfile.gettempdir()) / "kascade-offenders")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    options.offenders.mkdir(parents=True, exist_ok=True)
    preload()
    began = time.monotonic()
    from kascade_cli import provenance

    row: dict[str, Any] = {
        "benchmark": "fuzz",
        "commit": provenance.commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "seed": options.seed,
        "asked": {"captures": options.captures, "profiles": options.profiles, "minutes": options.minutes},
        "python": platform.python_version(),
        "versions": provenance.versions(("numpy", "scipy", "h5py", "pyyaml", "pydantic")),
    }
    for kind, count in (("capture", options.captures), ("profile", options.profiles)):
        until = time.monotonic() + 60 * options.minutes
        row[kind] = summary(in_parallel(kind, count, options.seed, options.jobs, options.offenders, until))
    row["seconds"] = round(time.monotonic() - began, 1)
    text = json.dumps(row, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
