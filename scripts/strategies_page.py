"""Write the list of strategies in docs/strategies.md from the registry, between two markers:

    python scripts/strategies_page.py [--page docs/strategies.md] [--check]

    <!-- strategies:begin -->
    ...
    <!-- strategies:end -->

--check changes nothing and exits with 1 if the list is not what the registry gives.
"""

import argparse
import inspect
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def listing(kinds: dict[str, Any]) -> str:
    """The markdown between the markers, from name -> class: one table, then a section each."""
    lines = ["| name | what it does | profile | options |", "|---|---|---|---|"]
    for name, kind in kinds.items():
        options = ", ".join(f"`{option}`" for option in kind.options)
        lines.append(f"| [`{name}`](#{name}) | {kind.summary} | {'yes' if kind.needs_profile else ''} | {options} |")
    for name, kind in kinds.items():
        lines += ["", *section(name, kind)]
    return "\n".join(lines)


def section(name: str, kind: Any) -> list[str]:
    """Heading, docstring, options with their defaults, file."""
    path = Path(inspect.getfile(kind)).resolve().relative_to(ROOT).as_posix()
    text = re.sub(r"method: section (\d+)", r"[method](method.md), section \1", inspect.cleandoc(kind.__doc__))
    lines = [f"### {name}", "", text, ""]
    if kind.options:
        lines += ["| option | meaning | default |", "|---|---|---|"]
        lines += [f"| `{key}` | {option.help} | {default(option.default)} |" for key, option in kind.options.items()]
        lines.append("")
    return [*lines, f"[`{path}`](../{path})"]


def default(value: Any) -> str:
    """As it would be typed; a strategy's own choice for None."""
    if value is None:
        return "its own"
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def main() -> int:
    """Rewrites the list, or checks it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "strategies.md")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the list is out of date")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from benchmarks.performance_table import replace, write
    from kascade_cli.sparse import known_strategies

    # Those of other packages that happen to be installed are not ours to describe.
    own = {name: kind for name, kind in known_strategies().items() if kind.__module__.startswith("kascade_cli.")}
    after = replace(options.page.read_text(encoding="utf-8"), listing(own), "strategies", str(options.page))
    current = write(options.page, after, options.check)
    return int(options.check and not current)


if __name__ == "__main__":
    sys.exit(main())
