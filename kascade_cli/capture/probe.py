"""What is measured in a model: pooled attention mass, importance, and the mass of the largest keys.

The probe is a transformers attention implementation whose output is the model's own SDPA output; beside it,
the post-RoPE queries of the sampled tiles are scored against the keys. Definitions: pooling as in section 3.3
of the Kascade paper (arXiv 2512.16391), importance as in `residual`.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kascade_cli.capture.mass import pooled_mass, round_mass, top_mass
from kascade_cli.capture.residual import Residual
from kascade_cli.errors import KascadeError
from kascade_cli.models import (
    ModelInfo,
    attention_implementation,
    attention_modules,
    decoder_layers,
    logits_at,
    unwrap,
)
from kascade_cli.partition import Partition, partition_of, sharded

IMPLEMENTATION = "kascade-capture"
_HANDLE = "kascade_probe"  # on the attention modules that are measured
TOP_MASS_KEYS = ["64", "256", "5%", "10%", "20%"]
_RESULT_BYTES = 64 << 20

# (position of the layer, index of the first tile, mass f16 [t, G, n]) -> None
Sink = Callable[[int, int, np.ndarray], None]


def _capture_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    output = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    probe = getattr(module, _HANDLE, None)
    if probe is not None:
        probe.observe(module, query, key, attention_mask, kwargs.get("scaling"))
    return output


AttentionInterface.register(IMPLEMENTATION, _capture_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


@dataclass
class Measurement:
    """What `Probe.run` returns beside the mass: importance f32 [Lp], top_mass f32 [Lp, H, K] (mean over the
    decode rows), and the ids of the generated tokens that were fed back."""

    importance: np.ndarray
    top_mass: np.ndarray
    generated: list[int] = field(default_factory=list)


class Probe:
    """Measures prompts while it is entered; leaving restores the model.

    `info` names the layers to profile; the others pass through. One sequence at a time, no padding.
    """

    def __init__(self, model: nn.Module, info: ModelInfo) -> None:
        self.model, self.info = unwrap(model), info  # hooks and compiled code do not go together
        self._position = {layer: position for position, layer in enumerate(info.profiled_layers)}
        self._exit = contextlib.ExitStack()
        self._partition: Partition | None = None
        self._residuals = [
            Residual(layer, self._measuring, functools.partial(self._keep_importance, position))
            for layer, position in self._position.items()
        ]
        self._sink: Sink | None = None

    def __enter__(self) -> "Probe":
        attention, layers = attention_modules(self.model), decoder_layers(self.model)
        self._partition = self._check_partition(attention)
        with contextlib.ExitStack() as stack:  # a failure on the way undoes what was done so far
            stack.callback(self._forget)
            stack.enter_context(attention_implementation(self.model, IMPLEMENTATION))
            for index, position in self._position.items():
                if hasattr(attention[index], _HANDLE):
                    raise KascadeError("a probe measures this model already; leave it first")
                setattr(attention[index], _HANDLE, self)
                stack.callback(delattr, attention[index], _HANDLE)
                for handle in self._residuals[position].follow(layers[index], attention[index]):
                    stack.callback(handle.remove)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _forget(self) -> None:
        self._sink = None
        for residual in self._residuals:
            residual.forget()

    def _measuring(self) -> bool:
        """Importance is that of the prompt's own tokens."""
        return self._sink is not None and not self._decoding

    def _keep_importance(self, position: int, importance: torch.Tensor) -> None:
        self._importance[position] = importance

    def _check_partition(self, attention: dict[int, nn.Module]) -> Partition | None:
        """How the profiled layers' heads are split over processes. Every process refuses what cannot be gathered."""
        first, *others = (partition_of(attention[index]) for index in self._position)
        if any(other != first for other in others):
            raise KascadeError("the layers' attention heads are split over processes in different ways")
        if first is not None and self.info.kv_heads % first.world:
            raise KascadeError(
                f"{self.info.kv_heads} KV heads cannot be split evenly over {first.world} processes; "
                "take as many processes as divide the KV heads"
            )
        return first

    def _check_heads(self, layer: int, query: torch.Tensor, key: torch.Tensor) -> None:
        world = self._partition.world if self._partition else 1
        expected = (self.info.query_heads // world, self.info.kv_heads // world)
        found = (query.shape[1], key.shape[1])
        if found != expected:
            raise KascadeError(
                f"layer {layer} attends with {found[0]} query and {found[1]} KV heads, "
                f"where {self.info.name} has {expected[0]} and {expected[1]}"
            )

    def _gather(self, local: torch.Tensor, dim: int) -> torch.Tensor:
        """The heads of all processes."""
        return local if self._partition is None else self._partition.gather(local, dim)

    # --- mass ---

    def observe(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None,
    ) -> None:
        """Called by the attention of a profiled layer: query [1, H, T, D], key [1, G, S, D].

        With tensor parallelism these are this process's heads, and the sink of every process gets all of them.
        """
        if self._sink is None:
            return
        self._check_heads(module.layer_idx, query, key)
        position = self._position[module.layer_idx]
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        rows = None if mask is None else mask[0, 0]

        def add_top_mass(probabilities: torch.Tensor, positions: torch.Tensor) -> None:
            mass = top_mass(probabilities, positions, TOP_MASS_KEYS).sum(0)
            self._top_mass[position] = self._top_mass.get(position, 0) + mass

        for length, first, starts in self._batches(key.shape[1] * key.shape[2] * 4, key.shape[2]):
            on_rows = add_top_mass if length == 1 else None
            mass = pooled_mass(query[0], key[0], starts, length, scale=scale, mask=rows, on_rows=on_rows)
            stored = self._gather(round_mass(mass), 1).cpu().numpy()
            if not np.isfinite(stored[..., 0]).all():
                raise self._not_finite(f"the attention of layer {module.layer_idx}")
            self._sink(position, first, stored)

    def _batches(self, tile_bytes: int, slots: int) -> list[tuple[int, int, torch.Tensor]]:
        """(queries per tile, index of the first tile, starts): runs of tiles with the same length.

        A run is short enough for its float32 result, `tile_bytes` a tile, to stay below `_RESULT_BYTES`.
        """
        if self._decoding:
            return [(1, len(self._tiles) + self._generated, torch.tensor([slots - 1]))]
        lengths = self._tiles[:, 1]
        most = max(1, _RESULT_BYTES // tile_bytes)
        batches, low = [], 0
        while low < len(lengths):
            high = low + 1
            while high < min(len(lengths), low + most) and lengths[high] == lengths[low]:
                high += 1
            starts = torch.from_numpy(self._tiles[low:high, 0].astype(np.int64))
            batches.append((int(lengths[low]), low, starts))
            low = high
        return batches

    # --- a prompt ---

    @torch.inference_mode()
    def run(self, tokens: list[int], tiles: np.ndarray, sink: Sink, *, decode_tokens: int = 0) -> Measurement:
        """One forward pass over a prompt, then greedy decoding of up to `decode_tokens` (ends at
        end-of-sequence).

        `tiles` int32 [T, 2] lie inside the prompt; generated token i becomes tile T + i, a decode row. `sink`
        gets the mass of every profiled layer as soon as it is known. Raises KascadeError if anything is not
        finite.
        """
        self._sink, self._tiles = sink, tiles
        self._importance: dict[int, torch.Tensor] = {}
        self._top_mass: dict[int, torch.Tensor] = {}
        self._decoding, self._generated = False, 0
        try:
            generated = self._forward(torch.tensor([tokens], device=self.model.device), decode_tokens)
        finally:
            self._forget()
        layers = range(len(self._position))
        importance = torch.stack([self._importance[layer].cpu() for layer in layers]).numpy()
        rows = int((tiles[:, 1] == 1).sum()) + len(generated)
        top = torch.stack([self._gather(self._top_mass[layer], 0).cpu() for layer in layers]).numpy() / rows
        if not np.isfinite(importance).all():
            layer = self.info.profiled_layers[int(np.flatnonzero(~np.isfinite(importance))[0])]
            raise self._not_finite(f"the attention output of layer {layer}")
        return Measurement(importance, top, generated)

    def _forward(self, ids: torch.Tensor, decode_tokens: int) -> list[int]:
        if not decode_tokens:
            hidden = self.model.base_model(input_ids=ids, use_cache=False)[0]
            self._check_output(hidden)
            return []
        logits, step = logits_at(self.model, ids, use_cache=True)
        stop = self.model.generation_config.eos_token_id
        stop = set(stop) if isinstance(stop, list) else {stop}
        self._decoding = True
        generated: list[int] = []
        while True:
            self._check_output(logits)
            token = int(logits[0, -1].argmax())
            if token in stop:
                return generated
            logits, step = logits_at(
                self.model, ids.new_tensor([[token]]), past_key_values=step.past_key_values, use_cache=True
            )
            generated.append(token)
            self._generated = len(generated)
            if len(generated) == decode_tokens:
                return generated

    def _check_output(self, output: torch.Tensor) -> None:
        if not torch.isfinite(output.sum(dtype=torch.float32)):
            raise self._not_finite("the model's output")

    def _not_finite(self, what: str) -> KascadeError:
        for name, parameter in self.model.named_parameters():
            held = parameter.to_local() if sharded(parameter) else parameter
            if not torch.isfinite(held.sum(dtype=torch.float32)):
                return KascadeError(f"{what} is not a number: weight {name} holds NaN or infinity")
        dtype = str(self.model.dtype).removeprefix("torch.")
        return KascadeError(f"{what} is not a number although the weights are finite; {dtype} overflows? try --dtype")
