"""The whole job on a real model, through the shipped commands: capture, anchors, answers of every strategy, look-ups.

    python benchmarks/real_models.py MODEL -o FOLDER [--minutes 9] [--only STEP,STEP] [--lengths 8k,16k]

Each step writes a file into FOLDER and is passed over when that is there, so that a run that was stopped (by
`--minutes`, or a kill) goes on where it was, and several (one a GPU) may share a FOLDER once its profile is there.
MODEL is anything that `kascade` takes; it is loaded once for all commands of a run.

Steps: profile; anchors; auto (budgets by length); tasks (per length and task, all strategies); lookups (per length:
records hidden in source files, worded unlike any built-in task; also with the budgets by length); report.
"""

import argparse
import concurrent.futures
import contextlib
import fcntl
import functools
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TASKS = ("niah_multikey_1", "vt", "niah_multivalue", "niah_multiquery", "fwe", "code_completion")
AT_BOTH = ("kascade", "kascade-decode-only", "oracle", "quest", "omnikv", "lessismore", "streaming-llm")
STRATEGIES = ",".join(["dense", *AT_BOTH, *(f"{name}:ratio=0.3" for name in AT_BOTH)])
LOOKUPS = "dense,kascade,kascade-decode-only,oracle"
QUESTIONS = 4  # of a prompt; these have one, and as many more prompts
ALONE = ("cwe", "fwe", "niah_single_1", "niah_single_2", "niah_single_3")
STEPS = ("profile", "anchors", "auto", "tasks", "lookups", "report")


class Stopped(Exception):
    """The time is over."""


class Job:
    """One model and one folder of results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.output
        self.deadline = time.monotonic() + 60 * options.minutes
        self.folder.mkdir(parents=True, exist_ok=True)

    @functools.cached_property
    def model(self) -> tuple[Any, Any]:
        from kascade_cli.models import load_model

        return load_model(self.options.model, notify=lambda line: print(line, file=sys.stderr))

    def kascade(self, *arguments: str, output: Path | None = None) -> None:
        """Runs a command in this process, the model loaded once; stdout goes to `output`, whole or not at all."""
        import kascade_cli.app
        import kascade_cli.models

        if time.monotonic() > self.deadline:
            raise Stopped
        began, written = time.perf_counter(), io.StringIO()
        loaded, genuine = self.model, kascade_cli.models.load_model
        kascade_cli.models.load_model = lambda *_, **__: loaded
        try:
            with contextlib.redirect_stdout(written):
                kascade_cli.app.main(list(map(str, arguments)))
        except SystemExit as stop:
            if stop.code:
                raise SystemExit(f"kascade {' '.join(map(str, arguments))}: exit {stop.code}") from None
        finally:
            kascade_cli.models.load_model = genuine
        seconds = time.perf_counter() - began
        print(f"{seconds:7.1f} s  kascade {' '.join(map(str, arguments))}", file=sys.stderr, flush=True)
        with (self.folder / "commands.jsonl").open("a") as log:
            log.write(json.dumps({"arguments": list(map(str, arguments)), "seconds": round(seconds, 1)}) + "\n")
        if output is not None:
            partial = output.with_suffix(".part")
            partial.write_text(written.getvalue())
            partial.rename(output)

    # -- steps --

    def profile(self) -> None:
        capture = self.folder / "capture.h5"
        if not capture.exists() or capture.with_name("capture.h5.parts").exists():
            resume = ["--resume"] if capture.exists() else []
            self.kascade("profile", self.options.model, "-o", capture, *self.options.profile, *resume)

    def anchors(self) -> None:
        self._select(self.folder / "profile.yaml")

    def auto(self) -> None:
        chosen = self._anchors()
        self._select(self.folder / "profile-auto.yaml", "--anchors", ",".join(map(str, chosen)), "--ratio", "auto")

    def _select(self, profile: Path, *more: str) -> None:
        with self.claimed(profile) as mine:
            if mine:
                shown = profile.with_suffix(".txt")
                arguments = [self.folder / "capture.h5", "-o", profile, "--model", self.options.model]
                self.kascade("select-anchors", *arguments, *self.options.select, *more, output=shown)

    def _anchors(self) -> list[int]:
        from kascade_cli.schema import Profile

        return Profile.load(self.folder / "profile.yaml").anchors

    def tasks(self) -> None:
        for length in self.options.lengths:
            for task in self.options.tasks:
                found = self.folder / f"tasks-{length}-{task}.json"
                with self.claimed(found) as mine:
                    if mine:
                        prompts = self.options.num_prompts * (QUESTIONS if task in ALONE else 1)
                        self.kascade(
                            "evaluate", self.options.model, "--profile", self.folder / "profile.yaml", "--task", task,
                            "--max-length", length, "--num-prompts", prompts, "--questions", QUESTIONS,
                            "--strategies", self.options.strategies, *self._random(),
                            "--json", output=found,
                        )  # fmt: skip

    def _random(self) -> list[Any]:
        """Options for random anchors, which read their keys as the profile does: by head maps, or pooled."""
        from kascade_cli.schema import Profile

        if not self.options.random:
            return []
        pooled = Profile.load(self.folder / "profile.yaml").pooled
        maps = [] if pooled else ["--capture", self.folder / "capture.h5"]
        return ["--anchors", f"random:{self.options.random}", *maps]

    @contextlib.contextmanager
    def claimed(self, found: Path) -> Iterator[bool]:
        """Whether `found` is for this process to make: it is not there, and no other process is at it."""
        with found.with_suffix(".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield not found.exists()

    def lookups(self) -> None:
        for length in self.options.lookup_lengths:
            texts = self.folder / f"lookups-{length}.jsonl"
            if not texts.exists():
                rows = lookups(self.model[1], _size(length), self.options.lookups, seed=7)
                partial = texts.with_suffix(f".{os.getpid()}")
                partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
                partial.rename(texts)
            for name, profile in (("", "profile.yaml"), ("-auto", "profile-auto.yaml")):
                found = self.folder / f"lookups-{length}{name}.json"
                with self.claimed(found) as mine:
                    if mine and (self.folder / profile).exists():
                        strategies = "dense,kascade" if name else LOOKUPS
                        self.kascade(
                            "evaluate", self.options.model, "--profile", self.folder / profile, "--task", texts,
                            "--chat", "--strategies", strategies, "--json", output=found,
                        )  # fmt: skip

    def report(self) -> None:
        """Once all tasks are there: another process may be at one of them."""
        page, options = self.folder / "report.html", self.options
        tasks = [self.folder / f"tasks-{length}-{task}.json" for length in options.lengths for task in options.tasks]
        with self.claimed(page) as mine:
            if mine and all(task.exists() for task in tasks):
                self.kascade("report", self.folder / "capture.h5", self.folder / "profile.yaml", *tasks, "-o", page)


def _size(text: str) -> int:
    return int(float(text.removesuffix("k")) * 1024) if text.endswith("k") else int(text)


def lookups(tokenizer: Any, length: int, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` rows: source files of this Python joined to `length` tokens, 8 records hidden in them, one asked for."""
    import random
    import sysconfig

    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in root.glob("*.py") if 4_000 < file.stat().st_size < 200_000)
    places = ("fjord", "harbor", "summit", "canyon", "lagoon", "prairie", "glacier", "orchard", "meadow", "tundra")
    colours = ("amber", "cobalt", "crimson", "ivory", "jade", "saffron", "violet", "umber", "teal", "scarlet")
    rng, drawn = random.Random(seed), []
    while len(drawn) < count:
        lines: list[str] = []
        for file in rng.sample(files, len(files)):
            lines += _lines(file)
            if len(lines) * 14 > length * 4:
                break
        names = [
            f"{colour}-{place}" for colour, place in zip(rng.sample(colours, 8), rng.sample(places, 8), strict=True)
        ]
        numbers = [str(rng.randrange(10**6, 10**7)) for _ in names]
        asked = rng.randrange(8)
        depths = [rng.random() for _ in names]
        drawn.append((lines, sorted(zip(depths, names, numbers, strict=True), reverse=True), names[asked]))

    def row(entry: tuple[list[str], list[tuple[float, str, str]], str]) -> dict[str, Any]:
        lines, records, asked = entry
        question = f"What is the secret number for {asked}? Answer with the number only."

        def prompt(used: int) -> str:
            kept = lines[:used]
            for depth, name, number in records:
                kept.insert(int(depth * used), f"The secret number for {name} is {number}.")
            return "\n".join(kept) + "\n\n" + question

        low, high = 1, len(lines)
        while low < high:  # the longest that fits
            middle = (low + high + 1) // 2
            tokens = len(tokenizer(prompt(middle), verbose=False)["input_ids"])
            low, high = (middle, high) if tokens <= length - 64 else (low, middle - 1)
        answer = next(number for _, name, number in records if name == asked)
        return {"prompt": prompt(low), "answers": [answer], "max_new_tokens": 24}

    with concurrent.futures.ThreadPoolExecutor() as pool:  # the tokenizer lets go of the interpreter's lock
        return list(pool.map(row, drawn))


