"""vLLM in this process with the plugin, and what transformers with `attach` says of the same tokens."""

import contextlib
import gc
import json
import os
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kascade_cli import Profile, attach
from kascade_cli.evaluation.cases import built_in_cases
from kascade_cli.integrations.transformers.attach import Attachment
from kascade_cli.integrations.vllm.rows import DecodeRows
from kascade_cli.models import load_model
from kascade_cli.tasks import get_task, member_tasks

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "kascade_cli" / "demo" / "model-16l"
PROFILE = ROOT / "profiles" / "demo.yaml"
SHORTEST = 240  # tokens of a text that carries every kind of question; shorter prompts are the end of one


@dataclass(frozen=True)
class Segment:
    """`count` tokens of one request from token `begin` on, in one step."""

    phase: str
    begin: int
    count: int


@dataclass
class Run:
    """tokens: what each prompt got. segments: of each prompt, how its tokens were processed. report: the plugin's."""

    tokens: list[list[int]]
    segments: list[list[Segment]]
    report: dict[str, Any]
    cached: int = 0
    preempted: int = field(default=0)


@contextlib.contextmanager
def environment(**values: str | None):
    """Environment variables, as they were afterwards."""
    before = {name: os.environ.get(name) for name in values}
    for name, value in values.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def kascade(profile: Path | str | None = PROFILE, **options: Any):
    """The plugin's two variables."""
    return environment(
        KASCADE_PROFILE=None if profile is None else str(profile),
        KASCADE_VLLM=json.dumps(options) if options else None,
    )


def options(**more: Any) -> dict[str, Any]:
    """What every engine of these tests is made with."""
    made = {
        "model": str(MODEL), "dtype": "float32", "enforce_eager": True, "max_model_len": 2048,
        "enable_prefix_caching": False, "disable_log_stats": True, "attention_config": {"backend": "CUSTOM"},
    } | more  # fmt: skip
    return {name: value for name, value in made.items() if value is not None}


@contextlib.contextmanager
def engine(**more: Any):
    """A vLLM engine in this process. Use it inside of `kascade`."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(**options(**more))
    try:
        yield llm
    finally:
        with contextlib.suppress(Exception):
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


@contextlib.contextmanager
def recorded(llm: Any):
    """Request id -> its segments, as the plugin's builder sees them."""
    from kascade_cli.integrations.vllm import backend

    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    seen: dict[str, list[Segment]] = defaultdict(list)
    original = backend.read_step

    def read_step(common: Any, *rest: Any) -> Any:
        step = original(common, *rest)
        starts, ends = common.query_start_loc_cpu.tolist(), common.seq_lens.tolist()
        decoding = set()
        for part in step.parts:
            if isinstance(part, DecodeRows):
                tokens = range(common.num_actual_tokens)
                decoding = set(tokens[part.tokens] if isinstance(part.tokens, slice) else part.tokens.tolist())
        for row, name in enumerate(runner.input_batch.req_ids):
            count = starts[row + 1] - starts[row]
            phase = "decode" if starts[row] in decoding else "prefill"
            seen[name].append(Segment(phase, ends[row] - count, count))
        return step

    backend.read_step = read_step
    try:
        yield seen
    finally:
        backend.read_step = original


def lengths(prompts: list[list[int]], least: int = 6) -> list[int]:
    """How many tokens each prompt is given: of many lengths, so that requests end, and others begin, at any step."""
    return [least + 3 * place % 7 for place in range(len(prompts))]


def generate(
    prompts: list[list[int]], new: int = 6, strategy: str = "kascade", profile: Any = PROFILE, **more: Any
) -> Run:
    """All prompts at once through a new engine, `new` tokens or some more each."""
    from vllm import SamplingParams

    from kascade_cli.integrations.vllm import served

    with kascade(profile, strategy=strategy), engine(**more) as llm, recorded(llm) as seen:
        out = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in lengths(prompts, new)],
            use_tqdm=False,
        )
        report = served._current[1].reporter.report()
    order = sorted(seen, key=lambda name: int(name.split("-")[0]))
    segments = [seen[name] for name in order]
    tokens = [list(one.outputs[0].token_ids) for one in out]
    return Run(tokens, segments, report, sum(one.num_cached_tokens or 0 for one in out), _restarts(segments))


def _restarts(segments: list[list[Segment]]) -> int:
    return sum(after.begin < before.begin for each in segments for before, after in zip(each, each[1:], strict=False))


def prompts(lengths: list[int], questions: int = 1, seed: int = 0) -> list[list[int]]:
    """Questions of the built-in tasks about texts of about these lengths; several about one text share its prefix."""
    tokenizer = reference_model()[1]
    kinds = list(member_tasks("hops"))
    found = []
    for place, length in enumerate(lengths):
        layout = get_task("hops").layout
        cases = built_in_cases(
            kinds, layout, tokenizer, length=max(length, SHORTEST), num_prompts=1, questions=4, seed=seed + place
        )
        cut = max(0, SHORTEST - length)
        found += [[*cases[0].context[cut:], *question.ids] for question in cases[0].questions[:questions]]
    return found


_loaded: dict[str, Any] = {}


def reference_model(dtype: str = "float32") -> tuple[Any, Any]:
    if dtype not in _loaded:
        _loaded[dtype] = load_model("demo", dtype=dtype, device="cpu")
    return _loaded[dtype]


@contextlib.contextmanager
def attached(strategy: str, profile: Any = PROFILE, dtype: str = "float32"):
    """The demo model under a strategy, its phase as `phase.value` says where that is not None."""
    model, _ = reference_model(dtype)
    original = Attachment._batch
    phase = type("Phase", (), {"value": None})()

    def batch(self: Attachment, *args: Any) -> Any:
        made = original(self, *args)
        return made if phase.value is None else replace(made, phase=phase.value)

    read = profile if profile is None or isinstance(profile, Profile) else Profile.load(profile)
    Attachment._batch = batch
    try:
        with torch.inference_mode(), attach(model, read, strategy=strategy, backend="torch") as run:
            yield model, phase, run
    finally:
        Attachment._batch = original


def whole(prompt: list[int], new: int) -> list[Segment]:
    """A prompt in one piece, then one token after the other."""
    return [Segment("prefill", 0, len(prompt)), *(Segment("decode", len(prompt) + i, 1) for i in range(new - 1))]


def replay(
    prompt: list[int], got: list[int], segments: list[Segment], strategy: str, profile: Any = PROFILE, **more: Any
) -> tuple[list[int], dict[str, Any]]:
    """What transformers would have written after each segment that ends where the known tokens end, and its report.

    got: what vLLM wrote; it is what the next segments read, so that one difference does not become many.
    """
    from transformers import DynamicCache

    tokens, wrote, known = prompt + got, [], len(prompt)
    with attached(strategy, profile, **more) as (model, phase, run):
        cache = None
        for segment in segments:
            if segment.begin == 0:  # once more after a preemption
                cache = DynamicCache(config=model.config)
            assert segment.begin == cache.get_seq_length(), "this segment reads keys that nobody wrote"
            for begin, end in _forwards(segment):
                phase.value = segment.phase
                ids = torch.tensor([tokens[begin:end]])
                logits = model(ids, past_key_values=cache, use_cache=True).logits[0, -1]
                if end == known:
                    wrote.append(int(logits.argmax()))
                    known += 1
        report = run.report()
    return wrote, report


def _forwards(segment: Segment) -> list[tuple[int, int]]:
    end = segment.begin + segment.count
    if segment.phase == "prefill":
        return [(segment.begin, end)]
    return [(at, at + 1) for at in range(segment.begin, end)]
