"""A strategy: which keys every layer reads. One file each in strategies/; registered by its class."""

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar

from torch import Tensor

from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.schema import Phase, Profile
from kascade_cli.sparse.layer import Keys, Layer
from kascade_cli.sparse.state import Pass

ENTRY_POINTS = "kascade.strategies"  # modules or classes of other packages
_REGISTRY: dict[str, type["Strategy"]] = {}


@dataclass(frozen=True)
class Option:
    """What a strategy can be told: `read` turns text (or a value) into the option's, raising ValueError."""

    read: Callable[[Any], Any]
    default: Any
    help: str


class Strategy:
    """Subclass it, name it, write `attend`.

    An instance serves one attached model, and any number of passes at once: it does not change. What a pass must
    find again goes into `layer.state`; what must outlive a pass into an object that `memory` makes.

    layers: the full-attention layers, in order. profile: None where there is none. Options stand on the instance under
    their names.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs_profile: ClassVar[bool] = False
    options: ClassVar[Mapping[str, Option]] = {}

    def __init_subclass__(cls) -> None:
        name = cls.__dict__.get("name")
        if name is None:  # a base of several strategies
            return
        other = _REGISTRY.get(name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise KascadeError(f"two strategies are called '{name}': {other.__module__} and {cls.__module__}")
        _REGISTRY[name] = cls

    def __init__(self, layers: Sequence[int], profile: Profile | None = None, **options: Any) -> None:
        """Raises UsageError for a missing profile, and for an option that is unknown or makes no sense."""
        values = self.read_options(options)
        if self.needs_profile and profile is None:
            raise UsageError(f"strategy {self.name} needs a profile (--profile)")
        self.layers, self.profile = tuple(layers), profile
        for name, value in values.items():
            setattr(self, name, value)
        self._derived: dict[Any, Any] = {}
        self.prepare()
        self._frozen = True

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "_frozen", False):
            raise AttributeError(f"strategy {self.name} does not change: keep `{name}` in layer.state.notes")
        super().__setattr__(name, value)

    @classmethod
    def read_options(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The value of every option. Raises UsageError that names what is wrong."""
        for name in given:
            if name not in cls.options:
                known = f"it has {', '.join(cls.options)}" if cls.options else "it has none"
                raise UsageError(f"strategy {cls.name} has no option '{name}': {known}")
        values = {}
        for name, option in cls.options.items():
            try:
                values[name] = option.read(given[name]) if name in given else option.default
            except (ValueError, TypeError) as error:
                raise UsageError(f"{cls.name}: {name} {given[name]} {error}") from error
        return values

    # -- what a strategy may write --

    def prepare(self) -> None:
        """At the end of construction: checks, and what follows from the options. May set attributes."""

    def attend(self, layer: Layer) -> Tensor:
        """The layer's output [B, H, T, Dv]. The only method that must be written."""
        raise KascadeError(f"strategy {self.name} does not say how a layer attends: write `attend`")

    def reads(self, layer: int, phase: Phase) -> Iterable[int]:
        """Earlier layers whose keys `layer` reads: what they keep is dropped after the last reader."""
        return ()

    def role(self, layer: int) -> str:
        """dense, anchor, reuse ... (for the report)."""
        return self.name

    def facts(self) -> dict[str, Any]:
        """What the report shall say besides, such as what of the profile could not be followed."""
        return {}

    def memory(self) -> Any:
        """A new object that is handed from pass to pass of one thread (`layer.state.memory`), or None."""
        return None

    def begin(self, state: Pass) -> None:
        """A pass starts."""

    def end(self, state: Pass) -> None:
        """The pass has run through."""

    # -- what the engine calls --

    def start(self, batch: Any, memory: Any = None) -> Pass:
        """A new pass over `batch`."""
        state = Pass(batch, self.last_readers(batch.phase), memory)
        self.begin(state)
        return state

    def run(self, layer: Layer) -> Tensor:
        """`attend`, and dropping what nobody reads any more."""
        out = self.attend(layer)
        layer.state.release(layer.index)
        return out

    def last_readers(self, phase: Phase) -> dict[int, int]:
        """Layer that keeps keys -> the last layer that reads them."""
        if phase not in self._derived:
            last: dict[int, int] = {}
            for layer in self.layers:
                for source in self.reads(layer, phase):
                    last[source] = layer
            self._derived[phase] = last
        return self._derived[phase]

    def keep(self, layer: Layer, keys: Keys) -> None:
        """`keys` are for the layers that read `layer`."""
        layer.state.keep(layer.index, keys, layer.groups)


def known_strategies() -> dict[str, type[Strategy]]:
    """Every strategy by name: those of strategies/, those of installed packages, and any class imported so far."""
    folder = importlib.import_module("kascade_cli.sparse.strategies")
    for module in pkgutil.iter_modules(folder.__path__, folder.__name__ + "."):
        importlib.import_module(module.name)
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            raise KascadeError(f"the strategies of {entry.value} cannot be imported: {error}") from error
    return dict(sorted(_REGISTRY.items(), key=lambda item: _order(item[1])))


def _order(kind: type[Strategy]) -> tuple:
    """Built-in ones first, in the order of their files' ranks; then by name."""
    return (not kind.__module__.startswith("kascade_cli."), getattr(kind, "rank", 50), kind.name)


def strategy_class(name: str) -> type[Strategy]:
    """Raises UsageError for a name that is no strategy's."""
    known = known_strategies()
    if name not in known:
        raise UsageError(f"strategy '{name}' is not known; use one of {', '.join(known)}")
    return known[name]


def make_strategy(name: str, layers: Sequence[int], profile: Profile | None, **options: Any) -> Strategy:
    """Raises UsageError for an unknown strategy, a missing profile or an option that makes no sense."""
    return strategy_class(name)(layers, profile, **options)


def whole_number(least: int) -> Callable[[Any], int]:
    """Reads a whole number, `least` or more."""

    def read(value: Any) -> int:
        try:
            number = int(value)
        except (TypeError, ValueError):
            raise ValueError("is not a whole number") from None
        if number < least:
            raise ValueError(f"must be {least} or more")
        return number

    return read


def layer_list(value: Any) -> tuple[int, ...]:
    """Reads layers: `2+8+18`, or a sequence of numbers."""
    parts = value.split("+") if isinstance(value, str) else list(value)
    try:
        layers = tuple(int(part) for part in parts)
    except ValueError:
        raise ValueError("is not a list of layers such as 2+8+18") from None
    if not layers or list(layers) != sorted(set(layers)):
        raise ValueError("must name layers in ascending order, each once")
    return layers
