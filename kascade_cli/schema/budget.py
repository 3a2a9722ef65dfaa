"""How many keys a query may read."""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, field_validator, model_serializer, model_validator

from kascade_cli.schema.base import Count, Strict

Ratio = Annotated[float, Field(gt=0, le=1, strict=True)]
MOST_LENGTHS = 32  # of a table


class Budget(Strict):
    """How many keys a query may read: k(N) = min(N, max(min_keys, ceil(ratio(N) * N))), N the keys that it sees.

    ratio(N) is `ratio`, or with a table `ratios` (length -> ratio; lengths are powers of two, rising) the entry of the
    largest length <= N. Below the smallest length `ratio` holds, which is then that length's own entry.

    The ratio and the floor are the paper's (section 3), which leaves the rounding open; its public code rounds down.
    """

    ratio: Ratio = 0.10
    ratios: Annotated[dict[Count, Ratio], Field(min_length=1, max_length=MOST_LENGTHS)] | None = None
    min_keys: Count = 128
    tile: Count = 32

    @field_validator("ratios", mode="before")
    @classmethod
    def _lengths_are_numbers(cls, given: Any) -> Any:
        """Keys of JSON are text."""
        if not isinstance(given, Mapping):
            return given
        return {int(k) if isinstance(k, str) and re.fullmatch("[1-9][0-9]{0,9}", k) else k: given[k] for k in given}

    @model_validator(mode="before")
    @classmethod
    def _ratio_follows_from_the_table(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("ratio") is not None or not isinstance(given.get("ratios"), dict):
            return given
        first = next(iter(given["ratios"].values()), None)
        return given | {"ratio": first} if isinstance(first, float) and 0 < first <= 1 else given

    @model_validator(mode="after")
    def _table_makes_sense(self):
        if self.ratios is None:
            return self
        lengths = list(self.ratios)
        for length in lengths:
            if length & (length - 1):
                raise ValueError(f"ratios: {length} is not a power of two")
        if lengths != sorted(lengths):
            raise ValueError("ratios: the lengths must rise")
        if self.ratio != self.ratios[lengths[0]]:
            raise ValueError(
                f"ratio: {self.ratio:g} is not that of the smallest length in `ratios`, {self.ratios[lengths[0]]:g}: "
                "leave it out"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_an_empty_table(self, handler: Any) -> dict[str, Any]:
        document = handler(self)
        return document if self.ratios is not None else {k: v for k, v in document.items() if k != "ratios"}

    def __hash__(self) -> int:
        return hash((self.ratio, tuple((self.ratios or {}).items()), self.min_keys, self.tile))

    def override(self, **given: Any) -> "Budget":
        """With what is not None, unchecked. A ratio takes the place of a table, `ratios` that of a ratio."""
        given = {name: value for name, value in given.items() if value is not None}
        if "ratios" in given:
            given["ratio"] = next(iter(given["ratios"].values()))
        elif "ratio" in given:
            given["ratios"] = None
        return self.model_copy(update=given)

    def ratio_at(self, visible: int) -> float:
        """The share for a query that sees `visible` keys."""
        ratio = self.ratio
        for length, entry in (self.ratios or {}).items():
            if length > visible:
                break
            ratio = entry
        return ratio

    def count(self, visible: int) -> int:
        """Keys chosen among `visible` ones. With a table not monotone: it may fall where a length begins."""
        return min(visible, max(self.min_keys, math.ceil(self.ratio_at(visible) * visible - 1e-6)))

    def most(self, visible: int, step: int = 1) -> int:
        """The largest `count` of 0, step, 2 step ... up to `visible`."""
        ends = [visible, *(length - 1 for length in self.ratios or () if length <= visible)]
        return max(self.count(end // step * step) for end in ends)

    def describe(self) -> str:
        """`10%`, or `30%, from 4096 keys 15%, from 16384 keys 10%`."""
        first, *rest = (self.ratios or {0: self.ratio}).items()
        return ", ".join([f"{100 * first[1]:g}%", *(f"from {length} keys {100 * r:g}%" for length, r in rest)])
