"""The models shipped with the package: paths only, nothing is loaded here."""

from pathlib import Path

_HERE = Path(__file__).parent

DEMO_MODELS: dict[str, Path] = {"demo": _HERE / "model-16l", "demo-small": _HERE / "model-8l"}

# The mix of built-in tasks that each model was trained on: its dev set and its test set.
DEMO_TASKS: dict[str, str] = {"demo": "hops", "demo-small": "pairs"}
