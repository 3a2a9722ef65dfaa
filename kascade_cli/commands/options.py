"""Options that several commands have, with one wording."""

from typing import Annotated

import typer

MinKeys = Annotated[int | None, typer.Option(min=1, help="Read at least this many keys. Default: the profile's.")]
Refresh = Annotated[
    int | None, typer.Option(min=1, help="kascade-refresh chooses keys every so many decode steps. Default: 8.")
]
Backend = Annotated[str, typer.Option(help="auto, torch or tilelang.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the hub.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")]
AllowOtherWeights = Annotated[
    bool, typer.Option("--allow-other-weights", help="Accept a profile of a model of the same shape.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
