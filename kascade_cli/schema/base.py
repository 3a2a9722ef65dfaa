"""What the parts of a profile share: strict models, and numbers that fit a device."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PHASES = ("decode", "prefill")
Phase = Literal["decode", "prefill"]

MOST_HEADS, MOST_LAYERS = 4096, 4096  # one error for a list without end, not one for each entry
_LARGEST = 2**31 - 1  # counts and indices become int32 on a device
Index = Annotated[int, Field(ge=0, le=_LARGEST, strict=True)]
Count = Annotated[int, Field(ge=1, le=_LARGEST, strict=True)]


class Strict(BaseModel):
    """Does not change, and knows all its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)
