"""A run in a process of its own: python -m tests.vllm.processes SPEC.json. What was generated goes to its `out`."""

import json
import sys
from pathlib import Path


def main(path: str) -> None:
    from vllm import LLM, SamplingParams

    from .engine import lengths, options

    spec = json.loads(Path(path).read_text())
    llm = LLM(**options(**spec["options"]))
    asked = spec["prompts"]
    out = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in asked],
        [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in lengths(asked, spec["new"])],
        use_tqdm=False,
    )
    Path(spec["out"]).write_text(json.dumps([list(one.outputs[0].token_ids) for one in out]))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
