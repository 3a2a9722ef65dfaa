"""The tasks in natural language by name; one file each beside this one."""

from kascade_cli.tasks.natural import code_completion, cwe, fwe, niah, qa_multihop, vt
from kascade_cli.tasks.natural.base import NaturalTask

NATURAL: dict[str, NaturalTask] = {
    task.name: task for module in (niah, vt, cwe, fwe, qa_multihop, code_completion) for task in module.TASKS
}

# What `mix` holds, in this order; `prose` and `code` are texts without a question.
MIX = "mix"
MIXED = (
    "niah_multikey_1",
    "qa_multihop",
    "niah_multiquery",
    "code_completion",
    "niah_multikey_1",
    "vt",
    "niah_multivalue",
    "prose",
    "niah_multikey_2",
    "qa_multihop",
    "niah_multikey_1",
    "code",
)
MIX_TASKS = tuple(name for name in dict.fromkeys(MIXED) if name in NATURAL)


def natural_names(name: str) -> tuple[str, ...]:
    """The tasks that `name` stands for: those of the mix, itself, or none."""
    if name == MIX:
        return MIX_TASKS
    return (name,) if name in NATURAL else ()
