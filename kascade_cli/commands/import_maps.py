"""`kascade import`: head maps of the public implementation into a profile."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kascade_cli.commands import options as shared
from kascade_cli.console import note, parse_ints
from kascade_cli.errors import UsageError
from kascade_cli.files import check_name, check_output
from kascade_cli.help import OUTPUT, examples

_GEOMETRY = "Whose heads they are (the model, or the numbers)"


@examples(
    "kascade import Qwen3-8B_layers_0_2_7_14_23.npy --model Qwen/Qwen3-8B -o qwen3-8b.yaml",
    "kascade import Qwen3-8B_layers_0_2_7_14_23.npy --query-heads 32 --head-dim 128 -o qwen3-8b.yaml",
    "kascade import map.npy --anchors 0,2,8 --model ./my-model --bind -o profile.yaml",
)
def import_maps(
    file: Annotated[
        Path, typer.Argument(metavar="MAP.npy", help="Whole numbers [layers, KV heads]: the anchor head of each.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="The YAML profile to write.", rich_help_panel=OUTPUT),
    ],
    overwrite: shared.Overwrite = False,
    anchors: Annotated[
        str | None,
        typer.Option(
            metavar="LAYERS",
            help="Anchor layers, such as 0,2,8. Default: those in the file's name (MODEL_layers_0_2_8).",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="Hub id, local folder, .gguf file or demo model: its config gives the geometry.",
            rich_help_panel=_GEOMETRY,
        ),
    ] = None,
    bind: Annotated[
        bool,
        typer.Option(
            "--bind",
            help="Load the model's weights too, and let the profile run with no others.",
            rich_help_panel=_GEOMETRY,
        ),
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(metavar="REV", help="Branch, tag or commit of the model.", rich_help_panel=_GEOMETRY),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run the model's own code.", rich_help_panel=_GEOMETRY),
    ] = False,
    query_heads: Annotated[
        int | None,
        typer.Option(min=1, max=2**20, metavar="N", help="Query heads of a layer.", rich_help_panel=_GEOMETRY),
    ] = None,
    head_dim: Annotated[
        int | None,
        typer.Option(min=1, max=2**20, metavar="N", help="Size of a head.", rich_help_panel=_GEOMETRY),
    ] = None,
) -> None:
    """Read head maps of the public implementation (microsoft/kascade) into a profile.

    Its files are named MODEL_layers_0_2_8_13_14.npy after the anchors and hold one map for both phases. Without
    --bind the profile runs with any weights of the model's geometry.
    """
    check_name(file, "MAP.npy")
    check_output(output, overwrite, [file, model])
    _check_geometry(model, query_heads, head_dim, {"--bind": bind, "--revision": revision})
    chosen = None if anchors is None else _layers(anchors)

    from kascade_cli.analysis import public_maps
    from kascade_cli.schema import ModelCard

    name, named = public_maps.named(file)
    found = public_maps.read_map(file)
    if chosen is None:
        chosen = named
    if chosen is None:
        raise UsageError(f"{file.name}: no anchors in the file's name (MODEL_layers_0_2_8.npy): pass --anchors 0,2,8")
    if model is None:
        layers, kv_heads = found.shape
        if query_heads % kv_heads:
            raise UsageError(f"--query-heads {query_heads} is not a multiple of the map's {kv_heads} KV heads")
        card = ModelCard(name=name, layers=layers, query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim)
        profiled = list(range(layers))
    else:
        card, profiled = _model(model, bind, revision, trust_remote_code)
    public_maps.check_anchors(file, chosen, len(found), profiled)
    profile = public_maps.to_profile(file, found, chosen, card, profiled)
    profile.save(output, overwrite=overwrite)
    if odd := public_maps.odd_anchors(found, chosen):
        note(
            f"note: rows {' '.join(map(str, odd))} of the map, which are anchors', do not name their own heads: was "
            "it made for these anchors? (anchors read their own keys all the same)"
        )
    whose = "any weights of this geometry" if card.fingerprint is None else f"the weights of {card.name}"
    note(f"wrote {output}: anchors {' '.join(map(str, chosen))} of {card.layers} layers, for {whose}")


def _layers(text: str) -> list[int]:
    """Raises UsageError."""
    try:
        chosen = parse_ints(text.strip())
    except UsageError as error:
        raise UsageError(f"--anchors: {error}") from error
    if min(chosen) < 0:
        raise UsageError(f"--anchors {text}: layers count from 0")
    return chosen


def _check_geometry(
    model: str | None, query_heads: int | None, head_dim: int | None, of_model: dict[str, Any]
) -> None:
    """Raises UsageError unless the geometry is given, once."""
    numbers = {"--query-heads": query_heads, "--head-dim": head_dim}
    given = [name for name, value in numbers.items() if value is not None]
    if model is not None and given:
        raise UsageError(f"--model and {given[0]} exclude each other: give the model, or its numbers")
    if model is None and len(given) < len(numbers):
        raise UsageError("the file does not say whose heads these are: pass --model, or --query-heads and --head-dim")
    if model is None and (unused := [name for name, value in of_model.items() if value]):
        raise UsageError(f"{unused[0]} is for --model: pass it too")


def _model(name: str, bind: bool, revision: str | None, trust_remote_code: bool) -> tuple[Any, list[int]]:
    """(the card of a model, its full-attention layers); with `bind` the card has its fingerprint."""
    from kascade_cli.models import describe, load_config, load_model
    from kascade_cli.models.info import outline
    from kascade_cli.provenance import portable_name

    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    if bind:
        loaded, _ = load_model(name, device="cpu", notify=note, **options)
        info = describe(loaded, name)
    else:
        info = outline(load_config(name, **options), name, trust_remote_code=trust_remote_code)
    return info.card.model_copy(update={"name": portable_name(name)}), info.profiled_layers
