"""The tiles under the title: what a reader wants to know first, each only where a file says it."""

from typing import Any

from kascade_cli.report.content import Content, difference
from kascade_cli.report.files import Source, trusted
from kascade_cli.report.markup import Safe, tag


def tiles(content: Content) -> Safe:
    found: list[tuple[str, str, str]] = []
    for source in content.of("profile")[:1]:
        found += _profile(source)
    for source in content.of("evaluation")[:1]:
        with trusted(source):
            found += _answers(source)
    for source in content.of("bench")[:1]:
        with trusted(source):
            found += _speed(source)
    if not found:
        return Safe("")
    return tag(
        "dl", *(tag("div", tag("dt", name), tag("dd", value, tag("small", note))) for name, value, note in found),
        class_="tiles",
    )  # fmt: skip


def _keys_read(budget: Any) -> tuple[str, str]:
    """The share, or where it depends on the length, from the most to the fewest; the rest of it in small."""
    least = f"at least {budget.min_keys}"
    if not budget.ratios:
        return f"{100 * budget.ratio:.4g} %", least
    shares = [f"{100 * share:g}" for share in (max(budget.ratios.values()), min(budget.ratios.values()))]
    return (
        f"{shares[0]} to {shares[1]} %" if shares[0] != shares[1] else f"{shares[0]} %"
    ), f"{budget.describe()}; {least}"


def _profile(source: Source) -> list[tuple[str, str, str]]:
    profile = source.document
    anchors, layers = profile.anchors, profile.attention_layers
    named = " ".join(map(str, anchors))
    found = [
        ("anchor layers", f"{len(anchors)} of {len(layers)}", named if len(named) < 30 else ""),
        ("keys read", *_keys_read(profile.budget)),
    ]
    verify = profile.selection.get("verify")
    candidates = verify.get("candidates") if isinstance(verify, dict) else None
    for entry in candidates if isinstance(candidates, list) else []:
        same = isinstance(entry, dict) and entry.get("anchors") == anchors
        if same and bool(entry.get("pooled")) == profile.pooled and isinstance(entry.get("kl_mean"), float):
            found.append(("KL to dense, nats", f"{entry['kl_mean']:.2g}", "on held-out prompts"))
    return found


def _answers(source: Source) -> list[tuple[str, str, str]]:
    """kascade against dense at the longest length, and the ratio nearest to a tenth."""
    rows = source.document["rows"]
    length = max(row["length"] for row in rows)
    mine = [row for row in rows if row["length"] == length and row["strategy"] == "kascade"]
    if not mine:
        return []
    row: dict[str, Any] = min(mine, key=lambda row: abs((row.get("ratio") or 0) - 0.1))
    versus = row["mean"].get("vs_dense")
    note = f"{difference(versus)} to dense, {length:,} tokens" if versus else f"{length:,} tokens"
    read = f"{100 * row['density']['all']:.3g} % of the keys"
    return [("kascade answers", f"{row['mean']['score']:.1f}", f"of 100; {note}; reads {read}")]


def _speed(source: Source) -> list[tuple[str, str, str]]:
    found = []
    models = [row for row in source.document["rows"] if row.get("kind") == "model" and "speedup" in row]
    for phase in ("decode", "prefill"):
        mine = [row for row in models if row["phase"] == phase and row.get("strategy", "kascade") == "kascade"]
        if mine:
            best = max(mine, key=lambda row: row["speedup"])
            found.append((f"{phase} attention", f"{best['speedup']:.2f}x", f"over dense, {best['size']}"))
    return found
