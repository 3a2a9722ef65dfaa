"""Compiled decoder layers: the same logits, one layer's code for all of them, nothing left behind."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from kascade_cli import attach
from kascade_cli.errors import KascadeError
from kascade_cli.integrations.transformers.decoding import Runner, Slots, decode
from kascade_cli.integrations.transformers.decoding import runner as runner_module
from kascade_cli.integrations.transformers.decoding.compiled import compiled_layers, in_rows
from kascade_cli.models import describe
from tests.conftest import tiny_model

from ..naive import some_profile
from .test_static_loop import padded, prefilled


def prompt_of(model, ids, mask):
    """What a runner loads: keys and values of the layers, the next token, the rows' lengths."""
    cache, token, lengths = prefilled(model, ids, mask)
    return [(layer.keys, layer.values) for layer in cache.layers], token, lengths


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
    """The compiler's own backend for this: a graph per row of layers, run as it is, so that float64 tells."""
    model = tiny_model("qwen2", layers=14, seed=4)
    profile = some_profile(describe(model))
    ids, mask = padded((40, 23))
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    for strategy in ("dense", "kascade", "kascade-refresh"):
        with torch.no_grad(), attach(model, profile, strategy=strategy) as run:
            prompt = prompt_of(model, ids, mask)
            run.reset()
            runner = Runner(model, Slots(prompt[0], 2, 64), run, capture=False)
            want, counted = logits_of(runner, prompt, 11), run.report()
            run.reset()
            with compiled_layers(model, runner.slots, backend=backend):
                got = logits_of(runner, prompt, 11)
            torch.testing.assert_close(got, want)
            assert run.report() == counted
        assert not any("forward" in vars(module) for module in model.modules())
    nodes = [[node.target for node in graph.graph.nodes if "kascade.attend" in str(node.target)] for graph in graphs]
    # Attention is one node each. The first layer has a hook that the others have not, so four layers are compiled
    # twice, the two that are left once, and the norm and the rotary embedding.
    assert sorted(map(len, nodes)) == [0, 0, 2, 4, 4]
    torch.compiler.reset()


@pytest.mark.parametrize("together", [1, 4])
def test_another_thread_cannot_run_the_model_meanwhile(together):
    """It would write into the cache of the one that compiles."""
    model = tiny_model("llama", layers=4)
    ids, mask = padded((20,))

    def pass_of(thread):
        return thread.submit(torch.no_grad()(lambda: model(ids[:, :7]).logits)).result()

    with torch.no_grad(), attach(model, strategy="dense") as run, ThreadPoolExecutor(1) as other:
        prompt = prompt_of(model, ids, mask)
        runner = Runner(model, Slots(prompt[0], 1, 64), run, capture=False)
        want, alone = logits_of(runner, prompt, 3), pass_of(other)
        with compiled_layers(model, runner.slots, backend="eager", together=together):
            got = logits_of(runner, prompt, 3)
            with pytest.raises(KascadeError, match="another thread is compiling"):
                pass_of(other)
            torch.testing.assert_close(logits_of(runner, prompt, 3), got)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(pass_of(other), alone)


def test_a_layer_that_cannot_be_compiled_leaves_no_trace():
    model = tiny_model("llama", layers=2)
    ids, mask = padded((20,))

    def backend(graph, _):
        raise NotImplementedError("not this layer")

    torch.compiler.reset()
    with torch.no_grad(), attach(model, strategy="dense") as run:
        prompt = prompt_of(model, ids, mask)
        runner = Runner(model, Slots(prompt[0], 1, 64), run, capture=False)
        want = logits_of(runner, prompt, 3)
        with pytest.raises(Exception, match="not this layer"), compiled_layers(model, runner.slots, backend=backend):
            logits_of(runner, prompt, 3)
        assert torch.equal(logits_of(runner, prompt, 3), want)
    torch.compiler.reset()


def compiled_agrees(model, first=lambda: None, **options):
    """Whether compiled steps, after what `first` does, give the logits of eager ones."""
    ids, mask = padded((20, 9))
    torch.compiler.reset()
    with torch.no_grad(), attach(model, strategy="dense") as run:
        prompt = prompt_of(model, ids, mask)
        runner = Runner(model, Slots(prompt[0], 2, 64), run, capture=False)
        want = logits_of(runner, prompt, 3)
        with compiled_layers(model, runner.slots, backend=lambda graph, _: graph.forward, **options):
            first()
            got = logits_of(runner, prompt, 3)
    return torch.allclose(got, want)


