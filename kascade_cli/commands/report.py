"""`kascade report`: one self-contained HTML page of what kascade has measured."""

from pathlib import Path
from typing import Annotated

import typer

from kascade_cli.commands import options as shared
from kascade_cli.console import format_bytes, progress, say
from kascade_cli.files import atomic_write, check_output
from kascade_cli.help import OUTPUT, examples


@examples(
    "kascade report capture.h5 profile.yaml evaluate.json -o report.html",
    "kascade report profile.yaml sweep-*.json bench.json --overwrite",
)
def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Captures (.h5), profiles (.yaml), JSON of evaluate, sweep and bench. Their kind is found.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The page to write.", rich_help_panel=OUTPUT)
    ] = Path("report.html"),
    title: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Heading of the page. Default: the model's name.", rich_help_panel=OUTPUT),
    ] = None,
    top_k: Annotated[
        int,
        typer.Option(
            min=1,
            max=2**31 - 1,
            metavar="K",
            help="Keys that figure 3 compares layers by.",
            rich_help_panel="What is shown",
        ),
    ] = 64,
    overwrite: shared.Overwrite = False,
) -> None:
    """Write one HTML page with the paper's figures, the profile, the strategies and the latencies of these files.

    The page needs no network and no script. Files must be about one model; a part without a file is left out.
    """
    from kascade_cli.report.page import load_all, measure_captures, page

    check_output(output, overwrite, files)
    sources = load_all(files)
    total = sum(source.document["num_prompts"] for source in sources if source.kind == "capture")
    with progress("reading captures", total=total or None) as bar:
        measured = measure_captures(
            sources,
            top_k=top_k,
            advance=lambda name, done, of: bar.update(bar.first, description=f"reading {name}", advance=1),
        )
    text = page(sources, measured, title=title)
    atomic_write(output, text, overwrite=overwrite)
    say(
        f"wrote {output}: {format_bytes(len(text.encode()))}, {text.count('<section')} sections "
        f"from {len(sources)} files"
    )
