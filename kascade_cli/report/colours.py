"""Colours: a scale for heat maps, and a class of the style sheet for every series, the same on the whole page."""

from collections.abc import Sequence

# viridis at nine places (matplotlib's, CC0): readable in grey and by colour-blind readers.
_VIRIDIS = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99),
    (170, 220, 50), (253, 231, 37),
)  # fmt: skip

# What has a colour of its own wherever it appears; others take what is left, in the order in which they come.
_FIXED = {
    "dense": "dense", "kascade": "s1", "kascade-no-remap": "s2", "kascade-pooled": "s3", "oracle": "s4",
    "streaming-llm": "s5", "oracle-per-query": "s6", "kascade-decode-only": "s7", "random": "s8",
    "post-softmax": "s1", "pre-softmax": "s2", "decode": "s1", "prefill": "s2",
}  # fmt: skip
_SERIES = ("s6", "s7", "s8", "s2", "s3", "s4", "s5", "s1")
MARKERS = ("circle", "square", "triangle", "diamond")


def viridis(share: float) -> str:
    """`#rrggbb` for 0 to 1; anything outside is taken to the edge."""
    place = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    low = min(int(place), len(_VIRIDIS) - 2)
    mixed = [round(a + (b - a) * (place - low)) for a, b in zip(_VIRIDIS[low], _VIRIDIS[low + 1], strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def ink_on(share: float) -> str:
    """The class of text that is readable on `viridis(share)`."""
    return "on-dark" if share < 0.6 else "on-light"


def series(labels: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Label -> (class, marker). Two labels share both only beyond 32 of them."""
    found: dict[str, tuple[str, str]] = {}
    taken: set[tuple[str, str]] = set()
    free = [(colour, marker) for marker in MARKERS for colour in _SERIES]
    for label in labels:
        if label in _FIXED:
            found[label] = (_FIXED[label], MARKERS[0])
            taken.add(found[label])
    for label in labels:
        if label not in found:
            found[label] = next((look for look in free if look not in taken), free[0])
            taken.add(found[label])
    return {label: found[label] for label in labels}