INNER = ("self_attn", "self_attn.o_proj", "self_attn.q_proj", "mlp.up_proj", "mlp")


@pytest.mark.parametrize("together", [4, 1])
@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward"])
def test_what_one_layer_has_inside_is_its_own(name, how, together):
    """One code serves all rows: a hook or a replaced forward in one of them must neither vanish nor spread."""
    model = tiny_model("llama", layers=9)
    inner = model.model.layers[5].get_submodule(name)
    if how == "hook":
        inner.register_forward_hook(
            lambda _, given, out: (out[0] * 1.5, *out[1:]) if isinstance(out, tuple) else out * 1.5
        )
    elif how == "pre-hook":
        inner.register_forward_pre_hook(
            lambda _, args, kwargs: (
                tuple(a * 1.5 for a in args),
                kwargs | ({"hidden_states": kwargs["hidden_states"] * 1.5} if "hidden_states" in kwargs else {}),
            ),
            with_kwargs=True,
        )
    else:
        own = inner.forward

        def forward(*args, **kwargs):
            out = own(*args, **kwargs)
            return (out[0] * 1.5, *out[1:]) if isinstance(out, tuple) else out * 1.5

        inner.forward = forward
    assert compiled_agrees(model, together=together)


def test_a_replaced_forward_is_refused_or_left():
    model = tiny_model("llama", layers=4)
    own = model.model.norm.forward
    model.model.norm.forward = lambda hidden: own(hidden) * 1.5
    assert compiled_agrees(model)
    assert "forward" in vars(model.model.norm)
    layer = model.model.layers[2]
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs) * 1.5
    with pytest.raises(KascadeError, match="a decoder layer's forward has been replaced"):
        compiled_agrees(model)
    assert "forward" in vars(layer)


@pytest.mark.parametrize("what", ["kept", "order"])
def test_layers_that_are_read_or_run_in_another_order_run_one_by_one(what, monkeypatch):
    model = tiny_model("llama", layers=4)
    body, layers = model.model, list(model.model.layers)

    class Odd(nn.ModuleList):
        def __getitem__(self, index):
            return self

        def __iter__(self):
            order = {"kept": layers, "order": [layers[0], layers[2], layers[1], layers[3]]}[what]
            return iter(order)

    body.layers.__class__ = Odd
    if what == "kept":
        first, last, kept = layers[0], layers[3], []
        call = nn.Module.__call__

        def called(self, hidden, *args, **kwargs):
            out = call(self, hidden, *args, **kwargs)
            if self is first:
                kept[:] = [out]
            return out + kept[0] if self is last else out

        monkeypatch.setattr(type(first), "__call__", called)
    with pytest.raises(Exception, match="more between two layers"):
        compiled_agrees(model)
    assert compiled_agrees(model, together=1)


@pytest.mark.parametrize("between", [lambda hidden: hidden * 1.5, lambda hidden: hidden.mul_(1.5)])
def test_layers_with_something_between_them_run_one_by_one(between, monkeypatch):
    """As in models that add to some layers' output: taken down and run later, they would not see it."""
    model = tiny_model("llama", layers=5)
    second = model.model.layers[1]
    # Not a hook, which would be seen: the class does it, before its second layer.
    monkeypatch.setattr(type(second), "__call__", lambda self, hidden, *args, **kwargs: nn.Module.__call__(
        self, between(hidden) if self is second else hidden, *args, **kwargs))  # fmt: skip
    with pytest.raises(KascadeError, match="more between two layers"):
        compiled_agrees(model)
    assert compiled_agrees(model, together=1)


def test_a_step_that_failed_on_its_way_leaves_nothing_for_the_next():
    model = tiny_model("llama", layers=4)
    assert compiled_agrees(model, first=lambda: model.model.layers[0].forward(torch.zeros(1, 1, 32)))


def test_rows_of_layers_end_where_another_kind_or_a_hook_is():
    layers = {index: nn.Identity() for index in (0, 1, 2, 3, 4, 5, 6, 9, 10)}
    layers[6] = nn.Flatten()
    layers[2].register_forward_hook(lambda *_: None)
    layers[5].register_forward_pre_hook(lambda *_: None)
    assert in_rows(layers, 4) == [[0, 1, 2], [3, 4], [5], [6], [9, 10]]
    assert in_rows(layers, 2) == [[0, 1], [2], [3, 4], [5], [6], [9, 10]]
    assert in_rows(layers, 1) == [[index] for index in layers]


