"""`kascade generate`: continue a prompt with sparse attention, or side by side with dense."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kascade_cli.commands import options as shared
from kascade_cli.console import compiling, note, out, parse_size, print_json
from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.help import BUDGET, PROMPTS, examples

DEFAULT_NEW_TOKENS = 64
DEFAULT_LENGTH = "1k"
ATTENTION = "How attention runs"
PHASES = ("prefill", "decode")  # in the order in which they run
_WARM_UP = 256  # tokens of the prompt that are run once before anything is timed


@examples(
    "kascade generate demo --profile profiles/demo.yaml --task hops --compare dense",
    "kascade generate MODEL --profile profile.yaml --prompt-file long.txt --chat",
    "kascade generate MODEL --strategy streaming-llm:ratio=0.3 --prompt 'Once upon a time'",
)
def generate(
    model: shared.Model,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The text to continue.", rich_help_panel=PROMPTS)
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A file with the text to continue; - is stdin.", rich_help_panel=PROMPTS),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="TASK",
            help="Ask a question of this built-in task about a long text.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    max_length: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="With --task: tokens of the text, such as 2k. Default: 1k.", rich_help_panel=PROMPTS
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Send the prompt as a user turn of the chat template.", rich_help_panel=PROMPTS),
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=shared.MOST_PROMPTS,
            metavar="N",
            help="Tokens to write. Default: 64; with --task the length of the answer.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, metavar="T", help="0 is greedy.", rich_help_panel=PROMPTS)
    ] = 0.0,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=shared.LARGEST_SEED,
            metavar="N",
            help="For sampling, and for the text of --task.",
            rich_help_panel=PROMPTS,
        ),
    ] = 0,
    strategy: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="With options after colons, such as streaming-llm:ratio=0.3. There are: {strategies}.",
            rich_help_panel=ATTENTION,
        ),
    ] = "kascade",
    profile: shared.ProfileFile = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Run this strategy too (usually dense) and show both side by side.",
            rich_help_panel=ATTENTION,
        ),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="SHARE",
            help="Share of the keys to read. Default: the profile's.",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    min_keys: shared.MinKeys = None,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    device_map: shared.DeviceMap = None,
    backend: shared.Backend = "auto",
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="On a GPU: compile the decoder layers for decoding. Takes longer at first, then each token less.",
            rich_help_panel=ATTENTION,
        ),
    ] = False,
    revision: shared.Revision = None,
    trust_remote_code: shared.TrustRemoteCode = False,
    allow_other_weights: shared.AllowOtherWeights = False,
    as_json: shared.AsJson = False,
) -> None:
    """Continue a prompt with sparse attention. Text streams to stdout, figures go to stderr.

    --compare dense shows both texts with speed, token agreement and KL divergence.
    """
    text = _text(prompt, prompt_file, task)
    if task is None and max_length is not None:
        raise UsageError("--max-length is the length of the text of --task: leave it out")
    if task is not None and chat:
        raise UsageError("--chat is for --prompt and --prompt-file: built-in tasks know what they need")
    length = parse_size(DEFAULT_LENGTH if max_length is None else max_length, "--max-length")

    from kascade_cli.schema import Profile

    loaded_profile = Profile.load(profile) if profile else None

    from kascade_cli import generation
    from kascade_cli.evaluation.cases import split_sources
    from kascade_cli.integrations.transformers import compile_ahead
    from kascade_cli.models import describe
    from kascade_cli.sparse import Setting
    from kascade_cli.tasks.chat import encode_request

    given = {
        "profile": loaded_profile,
        "min_keys": min_keys,
        "backend": backend,
        "allow_other_weights": allow_other_weights,
    }
    settings = [Setting.parse(name, **given) for name in ([compare] if compare else []) + [strategy]]
    settings = [one if one.ratio is not None else one.override(ratio=ratio) for one in settings]
    for setting in settings:
        setting.check()
    if task is not None and not split_sources([task]).built_in:
        raise UsageError(f"--task {task}: ask a file's questions with --prompt-file, or kascade evaluate")
    told: list[str] = []  # shown once nothing is left to refuse
    loading = shared.Loading(dtype, device, device_map, revision, trust_remote_code)
    loaded, tokenizer = loading.load(model, told.append)
    info = describe(loaded, model)
    expected = None
    if task:
        ids, expected = _question(model, tokenizer, info, task, length, seed)
        max_new_tokens = max_new_tokens or expected.new_tokens
    else:
        ids = encode_request(tokenizer, text, chat=chat)
    max_new_tokens = max_new_tokens or DEFAULT_NEW_TOKENS
    generation.check_room(info, len(ids), max_new_tokens)

    compile_ahead(loaded, loaded_profile, backend=backend, progress=compiling)
    for line in told:
        note(line)
    sampling = generation.Sampling(temperature, seed)
    if compare:
        for setting in settings:
            generation.generate(loaded, tokenizer, ids[:_WARM_UP], setting, max_new_tokens=2)
    runs = []
    for setting in settings:
        write = None if as_json or compare else _write
        run = generation.generate(
            loaded, tokenizer, ids, setting,
            max_new_tokens=max_new_tokens, sampling=sampling, write=write, compile=compile,
        )  # fmt: skip
        runs.append((setting, run))
    if not (as_json or compare):
        _write("\n")
    comparison = generation.compare(loaded, ids, *runs) if compare else None

    if as_json:
        document = {
            "model": model,
            "fingerprint": info.fingerprint,
            "profile": str(profile) if profile else None,
            "prompt_tokens": len(ids),
            "expected": _answers(expected) if expected else None,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "device": loaded.device.type,
            "runs": [_run_document(run) for _, run in runs],
            "comparison": _comparison_document(compare, strategy, comparison),
        }
        print_json(document)
    elif comparison:
        _side_by_side(len(ids), expected, comparison)
    else:
        _figures(len(ids), expected, runs[0][1])
    _note_unknown(tokenizer, ids)
    from kascade_cli.sparse.strategies.kascade import UNMEASURED

    for _, run in runs:
        if run.report.get("head_maps") == UNMEASURED:
            note(f"note: head maps not measured: {run.report['strategy']} ran pooled, one key set for all heads")
        _note_density(run.report, len(ids))


def _text(prompt: str | None, prompt_file: Path | None, task: str | None) -> str | None:
    sources = {"--prompt": prompt, "--prompt-file": prompt_file, "--task": task}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise UsageError(
            "give the text to continue: --prompt TEXT, --prompt-file FILE or --task NAME"
            if not given
            else f"{' and '.join(given)} exclude each other: give one of them"
        )
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty")
    if prompt_file is None:
        return prompt
    try:
        text = sys.stdin.read() if str(prompt_file) == "-" else prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise KascadeError(f"cannot read {prompt_file}: {reason}") from error
    if not text.strip():
        raise UsageError(f"{prompt_file} is empty")
    return text


def _question(model: str, tokenizer: Any, info: Any, task: str, length: int, seed: int) -> tuple[list[int], Any]:
    """(token ids of a text and a question about it, the question): the first test prompt of the seed."""
    from kascade_cli.demo import DEMO_TASKS
    from kascade_cli.evaluation.cases import Asking, gather_cases, split_sources

    sources = split_sources([task], DEMO_TASKS.get(model))
    case = gather_cases(sources, tokenizer, info, length, Asking(num_prompts=1, questions=1, seed=seed))[0]
    return case.context + case.questions[0].ids, case.questions[0]


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _note_unknown(tokenizer: Any, ids: list[int]) -> None:
    unknown = sum(token == tokenizer.unk_token_id for token in ids) if tokenizer.unk_token_id is not None else 0
    if unknown:
        note(
            f"note: {unknown} of {len(ids)} prompt tokens are unknown to this tokenizer; "
            "the demo models know only the words of the built-in tasks (--task)"
        )


def _note_density(report: dict[str, Any], prompt_tokens: int) -> None:
    """Says plainly when a sparse strategy had nothing to leave out."""
    from kascade_cli.schema import Budget

    if report["strategy"] != "dense" and report["density"] == 1.0:
        budget = Budget(**report["budget"])
        note(
            f"note: {report['strategy']} read every key: the prompt of {prompt_tokens} tokens is too short for a "
            f"budget of {budget.ratio_at(prompt_tokens):g} with at least {budget.min_keys} keys, so this was dense "
            "attention"
        )


def _answers(expected: Any) -> str:
    return ", ".join(expected.answers)


def _verdict(expected: Any, text: str) -> str:
    from kascade_cli.tasks import exact_match
    from kascade_cli.tasks.scoring import score_answer

    if expected is None:
        return ""
    if expected.score == "exact":
        return "right" if exact_match(text, expected.answers[0], prefix=True) else "wrong"
    score = score_answer(text, expected.answers, expected.score)
    return {0.0: "wrong", 1.0: "right"}.get(score, f"{score:.0%} of them")


def _figures(prompt_tokens: int, expected: Any, run: Any) -> None:
    report = run.report
    if expected is not None:
        note(f"expected: {_answers(expected)} ({_verdict(expected, run.text)})")
    phases = ", ".join(
        f"{name} {report['phases'][name]['density']:.1%}" for name in PHASES if name in report["phases"]
    )
    note(
        f"{report['strategy']}, {report['backend']} backend: {prompt_tokens} prompt tokens, {len(run.tokens)} new; "
        f"first token {run.first_token_s:.3f} s{_rate(run, ', {:.1f} tokens/s')}"
        f"{'' if run.eager else ' in CUDA graphs'}; "
        f"keys read {report['density']:.1%} of those visible ({phases})"
    )
    if run.uncompiled not in (None, "not asked for"):
        note(f"--compile did nothing: {run.uncompiled}")
    if run.apart:
        note(f"--compile compiled each layer by itself: {run.apart}")


def _rate(run: Any, template: str) -> str:
    return template.format(run.tokens_per_s) if run.tokens_per_s else ""


def _side_by_side(prompt_tokens: int, expected: Any, comparison: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    runs = (comparison.reference, comparison.other)
    table = Table(show_lines=False)
    table.add_column("")
    for run in runs:
        table.add_column(run.report["strategy"], overflow="fold")
    table.add_row("text", *(Text(run.text) for run in runs))
    if expected is not None:
        table.add_row("expected", *(Text(f"{_answers(expected)} ({_verdict(expected, run.text)})") for run in runs))
    table.add_row("new tokens", *(str(len(run.tokens)) for run in runs))
    table.add_row("time to first token", *(f"{run.first_token_s:.3f} s" for run in runs))
    table.add_row("tokens/s after it", *(_rate(run, "{:.1f}") or "-" for run in runs))
    for phase in PHASES:
        table.add_row(f"keys read, {phase}", *(_keys(run.report["phases"].get(phase)) for run in runs))
    table.add_row("keys read, all", *(_keys(run.report) for run in runs))
    out.print(table)
    where = comparison.first_divergence
    names = [run.report["strategy"] for run in runs]
    out.print(
        f"prompt: {prompt_tokens} tokens\n"
        f"token agreement: {comparison.agreement:.1%}"
        + (", no difference" if where is None else f", first difference at new token {where + 1}")
        + f"\nKL({names[0]} || {names[1]}) of the next token along the text of {names[0]}: "
        f"mean {comparison.kl_mean:.2g}, max {comparison.kl_max:.2g} nats",
        markup=False,
        soft_wrap=True,
    )


def _keys(entry: dict[str, float] | None) -> str:
    if entry is None:
        return "-"
    return f"{_count(entry['keys_read'])} of {_count(entry['keys_visible'])} ({entry['density']:.1%})"


def _count(number: float) -> str:
    """1565826 -> 1.57M."""
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def _run_document(run: Any) -> dict[str, Any]:
    return {
        "strategy": run.report["strategy"],
        "text": run.text,
        "tokens": run.tokens,
        "first_token_s": round(run.first_token_s, 4),
        "tokens_per_s": round(run.tokens_per_s, 3) if run.tokens_per_s else None,
        "graphs": {
            "eager": run.eager,
            "seconds": round(run.graphs_s, 4),
            "uncompiled": run.uncompiled,
            "apart": run.apart,
        },
        "report": run.report,
    }


def _comparison_document(compare: str | None, strategy: str, comparison: Any) -> dict[str, Any] | None:
    if comparison is None:
        return None
    return {
        "reference": compare,
        "strategy": strategy,
        "token_agreement": comparison.agreement,
        "first_divergence": comparison.first_divergence,
        "kl_mean": comparison.kl_mean,
        "kl_max": comparison.kl_max,
    }
