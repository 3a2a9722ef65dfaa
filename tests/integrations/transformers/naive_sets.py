"""The strategies of the comparison, key by key from their definitions: plain loops over one sequence.

Quest (arXiv 2406.10774), OmniKV (ICLR 2025), LessIsMore (arXiv 2508.07101), and the oracle of Kascade's figure 2.
"""

import math

DECODE_ONLY = ("quest", "omnikv", "lessismore")


class Published:
    """Hides from a causal mask what a strategy does not read. count(N): keys that a query of N visible keys reads."""

    def __init__(self, strategy, layers, count, options):
        self.strategy, self.layers, self.count, self.options = strategy, layers, count, options
        self.kept = {}  # layer -> {query: keys}, of the layers that choose for others

    def hide(self, mask, layer, logits, query, key, decode):
        """mask bool [H, T, T], written to; logits [H, T, T] (-inf in the future); query [H, T, D] scaled; key
        [G, T, D]; decode: the queries that are decode steps."""
        heads, length = mask.shape[:2]
        for i in range(length) if self.strategy == "oracle-per-query" else sorted(decode):
            rows = [[float(logits[h, i, j]) for j in range(i + 1)] for h in range(heads)]
            sets = getattr(self, self.strategy.replace("-", "_"))(layer, i, rows, query, key)
            if sets is None:
                continue
            for h in range(heads):
                for j in range(length):
                    mask[h, i, j] = j in sets[h]

    def oracle_per_query(self, layer, i, rows, query, key):
        if layer == self.layers[0]:
            return None
        return [set(best(row, self.count(i + 1))) for row in rows]

    def quest(self, layer, i, rows, query, key):
        page = self.options.get("page", 16)
        if layer in self.layers[: self.options.get("dense_layers", 2)]:
            return None
        whole = i // page  # pages that end before the newest key's
        newest = list(range(whole * page, i + 1))
        wanted = min(whole, math.ceil(max(0, self.count(i + 1) - len(newest)) / page))
        group = len(rows) // len(key)
        sets = []
        for g in range(len(key)):
            promise = [0.0] * whole
            for h in range(g * group, (g + 1) * group):
                bounds = []
                for p in range(whole):
                    keys = key[g, p * page : (p + 1) * page].tolist()
                    bounds.append(
                        sum(
                            max(q * min(column), q * max(column))
                            for q, column in zip(query[h, i].tolist(), zip(*keys, strict=True), strict=True)
                        )
                    )
                promise = [a + b for a, b in zip(promise, softmax(bounds), strict=True)]
            pages = best(promise, wanted)
            keys = {j for p in pages for j in range(p * page, (p + 1) * page)} | set(newest)
            sets += [keys] * group
        return sets

    def depths(self, *published):
        """Layers at the same share of the depth as in a model of 32."""
        return sorted({self.layers[round(depth / 32 * len(self.layers))] for depth in published})

    def shared(self, layer, i, rows, choosing, choose):
        if layer in choosing:
            self.kept.setdefault(layer, {})[i] = choose(rows, i)
            return None
        before = [chosen for chosen in choosing if chosen < layer]
        return [self.kept[before[-1]][i]] * len(rows) if before else None

    def omnikv(self, layer, i, rows, query, key):
        def choose(rows, i):
            highest = [max(column) for column in zip(*map(softmax, rows), strict=True)]
            return set(best(highest, self.count(i + 1)))

        return self.shared(layer, i, rows, self.options.get("filter_layers") or self.depths(2, 8, 18), choose)

    def lessismore(self, layer, i, rows, query, key):
        def choose(rows, i):
            k = self.count(i + 1)
            recent = math.ceil(round(self.options.get("recent", 0.25) * k, 6))
            keys = set(range(i + 1 - recent, i + 1))
            older = i + 1 - recent
            orders = [best(row[:older], older) for row in rows]
            for rank in range(older):
                for j in sorted({order[rank] for order in orders}):  # heads of one rank: by slot
                    if len(keys) < k:
                        keys.add(j)
            return keys

        return self.shared(layer, i, rows, self.options.get("selection_layers") or self.depths(2, 13), choose)


def best(scores, count):
    """The `count` highest, ties to the lowest index, in order."""
    return sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:count]


def softmax(row):
    if not row:
        return []
    top = max(row)
    weights = [math.exp(value - top) for value in row]
    return [weight / sum(weights) for weight in weights]
