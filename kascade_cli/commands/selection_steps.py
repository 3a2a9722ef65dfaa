"""What `select-anchors` does beside calling the analysis: options that fit together, the model, a second reading."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kascade_cli import processes
from kascade_cli.commands import options as shared
from kascade_cli.console import Steps, note, parse_ints, progress
from kascade_cli.errors import KascadeError, UsageError, plain, require_extra
from kascade_cli.files import check_output, check_output_folder

_SESSION, _OPENED = "session", "session opened"  # what the leader tells the other processes


def reading_again() -> Callable[[int, int], None]:
    """Takes (prompts done, in all) of a pass over the capture that begins when it must, and shows a bar of it."""
    bars: list[Any] = []

    def advance(done: int, total: int) -> None:
        if not bars:
            bars.append(progress("reading the capture again", total=total))
            bars[0].start()
        bars[0].update(bars[0].first, completed=done)
        if done == total:
            bars.pop().stop()

    return advance


def parse_ratio(text: str, verify: bool | None) -> tuple[float, bool]:
    """(the ratio that sets are compared at, whether a table by length is wanted). Raises UsageError."""
    if text.strip() == "auto":
        if verify is False:
            raise UsageError("--ratio auto measures on the model: leave --no-verify out, or give a share such as 0.1")
        return 0.10, True
    try:
        return float(text), False
    except ValueError as error:
        raise UsageError(f"--ratio '{plain(text, 40)}' is neither a share such as 0.1 nor auto") from error


def check_ratios(session: Any) -> None:
    """Raises UsageError where held-out prompts are too short to find ratios for, before anything is measured."""
    from kascade_cli.evaluation.ratios import lengths

    lengths(session.longest)


def find_ratios(session: Any, search: Any, decision: Any, journal: Any) -> Any:
    """The budget with the table found for the chosen anchors; adds to `decision` what was measured."""
    from kascade_cli.evaluation import ratios

    tolerance = search.settings.tolerance
    layout = search.layout(decision.anchors, pooled=decision.choice.row.pooled)
    with Steps("ratios") as shown:
        found = ratios.find_ratios(session, layout, tolerance, journal=journal, report=shown.update)
    decision.ratios = [entry.document() for entry in found]
    decision.notes += ratios.notes(found, tolerance)
    return search.budget.override(ratios=ratios.table(found))


def anchors(text: str | None) -> int | tuple[int, ...] | None:
    """`5` -> how many; `0,2,8` -> which layers."""
    if text is None:
        return None
    try:
        numbers = parse_ints(text.strip().removesuffix(","))
    except UsageError as error:
        raise UsageError(f"--anchors: {error}, nor how many there shall be, such as 5") from error
    return tuple(numbers) if "," in text else numbers[0]


def draw(folder: Path, search: Any, decision: Any) -> list[Path]:
    """The figures' paths."""
    from kascade_cli.analysis.plots import draw_all

    return draw_all(folder, search.measured, search.rows, decision.choice.row, decision.candidates)


def check_plots(folder: Path, overwrite: bool) -> None:
    from kascade_cli.analysis.plots import FILES

    check_output_folder(folder)
    for name in FILES if folder.exists() else ():
        check_output(folder / name, overwrite)
    require_extra("matplotlib", "plot")


@contextlib.contextmanager
def kept(journal: Any) -> Iterator[None]:
    """After Ctrl-C, says that what has been measured is kept."""
    try:
        yield
    except KeyboardInterrupt:
        if len(journal):
            note(f"{len(journal)} runs are kept in {journal.path}: the same command goes on after them")
        raise


def check_verification(verify: bool | None, verification: Any, settings: Any, candidates: int) -> bool:
    """Whether verification is asked for, so that it must not fail. Raises UsageError for options that fit together
    badly, or name what is not there."""
    if verify is False:
        plain, usual = type(verification)(), type(settings)()
        options = {
            "--model": verification.model != plain.model,
            "--verify-dev-set": verification.dev_set != plain.dev_set,
            "--verify-prompts": verification.prompts != plain.prompts,
            "--verify-length": verification.max_length != plain.max_length,
            "--candidates": candidates != 1,
            "--kl-tolerance": settings.kl_tolerance != usual.kl_tolerance,
            "--lost-tolerance": settings.lost_tolerance != usual.lost_tolerance,
            "--dtype": verification.dtype != plain.dtype,
            "--device": verification.device != plain.device,
            "--device-map": verification.device_map != plain.device_map,
            "--backend": verification.backend != plain.backend,
            "--revision": verification.revision != plain.revision,
            "--trust-remote-code": verification.trust_remote_code != plain.trust_remote_code,
        }
        for name, given in options.items():
            if given:
                raise UsageError(f"{name} is for verification: leave --no-verify out")
        return False
    verification.check()
    asked = (verification.model, verification.dev_set, verification.max_length, verification.revision)
    return verify is True or any(value is not None for value in asked)


def open_session(search: Any, verification: Any, wanted: bool) -> Any:
    """The model and its prompts; None and a line that says why, where they are not there and nobody asked for them."""
    from kascade_cli.evaluation import session

    meta, opened = search.measured.meta, None
    try:
        if not wanted and (missing := verification.missing(meta)):
            raise KascadeError(missing)
        shared.decide(_SESSION, lambda: (meta, search.settings.phases))
        opened = session.load_session(meta, search.settings.phases, verification)
        shared.decide(_OPENED, lambda: True)
        opened.choose_prompts()
        return opened
    except KascadeError as error:
        if wanted or isinstance(error, processes.Ended):
            raise
        if opened is None:
            shared.decide(_OPENED, lambda: False)
        note(f"not verified: {error}; pass --model, or --no-verify to choose by the similarity alone")
        return None


def follow(team: processes.Team, verification: Any) -> None:
    """What every process does beside the leader: measures what that hands out, if it verifies."""
    from kascade_cli.evaluation import session, sharing

    meta, phases = shared.decide(_SESSION, dict)
    try:
        loaded = session.load_session(meta, phases, verification)
    except KascadeError:
        if shared.decide(_OPENED, bool):
            raise
        return  # as in the leader, which goes on without
    sharing.follow(team, loaded)
