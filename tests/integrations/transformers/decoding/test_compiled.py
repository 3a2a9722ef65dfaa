"""Compiled decoder layers: the same logits, one layer's code for all of them, nothing left behind."""

import pytest
import torch

from kascade_cli import attach
from kascade_cli.errors import KascadeError
from kascade_cli.integrations.transformers.decoding import Runner, Slots, decode
from kascade_cli.integrations.transformers.decoding.compiled import compiled_layers
from kascade_cli.models import describe
from tests.conftest import tiny_model

from ..naive import some_profile
from .test_static_loop import padded, prefilled


def logits_of(runner, prompt, steps):
    """Logits of each step, [steps, B, V]."""
    found = []

    def choose(scores, _):
        found.append(scores.clone())
        return scores.argmax(-1)

    runner.load(*prompt)
    decode(runner, steps + 1, choose=choose)
    return torch.stack(found)


def test_one_code_for_all_layers_and_strategies():
    """The compiler's own backend for this: a graph per layer, run as it is, so that float64 tells."""
    model = tiny_model("qwen2", layers=6, seed=4)
    profile = some_profile(describe(model))
    ids, mask = padded((40, 23))
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    for strategy in ("dense", "kascade", "kascade-refresh"):
        with torch.no_grad(), attach(model, profile, strategy=strategy) as run:
            cache, token, lengths = prefilled(model, ids, mask)
            prompt = [(layer.keys, layer.values) for layer in cache.layers], token, lengths
            run.reset()
            runner = Runner(model, Slots(prompt[0], 2, 64), run, capture=False)
            want, counted = logits_of(runner, prompt, 11), run.report()
            run.reset()
            with compiled_layers(model, runner.slots, backend=backend):
                got = logits_of(runner, prompt, 11)
            torch.testing.assert_close(got, want)
            assert run.report() == counted
        assert not any("forward" in vars(module) for module in model.modules())
    assert len(graphs) <= 2  # the first layer has a hook that the others have not
    nodes = [node for graph in graphs for node in graph.graph.nodes if "kascade.attend" in str(node.target)]
    assert len(nodes) == len(graphs)  # attention is one node each
    torch.compiler.reset()


def test_a_layer_that_cannot_be_compiled_leaves_no_trace():
    model = tiny_model("llama", layers=2)
    ids, mask = padded((20,))

    def backend(graph, _):
        raise NotImplementedError("not this layer")

    torch.compiler.reset()
    with torch.no_grad(), attach(model, strategy="dense") as run:
        cache, token, lengths = prefilled(model, ids, mask)
        prompt = [(layer.keys, layer.values) for layer in cache.layers], token, lengths
        runner = Runner(model, Slots(prompt[0], 1, 64), run, capture=False)
        want = logits_of(runner, prompt, 3)
        with pytest.raises(Exception, match="not this layer"), compiled_layers(model, runner.slots, backend=backend):
            logits_of(runner, prompt, 3)
        assert torch.equal(logits_of(runner, prompt, 3), want)
    torch.compiler.reset()


def test_code_that_was_compiled_under_an_attachment_does_not_run_after_it():
    query = torch.zeros(1, 2, 1, 8)
    with pytest.raises(KascadeError, match="compile the model anew"):
        torch.ops.kascade.attend(query, query, query, None, 1.0, torch.tensor([10**9, 0]))
