"""`model.generate` with decode steps in CUDA graphs: what it prepares and chooses stays transformers' own."""

from typing import Any

import torch
from torch import Tensor, nn

from kascade_cli.errors import KascadeError
from kascade_cli.integrations.transformers.decoding.decoder import LEAST, Decoder, decoder_of
from kascade_cli.integrations.transformers.decoding.loop import decode
from kascade_cli.integrations.transformers.decoding.slots import Slots

# What `generate` may hand on besides its own objects; anything else may change from step to step.
_KNOWN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


class GraphDecode:
    """`model.generate(..., custom_generate=GraphDecode())` on a model that is attached.

    Logits processors, sampling and stopping are those of the call; a streamer is given here, as transformers keeps it
    from custom loops, and is told of a few tokens at a time. The prompt is prefilled as always; the steps run on a
    static cache in CUDA graphs, or in transformers' own loop, with the `reason`. seconds: what recording graphs took.
    compile: compile the decoder layers for the steps, which takes longer at first; `uncompiled` says why they are not,
    `apart` why each is compiled by itself.
    """

    def __init__(self, streamer: Any = None, *, compile: bool = False):
        self.streamer, self.compile = streamer, compile
        self.uncompiled: str | None = "not asked for"
        self.apart: str | None = None
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
        call = (input_ids, logits_processor, stopping_criteria, generation_config)
        self.reason = decoder.refuses(model_kwargs.get("past_key_values"))
        self.reason = self.reason or _why_not(
            generation_config, stopping_criteria, synced_gpus, model_kwargs, input_ids
        )
        if self.reason is None:
            out = self._decode(model, decoder, streamer, *call, model_kwargs)
            if out is not None:
                return out
            streamer = streamer and _WithoutFirst(streamer)
        self.uncompiled, self.apart = self.reason if self.compile else "not asked for", None
        names = ("input_ids", "logits_processor", "stopping_criteria", "generation_config")
        return model._sample(
            **dict(zip(names, call, strict=True)), synced_gpus=synced_gpus, streamer=streamer, **model_kwargs
        )

    def _decode(
        self,
        model: nn.Module,
        decoder: Decoder,
        streamer: Any,
        prompt: Tensor,
        processors: Any,
        criteria: Any,
        config: Any,
        given: dict[str, Any],
    ) -> Tensor | None:
        """Prompt and new tokens, int64 [B, n]. None where the steps cannot be captured: the first token has been told,
        and nothing else is changed."""
        decoder.compile = self.compile
        cache, tally = given["past_key_values"], decoder.attachment.tally
        before, counted, drawn = cache.get_seq_length(), tally.mark(), _random_state(prompt.device)
        choose, stops = Choice(prompt, processors, config.do_sample), _stops(criteria)
        logits, lengths = _prefill(model, prompt, given)
        first = choose(logits, prompt[:, :0])
        if streamer is not None:
            streamer.put(first.cpu())
        steps = criteria.max_length - prompt.shape[1]
        runner = decoder.ready([(layer.keys, layer.values) for layer in cache.layers], first, steps, lengths)
        if runner is None:
            self.reason = decoder.reason
            cache.crop(before - prompt.shape[1])
            tally.back_to(counted)
            _set_random_state(prompt.device, drawn)
            return None
        kept = before > 0 or _of_the_caller(cache)
        if not kept:  # what has been copied need not stay
            for layer in cache.layers:
                layer.keys = layer.values = None
        told = _WithoutFirst(streamer)

        def seen(tokens: Tensor) -> None:
            for column in tokens.unbind(1):
                told.put(column)

        tokens = decode(
            runner,
            steps,
            stops=stops,
            choose=None if choose.plain else choose,
            seen=None if streamer is None else seen,
        )
        self.reason, self.uncompiled, self.seconds = runner.reason, runner.uncompiled, runner.seconds
        self.apart = runner.apart if runner.compiled else None
        if kept:
            _give_back(cache, runner.slots, tokens.shape[1] - 1)
        if streamer is not None:
            streamer.end()
        return torch.cat([prompt, _padded(tokens, stops, config._pad_token_tensor)], 1)


class _WithoutFirst:
    """A streamer that has been told of the first token already."""

    def __init__(self, streamer: Any):
        self.streamer, self.told = streamer, False

    def put(self, tokens: Tensor) -> None:
        if self.told:
            self.streamer.put(tokens)
        self.told = True

    def end(self) -> None:
        self.streamer.end()


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


def _why_not(config: Any, criteria: Any, synced: bool, given: dict[str, Any], prompt: Tensor) -> str | None:
    """What of a call needs transformers' own loop."""
    from transformers import EosTokenCriteria, MaxLengthCriteria

    others = [c for c in criteria if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))]
    if others:
        return f"{type(others[0]).__name__} looks at every step"
    if criteria.max_length is None:
        return "the number of new tokens has no bound"
    if synced:
        return "synced_gpus keeps processes in step"
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
    if mask is not None and not bool(mask[:, -1].all()):
        return "rows are padded on the right"
    steps = criteria.max_length - prompt.shape[1]
    return None if steps >= LEAST else f"{LEAST} new tokens or more pay for recording graphs"


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)


def _prefill(model: nn.Module, ids: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Logits [B, V] behind the prompt, and how many tokens each row holds, int64 [B] (None: all slots)."""
    cache, mask, positions = (given.get(name) for name in ("past_key_values", "attention_mask", "position_ids"))
    new = ids[:, cache.get_seq_length() :]
    options = {} if positions is None else {"position_ids": positions[:, -new.shape[1] :]}
    if "logits_to_keep" in given:
        options["logits_to_keep"] = 1
    logits = model(input_ids=new, past_key_values=cache, attention_mask=mask, use_cache=True, **options).logits
    return logits[:, -1], None if mask is None else mask.sum(-1)


def _of_the_caller(cache: Any) -> bool:
    """Whether the call brought its cache; True where this transformers does not tell."""
    from transformers import GenerationMixin

    tells = "_is_user_defined" in GenerationMixin._prepare_cache_for_generation.__code__.co_names
    return not tells or getattr(cache, "_is_user_defined", False)


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
