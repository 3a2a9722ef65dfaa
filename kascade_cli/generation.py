"""Generate from one prompt under a strategy, and measure how far it is from another (docs/generate.md)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TextStreamer

from kascade_cli.errors import KascadeError
from kascade_cli.evaluation.behind import logits_behind
from kascade_cli.evaluation.kl import kl_divergence, log_probabilities
from kascade_cli.integrations.transformers import attach_setting
from kascade_cli.integrations.transformers.decoding import GraphDecode
from kascade_cli.models import ModelInfo
from kascade_cli.sparse import Setting


def check_room(info: ModelInfo, prompt_tokens: int, new_tokens: int) -> None:
    """Raises KascadeError if the prompt and its continuation do not fit into the model's positions."""
    limit = info.max_positions
    if limit is None or prompt_tokens + new_tokens <= limit:
        return
    if prompt_tokens >= limit:
        raise KascadeError(
            f"the prompt has {prompt_tokens} tokens, and {info.name} takes {limit} positions: shorten it"
        )
    raise KascadeError(
        f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones need more than the {limit} positions of "
        f"{info.name}: use --max-new-tokens {limit - prompt_tokens} or less"
    )


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily at temperature 0, else from the softmax at that temperature."""

    temperature: float = 0.0
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """Arguments of `model.generate`; the checkpoint's own sampling settings are switched off."""
        if not self.temperature:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": 1.0, "top_k": 0}


@dataclass(frozen=True)
class Generated:
    """One generation. first_token_s: time to the first token; tokens_per_s: over the tokens after it, or None.

    report: what really ran (Attachment.report()). eager: why the steps did not run in CUDA graphs, None where they
    did; graphs_s: what recording those took, which tokens_per_s leaves out. uncompiled: why the layers in them are not
    compiled; apart: why they are, but each by itself.
    """

    tokens: list[int]
    text: str
    first_token_s: float
    tokens_per_s: float | None
    report: dict[str, Any]
    eager: str | None = None
    graphs_s: float = 0.0
    uncompiled: str | None = None
    apart: str | None = None


class _Streamer(TextStreamer):
    """Notes when each token comes; hands finished words to `write` if there is one."""

    def __init__(self, tokenizer: Any, device: torch.device, write: Callable[[str], None] | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.device, self.write = device, write
        self.began = time.perf_counter()
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.times.append(time.perf_counter() - self.began)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.write and text:
            self.write(text)


def generate(
    model: nn.Module,
    tokenizer: Any,
    ids: Sequence[int],
    setting: Setting,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    write: Callable[[str], None] | None = None,
    compile: bool = False,
) -> Generated:
    """Continues `ids` under `setting`. `write` gets the text word by word as it comes.

    What `model.generate` does, with the steps in CUDA graphs where that works; compile: with compiled decoder layers.
    """
    sampling = sampling or Sampling()
    prompt = torch.tensor([list(ids)], device=model.device)
    torch.manual_seed(sampling.seed)
    with attach_setting(model, setting) as attachment:
        streamer = _Streamer(tokenizer, model.device, write)
        loop = GraphDecode(streamer, compile=compile)
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            custom_generate=loop,
            pad_token_id=_pad_token(model, tokenizer),
            **sampling.options(),
        )
        report = attachment.report()
    tokens = out[0, len(ids) :].tolist()
    times = streamer.times
    spent = times[-1] - times[0] - loop.seconds
    rate = (len(times) - 1) / spent if len(times) > 1 and spent > 0 else None
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Generated(tokens, text, times[0], rate, report, loop.reason, loop.seconds, loop.uncompiled, loop.apart)


def _pad_token(model: nn.Module, tokenizer: Any) -> int:
    """Any valid id does: one row is never padded. Given so that `generate` does not warn."""
    generation = model.generation_config
    ends = generation.eos_token_id
    first_end = ends[0] if isinstance(ends, list) else ends
    candidates = (generation.pad_token_id, tokenizer.pad_token_id, first_end, 0)
    return next(token for token in candidates if token is not None)


@torch.no_grad()
def forced_log_probabilities(
    model: nn.Module, ids: Sequence[int], continuation: Sequence[int], setting: Setting
) -> Tensor:
    """log P(next token) along `continuation`, in nats: float32 [len(continuation), V] on the CPU.

    The prompt is one prefill and every token of the continuation one decode step, as in generation; row i is the
    distribution that token i was drawn from.
    """
    rows = []
    with attach_setting(model, setting):
        cache, seen = None, 0  # the model's own kind
        chunk = torch.tensor([list(ids)], device=model.device)
        for token in continuation:
            logits, output = logits_behind(model, chunk, cache, seen)
            cache, seen = output.past_key_values, seen + chunk.shape[1]
            rows.append(log_probabilities(logits[0, -1]).cpu())
            chunk = torch.tensor([[token]], device=model.device)
    return torch.stack(rows)


def agreement(reference: Sequence[int], other: Sequence[int]) -> tuple[float, int | None]:
    """(share of positions with equal tokens, first position that differs or None).

    Positions run to the longer one's end: a token without a partner differs.
    """
    longest = max(len(reference), len(other))
    same = [i < len(reference) and i < len(other) and reference[i] == other[i] for i in range(longest)]
    return sum(same) / longest, next((i for i, equal in enumerate(same) if not equal), None)


@dataclass(frozen=True)
class Comparison:
    """How `other` differs from `reference` on one prompt. KL(reference || other) in nats, teacher forced on the
    reference's continuation."""

    reference: Generated
    other: Generated
    agreement: float
    first_divergence: int | None
    kl_mean: float
    kl_max: float


def compare(
    model: nn.Module, ids: Sequence[int], reference: tuple[Setting, Generated], other: tuple[Setting, Generated]
) -> Comparison:
    """Compares two generations from the prompt `ids`, each with the setting it ran under."""
    (first, expected), (second, got) = reference, other
    log_p = forced_log_probabilities(model, ids, expected.tokens, first)
    log_q = forced_log_probabilities(model, ids, expected.tokens, second)
    divergence = kl_divergence(log_p, log_q)
    share, where = agreement(expected.tokens, got.tokens)
    return Comparison(expected, got, share, where, float(divergence.mean()), float(divergence.max()))
