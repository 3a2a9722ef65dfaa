"""However vLLM cuts and orders the work: chunks inside of tiles, cached prefixes, preemption, aborts, drafts."""

import pytest

from .engine import engine, generate, kascade, prompts, replay, whole

ASKED = [130, 300, 420, 512]


def same_as_transformers(asked, run, strategy="kascade", profile=None):
    """Every token is what transformers writes, given the same segments; and as many keys were read."""
    more = {} if profile is None else {"profile": profile}
    read = visible = 0
    for prompt, got, segments in zip(asked, run.tokens, run.segments, strict=True):
        wrote, report = replay(prompt, got, segments, strategy, **more)
        assert got == wrote
        read, visible = read + report["keys_read"], visible + report["keys_visible"]
    assert (run.report["keys_read"], run.report["keys_visible"]) == (read, visible)


@pytest.mark.parametrize("budget", [96, 300, 512])
def test_chunks(budget):
    """Chunks begin anywhere within a tile; a last chunk of one token is prefill all the same."""
    asked = prompts(ASKED)
    asked.append(asked[-1][: 2 * budget + 1])
    run = generate(asked, max_num_batched_tokens=budget, max_num_seqs=4)
    steps = run.report["steps"]
    assert steps["mixed_steps"] > 2
    assert steps["chunks_inside_a_tile"] > 2
    same_as_transformers(asked, run)


def test_a_last_chunk_of_one_token_is_prefill():
    asked = [prompts([300])[0][:257]]
    run = generate(asked, max_num_batched_tokens=128, max_num_seqs=1)
    assert [(one.phase, one.count) for one in run.segments[0][:4]] == [
        ("prefill", 128), ("prefill", 128), ("prefill", 1), ("decode", 1),
    ]  # fmt: skip
    same_as_transformers(asked, run)


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_prefixes_from_the_cache(block_size):
    """Blocks are whole tiles, so that a cached prefix holds what the request would have written itself."""
    asked = prompts(ASKED[1:], questions=2)
    run = generate(asked, enable_prefix_caching=True, block_size=block_size, max_num_seqs=3)
    assert run.cached > 1000
    for prompt, got in zip(asked, run.tokens, strict=True):
        assert got == replay(prompt, got, whole(prompt, len(got)), "kascade")[0]


@pytest.mark.parametrize("strategy", ["kascade", "dense"])
def test_preemption(strategy):
    """A cache of 1,024 tokens for requests of 600 and more: some lose their blocks and are computed anew."""
    asked = prompts([300, 301, 302, 303, 304])
    run = generate(
        asked, new=30, strategy=strategy, num_gpu_blocks_override=21, block_size=64, max_model_len=1024,
        max_num_seqs=6, max_num_batched_tokens=1024,
    )  # fmt: skip
    assert run.preempted > 0
    same_as_transformers(asked, run, strategy)


def test_arrivals_at_any_time_and_aborts():
    from vllm import SamplingParams

    asked = prompts([130, 300, 420, 512], questions=2)
    gone, got = {2, 5}, {}
    with kascade(strategy="kascade"), engine(max_num_seqs=4, max_num_batched_tokens=256) as llm:
        running, waiting, step = llm.llm_engine, list(enumerate(asked)), 0
        while waiting or running.has_unfinished_requests():
            if waiting and step % 3 == 0:
                number, prompt = waiting.pop(0)
                parameters = SamplingParams(temperature=0, max_tokens=8 + number % 5, ignore_eos=True)
                running.add_request(str(number), {"prompt_token_ids": prompt}, parameters)
            if step in (9, 19):
                running.abort_request([str(2 if step == 9 else 5)])
            for out in running.step():
                if out.finished:
                    got[int(out.request_id.split("-")[0])] = list(out.outputs[0].token_ids)
            step += 1
    for number, prompt in enumerate(asked):
        if number in gone:
            continue
        # Chunks of 256 tokens begin at a tile's edge where a request has the step to itself, not where it shares it:
        # the end is compared with one piece, which differs by a tile's worth of keys at most.
        wrote, _ = replay(prompt, got[number], whole(prompt, len(got[number])), "kascade")
        assert len(got[number]) == 8 + number % 5
        assert got[number][0] == wrote[0]
