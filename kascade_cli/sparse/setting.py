"""How attention runs: a strategy with its options, profile, budget and backend, in one value."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kascade_cli.errors import UsageError
from kascade_cli.kernels.backend import check_backend
from kascade_cli.schema import Budget, Profile
from kascade_cli.sparse.strategy import Strategy, make_strategy, strategy_class

_BUDGET = {"ratio": float, "min_keys": int, "tile": int}


@dataclass(frozen=True)
class Setting:
    """What `attach` takes. ratio, min_keys and tile override the profile's budget; options are the strategy's own.

    A ratio drops the profile's table by context length.
    """

    strategy: str = "kascade"
    profile: Profile | None = None
    ratio: float | None = None
    min_keys: int | None = None
    tile: int | None = None
    backend: str = "auto"
    allow_other_weights: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, spec: str, **defaults: Any) -> "Setting":
        """`streaming-llm`, or with options: `streaming-llm:ratio=0.3`, `omnikv:filter_layers=2+8+18:ratio=0.05`.

        ratio and min_keys are the budget's, anything else the strategy's. Raises UsageError.
        """
        name, *parts = spec.split(":")
        budget: dict[str, Any] = {}
        options: dict[str, Any] = {}
        for part in parts:
            key, equals, value = part.partition("=")
            key = key.strip().replace("-", "_")
            if not equals or not key or not value.strip():
                raise UsageError(f"strategy '{spec}': '{part}' is not an option; write NAME:OPTION=VALUE")
            if key in budget or key in options:
                raise UsageError(f"strategy '{spec}' has {key} twice")
            if key not in _BUDGET:
                options[key] = value.strip()
                continue
            try:
                budget[key] = _BUDGET[key](value)
            except ValueError as error:
                raise UsageError(f"strategy '{spec}': {key} {value} is not a number") from error
        return replace(cls(name.strip(), **defaults), options=options, **budget)

    def override(self, options: Mapping[str, Any] | None = None, **budget: Any) -> "Setting":
        """With the budget numbers that are not None, and more options of the strategy."""
        given = {name: value for name, value in budget.items() if value is not None}
        return replace(self, options={**self.options, **(options or {})}, **given)

    def check(self) -> "Setting":
        """What can be refused before a model is loaded. Raises UsageError; returns itself."""
        kind = strategy_class(self.strategy)
        kind.read_options(self.options)
        if kind.needs_profile and self.profile is None:
            raise UsageError(f"strategy {self.strategy} needs a profile (--profile)")
        self.budget()
        check_backend(self.backend)
        return self

    def budget(self) -> Budget:
        """The profile's budget with what is overridden. Raises UsageError for numbers that make no sense."""
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise UsageError(f"ratio {self.ratio:g} is outside (0, 1]")
        for name in ("min_keys", "tile"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name.replace('_', '-')} {value} must be 1 or more")
        base = self.profile.budget if self.profile else Budget()
        return base.override(**{name: getattr(self, name) for name in _BUDGET})

    def make(self, layers: list[int]) -> Strategy:
        """The strategy for a model with these full-attention layers. Raises UsageError."""
        return make_strategy(self.strategy, layers, self.profile, **self.options)
