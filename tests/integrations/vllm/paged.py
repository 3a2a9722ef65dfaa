"""A serving engine of two dozen lines: requests in blocks of a shared cache, steps of any mix of rows."""

from types import SimpleNamespace

import torch

from kascade_cli.integrations.vllm.views import pages_of, write


class Engine:
    """Random q, k, v for `lengths` tokens of each request and every layer; blocks are dealt out at random.

    `q`, `k`, `v`: [layer][request], float64 [tokens, heads, D].
    """

    def __init__(self, layers, lengths, heads=4, kv_heads=2, dim=8, page=16, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.page, self.dim, self.kv_heads = page, dim, kv_heads

        def random(count, sharp=1.0):
            return [
                [
                    sharp * torch.randn(length, count, dim, generator=generator, dtype=torch.float64)
                    for length in lengths
                ]
                for _ in range(layers)
            ]

        self.q, self.k, self.v = random(heads, 3.0), random(kv_heads), random(kv_heads)
        need = [-(-length // page) for length in lengths]
        blocks = torch.randperm(sum(need) + 3, generator=generator) + 1
        self.table = torch.zeros(len(lengths), max(need) + 2, dtype=torch.int32)
        for row, count in enumerate(need):
            self.table[row, :count] = blocks[sum(need[:row]) : sum(need[:row]) + count]
        shape = (len(blocks) + 1, kv_heads, page, 2 * dim)
        self.caches = [torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(layers)]

    def common(self, rows):
        """What vLLM tells a builder. rows: (request, first token, count, whether its prompt is not done)."""
        counts = [count for _, _, count, _ in rows]
        ends = torch.tensor([begin + count for _, begin, count, _ in rows], dtype=torch.int32)
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
        order = [request for request, *_ in rows]
        slots = [
            int(self.table[request, at // self.page]) * self.page + at % self.page
            for request, begin, count, _ in rows
            for at in range(begin, begin + count)
        ]
        return SimpleNamespace(
            query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=ends, seq_lens_cpu_upper_bound=ends,
            num_reqs=len(rows), num_actual_tokens=sum(counts), max_query_len=max(counts), max_seq_len=int(ends.max()),
            block_table_tensor=self.table[order], slot_mapping=torch.tensor(slots),
            is_prefilling=torch.tensor([busy for *_, busy in rows]),
        )  # fmt: skip

    def layer(self, tensors, layer, rows):
        """The tokens of a step, one row after the other: [N, heads, D]."""
        return torch.cat([tensors[layer][request][begin : begin + count] for request, begin, count, _ in rows])

    def run(self, served, step, rows, slots, layers=None):
        """All layers of one step, or those of one process; [layers, N, H, D]."""
        outs = []
        for layer in range(len(self.caches)) if layers is None else layers:
            pages = pages_of(self.caches[layer])
            write(pages, self.layer(self.k, layer, rows), self.layer(self.v, layer, rows), slots)
            query = self.layer(self.q, layer, rows)
            output = torch.full_like(query, torch.nan)
            served.attend(step, layer, query, pages, output, self.dim**-0.5)
            outs.append(output)
        return torch.stack(outs)
