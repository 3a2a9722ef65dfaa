"""Names and summaries of the strategies for help pages, without importing torch.

Built-in strategies are read from their source (class attributes `name`, `summary` and `rank`); those of plugins and
installed packages from the registry once they are imported.
"""

import ast
import sys
from pathlib import Path

_FOLDER = Path(__file__).parent / "sparse" / "strategies"


def _literals(body: ast.ClassDef) -> dict[str, object]:
    found: dict[str, object] = {}
    for node in body.body:
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            values = (
                node.value.elts
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                else [node.value]
            )
            for name, value in zip(names, values, strict=False):
                if isinstance(name, ast.Name) and isinstance(value, ast.Constant):
                    found[name.id] = value.value
    return found


def strategy_summaries() -> dict[str, str]:
    """Name -> what it does, in the order of `kascade_cli.sparse.known_strategies()`."""
    if registry := sys.modules.get("kascade_cli.sparse.strategy"):
        return {name: kind.summary for name, kind in registry.known_strategies().items()}
    found = []
    for path in sorted(_FOLDER.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and (values := _literals(node)).get("summary"):
                found.append((values.get("rank", 50), str(values["name"]), str(values["summary"])))
    return {name: summary for _, name, summary in sorted(found)}


def strategy_names() -> str:
    """`dense, kascade, ...`."""
    return ", ".join(strategy_summaries())
