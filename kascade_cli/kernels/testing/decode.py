"""Numerics of a backend's decode ops against a float64 reference, as rows that a test or a GPU suite can print.

The rule is FlashAttention's: the largest error may be twice that of the same computation in plain low-precision
PyTorch. Selections must equal the reference's on the same scores, bit for bit. Outputs are poisoned before every
call, NaN lies in every slot that no row owns, and every call is made twice and must give the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kascade_cli.kernels import reference
from kascade_cli.kernels.reference.common import row_slots
from kascade_cli.kernels.testing.poison import poisoned

Row = dict[str, Any]


@dataclass(frozen=True)
class DecodeCase:
    """One decode problem: lengths per row, slots of the cache, page size (0: contiguous), where each row starts."""

    lengths: tuple[int, ...]
    slots: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    page: int = 0
    starts: tuple[int, ...] = field(default=())
    ratio: float = 0.1

    def __str__(self) -> str:
        name = f"B{len(self.lengths)}-S{self.slots}-H{self.heads}-G{self.kv_heads}-D{self.dim}-{str(self.dtype)[6:]}"
        return name + (f"-page{self.page}" if self.page else "") + ("-padded" if any(self.starts) else "")


CASES = (
    DecodeCase((1, 33, 127, 129), 160),
    DecodeCase((4097, 100, 2500), 4097),
    DecodeCase((4097, 1, 64), 4160, dtype=torch.float16),
    DecodeCase((4097, 129), 4160, dim=64, dtype=torch.float16),
    DecodeCase((2048, 2047, 63), 4096, dim=64, starts=(0, 1, 4033)),
    DecodeCase((3000, 17, 0), 3111, starts=(111, 3094, 50)),
    DecodeCase((5000,), 5001, heads=28, kv_heads=4),
    DecodeCase((5000, 777), 5120, heads=16, kv_heads=1),
    DecodeCase((5000, 777), 5120, heads=12, kv_heads=12, dtype=torch.float16),
    DecodeCase((5000, 777), 5120, heads=9, kv_heads=1, dim=64),
    DecodeCase((2500, 31), 2560, heads=4, kv_heads=2, dim=64, dtype=torch.float16),
    DecodeCase((2500, 31), 2560, heads=6, kv_heads=1),
    DecodeCase((2500, 31), 2560, heads=12, kv_heads=1, dtype=torch.float16),
    DecodeCase((2500, 31), 2560, heads=30, kv_heads=2, dim=64),
    DecodeCase((5000, 777, 16), 5120, page=16),
    DecodeCase((5000, 777, 1), 5120, page=64, starts=(3, 64, 0)),
    DecodeCase((5000, 777, 255), 5120, page=256, dtype=torch.float16),
    DecodeCase((5000, 777, 255), 5120, page=128, dim=64),
    DecodeCase((32768 + 17, 12345), 32768 + 17),
    DecodeCase((1 << 19,), 1 << 19, heads=8, kv_heads=2),
    DecodeCase(tuple(range(700, 860)), 1024, heads=8, kv_heads=2),
    # Rings that wrap, with pages looked up two blocks ahead; rows without a page; more KV heads than one round of
    # pooling takes; every plan of Top-k.
    DecodeCase((9000, 4000, 64, 0) * 8, 9216, page=16),
    DecodeCase((9000, 4000, 65, 0) * 8, 9216, page=64, starts=(0, 130, 1, 0) * 8),
    DecodeCase((16000, 8000, 129, 0) * 12, 16384, page=256, dim=64),
    DecodeCase((20000, 6000, 1) * 12, 20480, page=128, dim=64, dtype=torch.float16),
    DecodeCase((20000, 6000, 1) * 12, 20480, dim=64),
    DecodeCase((2500, 31, 0), 2560, heads=272, kv_heads=17, dim=64),
    DecodeCase((2500, 31, 0), 2560, heads=261, kv_heads=87, dim=64, dtype=torch.float16),
    DecodeCase((20000, 17000, 5, 0), 20480),
    DecodeCase((40000, 9, 0) * 3, 40000),
)


def check_decode(ops: Any, device: torch.device, cases: tuple[DecodeCase, ...] = CASES, seed: int = 0) -> list[Row]:
    """Runs every decode op of `ops` (see `get_backend`) on `cases`; rows have op, case, error, bound, ok, note."""
    rows = []
    for number, case in enumerate(cases):
        try:
            rows += _check_case(ops, case, device, seed + number)
        except Exception as error:  # one broken case must not hide the others
            rows.append(_row("all", str(case), note=f"{type(error).__name__}: {str(error)[:300]}", ok=False))
    return rows


def check_select(ops: Any, device: torch.device, widths: tuple[int, ...] = (1, 33, 4097, 40000, 1 << 19)) -> list[Row]:
    """Adversarial rows for select_topk: exact equality with the reference, counts from 0 to past the length."""
    rows = []
    for width in widths:
        generator = torch.Generator(device=device).manual_seed(width)
        noise = torch.rand(width, device=device, generator=generator)
        spike = torch.zeros(width, device=device)
        spike[width // 3] = 1.0
        minus = torch.full((width,), -1 << 22, dtype=torch.int32, device=device).view(torch.float32)  # a NaN
        odd = torch.where(noise > 0.998, minus, float("nan")), torch.full_like(noise, float("inf"))
        kinds = {
            "random": noise,
            "softmax": torch.softmax(torch.randn(width, device=device, generator=generator) * 4, 0),
            "equal": torch.full_like(noise, 1.0 / width),
            "zeros but one": spike,
            "spike": torch.where(spike > 0, 1e30, noise * 1e-30),
            "denormal": noise * 1e-40,
            "few values": (noise * 5).floor() / 4,
            "ascending": torch.arange(width, device=device) / width,
            "nan and inf": torch.where(noise > 0.99, torch.where(noise > 0.995, *odd), noise),
        }
        # 9 rows are shared out over wide clusters; at one width also as pairs, and alone with large and small CTAs.
        times = {40000: (1, 4, 8, 32)}.get(width, (1,))
        scores = torch.stack(list(kinds.values()))
        for want in sorted({0, 1, 2, width // 10, width // 2, max(width - 1, 0), width, width + 5}):
            top = max(1, min(want, width))
            for begin, length in ((0, width), (width // 5, width - width // 3)):
                args = [torch.tensor(x, dtype=torch.int32, device=device) for x in (want, begin, length)]
                expected = reference.select_topk(scores, *args, max_count=top + 3)
                for repeat in times:
                    case = f"S{width}x{repeat}-k{want}-[{begin},+{length})"
                    many = scores.repeat(repeat, 1)
                    try:
                        with poisoned():
                            found = ops.select_topk(many, *args, max_count=top + 3)
                            again = ops.select_topk(many, *args, max_count=top + 3)
                        equal = (found.unflatten(0, (repeat, -1)) == expected).all(-1).all(0)
                        bad = [name for name, same in zip(kinds, equal.tolist(), strict=True) if not same]
                        rows.append(_row("select_topk", case, note=f"differs: {bad}" if bad else "", ok=not bad))
                        if not torch.equal(found, again):
                            rows.append(_row("select_topk", case, note="two calls differ", ok=False))
                    except Exception as error:
                        note = f"{type(error).__name__}: {str(error)[:200]}"
                        rows.append(_row("select_topk", case, note=note, ok=False))
    return rows


def stress_decode(ops: Any, device: torch.device, repeats: int = 50) -> list[Row]:
    """The same inputs over and over, at sizes that fill the machine: any change of bits is a race."""
    rows = []
    shapes = (
        DecodeCase((9000, 4000, 8191, 77) * 16, 9216),
        DecodeCase((60000,), 60000),
        DecodeCase((3000,) * 7, 3072, page=16),
        DecodeCase((9000,) * 32, 9216, page=16),
        DecodeCase((2500, 31, 0), 2560, heads=272, kv_heads=17, dim=64),
    )
    for number, case in enumerate(shapes):
        data = make_inputs(case, device, 1000 + number, _dead(ops))
        first: tuple[Tensor, ...] | None = None
        differ = 0
        for _ in range(repeats):
            result = _outputs(ops, data)
            first = first or result
            differ += any(not torch.equal(a, b) for a, b in zip(first, result, strict=True))
        rows.append(
            _row("stress", str(case), note=f"{differ} of {repeats} runs differ" if differ else "", ok=not differ)
        )
    return rows


def check_graph(ops: Any, device: torch.device) -> list[Row]:
    """A decode step captured once and replayed with other lengths gives what eager calls give."""
    case = DecodeCase((900, 2000, 31), 4096)
    data = make_inputs(case, device, 77)
    for name in ("k", "v"):  # rows of other lengths will reach the slots that hold NaN now
        data[name].nan_to_num_(nan=0.5)
    _outputs(ops, data)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _outputs(ops, data)
    rows = []
    for lengths in ((900, 2000, 31), (4096, 1, 2222), (0, 300, 4000)):
        data["length"].copy_(torch.tensor(lengths, dtype=torch.int32))
        data["count"].copy_(torch.tensor([min(n, max(128, n // 10)) for n in lengths], dtype=torch.int32))
        graph.replay()
        same = all(torch.equal(a, b) for a, b in zip(captured, _outputs(ops, data), strict=True))
        rows.append(_row("graph", f"lengths {lengths}", note="" if same else "replay differs from eager", ok=same))
    return rows


def make_inputs(case: DecodeCase, device: torch.device, seed: int, dead_page: int = 1 << 30) -> dict[str, Any]:
    """Random inputs of a case. Slots outside the rows hold NaN; pages are shuffled.

    Pages without a key of the row are `dead_page` in the table, or the last whose slots an int32 can number: a kernel
    that follows one faults.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    batch, starts = len(case.lengths), case.starts or (0,) * len(case.lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.float32, generator=generator)

    q = (normal(batch, case.heads, case.dim) * 2).to(case.dtype)
    k = normal(batch, case.kv_heads, case.slots, case.dim).to(case.dtype)
    v = normal(batch, case.kv_heads, case.slots, case.dim).to(case.dtype)
    slot = torch.arange(case.slots, device=device)
    start = torch.tensor(starts, dtype=torch.int32, device=device)
    length = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    outside = (slot < start[:, None]) | (slot >= (start + length)[:, None])
    k = k.masked_fill(outside[:, None, :, None], float("nan"))
    v = v.masked_fill(outside[:, None, :, None], float("nan"))
    count = [min(n, max(min(128, n), int(case.ratio * n))) for n in case.lengths]
    data = {
        "q": q, "k": k, "v": v, "start": start, "length": length, "table": None, "scale": case.dim**-0.5,
        "count": torch.tensor(count, dtype=torch.int32, device=device), "most": max(*count, 1) + 7 if count else 1,
        "map": torch.randint(0, case.kv_heads, (case.kv_heads,), device=device, generator=generator).int(),
    }  # fmt: skip
    if case.page:
        pages = case.slots // case.page
        table = torch.randperm(batch * pages, device=device, generator=generator).view(batch, pages)
        for name in ("k", "v"):
            cut = data[name].transpose(1, 2).reshape(batch * pages, case.page, case.kv_heads, case.dim)
            store = torch.empty_like(cut)
            store[table.view(-1)] = cut
            data[name] = store
        begin = torch.arange(pages, device=device) * case.page
        dead = (begin >= (start + length)[:, None]) | (begin + case.page <= start[:, None])
        data["table"] = table.int().masked_fill(dead, min(dead_page, (1 << 31) // case.page - 1))
    return data


def _dead(ops: Any) -> int:
    """The reference, under whatever name, gathers whole pages and needs a real one."""
    return 1 << 30 if getattr(ops, "name", "torch") == "tilelang" else 0


def _outputs(ops: Any, data: dict[str, Any]) -> tuple[Tensor, ...]:
    """(dense out, dense scores, dense out without scores, scores, indices, sparse out, sparse out by known logits,
    scores of all heads)."""
    q, k, v, start, length = (data[n] for n in ("q", "k", "v", "start", "length"))
    paged = {} if data["table"] is None else {"block_table": data["table"]}
    out, scores = ops.decode_dense(q, k, v, start, length, scale=data["scale"], scores=True, **paged)
    plain, _ = ops.decode_dense(q, k, v, start, length, scale=data["scale"], **paged)
    pooled, logits = ops.decode_score(q, k, start, length, scale=data["scale"], logits=True, **paged)
    picked = ops.select_topk(pooled, data["count"][:, None], start[:, None], length[:, None], max_count=data["most"])
    where = (q, k, v, picked, data["count"], data["map"])
    sparse = ops.decode_sparse(*where, scale=data["scale"], **paged)
    known = ops.decode_sparse(*where, scale=data["scale"], logits=logits, **paged)
    joined = ops.decode_score(q, k, start, length, scale=data["scale"], pooled=True, **paged)
    return out, scores, plain, pooled, picked, sparse, known, joined


def _check_case(ops: Any, case: DecodeCase, device: torch.device, seed: int) -> list[Row]:
    data = make_inputs(case, device, seed, _dead(ops))
    with poisoned():
        found = _outputs(ops, data)
        again = _outputs(ops, data)
    out, scores, plain, pooled, picked, sparse, known, joined = found
    q, start, length, scale = data["q"], data["start"], data["length"], data["scale"]
    k, v = data["k"], data["v"]
    if data["table"] is not None:
        pages = data["table"].clamp(0, k.shape[0] - 1)
        k, v = reference.gather_pages(k, pages), reference.gather_pages(v, pages)
    wide = [x.double() for x in (q, k, v)]
    true_out, true_scores = reference.decode_dense(*wide, start, length, scale=scale, scores=True)
    visible = row_slots(k, start, length)
    low_out, low_scores = _plain(q, k, v, visible, scale)
    name = str(case)
    rows = [
        _error("decode_dense", name, out, true_out, low_out),
        _error("decode_dense no scores", name, plain, true_out, low_out),
        _error("decode_dense scores", name, scores, true_scores, low_scores),
        _error("decode_score", name, pooled, true_scores, low_scores),
        _error("decode_score pooled", name, joined, *(x.sum(1, keepdim=True) for x in (true_scores, low_scores))),
    ]
    expected = reference.select_topk(
        pooled, data["count"][:, None], start[:, None], length[:, None], max_count=data["most"]
    )
    same = torch.equal(picked, expected)
    rows.append(_row("select_topk", name, note="" if same else "differs from the reference", ok=same))
    chosen = torch.zeros_like(visible).unsqueeze(1).repeat(1, k.shape[1], 1)
    for b in range(len(case.lengths)):
        for g in range(k.shape[1]):
            slots = expected[b, int(data["map"][g])]
            chosen[b, g, slots[slots >= 0].long()] = True
    true_sparse = reference.decode_sparse(*wide, expected, data["count"], data["map"], scale=scale)
    low_sparse = _plain(q, k, v, chosen, scale)[0]
    rows.append(_error("decode_sparse", name, sparse, true_sparse, low_sparse))
    rows.append(_error("decode_sparse logits", name, known, true_sparse, low_sparse))
    if any(not torch.equal(a, b) for a, b in zip(found, again, strict=True)):
        rows.append(_row("repeat", name, note="two calls differ", ok=False))
    return rows


def _plain(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Eager attention in the inputs' own precision; visible bool [B, S] or [B, G, S]. Returns (out, pooled scores)."""
    groups = k.shape[1]
    visible = visible[:, None, None] if visible.dim() == 2 else visible[:, :, None]
    logits = (q.unflatten(1, (groups, -1)) @ k.transpose(-1, -2) * scale).masked_fill(~visible, float("-inf"))
    weight = torch.softmax(logits, -1, dtype=torch.float32).nan_to_num(0.0).to(q.dtype)
    return (weight @ v.nan_to_num(0.0)).flatten(1, 2), weight.sum(2)


def _error(op: str, case: str, found: Tensor, true: Tensor, low: Tensor) -> Row:
    """Largest error against twice plain PyTorch's; the floor is one rounding of the output."""
    error = (found.double() - true).abs().max().item()
    floor = torch.finfo(low.dtype).eps * true.abs().max().item() / 4 + 1e-7
    bound = 2 * (low.double() - true).abs().max().item() + floor
    return _row(op, case, error=error, bound=bound, ok=error <= bound)


def _row(op: str, case: str, *, ok: bool, error: float = 0.0, bound: float = 0.0, note: str = "") -> Row:
    return {"op": op, "case": case, "error": error, "bound": bound, "ok": bool(ok), "note": note}


def summary(rows: list[Row], say: Callable[[str], None] = print) -> bool:
    """One line per op with its worst ratio, one per failure; True if all is well."""
    for op in dict.fromkeys(r["op"] for r in rows):
        mine = [r for r in rows if r["op"] == op]
        worst = max((r["error"] / r["bound"] for r in mine if r["bound"]), default=0.0)
        say(f"{op:24} {sum(r['ok'] for r in mine)}/{len(mine)} inside the rule, worst error/bound {worst:.2f}")
    for r in rows:
        if not r["ok"]:
            say(f"FAILED {r['op']} {r['case']}: error {r['error']:.3g}, bound {r['bound']:.3g} {r['note']}")
    return all(r["ok"] for r in rows)