@pytest.mark.parametrize("fails", [(), (4,), (4, 1)])
def test_what_cannot_run_together_is_tried_one_by_one(fails, monkeypatch):
    """Recording, which needs a GPU, stands aside."""
    tried = []

    @contextlib.contextmanager
    def compiled(model, slots, together):
        tried.append(together)
        if together in fails:
            raise NotImplementedError(f"not {together}")
        yield

    monkeypatch.setattr(runner_module, "compiled_layers", compiled)
    monkeypatch.setattr(runner_module.graph, "warm_up", lambda steps, _: None)
    monkeypatch.setattr(runner_module.graph, "record", lambda step, _: step)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    model = tiny_model("llama", layers=2)
    ids, mask = padded((20,))
    with torch.no_grad():
        cache, token, lengths = prefilled(model, ids, mask)
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        runner = Runner(model, Slots(layers, 1, 64), compile=True)
        runner.load(layers, token, lengths)
        runner.prepare()
    assert tried == [4, 1][: len(fails) + 1]
    assert runner.captured
    assert runner.reason is None
    assert runner.uncompiled == ("NotImplementedError: not 1" if len(fails) == 2 else None)
    assert runner.apart == ("NotImplementedError: not 4" if fails else None)


def test_code_that_was_compiled_under_an_attachment_does_not_run_after_it():
    query = torch.zeros(1, 2, 1, 8)
    with pytest.raises(KascadeError, match="compile the model anew"):
        torch.ops.kascade.attend(query, query, query, None, 1.0, torch.tensor([10**9, 0]))


def test_graphs_of_torch_compile_are_refused(monkeypatch):
    """What one layer keeps for the next lies in their pool, where they know nothing of it. Whole steps are another
    thing: Runner says so while it records one."""
    from kascade_cli.integrations.transformers.interface import _refuse_captured, capturing

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(KascadeError, match="torch.compile captures CUDA graphs in this mode"):
        _refuse_captured(True)
    _refuse_captured(False)
    token = capturing.set(True)
    _refuse_captured(True)
    capturing.reset(token)


def test_a_model_compiled_as_a_whole_decodes_as_it_does_eagerly():
    """Attention is one node and no break, so that `fullgraph` holds. Kept keys need a proof, which compiled code does
    not give, so every step chooses."""
    from transformers import StaticCache

    model = tiny_model("llama", layers=3, seed=5)
    profile = some_profile(describe(model))
    ids, _ = padded((45,))
    torch.compiler.reset()
    logits = []
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for forward, strategy in ((model.forward, "kascade"), (compiled, "kascade-refresh")):
            with attach(model, profile, strategy=strategy) as run:
                cache, found = StaticCache(model.config, 52), []
                model(ids, past_key_values=cache, use_cache=True)
                for step in range(3):
                    # As `generate` makes it ahead of a compiled model.
                    rows = torch.tensor([[45 + step, 0, 46 + step]], dtype=torch.int32)
                    options = {"attention_mask": rows[:, None, None].expand(-1, -1, 52, -1), "use_cache": True}
                    options["position_ids"] = torch.tensor([[45 + step]])
                    found.append(forward(ids[:, step : step + 1], past_key_values=cache, **options).logits)
                logits.append(torch.cat(found))
                report = run.report()
    assert report["refresh"] == {"every": 8, "refreshes": 3, "between": 0}
    torch.compiler.reset()
    torch.testing.assert_close(logits[1], logits[0])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "phi3"])
def test_joined_projections_give_the_same_and_leave_no_trace(kind):
    from kascade_cli.integrations.transformers.decoding.joined import joined_projections

    model = tiny_model(kind, layers=2)
    ids, _ = padded((9, 9))
    modules = dict(model.named_modules())
    with torch.no_grad():
        want = model(ids).logits
        with joined_projections(model) as made:
            got = model(ids).logits
            # Two layers: q, k, v of one and gate, up of one; phi3 has one product of each already.
            assert [len(joined.sizes) for joined in made] == ([] if kind == "phi3" else [3, 3, 2, 2])
    torch.testing.assert_close(got, want)
    assert dict(model.named_modules()) == modules
    assert torch.equal(model(ids).logits, want)


def test_where_memory_is_short_attention_goes_first(monkeypatch):
    from kascade_cli.integrations.transformers.decoding import joined

    model = tiny_model("llama", layers=2)
    attention = sum(
        getattr(layer.self_attn, name).weight.nbytes for layer in model.model.layers for name in joined.GROUPS[0]
    )
    monkeypatch.setattr(joined, "_fits", lambda size, _: size <= attention)
    with joined.joined_projections(model) as made:
        assert [len(one.sizes) for one in made] == [3, 3]
