"""The two variables: KASCADE_PROFILE, a profile's file, and KASCADE_VLLM, everything else as one JSON object."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kascade_cli.errors import UsageError, plain
from kascade_cli.files import check_output

if TYPE_CHECKING:
    from kascade_cli.sparse import Setting

PROFILE, OPTIONS = "KASCADE_PROFILE", "KASCADE_VLLM"
GRAPHS = ("auto", "piecewise", "full")


@dataclass(frozen=True)
class Settings:
    """profile: path, or None for strategies that need none. The others are the keys of KASCADE_VLLM.

    strategy: a name, with options as on the command line (`streaming-llm:ratio=0.3`). ratio, min_keys, tile: in place
    of the profile's. log: seconds between two reports in the log, 0 for one at the exit only. report: file that the
    report is written to as JSON at the same times. graphs: what of a step CUDA graphs may hold: `piecewise` (all but
    attention), `full` (decode steps whole), or `auto` (`whole_steps`).
    """

    profile: str | None = None
    strategy: str = "kascade"
    ratio: float | None = None
    min_keys: int | None = None
    tile: int | None = None
    backend: str = "auto"
    allow_other_weights: bool = False
    log: float = 0.0
    report: str | None = None
    graphs: str = "auto"

    def whole_steps(self, device: str) -> bool:
        """Whether CUDA graphs hold decode steps whole: left to us, on a GPU, where kascade or dense runs.

        Those were measured so inside vLLM. Raises UsageError for a strategy that is not known.
        """
        if self.graphs != "auto":
            return self.graphs == "full"
        from kascade_cli.sparse.strategies.dense import Dense
        from kascade_cli.sparse.strategies.kascade import Kascade
        from kascade_cli.sparse.strategy import strategy_class

        return device == "cuda" and issubclass(strategy_class(self.strategy.partition(":")[0]), Dense | Kascade)

    def setting(self) -> "Setting":
        """As the rest of kascade takes it, with the profile read and everything checked that needs no model.

        Raises KascadeError for a profile that cannot be read, UsageError for what makes no sense and for a report that
        cannot be written.
        """
        from kascade_cli.schema import Profile
        from kascade_cli.sparse import Setting

        profile = None if self.profile is None else Profile.load(self.profile)
        parsed = Setting.parse(
            self.strategy, profile=profile, backend=self.backend, allow_other_weights=self.allow_other_weights
        )
        if self.report is not None:
            check_output(self.report, overwrite=True)
        setting = parsed.override(ratio=self.ratio, min_keys=self.min_keys, tile=self.tile)
        if profile is None:
            _needs_none(setting)
        return setting.check()


def _needs_none(setting: "Setting") -> None:
    from kascade_cli.sparse.strategy import strategy_class

    if strategy_class(setting.strategy).needs_profile:
        raise UsageError(f"strategy {setting.strategy} needs a profile: set {PROFILE} to its file")


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "strategy": (_text, "a strategy's name"),
    "ratio": (lambda value: _number(value) and 0 < value <= 1, "a number in (0, 1]"),
    "min_keys": (_whole, "a whole number, 1 or more"),
    "tile": (_whole, "a whole number, 1 or more"),
    "backend": (_text, "auto, torch or tilelang"),
    "allow_other_weights": (lambda value: isinstance(value, bool), "true or false"),
    "log": (_number, "seconds, 0 or more"),
    "report": (_text, "a file's path"),
    "graphs": (lambda value: value in GRAPHS, ", ".join(GRAPHS[:-1]) + " or " + GRAPHS[-1]),
}


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether either variable is set."""
    return bool(environment.get(PROFILE) or environment.get(OPTIONS))


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Raises UsageError that names the variable and what is wrong with it."""
    text = environment.get(OPTIONS) or "{}"
    return Settings(profile=environment.get(PROFILE) or None, **_options(text))


def _options(text: str) -> dict[str, Any]:
    try:
        given = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError:
        raise UsageError(f"{OPTIONS} is not readable as JSON: nested too deeply") from None
    except ValueError as error:
        raise UsageError(f"{OPTIONS} is not readable as JSON: {error}") from None
    if not isinstance(given, dict):
        raise UsageError(f'{OPTIONS} is not a JSON object: write \'{{"strategy": "kascade"}}\'')
    for name, value in given.items():
        if name not in _KEYS:
            raise UsageError(f"{OPTIONS} has no key '{plain(name, 40)}': it has {', '.join(_KEYS)}")
        fits, what = _KEYS[name]
        if not fits(value):
            raise UsageError(f"{OPTIONS}: {name} is {plain(json.dumps(value), 40)} and must be {what}")
    return given


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"key '{plain(name, 40)}' twice")
        found[name] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")
