"""`model.generate` with decode steps in CUDA graphs: what it prepares and chooses stays transformers' own."""

from typing import Any

import torch
from torch import Tensor, nn

from kascade_cli.errors import KascadeError
from kascade_cli.integrations.transformers.decoding.decoder import decoder_of
from kascade_cli.integrations.transformers.decoding.slots import Slots

# What `generate` may hand on besides its own objects; anything else may change from step to step.
_KNOWN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


class GraphDecode:
    """`model.generate(..., custom_generate=GraphDecode())` on a model that is attached.

    Logits processors, sampling and stopping are those of the call; a streamer is given here, as transformers keeps it
    from custom loops, and is told of a few tokens at a time. The prompt is prefilled as always; the steps run on a
    static cache in CUDA graphs, or in transformers' own loop, with the `reason`. seconds: what recording graphs took.
    compile: compile the decoder layers for the steps, which takes longer at first; `uncompiled` says why they are not.
    """

    def __init__(self, streamer: Any = None, *, compile: bool = False):
        self.streamer, self.compile = streamer, compile
        self.uncompiled: str | None = "not asked for"
        self.reason: str | None = None
        self.seconds = 0.0

    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """What `generate` calls. Raises KascadeError for a model without attachment, and for beam search."""
        streamer = streamer or self.streamer
        decoder = decoder_of(model)
        if decoder is None:
            raise KascadeError("GraphDecode runs what is attached: with attach(model, profile): model.generate(...)")
        if generation_config.num_beams > 1:
            raise KascadeError("GraphDecode does not search with beams: leave num_beams or custom_generate out")
        cache = model_kwargs.get("past_key_values")
        stops = _stops(stopping_criteria)
        self.reason = decoder.refuses(cache) or _why_not(generation_config, stopping_criteria, stops, model_kwargs)
        if self.reason is not None or synced_gpus:
            return model._sample(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        decoder.compile = self.compile
        choose = Choice(input_ids, logits_processor, generation_config.do_sample)
        logits, lengths = _prefill(model, input_ids, model_kwargs)
        first = choose(logits, input_ids[:, :0])

        def seen(tokens: Tensor) -> None:
            for column in tokens.unbind(1):
                streamer.put(column)

        tokens = decoder.run(
            [(layer.keys, layer.values) for layer in cache.layers],
            first,
            stopping_criteria.max_length - input_ids.shape[1],
            lengths=lengths,
            stops=stops,
            choose=None if choose.plain else choose,
            seen=None if streamer is None else seen,
        )
        runner = decoder.runner
        self.reason, self.uncompiled, self.seconds = runner.reason, runner.uncompiled, runner.seconds
        if getattr(cache, "_is_user_defined", False):
            _give_back(cache, decoder.runner.slots, tokens.shape[1] - 1)
        if streamer is not None:
            streamer.end()
        return torch.cat([input_ids, _padded(tokens, stops, generation_config._pad_token_tensor)], 1)


class Choice:
    """The next token, as `generate` chooses it."""

    def __init__(self, prompt: Tensor, processors: Any, sample: bool):
        self.prompt, self.processors, self.sample = prompt, processors, sample

    @property
    def plain(self) -> bool:
        """The likeliest, whatever came before."""
        return not (self.sample or len(self.processors))

    def __call__(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """logits [B, V], tokens so far int64 [B, n] -> int64 [B]."""
        scores = logits.to(torch.float32, copy=True)
        if len(self.processors):
            scores = self.processors(torch.cat([self.prompt, tokens], 1), scores)
        return draw(scores.softmax(-1)) if self.sample else scores.argmax(-1)


def draw(probabilities: Tensor) -> Tensor:
    """One sample a row, [B, V] -> int64 [B]: what torch.multinomial draws, which would wait for the device."""
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


def _stops(criteria: Any) -> set[int]:
    found: set[int] = set()
    for criterion in criteria:
        ends = getattr(criterion, "eos_token_id", None)
        found |= set() if ends is None else set(torch.as_tensor(ends).flatten().tolist())
    return found


def _why_not(config: Any, criteria: Any, stops: set[int], given: dict[str, Any]) -> str | None:
    """What of a call needs transformers' own loop."""
    from transformers import EosTokenCriteria, MaxLengthCriteria

    others = [c for c in criteria if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))]
    if others:
        return f"{type(others[0]).__name__} looks at every step"
    if criteria.max_length is None:
        return "the number of new tokens has no bound"
    if config.return_dict_in_generate:
        return "return_dict_in_generate asks for what each step leaves"
    if getattr(config, "prefill_chunk_size", None) is not None:
        return "the prompt is prefilled in chunks"
    if not given.get("use_cache", True) or given.get("past_key_values") is None:
        return "it runs without a cache"
    more = sorted(name for name, value in given.items() if name not in _KNOWN and value is not None)
    if more:
        return f"{more[0]} is given"
    mask = given.get("attention_mask")
    return "rows are padded on the right" if mask is not None and not bool(mask[:, -1].all()) else None


def _prefill(model: nn.Module, ids: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Logits [B, V] behind the prompt, and how many tokens each row holds, int64 [B] (None: all slots)."""
    cache, mask, positions = (given.get(name) for name in ("past_key_values", "attention_mask", "position_ids"))
    new = ids[:, cache.get_seq_length() :]
    options = {} if positions is None else {"position_ids": positions[:, -new.shape[1] :]}
    if "logits_to_keep" in given:
        options["logits_to_keep"] = 1
    logits = model(input_ids=new, past_key_values=cache, attention_mask=mask, use_cache=True, **options).logits
    return logits[:, -1], None if mask is None else mask.sum(-1)


def _give_back(cache: Any, slots: Slots, count: int) -> None:
    """Appends what the last `count` steps wrote to the cache that the caller brought."""
    written = slice(slots.first, slots.first + count)
    for layer, mine in zip(cache.layers, slots.cache.layers, strict=True):
        layer.keys = torch.cat([layer.keys, mine.keys[:, :, written]], 2)
        layer.values = torch.cat([layer.values, mine.values[:, :, written]], 2)


def _padded(tokens: Tensor, stops: set[int], pad: Tensor | None) -> Tensor:
    """Rows that ended before others go on with padding."""
    if not stops or pad is None:
        return tokens
    ended = torch.isin(tokens, torch.tensor(sorted(stops), device=tokens.device))
    behind = ended.int().cumsum(1) - ended.int() > 0
    return torch.where(behind, pad.to(tokens), tokens)
