"""`kascade bench`: measure the attention kernels (`ops`), the roles of a layer (`model`) and whole models (`e2e`)."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kascade_cli.commands import options as shared
from kascade_cli.console import (
    err,
    out,
    parse_sizes,
    print_json,
)
from kascade_cli.errors import UsageError, require_extra
from kascade_cli.files import atomic_write, check_output
from kascade_cli.help import BUDGET, OUTPUT, Command, examples

bench = typer.Typer(
    name="bench",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Measure the attention kernels: ops, model, e2e. Without a GPU the PyTorch backend, at small sizes.",
)

_WHAT = "What is measured"
_HOW = "How"

_Shape = Annotated[
    str | None,
    typer.Option("--shape", help="H,G,D, or llama-3.1-8b, qwen3-8b, demo.", show_default=False, rich_help_panel=_WHAT),
]
_Model = Annotated[
    str | None, typer.Option("--model", help="Take the shape of this hub id or folder.", rich_help_panel=_WHAT)
]
_Profile = Annotated[
    Path | None,
    typer.Option("--profile", help="Take shape, anchors and budget of this profile.", rich_help_panel=_WHAT),
]
_Phase = Annotated[str, typer.Option(help="decode, prefill, or both separated by a comma.", rich_help_panel=_WHAT)]
_Context = Annotated[
    str | None,
    typer.Option(help="Context lengths, such as 32k,128k.", show_default="by device", rich_help_panel=_WHAT),
]
_Batch = Annotated[
    str | None, typer.Option(help="Batch sizes, such as 1,16.", show_default="by phase", rich_help_panel=_WHAT)
]
_Ratio = Annotated[
    float | None,
    typer.Option(help="Share of the keys that a query reads.", show_default="0.1", rich_help_panel=BUDGET),
]
_MinKeys = Annotated[
    int | None, typer.Option(help="Fewest keys a query reads.", show_default="128", rich_help_panel=BUDGET)
]
_Dtype = Annotated[
    str | None, typer.Option(help="bfloat16, float16 or float32.", show_default="by device", rich_help_panel=_HOW)
]
_Backend = Annotated[str, typer.Option(help="auto, tilelang or torch.", rich_help_panel=_HOW)]
_Baseline = Annotated[
    str,
    typer.Option(
        help="Dense attention to compare with: all, or some of cudnn,flash2,sdpa,fa4,fa3,flashinfer,own.",
        rich_help_panel=_HOW,
    ),
]
_Seconds = Annotated[
    float, typer.Option(min=0.01, help="Time to spend on the repeats of each measurement.", rich_help_panel=_HOW)
]
_Strategy = Annotated[
    str,
    typer.Option(help="kascade, kascade-reused-norm (prefill) or kascade-refresh (decode).", rich_help_panel=_WHAT),
]
_Refresh = Annotated[
    int | None,
    typer.Option(
        min=1, help="kascade-refresh chooses keys every so many decode steps.", show_default="8", rich_help_panel=_WHAT
    ),
]
_Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write the result as JSON.", rich_help_panel=OUTPUT)
]
_Csv = Annotated[Path | None, typer.Option("--csv", help="Write the rows as CSV.", rich_help_panel=OUTPUT)]
_Plot = Annotated[Path | None, typer.Option("--plot", help="Write a PNG picture.", rich_help_panel=OUTPUT)]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.", rich_help_panel=OUTPUT)]


@bench.command(short_help="Time each op by itself.", cls=Command)
@examples(
    "kascade bench ops --phase decode --context 32k,128k",
)
def ops(
    shape: _Shape = None,
    model: _Model = None,
    profile: _Profile = None,
    phase: _Phase = "decode,prefill",
    context: _Context = None,
    batch: _Batch = None,
    ratio: _Ratio = None,
    min_keys: _MinKeys = None,
    dtype: _Dtype = None,
    backend: _Backend = "auto",
    device: shared.Device = "auto",
    baseline: _Baseline = "all",
    seconds: _Seconds = 0.4,
    output: _Output = None,
    csv: _Csv = None,
    plot: _Plot = None,
    overwrite: _Overwrite = False,
    as_json: shared.AsJson = False,
) -> None:
    """Time each of the ops by itself, with its achieved GB/s or TFLOP/s."""
    job = _Job(phase, context, batch, output, csv, plot, overwrite, as_json)
    run = job.start(shape, model, profile, ratio, min_keys, dtype, backend, device, seconds)
    from kascade_cli.benchmarking.baselines import choose
    from kascade_cli.benchmarking.ops import run_ops

    chosen = choose(baseline, run.setting.backend)
    job.finish(run, "ops", lambda name, sizes: run_ops(run.shape, name, sizes, run.setting, chosen, job.say))


@bench.command(short_help="Time a layer's roles and a whole model's attention.", cls=Command)
@examples(
    "kascade bench model -o bench.json",
    "kascade bench model --shape 28,2,128 --layers 28 --anchors 6 --context 32k",
)
def model(
    shape: _Shape = None,
    model: _Model = None,
    profile: _Profile = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of the whole model.", show_default="32")] = None,
    anchors: Annotated[
        int | None,
        typer.Option(min=1, help="Layers that select keys, the dense first one included.", show_default="5"),
    ] = None,
    phase: _Phase = "decode,prefill",
    context: _Context = None,
    batch: _Batch = None,
    ratio: _Ratio = None,
    min_keys: _MinKeys = None,
    dtype: _Dtype = None,
    backend: _Backend = "auto",
    device: shared.Device = "auto",
    baseline: _Baseline = "all",
    strategy: _Strategy = "kascade",
    refresh: _Refresh = None,
    seconds: _Seconds = 0.4,
    output: _Output = None,
    csv: _Csv = None,
    plot: _Plot = None,
    overwrite: _Overwrite = False,
    as_json: shared.AsJson = False,
) -> None:
    """Time the roles of a layer and a whole model's attention (the paper's Table 3) against the best dense attention.

    The JSON result is what `kascade select-anchors --cost` reads.
    """
    job = _Job(phase, context, batch, output, csv, plot, overwrite, as_json)
    run = job.start(shape, model, profile, ratio, min_keys, dtype, backend, device, seconds, strategy, refresh)
    from kascade_cli.benchmarking.baselines import choose
    from kascade_cli.benchmarking.model import run_model
    from kascade_cli.benchmarking.shapes import with_layers

    run.shape = with_layers(run.shape, layers, anchors)
    chosen = choose(baseline, run.setting.backend)
    job.finish(run, "model", lambda name, sizes: run_model(run.shape, name, sizes, run.setting, chosen, job.say))


@bench.command(short_help="Time a whole model, dense against sparse.", cls=Command)
@examples(
    "kascade bench e2e --shape llama-3.1-8b --phase decode --context 64k --batch 8",
)
def e2e(
    shape: _Shape = None,
    model: _Model = None,
    profile: _Profile = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Fewer layers than the shape has (random weights only).")
    ] = None,
    anchors: Annotated[int | None, typer.Option(min=1, help="Layers that select keys.", show_default="5")] = None,
    phase: _Phase = "decode,prefill",
    context: _Context = None,
    batch: _Batch = None,
    ratio: _Ratio = None,
    min_keys: _MinKeys = None,
    dtype: _Dtype = None,
    backend: _Backend = "auto",
    device: shared.Device = "auto",
    strategy: _Strategy = "kascade",
    refresh: _Refresh = None,
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Compile the decoder layers for decoding, on both sides: fewer small kernels."),
    ] = False,
    seconds: _Seconds = 1.0,
    output: _Output = None,
    csv: _Csv = None,
    plot: _Plot = None,
    overwrite: _Overwrite = False,
    as_json: shared.AsJson = False,
) -> None:
    """Time a whole model, dense against sparse: time to first token (prefill) and tokens per second (decode).

    Give --model for real weights, or --shape llama-3.1-8b or qwen3-8b for random ones. Decode runs on a full static
    cache of random keys and values, in a CUDA graph where there is a GPU.
    """
    job = _Job(phase, context, batch, output, csv, plot, overwrite, as_json)
    options = (shape, model, profile, ratio, min_keys, dtype, backend, device, seconds, strategy, refresh)
    run = job.start(*options, whole=True)
    from kascade_cli.benchmarking.e2e import run_e2e
    from kascade_cli.benchmarking.shapes import random_model, with_layers
    from kascade_cli.models import load_model

    job.check_positions(run.shape)
    where = run.setting.device
    if run.weights:
        if layers is not None:
            raise UsageError("--layers is for random weights; a model has the layers it has")
        run.shape = with_layers(run.shape, None, anchors)
        loaded, _ = load_model(run.weights, dtype=run.setting.dtype_name, device=str(where))
    else:
        run.shape = with_layers(run.shape, layers, anchors)
        loaded = random_model(run.shape, dtype=run.setting.dtype, device=where, layers=run.shape.layers)

    def measure(name: str, sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
        return run_e2e(loaded, run.shape, name, sizes, run.setting, run.profile, job.say, compile=compile)

    job.finish(run, "e2e", measure)


class _Run:
    """What the options resolved to."""

    def __init__(self, shape: Any, setting: Any, profile: Any, weights: str | None):
        self.shape, self.setting, self.profile, self.weights = shape, setting, profile, weights


class _Job:
    """Option values that all three commands share, checked before anything heavy is imported."""

    def __init__(
        self,
        phase: str,
        context: str | None,
        batch: str | None,
        output: Path | None,
        csv: Path | None,
        plot: Path | None,
        overwrite: bool,
        as_json: bool,
    ):
        self.phases = [name.strip() for name in phase.split(",")]
        for name in self.phases:
            if name not in ("decode", "prefill"):
                raise UsageError(f"phase '{name}' is not known: use decode, prefill or decode,prefill")
        self.contexts = parse_sizes(context, "--context") if context is not None else None
        if "prefill" in self.phases and 1 in (self.contexts or ()):
            raise UsageError("--context 1 is no prefill but a decode step: use 2 or more, or --phase decode")
        self.batches = parse_sizes(batch, "--batch") if batch is not None else None
        outputs = [path for path in (output, csv, plot) if path is not None]
        for path in outputs:
            check_output(path, overwrite)
            if outputs.count(path) > 1:
                raise UsageError(f"two outputs name the same file {path}: give each its own")
        if plot is not None:
            require_extra("matplotlib", "plot")
        self.output, self.csv, self.plot, self.as_json = output, csv, plot, as_json

    def say(self, text: str) -> None:
        """One line of progress on a terminal."""
        if err.is_terminal:
            err.print(text, markup=False)

    def start(
        self,
        shape: str | None,
        model: str | None,
        profile: Path | None,
        ratio: float | None,
        min_keys: int | None,
        dtype: str | None,
        backend: str,
        device: str,
        seconds: float,
        strategy: str = "kascade",
        refresh: int | None = None,
        whole: bool = False,
    ) -> _Run:
        """Shape, device, backend and budget. Raises UsageError for options that exclude each other."""
        from kascade_cli.benchmarking import shapes
        from kascade_cli.benchmarking.roles import Bench, with_strategy
        from kascade_cli.kernels import get_backend
        from kascade_cli.models import resolve_device, resolve_dtype
        from kascade_cli.schema import Budget, Profile

        given_names = [value is not None for value in (shape, model, None if whole else profile)]
        if sum(given_names) > 1:
            raise UsageError("give one of --shape, --model and --profile")
        if ratio is not None and not 0 < ratio <= 1:
            raise UsageError(f"ratio {ratio} is outside (0, 1]")
        if min_keys is not None and min_keys < 1:
            raise UsageError(f"min-keys {min_keys} must be 1 or more")
        where = resolve_device(device)
        gpu = where.type == "cuda"
        loaded = Profile.load(profile) if profile else None
        if shape is not None:
            chosen = shapes.parse_shape(shape)
        elif model is not None:
            chosen = shapes.shape_of_model(model)
        elif loaded:
            chosen = shapes.shape_of_profile(loaded)
        else:
            chosen = shapes.named_shape("llama-3.1-8b" if gpu else "demo")
        if loaded and whole:
            chosen = shapes.with_layers(chosen, None, len(loaded.anchors))
        budget = (loaded.budget if loaded else Budget()).override(ratio=ratio, min_keys=min_keys)
        element = resolve_dtype(dtype or ("bfloat16" if gpu else "float32"))
        if isinstance(element, str):
            raise UsageError("dtype auto means nothing without a checkpoint: use bfloat16, float16 or float32")
        setting = Bench(get_backend(backend, where), where, element, budget, seconds if gpu else min(seconds, 0.2))
        weights = model or ("demo" if whole and chosen.name == "demo" else None)
        if whole and loaded and not (weights or shape):
            raise UsageError("e2e with --profile needs the weights (--model) or a named --shape")
        setting = with_strategy(setting, strategy, refresh)
        setting.backend.compile_ahead(chosen.query_heads // chosen.kv_heads, chosen.head_dim, element, budget.tile)
        if not gpu:
            err.print("no GPU: the PyTorch backend at small sizes; these are CPU figures", markup=False)
        return _Run(chosen, setting, loaded, weights)

    def check_positions(self, shape: Any) -> None:
        """Raises UsageError for a context that a whole model of this shape has no positions for."""
        limit = shape.max_positions
        for context in self.contexts or []:
            if limit and context > limit:
                raise UsageError(f"--context {context} is more than {shape.name} has positions: the most is {limit}")

    def sizes(self, run: _Run, kind: str, phase: str) -> list[tuple[int, int]]:
        """(batch, context) pairs: what was asked for, or sizes that suit the device."""
        gpu, limit = run.setting.device.type == "cuda", run.shape.max_positions
        contexts, batch = [32 * 1024, 128 * 1024], 16 if phase == "decode" else 1
        if kind == "e2e":
            contexts, batch = [32 * 1024, 64 * 1024], 4 if phase == "decode" else 1
        if not gpu:
            contexts, batch = [4096] if phase == "decode" else [1024], 1
        if kind == "e2e" and limit:
            contexts = [context for context in contexts if context <= limit] or [limit]
        return [(b, c) for c in self.contexts or contexts for b in self.batches or [batch]]

    def finish(self, run: _Run, kind: str, measure: Callable[..., list[dict[str, Any]]]) -> None:
        """Runs the phases, writes what was asked for and prints."""
        from kascade_cli.benchmarking import report
        from kascade_cli.benchmarking.timing import ceilings

        rows = [row for phase in self.phases for row in measure(phase, self.sizes(run, kind, phase))]
        settings = {"command": kind, "seconds": run.setting.seconds, "budget": run.setting.budget.model_dump()}
        settings |= report.strategy_fields(run.setting) if kind != "ops" else {}
        result = report.document(run.setting.device, rows, ceilings(run.setting.device), settings=settings)
        if self.output:
            import json

            atomic_write(self.output, json.dumps(result, indent=1) + "\n")
        if self.csv:
            atomic_write(self.csv, report.to_csv(rows))
        if self.plot:
            report.plot(result, self.plot)
        if self.as_json:
            print_json(result)
        else:
            report.render(result, out)
            for path in (self.output, self.csv, self.plot):
                if path:
                    out.print(f"wrote {path}", markup=False)
