"""Write the profiles with the anchors that the paper published (arXiv 2512.16391) into profiles/:

    python scripts/published_profiles.py [--folder profiles] [--check]

They name no weights, which we have not had, and hold no head maps, which the paper does not print: they run pooled on
every model of the geometry. --check changes nothing and exits with 1 if a file is not what this script makes.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "arXiv 2512.16391"


@dataclass(frozen=True)
class Published:
    """A model of the paper; all have 32 query heads and 8 KV heads of 128."""

    file: str
    name: str
    layers: int
    anchors: tuple[int, ...]


MODELS = (
    Published("llama-3.1-8b-instruct.yaml", "meta-llama/Llama-3.1-8B-Instruct", 32, (0, 2, 8, 13, 14)),
    Published("deepseek-r1-distill-llama-8b.yaml", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 32, (0, 2, 8, 13, 14)),
    Published("qwen3-8b.yaml", "Qwen/Qwen3-8B", 36, (0, 2, 7, 14, 23)),
)


def text(published: Published) -> str:
    """The profile's YAML."""
    from kascade_cli.schema import Budget, ModelCard, Profile

    anchors = list(published.anchors)
    listed = ",".join(map(str, anchors))
    return Profile.build(
        model=ModelCard(name=published.name, layers=published.layers, query_heads=32, kv_heads=8, head_dim=128),
        anchors=anchors,
        profiled_layers=range(published.layers),
        head_maps=None,
        budget=Budget(),
        selection={
            "method": "published",
            "anchors": anchors,
            "why": f"the anchors that the paper chose for this model on MuSiQue ({SOURCE})",
            "head_maps": f"not measured; kascade select-anchors CAPTURE --anchors {listed} measures them",
        },
        provenance={"source": SOURCE, "script": "scripts/published_profiles.py"},
    ).checked_dumps()


def main() -> int:
    """Writes the files, or checks them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "profiles")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a file is out of date")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    stale = 0
    for published in MODELS:
        path, new = options.folder / published.file, text(published)
        if path.is_file() and path.read_text() == new:
            continue
        stale += 1
        if options.check:
            print(f"{path} is not what {Path(__file__).name} makes", file=sys.stderr)
        else:
            path.write_text(new)
            print(f"wrote {path}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
