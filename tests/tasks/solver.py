"""Answers questions by reading the haystack's words, with nothing taken from the generator."""

MARKERS = {"@", "#", "<c>"}


def parse(haystack: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """(records key -> two values, links key -> key) of a haystack; fails on a key that is defined twice."""
    words = haystack.split()
    records: dict[str, list[str]] = {}
    links: dict[str, str] = {}
    for i, word in enumerate(words):
        if word == "@":
            assert words[i + 1] not in records
            records[words[i + 1]] = words[i + 2 : i + 4]
        elif word == "#":
            assert words[i + 1] not in links
            links[words[i + 1]] = words[i + 2]
    assert not records.keys() & links.keys()
    return records, links


def solve(haystack: str, question: str) -> str:
    """The answer to `? k`, `?? a`, `<r0> a` or `<r1> b`."""
    records, links = parse(haystack)
    marker, key = question.split()
    if marker == "?":
        return " ".join(records[key])
    if marker == "??":
        return " ".join([links[key], *records[links[key]]])
    if marker == "<r0>":
        return " ".join(records[links[key]])
    if marker == "<r1>":
        return " ".join(records[links[links[key]]])
    raise ValueError(question)
