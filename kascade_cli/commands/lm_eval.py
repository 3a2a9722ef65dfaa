"""`kascade lm-eval`: lm-evaluation-harness with the model `kascade` registered. Its arguments are lm_eval's own."""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from kascade_cli.errors import require_extra
from kascade_cli.help import CONTEXT_SETTINGS, Command, examples

app = typer.Typer(add_completion=False, rich_markup_mode=None)


# What follows the first word that is not ours goes to lm_eval, `--help` included.
@app.command(
    cls=Command,
    context_settings=CONTEXT_SETTINGS | {"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@examples(
    "kascade lm-eval --model_args pretrained=org/model,profile=profile.yaml --tasks gsm8k --output_path results",
    "kascade lm-eval --model_args pretrained=m.gguf,strategy=streaming-llm:ratio=0.3 --tasks niah_single_1 "
    "--metadata max_seq_lengths=[4096]",
    "kascade lm-eval ls tasks",
    "kascade lm-eval run --help",
)
def lm_eval(
    arguments: Annotated[list[str], typer.Argument(metavar="ARGS...", help="lm_eval's own: run, ls, validate ...")],
) -> None:
    """Run lm-evaluation-harness with a model whose attention runs a strategy (--model kascade, the default here).

    --model_args takes pretrained (what MODEL is elsewhere), profile, strategy, ratio, min_keys, tile, backend, dtype,
    device_map, revision, allow_other_weights. What really ran stands in the results file under config.kascade.
    """
    require_extra("lm_eval", "eval")
    require_extra("lm_eval.models.huggingface", "eval")

    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    import kascade_cli.integrations.lm_eval  # noqa: F401  registers the model

    setup_logging()
    cli = HarnessCLI()
    with _as_argv(arguments):
        parsed = cli.parse_args()
    with contextlib.ExitStack() as stack:
        if parsed.command == "run":
            _complete(parsed, stack)
        cli.execute(parsed)


@contextlib.contextmanager
def _as_argv(arguments: list[str]) -> Iterator[None]:
    """lm_eval's parser reads sys.argv, and may add to it."""
    before, sys.argv = sys.argv, ["kascade lm-eval", *arguments]
    try:
        yield
    finally:
        sys.argv = before


def _complete(parsed: Any, stack: contextlib.ExitStack) -> None:
    """The model `kascade` on any device, unless something else is asked for; a tokenizer for tasks that make text.

    Such tasks (RULER) take a tokenizer by name, which transformers must find: a folder stands in for names that only
    kascade knows.
    """
    from kascade_cli.demo import DEMO_MODELS
    from kascade_cli.models import is_gguf, load_tokenizer, resolve_name

    if parsed.config is None:
        parsed.model = parsed.model or "kascade"
        parsed.device = parsed.device or "auto" if parsed.model == "kascade" else parsed.device
    given = parsed.model_args or {}
    name, metadata = given.get("pretrained"), parsed.metadata or {}
    if parsed.model != "kascade" or not isinstance(name, str) or "tokenizer" in {**given, **metadata}:
        return
    if name in DEMO_MODELS:
        metadata = {**metadata, "tokenizer": resolve_name(name)}
    elif is_gguf(name):
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kascade-tokenizer-"))
        load_tokenizer(name).save_pretrained(folder)
        metadata = {**metadata, "tokenizer": folder}
    parsed.metadata = metadata or None
