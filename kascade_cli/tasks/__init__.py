"""Built-in long-context tasks as plain text: generate, encode, score. numpy only, no torch.

prompts = make_prompts("hops", length=1024, count=8, questions_per_task=8, seed=0)
encoded = encode_prompt(prompts[0], tokenizer)
"""

from kascade_cli.tasks import natural
from kascade_cli.tasks.encoding import EncodedPrompt, check_words, encode_prompt
from kascade_cli.tasks.haystack import LAYOUTS
from kascade_cli.tasks.questions import (
    SPLITS,
    TASKS,
    Prompt,
    Question,
    Task,
    get_task,
    make_prompt,
    make_prompts,
    member_tasks,
    prompt_rng,
)
from kascade_cli.tasks.scoring import Interval, cluster_interval, exact_match, paired_interval

__all__ = [
    "LAYOUTS",
    "SPLITS",
    "TASKS",
    "EncodedPrompt",
    "Interval",
    "Prompt",
    "Question",
    "Task",
    "check_words",
    "cluster_interval",
    "encode_prompt",
    "exact_match",
    "get_task",
    "make_prompt",
    "make_prompts",
    "member_tasks",
    "natural",
    "paired_interval",
    "prompt_rng",
]
