"""`kascade export`: a profile in the vocabulary of the serving engines."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kascade_cli.console import err
from kascade_cli.errors import KascadeError
from kascade_cli.files import atomic_write, check_output

_LETTERS = {"dense": "F", "anchor": "F", "reuse": "S", "passthrough": "F"}


def export(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="The YAML that `kascade select-anchors` wrote.")],
    format_: Annotated[
        Literal["index_topk_pattern", "sparse_attention_config"],
        typer.Option("--format", help="The pattern with its keys, or the whole nested config."),
    ] = "index_topk_pattern",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file to write. Default: stdout.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of YAML.")] = False,
) -> None:
    """Write a profile in the vocabulary of a serving engine."""
    if output:
        check_output(output, overwrite)

    import yaml

    from kascade_cli.schema import Profile

    loaded = Profile.load(profile)
    pattern = index_topk_pattern(loaded)
    if format_ == "index_topk_pattern":
        document = {"index_topk_pattern": pattern, "sparse_attention_config": _short_config(loaded)}
    else:
        document = {"sparse_attention_config": _full_config(loaded, pattern)}
    if as_json:
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    else:
        text = yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
    if output:
        atomic_write(output, text)
        err.print(f"wrote {output}", markup=False, soft_wrap=True)
    else:
        typer.echo(text, nl=False)


def index_topk_pattern(profile: Any) -> str:
    """One letter per layer: F computes its own index (or passes through), S shares that of the nearest F
    before it.

    Raises KascadeError where the pattern cannot say what the profile means.
    """
    source: int | None = None
    for index, layer in enumerate(profile.layers):
        if layer.role in ("dense", "anchor"):
            source = index
        elif layer.role == "passthrough":
            continue
        elif layer.anchor != source:
            raise KascadeError(
                f"layer {index} reads anchor {layer.anchor}, not the nearest one before it ({source}); "
                "index_topk_pattern can only share the nearest: choose anchors with --assignment nearest"
            )
        else:
            far = {anchor for phase in ("decode", "prefill") for anchor, _ in profile.head_map(index, phase)} - {
                source
            }
            if far:
                raise KascadeError(
                    f"heads of layer {index} read anchor {min(far)} beside {source} (free assignment); "
                    "index_topk_pattern can only share the nearest: choose anchors with --assignment nearest"
                )
    return "".join(_LETTERS[layer.role] for layer in profile.layers)


def _short_config(profile: Any) -> dict[str, Any]:
    """The budget and the layers that the pattern's letters do not tell apart."""
    config: dict[str, Any] = {
        "algorithm": profile.algorithm,
        "topk_ratio": profile.budget.ratio,
        "min_topk": profile.budget.min_keys,
        "query_tile": profile.budget.tile,
        "dense_layers": [index for index, layer in enumerate(profile.layers) if layer.role == "dense"],
    }
    passthrough = [index for index, layer in enumerate(profile.layers) if layer.role == "passthrough"]
    return config | ({"passthrough_layers": passthrough} if passthrough else {})


def _full_config(profile: Any, pattern: str) -> dict[str, Any]:
    """Everything that a serving engine needs to run the profile, head maps included."""
    maps = {
        str(index): {phase: [head for _, head in profile.head_map(index, phase)] for phase in ("decode", "prefill")}
        for index, layer in enumerate(profile.layers)
        if layer.role == "reuse"
    }
    return _short_config(profile) | {
        "index_topk_pattern": pattern,
        "anchor_layers": profile.anchors,
        "head_map": maps,
        "model": profile.model.name,
        "model_fingerprint": profile.model.fingerprint,
    }
