"""The kernels' imports run one way: contract, then the ops, then the backend; nothing knows the terminal."""

import ast
import graphlib
from pathlib import Path

import kascade_cli.kernels as package

ROOT = Path(package.__file__).parent


def imports() -> dict[str, set[str]]:
    """What each module of the package imports from kascade_cli, inside functions too."""
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(("kascade_cli.kernels", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
            ".__init__"
        )
        found[name] = wanted = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                wanted |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name: {other for other in wanted if other.startswith("kascade_cli")} for name, wanted in found.items()}


def test_imports_are_no_circle():
    graph = imports()
    assert len(graph) > 20
    known = {name: {other for other in wanted if other in graph} for name, wanted in graph.items()}
    # `from kascade_cli.kernels import reference` is an import of reference, not of the package's front.
    for name, wanted in known.items():
        if any(other.startswith("kascade_cli.kernels.") for other in wanted):
            wanted.discard("kascade_cli.kernels")
        wanted.discard(name)
    assert list(graphlib.TopologicalSorter(known).static_order())  # CycleError names the circle


def test_the_kernels_know_nothing_above_them():
    for name, wanted in imports().items():
        outside = {other for other in wanted if not other.startswith("kascade_cli.kernels")}
        assert {other.split(".")[1] for other in outside if "." in other} <= {"errors"}, name
