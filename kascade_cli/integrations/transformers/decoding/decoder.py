"""Goes on from a prefilled cache in CUDA graphs, for whatever runs attached; keeps its graphs from call to call."""

import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kascade_cli.integrations.transformers.attach import Attachment, attachment_of
from kascade_cli.integrations.transformers.decoding.loop import decode
from kascade_cli.integrations.transformers.decoding.reasons import why_not, why_not_cache, why_not_here
from kascade_cli.integrations.transformers.decoding.runner import Runner
from kascade_cli.integrations.transformers.decoding.slots import Slots, bucket

log = logging.getLogger("kascade")

# The static loop also where nothing can be captured: for tests, as it is no faster there.
EVERYWHERE = False

LEAST = 4  # steps that pay for recording graphs


class Decoder:
    """Of one thread of an attachment. reason: why steps run eagerly, None as long as they do not.

    compile: compile the decoder layers too (Runner). One runner is kept: graphs are recorded again only for another
    number of rows or another bucket of slots.
    """

    def __init__(self, attachment: Attachment):
        self.attachment = attachment
        self.runner: Runner | None = None
        self.compile = False
        device = next(attachment.model.parameters()).device
        self._here = why_not_here(device)
        self.reason = None if EVERYWHERE else self._here
        if self.reason is None:
            self.reason = why_not(attachment.model, attachment)
            if self.reason is not None:
                self._warn()

    def refuses(self, cache: Any = None) -> str | None:
        """Why the steps behind `cache` (None: of the model's own kind) run eagerly; None if they need not."""
        if self.reason is None and cache is not None:
            return why_not_cache(cache)
        return self.reason

    def ready(
        self, layers: Sequence[tuple[Tensor, Tensor]], token: Tensor, steps: int, lengths: Tensor | None = None
    ) -> Runner | None:
        """A runner loaded and prepared to go on behind a prefilled cache for `steps` steps, for `loop.decode`.

        layers: keys and values [B, G, width, D], whose rows end at the last slot and hold `lengths` tokens, int [B]
        (None: all slots); they are left as they are. token: int64 [B], the one after them. None where the steps cannot
        be captured: `reason` says why.
        """
        try:
            runner = self._runner(layers, len(token), layers[0][0].shape[2] + steps + 1)
            runner.load(layers, token, lengths)
            runner.prepare()
            reason = runner.reason
        except torch.OutOfMemoryError:
            reason = "a static cache does not fit into memory beside the prompt's"
        if reason is None or not self._captures():
            return self.runner
        self.runner, self.reason = None, reason
        self._warn()
        return None

    def _runner(self, layers: Sequence[tuple[Tensor, Tensor]], rows: int, slots: int) -> Runner:
        slots = bucket(slots)
        kept = self.runner
        if kept is None or kept.compile != self.compile or not kept.slots.fits(layers, rows, slots):
            self.runner = kept = None  # its cache makes room for the next one
            made = Slots(layers, rows, slots)
            capture = self._here is None
            self.runner = Runner(self.attachment.model, made, self.attachment, capture=capture, compile=self.compile)
        return self.runner

    def _captures(self) -> bool:
        """Whether graphs are what this is for; else the static loop is wanted without (EVERYWHERE)."""
        return self._here is None

    def _warn(self) -> None:
        if self._here is None:
            log.warning("decode steps run without CUDA graphs: %s", self.reason)


def decoder_of(model: nn.Module) -> Decoder | None:
    """The decoder of what is attached to `model`, for this thread; None where nothing is attached."""
    attachment = attachment_of(model)
    if attachment is None:
        return None
    if attachment.decoder is None:
        attachment.decoder = Decoder(attachment)
    return attachment.decoder


@torch.no_grad()
def decode_behind(
    model: nn.Module,
    cache: Any,
    token: Tensor,
    steps: int,
    *,
    lengths: Tensor | None = None,
    stops: Collection[int] = (),
) -> Tensor | None:
    """Greedy: `token` int64 [B] and up to `steps - 1` after it, int64 [B, n]; None where the caller must decode.

    cache: prefilled; its rows end at its last slot and hold `lengths` tokens each, int [B] (None: all slots).
    """
    decoder = decoder_of(model)
    if decoder is None or steps < LEAST or decoder.refuses(cache) is not None:
        return None
    runner = decoder.ready([(layer.keys, layer.values) for layer in cache.layers], token, steps, lengths)
    return None if runner is None else decode(runner, steps, stops=stops)
