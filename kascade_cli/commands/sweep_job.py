"""What the commands of `kascade sweep` share: from options to a result file that grows row by row."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kascade_cli.commands import options as shared
from kascade_cli.commands.sweep_report import finished, render
from kascade_cli.console import compiling, err, note, out, parse_size, print_json, progress
from kascade_cli.files import check_output

DEFAULT_LENGTH, NATURAL_LENGTH = 1024, 2048
MOST_PROMPTS = 16  # by default, of all tasks together


@dataclass(frozen=True)
class Prompts:
    """What is asked: the options of that heading."""

    task: list[str] | None
    max_length: str | None
    num_prompts: int | None
    questions: int
    kl_prompts: int
    haystack: str | None
    chat: bool
    seed: int


class Job:
    """What the three commands share: where the result goes, and running it."""

    def __init__(
        self, name: str, output: Path | None, overwrite: bool, as_json: bool, prompts: int = MOST_PROMPTS
    ) -> None:
        self.prompts = prompts
        self.name, self.overwrite, self.as_json = name, overwrite, as_json
        self.output = output or Path(f"sweep-{name}.json")
        # A result that is there is gone on with, if it is one of this sweep (document.open_result).
        check_output(self.output, overwrite or self.output.is_file())

    def run(
        self,
        points: Callable[..., Any],
        model: str,
        prompts: Prompts,
        loading: shared.Loading,
        *,
        min_keys: int,
        backend: str = "torch",
        profile: Path | None = None,
    ) -> None:
        """Measures what the result lacks; `points(base setting, model info)` says what there is to measure."""
        length = parse_size(prompts.max_length, "--max-length") if prompts.max_length is not None else None

        from kascade_cli.evaluation.cases import Asking, gather_cases, named_tasks
        from kascade_cli.integrations.transformers import compile_ahead
        from kascade_cli.models import describe
        from kascade_cli.sparse import Setting
        from kascade_cli.sweeps.document import SCHEMA, open_result, read_result
        from kascade_cli.sweeps.head import head
        from kascade_cli.sweeps.plan import check_points
        from kascade_cli.sweeps.run import run_sweep, tokens_to_read

        shared.check_haystack(prompts.haystack)
        asked, sources = named_tasks(prompts.task, model)
        length = length or (NATURAL_LENGTH if sources.natural else DEFAULT_LENGTH if sources.kinds else None)
        num_prompts = prompts.num_prompts or max(1, self.prompts // max(1, len(sources.natural)))
        base = Setting(min_keys=min_keys, backend=backend)
        check_points(points(base))
        if self.output.exists() and not self.overwrite:
            read_result(self.output)

        loaded, tokenizer = loading.load(model, note)
        info = describe(loaded, model)
        asking = Asking(num_prompts, prompts.questions, prompts.seed, prompts.chat, None, prompts.haystack, note)
        cases = gather_cases(sources, tokenizer, info, length, asking)
        kl_prompts = min(prompts.kl_prompts, len(cases))
        plan = points(base, info)
        check_points(plan)
        settings = {
            "tasks": asked, "length": length or max(case.tokens for case in cases), "prompts": len(cases),
            "questions": prompts.questions, "seed": prompts.seed, "chat": prompts.chat, "kl_prompts": kl_prompts,
            "min_keys": min_keys,
        }  # fmt: skip
        about = head(SCHEMA, self.name, loaded, info, settings, cases, profile)
        result = open_result(self.output, about, self.overwrite)
        missing = [point for point in plan if not result.has(point)]
        if len(missing) < len(plan):
            note(f"{self.output} has {len(plan) - len(missing)} of {len(plan)} rows")
        if missing:
            compile_ahead(loaded, backend=backend, progress=compiling)
        with progress(f"sweep {self.name}", total=tokens_to_read(cases, kl_prompts, len(missing))) as bar:
            tell = finished(len(missing)) if not err.is_terminal else None
            run_sweep(
                loaded, tokenizer, cases, plan, result, kl_prompts=kl_prompts,
                advance=lambda what, tokens: bar.update(bar.first, description=what, advance=tokens),
                done=tell or (lambda point, row: None),
            )  # fmt: skip
        document = result.document(plan)
        print_json(document) if self.as_json else render(document, out)
        note(f"wrote {self.output}")
