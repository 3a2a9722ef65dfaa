"""lm-evaluation-harness with one more model, `kascade`: a transformers model whose attention runs a strategy.

Importing it registers the model (lm_eval, extra `eval`, must be installed):

    --model kascade --model_args pretrained=MODEL,profile=FILE,strategy=NAME,ratio=0.1
"""

import contextlib
import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from kascade_cli import provenance
from kascade_cli.errors import UsageError
from kascade_cli.integrations.transformers import attach_setting
from kascade_cli.models import load_model, logits_at
from kascade_cli.schema import Profile
from kascade_cli.sparse import Setting

# What HFLM takes that has nothing to do with loading.
_PASSED = {
    "add_bos_token", "chat_template_args", "enable_thinking", "logits_cache", "max_batch_size", "max_length",
    "mixed_precision_dtype", "prefix_token_id", "softmax_dtype", "think_end_token", "truncation",
}  # fmt: skip
_INSTEAD = {
    "parallelize": "use device_map=auto",
    "gguf_file": "name the file itself as pretrained",
    "min-keys": "write min_keys",
}

Request = tuple[Any, list[int], list[int]]  # lm_eval's: (what the caches call it, context, continuation)


@register_model("kascade")
class KascadeLM(HFLM):
    """`pretrained` is what MODEL is everywhere in kascade; `strategy` may bring options (`streaming-llm:ratio=0.3`).

    What really ran (`Attachment.report()`) stands in the results under config.kascade.
    """

    def __init__(
        self,
        pretrained: str = "",
        *,
        profile: str | None = None,
        strategy: str = "kascade",
        ratio: float | None = None,
        min_keys: int | None = None,
        tile: int | None = None,
        backend: str = "auto",
        allow_other_weights: bool = False,
        dtype: str = "auto",
        device: str | None = None,
        device_map: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        tokenizer: str | None = None,
        batch_size: int | str = 1,
        **options: Any,
    ) -> None:
        _check_options(options, batch_size)
        self.setting = Setting.parse(
            strategy,
            profile=None if profile is None else Profile.load(profile),
            backend=backend,
            allow_other_weights=allow_other_weights,
        ).override(ratio=ratio, min_keys=min_keys, tile=tile)
        self.setting.check()
        self.profile_name, self.strategy = profile, strategy
        model, own = load_model(
            str(pretrained),
            dtype=str(dtype),
            device=device or "auto",
            device_map=device_map,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        with _without_warnings():
            super().__init__(
                pretrained=model,
                backend="causal",
                tokenizer=tokenizer or own,
                revision=revision or "main",
                trust_remote_code=trust_remote_code,
                batch_size=batch_size,
                **options,
            )
        self.pretrained = provenance.portable_name(str(pretrained))
        self.attachment = attach_setting(model, self.setting)

    def get_model_info(self) -> dict[str, Any]:
        info = self.attachment.info
        return {
            **super().get_model_info(),
            "kascade": {
                "tool": provenance.tool(),
                "model": self.pretrained,
                "fingerprint": info.fingerprint,
                "profile": None if self.profile_name is None else provenance.portable_name(str(self.profile_name)),
                "setting": self.strategy,
                **_finite(self.attachment.report()),
            },
        }

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of each continuation after its context.

        HFLM pads on the right without a mask, which sparse attention would read as text (tiles pool over it). Here
        rows are masked, equal inputs (the choices of a question) run once, and logits exist where they are asked
        for only.
        """
        inputs: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            inputs[tuple((context + continuation)[-(self.max_length + 1) :][:-1])].append(index)
        order = sorted(inputs, key=lambda ids: (-len(ids), ids))
        rows = override_bs or self.batch_size
        found: list[tuple[float, bool] | None] = [None] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or None, desc="Running loglikelihood requests") as bar:
            for start in range(0, len(order), rows):
                batch = order[start : start + rows]
                wanted = [max(len(requests[index][2]) for index in inputs[ids]) for ids in batch]
                for ids, logits in zip(batch, self._logits(batch, wanted), strict=True):
                    for index in inputs[ids]:
                        name, _, continuation = requests[index]
                        found[index] = _score(logits[len(logits) - len(continuation) :], continuation)
                        if name is not None:
                            self.cache_hook.add_partial("loglikelihood", name, found[index])
                        bar.update()
        return found

    def _logits(self, batch: list[tuple[int, ...]], wanted: list[int]) -> Iterable[Tensor]:
        """Log-probabilities [n, vocabulary] at the last n = wanted[i] positions of each row, padded and masked."""
        width = max(map(len, batch))
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        needed = {
            position
            for tokens, count in zip(batch, wanted, strict=True)
            for position in range(len(tokens) - count, len(tokens))
        }
        at = sorted(needed)
        options = {} if bool(mask.all()) else {"attention_mask": mask.to(self.device)}
        autocast = torch.autocast(
            self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        )
        with torch.no_grad(), autocast:
            logits, _ = logits_at(self.model, ids.to(self.device), at, use_cache=False, **options)
        logits = F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
        for row, (tokens, count) in enumerate(zip(batch, wanted, strict=True)):
            first = at.index(len(tokens) - count)
            yield logits[row, first : first + count]


def _score(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    tokens = torch.tensor(continuation, device=logits.device)
    return float(logits.gather(1, tokens[:, None]).sum()), bool((logits.argmax(-1) == tokens).all())


def _check_options(options: dict[str, Any], batch_size: int | str) -> None:
    """Raises UsageError for what a kascade model does not take."""
    for name in options:
        if name not in _PASSED:
            advice = _INSTEAD.get(name, "see docs/lm-eval.md for what it takes")
            raise UsageError(f"--model_args {name}: the model kascade does not take it; {advice}")
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise UsageError(
            f"--batch_size {batch_size}: give a number; trying sizes out would be counted as reading keys"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("the model kascade runs in one process: start it without torchrun or accelerate launch")


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """HFLM warns of a model that is loaded already: its arguments would be ignored. They are not."""
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _finite(report: Any) -> Any:
    """Without NaN (a density before anything ran), which JSON lacks."""
    if isinstance(report, dict):
        return {name: _finite(value) for name, value in report.items()}
    return None if isinstance(report, float) and not math.isfinite(report) else report
