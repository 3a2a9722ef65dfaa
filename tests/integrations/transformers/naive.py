"""Kascade by the formulas alone: full probability matrices and one key set per query. The oracle of these tests.

A sequence is processed in segments (start, end): a segment of one token is a decode step, a longer one a prefill
chunk. Since a query only reads keys of earlier tokens, one forward pass over the whole sequence with a key set per
query equals running the segments one after the other through a cache.
"""

import math

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .naive_sets import DECODE_ONLY, Published

NAIVE = (
    "dense", "kascade", "kascade-pooled", "kascade-no-remap", "kascade-decode-only", "kascade-reused-norm",
    "kascade-refresh", "oracle", "oracle-per-query", "streaming-llm", *DECODE_ONLY,
)  # fmt: skip


class Naive:
    def __init__(
        self, model, profile, strategy, segments, ratio, min_keys, tile=32, refresh=8, pooled=False, **options
    ):
        self.model, self.profile, self.strategy, self.segments = model, profile, strategy, segments
        self.ratio, self.min_keys, self.tile = ratio, min_keys, tile
        self.refresh = refresh if strategy == "kascade-refresh" else 1
        self.pooled = pooled or strategy == "kascade-pooled"
        self.options = {"sinks": 4} | options
        self.sets = {}
        self.read = self.visible = 0

    def count(self, visible):
        ratio = self.ratio
        if isinstance(ratio, dict):  # by length
            ratio = ratio[max((length for length in ratio if length <= visible), default=min(ratio))]
        return min(visible, max(self.min_keys, math.ceil(round(ratio * visible, 6))))

    def top(self, scores, candidates, count):
        order = sorted(candidates, key=lambda j: (-float(scores[j]), j))
        return set(order[:count])

    def select(self, probability, groups):
        """Per segment piece (queries, own keys always kept): a key set per KV head."""
        pooled = probability.unflatten(0, (groups, -1)).sum(1)
        if self.pooled:
            pooled = pooled.sum(0, keepdim=True).expand(groups, -1, -1)
        chosen = {}
        for queries, before in self.pieces():
            score = pooled[:, queries].sum(1)
            at, last = queries[0], self.chosen_at(queries[0])
            if last < at:  # a decode step between refreshes: the old choice, and every key since
                chosen[at] = [keys | set(range(last + 1, at + 1)) for keys in chosen[last]]
                continue
            chosen[at] = [self.top(score[g], range(before), self.count(before)) for g in range(groups)]
        return chosen

    def chosen_at(self, query):
        """The query whose keys a decode step reads: the first after a prefill, then every `refresh`-th."""
        steps = 0
        for start, end in self.segments:
            if start == query:
                return query - steps % self.refresh if end - start == 1 else query
            steps = steps + 1 if end - start == 1 else 0
        return query

    def pieces(self):
        for start, end in self.segments:
            if end - start == 1:
                yield [start], start + 1
                continue
            for t in range(start // self.tile, (end - 1) // self.tile + 1):
                yield list(range(max(start, t * self.tile), min(end, (t + 1) * self.tile))), t * self.tile

    def reused_norm(self, probability, sets):
        """Probabilities [H, T, S] of prefill queries divided by the mass on `sets` and the query's own tile."""
        scaled = probability.clone()
        group = len(probability) // len(next(iter(sets.values())))
        decode = {start for start, end in self.segments if end - start == 1}
        for queries, before in self.pieces():
            if queries[0] in decode:
                continue
            for i in queries:
                for head in range(len(probability)):
                    keys = sorted(sets[queries[0]][head // group]) + list(range(before, i + 1))
                    scaled[head, i] /= probability[head, i, keys].sum()
        return scaled

    def window(self, groups):
        chosen = {}
        for queries, before in self.pieces():
            k = self.count(before)
            sinks = self.options["sinks"]
            keys = set(range(min(sinks, k))) | set(range(before - max(k - sinks, 0), before))
            chosen[queries[0]] = [keys] * groups
        return chosen

    def layer_sets(self, layer, probability, groups, first):
        """Key sets of a layer, or None where it is dense."""
        if self.strategy == "dense":
            return None
        if self.strategy == "streaming-llm":
            return self.window(groups)
        if self.strategy == "oracle":
            return None if layer == first else self.select(probability, groups)
        role = self.profile.layers[layer].role
        if role in ("dense", "anchor"):
            if role == "anchor" and self.strategy == "kascade-reused-norm":
                probability = self.reused_norm(probability, self.sets[max(self.sets)])
            self.sets[layer] = self.select(probability, groups)
            return None if role == "dense" else self.sets[layer]
        chosen = {}
        decode = {start for start, end in self.segments if end - start == 1}
        for queries, _ in self.pieces():
            entries = self.profile.head_map(layer, "decode" if queries[0] in decode else "prefill")
            if self.strategy == "kascade-no-remap":
                entries = [(a, g) for g, (a, _) in enumerate(entries)]
            chosen[queries[0]] = [self.sets[a][queries[0]][h] for a, h in entries]
        return chosen

    def attend(self, module, q, k, v, scale):
        heads, groups, length = q.shape[1], k.shape[1], q.shape[2]
        keys, values = (x[0].repeat_interleave(heads // groups, 0) for x in (k, v))
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        logits = (q[0] @ keys.transpose(-1, -2) * scale).masked_fill(~causal, -torch.inf)
        first = self.first
        decode = {start for start, end in self.segments if end - start == 1}
        mask = causal.expand(heads, -1, -1).clone()
        if self.strategy in (*DECODE_ONLY, "oracle-per-query"):
            self.published.hide(mask, module.layer_idx, logits, q[0] * scale, k[0], decode)
            chosen = None
        else:
            chosen = self.layer_sets(module.layer_idx, logits.softmax(-1), groups, first)
        for queries, before in self.pieces():
            dense = chosen is None or (self.strategy == "kascade-decode-only" and queries[0] not in decode)
            if not dense:
                for head in range(heads):
                    for i in queries:
                        allowed = torch.zeros(length, dtype=torch.bool)
                        allowed[sorted(chosen[queries[0]][head // (heads // groups)])] = True
                        if queries[0] not in decode:
                            allowed[before : i + 1] = True
                        mask[head, i] &= allowed
        self.read += int(mask[:: heads // groups].sum()) / groups
        self.visible += int(causal.sum())
        out = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ values
        return out.transpose(0, 1)[None].contiguous()

    def logits(self, ids):
        """ids: list of token ids -> logits [T, vocab] of the segments run one after the other."""
        from kascade_cli.models import full_attention_layers

        full = full_attention_layers(self.model)
        self.first = full[0]
        self.published = Published(self.strategy, full, self.count, self.options)
        oracle = self

        def attention(module, q, k, v, mask, scaling=None, **kwargs):
            if module.layer_idx not in full:
                return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **kwargs)
            return oracle.attend(module, q, k, v, scaling), None

        AttentionInterface.register("naive", attention)
        AttentionMaskInterface.register("naive", sdpa_mask)
        self.model.set_attn_implementation("naive")
        try:
            with torch.no_grad():
                return self.model(torch.tensor([ids]), use_cache=False).logits[0]
        finally:
            self.model.set_attn_implementation("sdpa")


def without_head_maps(profile):
    """The same profile, head maps not measured."""
    from kascade_cli.schema import Profile

    return Profile.build(
        model=profile.model, anchors=profile.anchors, profiled_layers=profile.attention_layers, head_maps=None,
        budget=profile.budget,
    )  # fmt: skip


def some_profile(info, anchors=None, pairs=False, ratio=0.2, min_keys=4):
    """A profile with head maps that are not the identity, different in decode and prefill."""
    from kascade_cli.schema import Budget, Profile

    layers = info.profiled_layers
    anchors = anchors or [layers[0], layers[len(layers) // 2]]
    maps = {}
    for index in layers:
        nearest = [a for a in anchors if a < index]
        if index in anchors:
            continue
        decode = [(g + 1) % info.kv_heads for g in range(info.kv_heads)]
        prefill = [0] * info.kv_heads
        if pairs:
            decode = [(nearest[g % len(nearest)], head) for g, head in enumerate(decode)]
            prefill = [(nearest[-1 - g % len(nearest)], head) for g, head in enumerate(prefill)]
        maps[index] = {"decode": decode, "prefill": prefill}
    return Profile.build(
        model=info.card,
        anchors=anchors,
        profiled_layers=layers,
        head_maps=maps,
        budget=Budget(ratio=ratio, min_keys=min_keys, tile=32),
    )
