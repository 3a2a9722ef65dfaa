"""`kascade export`: a profile in the words that serving engines use. What runs it stands in docs/export.md."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kascade_cli.commands import options as shared
from kascade_cli.console import note, to_json
from kascade_cli.errors import KascadeError
from kascade_cli.files import atomic_write, check_output
from kascade_cli.help import OUTPUT, examples

_NOTE = (
    "note: no serving engine runs this for a model with KV heads of its own (GQA, MHA): vLLM and SGLang read the "
    "pattern for models with an indexer, such as DeepSeek-V3.2; the vLLM plugin, `kascade generate` and `attach` run "
    "the profile itself"
)
_LETTERS = {"dense": "F", "anchor": "F", "reuse": "S", "passthrough": "F"}


@examples(
    "kascade export profile.yaml", "kascade export profile.yaml --format sparse_attention_config --json -o config.json"
)
def export(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="The YAML that `kascade select-anchors` wrote.")],
    format_: Annotated[
        Literal["index_topk_pattern", "sparse_attention_config"],
        typer.Option(
            "--format", help="The pattern and the budget, or everything, head maps included.", rich_help_panel=OUTPUT
        ),
    ] = "index_topk_pattern",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="A file to write. Default: stdout.", rich_help_panel=OUTPUT
        ),
    ] = None,
    overwrite: shared.Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of YAML.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Write a profile in the words that serving engines use for sharing Top-k indices across layers.

    No engine runs it for a model with KV heads of its own (GQA, MHA) today. vLLM and SGLang read index_topk_pattern
    for models with an indexer (DeepSeek-V3.2, GLM-5), which have neither head maps nor a budget like a profile's.
    It is a description to compare with and to build on. The vLLM plugin, `kascade generate` and `attach` run the
    profile itself.
    """
    if output:
        check_output(output, overwrite, [profile])

    import yaml

    from kascade_cli.schema import Profile

    loaded = Profile.load(profile)
    pattern = index_topk_pattern(loaded)
    if format_ == "index_topk_pattern":
        # Both keys are needed in the model's config (vLLM: --hf-overrides): without the first the pattern is ignored.
        document = {"use_index_cache": True, "index_topk_pattern": pattern}
        document["sparse_attention_config"] = _short_config(loaded)
    else:
        document = {"sparse_attention_config": _full_config(loaded, pattern)}
    if as_json:
        text = to_json(document)
    else:
        text = yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
    if output:
        atomic_write(output, text, overwrite=overwrite)
        note(f"wrote {output}")
    else:
        typer.echo(text, nl=False)
    note(_NOTE)


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
        elif profile.heads_measured:
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
        **({} if profile.budget.ratios is None else {"topk_ratios": dict(profile.budget.ratios)}),
        "min_topk": profile.budget.min_keys,
        "query_tile": profile.budget.tile,
        "dense_layers": [index for index, layer in enumerate(profile.layers) if layer.role == "dense"],
    }
    passthrough = [index for index, layer in enumerate(profile.layers) if layer.role == "passthrough"]
    return config | ({"passthrough_layers": passthrough} if passthrough else {})


def _full_config(profile: Any, pattern: str) -> dict[str, Any]:
    """Everything that running the profile takes, head maps included (null: none, all heads pooled)."""
    maps = {
        str(index): {phase: [head for _, head in profile.head_map(index, phase)] for phase in ("decode", "prefill")}
        for index, layer in enumerate(profile.layers)
        if layer.role == "reuse" and profile.heads_measured
    }
    return _short_config(profile) | {
        "index_topk_pattern": pattern,
        "anchor_layers": profile.anchors,
        "head_map": maps if profile.heads_measured else None,
        "model": profile.model.name,
        "model_fingerprint": profile.model.fingerprint,
    }
