"""OmniKV (ICLR 2025, openreview ulCAPXYXfa): a few filter layers choose keys for the layers after them."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from kascade_cli.errors import UsageError
from kascade_cli.schema import Phase
from kascade_cli.sparse.layer import Keys, Layer
from kascade_cli.sparse.strategy import Option, Strategy, layer_list


class SharedSelection(Strategy):
    """Base: some layers attend densely and choose one key set for all heads, which the layers after them read.

    Decode only; layers before the first that chooses are dense. `choosing_layers` reads the option of the subclass, or
    takes its published depths as shares of the model's.
    """

    published: tuple[tuple[int, ...], int]  # layers that choose, and of how many

    def choose(self, layer: Layer) -> Keys:
        """One key set: indices [B, 1, K]."""
        raise UsageError(f"strategy {self.name} does not say how a layer chooses")

    @property
    def chosen_layers(self) -> Sequence[int] | None:
        """What the option says; None: the published depths."""
        return None

    def prepare(self) -> None:
        given = self.chosen_layers
        if given is not None:
            for layer in given:
                if layer not in self.layers:
                    raise UsageError(f"{self.name}: layer {layer} is not a full-attention layer of this model")
            self.choosing_layers = tuple(given)
            return
        depths, of = self.published
        places = sorted({min(len(self.layers) - 1, round(depth * len(self.layers) / of)) for depth in depths})
        self.choosing_layers = tuple(self.layers[place] for place in places)

    def source(self, layer: int) -> int | None:
        """The layer whose keys `layer` reads; None where it is dense."""
        if layer in self.choosing_layers:
            return None
        return max((chosen for chosen in self.choosing_layers if chosen < layer), default=None)

    def reads(self, layer: int, phase: Phase) -> Iterable[int]:
        source = self.source(layer)
        return () if phase == "prefill" or source is None else (source,)

    def role(self, layer: int) -> str:
        return "filter" if layer in self.choosing_layers else "dense" if self.source(layer) is None else "reuse"

    def attend(self, layer: Layer) -> Tensor:
        source = self.source(layer.index)
        if layer.phase == "prefill" or (source is None and layer.index not in self.choosing_layers):
            return layer.dense()
        if source is None:
            self.keep(layer, self.choose(layer))
            return layer.dense()
        return layer.attend(layer.state.kept(source, layer.index).to(layer.query.device))


class OmniKV(SharedSelection):
    """Keys whose post-softmax attention is highest in any query head (pooled by max), in the published layers 2, 8
    and 18 of 32 (method: section 8). No key is kept for being recent."""

    name, rank = "omnikv", 22
    summary = "a few filter layers choose keys for those after them, pooled over all heads by max; decode only"
    published = ((2, 8, 18), 32)
    options = {"filter_layers": Option(layer_list, None, "layers that choose, such as 2+8+18")}

    @property
    def chosen_layers(self) -> Sequence[int] | None:
        return self.filter_layers

    def choose(self, layer: Layer) -> Keys:
        scores = layer.gathered(layer.probabilities()).amax(1, keepdim=True)
        return Keys(layer.top(scores.contiguous()), layer.batch.counts)
