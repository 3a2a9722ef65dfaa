"""`kascade sweep oracle|pooling|remap`: the measurements behind figures 2, 5 and 6 of the paper."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kascade_cli.commands import options as shared
from kascade_cli.commands.sweep_job import Job, Prompts
from kascade_cli.console import parse_floats, parse_ints
from kascade_cli.errors import UsageError
from kascade_cli.help import BUDGET, OUTPUT, PROMPTS, Command, examples

sweep = typer.Typer(
    name="sweep",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Sweeps of the paper's figures 2, 5 and 6: task scores and KL at the answers, resumable.",
)

DEFAULT_MIN_KEYS = 16
_WHAT = "What is swept"

_Ratios = Annotated[
    str, typer.Option(metavar="LIST", help="Shares of the keys to read.", rich_help_panel=_WHAT)
]  # fmt: skip
_MinKeys = Annotated[
    int,
    typer.Option(
        min=1, max=2**31 - 1, metavar="N", help="Read at least this many keys. Low, so that ratios differ.",
        rich_help_panel=BUDGET,
    ),
]  # fmt: skip
_Task = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        metavar="TASK",
        help="What `evaluate --task` takes: tasks, comma-separated, or a .jsonl file. Default: mix, which is several; "
        "what a demo model was trained on.",
        rich_help_panel=PROMPTS,
    ),
]
_MaxLength = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="Tokens of a prompt (of a demo task: before the questions). Default: 2k; 1k for demo tasks.",
        rich_help_panel=PROMPTS,
    ),
]
_NumPrompts = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=shared.MOST_PROMPTS,
        metavar="N",
        help="Prompts (of each task in natural language). Default: about 16 in all; pooling: 8.",
        rich_help_panel=PROMPTS,
    ),
]
_Questions = Annotated[
    int,
    typer.Option(
        min=1, max=1000, metavar="N", help="Questions of each task about one prompt.", rich_help_panel=PROMPTS
    ),
]
_KlPrompts = Annotated[
    int,
    typer.Option(
        min=0, max=10_000, metavar="N", help="Of these prompts, how many for the KL.", rich_help_panel=PROMPTS
    ),
]
_Chat = Annotated[
    bool, typer.Option("--chat", help="Send prompts of a file through the chat template.", rich_help_panel=PROMPTS)
]
_Seed = Annotated[
    int,
    typer.Option(min=0, max=shared.LARGEST_SEED, metavar="N", help="Chooses the prompts.", rich_help_panel=PROMPTS),
]
_Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="The result; repeating the command goes on from it. Default: sweep-NAME.json.",
        rich_help_panel=OUTPUT,
    ),
]  # fmt: skip
_Profile = Annotated[
    Path, typer.Option("--profile", metavar="FILE", help="Profile of this model.", rich_help_panel=_WHAT)
]
_Capture = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Capture that --anchors chooses from.", rich_help_panel=_WHAT),
]


@sweep.command(short_help="Figure 2: exact Top-k in every layer, against k.", cls=Command)
@examples(
    "kascade sweep oracle demo -o oracle.json",
    "kascade sweep oracle MODEL --ratio '' --keys 16,32,64,128,256 --max-length 2k",
)
def oracle(
    model: shared.Model,
    ratio: _Ratios = "0.01,0.02,0.05,0.1,0.2,0.4",
    keys: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Also fixed numbers of keys, such as 16,64.", rich_help_panel=_WHAT),
    ] = None,
    per_query: Annotated[
        bool,
        typer.Option("--per-query", help="Also oracle-per-query: every query its own (slow).", rich_help_panel=_WHAT),
    ] = False,
    task: _Task = None,
    max_length: _MaxLength = None,
    num_prompts: _NumPrompts = None,
    questions: _Questions = 4,
    kl_prompts: _KlPrompts = 8,
    haystack: shared.Haystack = None,
    chat: _Chat = False,
    seed: _Seed = 0,
    min_keys: _MinKeys = DEFAULT_MIN_KEYS,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    device_map: shared.DeviceMap = None,
    backend: shared.Backend = "auto",
    revision: shared.Revision = None,
    trust_remote_code: shared.TrustRemoteCode = False,
    output: _Output = None,
    overwrite: shared.Overwrite = False,
    as_json: shared.AsJson = False,
) -> None:
    """Figure 2 of the paper: what exact Top-k could keep, against k. The first layer is dense.

    Every layer reads its own k best keys, pooled over tile and KV group as an anchor's.
    """
    ratios = parse_floats(ratio) if ratio.strip() else []
    counts = parse_ints(keys) if keys else []
    if not ratios and not counts:
        raise UsageError("nothing to sweep: give --ratio or --keys")
    if wrong := [count for count in counts if count < 1]:
        raise UsageError(f"--keys {wrong[0]} must be 1 or more")

    def points(base: Any, info: Any = None) -> Any:
        from kascade_cli.sweeps.plan import oracle_points

        return oracle_points(base, ratios, counts, per_query)

    prompts = Prompts(task, max_length, num_prompts, questions, kl_prompts, haystack, chat, seed)
    loading = shared.Loading(dtype, device, device_map, revision, trust_remote_code)
    Job("oracle", output, overwrite, as_json).run(points, model, prompts, loading, min_keys=min_keys, backend=backend)


@sweep.command(short_help="Figure 5: pooling before or after the softmax, over tile sizes.", cls=Command)
@examples("kascade sweep pooling demo -o pooling.json", "kascade sweep pooling MODEL --tiles 8,32 --ratio 0.05")
def pooling(
    model: shared.Model,
    tiles: Annotated[
        str, typer.Option(metavar="LIST", help="Queries that share a selection.", rich_help_panel=_WHAT)
    ] = "4,8,16,32,64,128",
    ratio: _Ratios = "0.1",
    task: _Task = None,
    max_length: _MaxLength = None,
    num_prompts: _NumPrompts = None,
    questions: _Questions = 4,
    kl_prompts: _KlPrompts = 8,
    haystack: shared.Haystack = None,
    chat: _Chat = False,
    seed: _Seed = 0,
    min_keys: _MinKeys = DEFAULT_MIN_KEYS,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    device_map: shared.DeviceMap = None,
    revision: shared.Revision = None,
    trust_remote_code: shared.TrustRemoteCode = False,
    output: _Output = None,
    overwrite: shared.Overwrite = False,
    as_json: shared.AsJson = False,
) -> None:
    """Figure 5 of the paper: scores summed before (logits) or after the softmax (probabilities), over tile sizes.

    Every layer reads its own best keys, chosen either way. Runs on plain PyTorch: the kernels have one tile size.
    """
    ratios, sizes = parse_floats(ratio), parse_ints(tiles)
    if wrong := [size for size in sizes if not 1 <= size <= 4096]:
        raise UsageError(f"--tiles {wrong[0]} is outside 1..4096")

    def points(base: Any, info: Any = None) -> Any:
        from kascade_cli.sweeps.plan import pooling_points

        return pooling_points(base, sizes, ratios)

    prompts = Prompts(task, max_length, num_prompts, questions, kl_prompts, haystack, chat, seed)
    loading = shared.Loading(dtype, device, device_map, revision, trust_remote_code)
    Job("pooling", output, overwrite, as_json, prompts=8).run(points, model, prompts, loading, min_keys=min_keys)


@sweep.command(short_help="Figure 6: head maps, one set for all heads, or no map.", cls=Command)
@examples(
    "kascade sweep remap demo --profile profiles/demo.yaml -o remap.json",
    "kascade sweep remap MODEL --profile profile.yaml --capture capture.h5 --anchors 3,5,8",
)
def remap(
    model: shared.Model,
    profile: _Profile,
    ratio: _Ratios = "0.02,0.05,0.1,0.2",
    capture: _Capture = None,
    anchors: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Also the best sets of so many anchors (--capture).", rich_help_panel=_WHAT),
    ] = None,
    task: _Task = None,
    max_length: _MaxLength = None,
    num_prompts: _NumPrompts = None,
    questions: _Questions = 4,
    kl_prompts: _KlPrompts = 8,
    haystack: shared.Haystack = None,
    chat: _Chat = False,
    seed: _Seed = 0,
    min_keys: _MinKeys = DEFAULT_MIN_KEYS,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    device_map: shared.DeviceMap = None,
    backend: shared.Backend = "auto",
    revision: shared.Revision = None,
    trust_remote_code: shared.TrustRemoteCode = False,
    output: _Output = None,
    overwrite: shared.Overwrite = False,
    as_json: shared.AsJson = False,
) -> None:
    """Figure 6 of the paper: reuse through head maps, through one key set for all heads, and through the identity.

    kascade, kascade-pooled and kascade-no-remap with the profile's anchors, and with others of a capture.
    """
    ratios, sizes = parse_floats(ratio), parse_ints(anchors) if anchors else []
    if bool(sizes) != bool(capture):
        raise UsageError("--capture and --anchors go together: the capture says which anchors are best for a number")
    from kascade_cli.schema import Profile

    loaded = Profile.load(profile)
    if not loaded.heads_measured:
        raise UsageError(
            f"{profile} has no head maps to compare: select-anchors --heads maps makes a profile that has"
        )
    if capture:
        from kascade_cli.capture.store import open_capture

        open_capture(capture).close()

    def points(base: Any, info: Any = None) -> Any:
        from kascade_cli.sweeps.plan import profiles_of_sizes, remap_points

        others = profiles_of_sizes(loaded, info, sizes, capture) if info and sizes else []
        others = [other for other in others if other.anchors != loaded.anchors]
        return remap_points(base, ratios, [loaded, *others])

    prompts = Prompts(task, max_length, num_prompts, questions, kl_prompts, haystack, chat, seed)
    loading = shared.Loading(dtype, device, device_map, revision, trust_remote_code)
    Job("remap", output, overwrite, as_json).run(
        points, model, prompts, loading, min_keys=min_keys, backend=backend, profile=profile
    )
