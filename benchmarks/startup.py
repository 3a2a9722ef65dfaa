"""Time of `kascade --help` over that of a bare Typer program with as many commands, run in turn:

python benchmarks/startup.py [-o benchmarks/results/startup.json]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

BARE = """
import typer
app = typer.Typer()
for name in "abcdefgh":
    @app.command(name)
    def command(): "A command."
app()
"""


def seconds(command: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(BARE)
        file.flush()
        ours, bare = [sys.executable, "-m", "kascade_cli", "--help"], [sys.executable, file.name, "--help"]
        seconds(ours), seconds(bare)  # warm the file cache
        pairs = [(seconds(ours), seconds(bare)) for _ in range(options.runs)]
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": options.runs,
        "kascade_help_s": round(statistics.median(a for a, _ in pairs), 4),
        "bare_typer_help_s": round(statistics.median(b for _, b in pairs), 4),
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
    }
    print(json.dumps(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