@functools.cache
def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8", errors="ignore").splitlines()


def summary(folder: Path) -> dict[str, Any]:
    """All evaluations in a folder, one row each."""
    rows = []
    for file in sorted([*folder.glob("tasks-*.json"), *folder.glob("lookups-*.json")]):
        document = json.loads(file.read_text())
        rows += [{"file": file.name, "tasks": document["tasks"], **row} for row in document["rows"]]
    return {"rows": rows}


def show(folder: Path) -> None:
    for row in summary(folder)["rows"]:
        mean, density = row["mean"], row["density"]
        print(
            f"{row['file']:40} {row['strategy']:24} {mean['score']:6.1f} [{mean['low']:5.1f}, {mean['high']:5.1f}] "
            f"read {100 * density.get('prefill', 0):5.1f} / {100 * density.get('decode', 0):5.1f} % "
            f"{row['seconds']:6.0f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", default=",".join(STEPS), help="steps, comma-separated")
    parser.add_argument("--lengths", default="16k,8k", type=lambda text: text.split(","))
    parser.add_argument("--lookup-lengths", default="8k,16k,30k", type=lambda text: text.split(","))
    parser.add_argument("--tasks", default=",".join(TASKS), type=lambda text: text.split(","))
    parser.add_argument("--strategies", default=STRATEGIES)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--lookups", type=int, default=192)
    parser.add_argument("--random", type=int, default=3, help="sets of random anchors to compare with; 0: none")
    parser.add_argument("--profile", default="", type=str.split, help="more options of kascade profile")
    parser.add_argument("--select", default="", type=str.split, help="more options of kascade select-anchors")
    options = parser.parse_args()
    job = Job(options)
    try:
        for step in options.only.split(","):
            getattr(job, step)()
    except Stopped:
        print(f"{options.minutes:g} minutes are over; run again to go on", file=sys.stderr)
    show(options.output)


if __name__ == "__main__":
    main()
