"""YAML as plain data, from text that nobody vouches for: no aliases, no tags of one's own, no surprises.

What PyYAML's safe loader lets through and we do not: aliases (a kilobyte of them can stand for gigabytes), nesting
without end, a key given twice, keys that are no text, NaN and infinity, numbers of thousands of digits, half
characters. Dates stay text.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MAX_DEPTH = 20  # mappings and lists within each other
MAX_NODES = 50_000  # values: a profile of 200 layers with 32 KV heads has 15,000; PyYAML reads some 10,000 a second
_LONGEST_NUMBER = 40  # characters
_TAG = "tag:yaml.org,2002:"
_WHOLE = re.compile("[1-9][0-9]{0,9}")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_PLAIN_TAGS = {_TAG + name: name for name in ("null", "bool", "int", "float", "timestamp", "str", "seq", "map")}


class YamlProblem(ValueError):
    """The text cannot be read. `line` counts from 1, None where it is not known; the message is the reason."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


def load(text: str, number_keys: Sequence[str] = ()) -> Any:
    """dicts with text keys, lists, str, int, float (finite), bool and None. Raises YamlProblem.

    number_keys: the place of a mapping whose keys may stand as whole numbers; they are read as their text.
    """
    try:
        loader = _Loader(text)  # looks at the first characters
        node = loader.get_single_node()
        _number_keys_as_text(node, number_keys)
        return None if node is None else _construct(loader, node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or (str(error).splitlines() or ["unknown reason"])[0]
        raise YamlProblem(reason, mark.line + 1 if mark else None) from error
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
        # PyYAML's scanner converts escapes and version numbers without a check.
        raise YamlProblem(f"{type(error).__name__}: {str(error)[:200]}") from error


def _number_keys_as_text(node: Node | None, place: Sequence[str]) -> None:
    if not place:
        return
    for part in place:
        if not isinstance(node, MappingNode):
            return
        node = next((value for key, value in node.value if key.value == part), None)
    for key, _ in node.value if isinstance(node, MappingNode) else ():
        if key.tag == _TAG + "int" and _WHOLE.fullmatch(key.value):
            key.tag = _TAG + "str"


def line_of(text: str, location: Sequence[str]) -> int | None:
    """The line of the deepest node on the way to `location` in a text that `load` takes, or None."""
    node, line = yaml.compose(text, Loader=_Loader), None
    for part in location:
        if isinstance(node, MappingNode):
            pairs = {key.value: (key, value) for key, value in node.value}
            if part not in pairs:
                break
            key, node = pairs[part]
            line = key.start_mark.line + 1
        elif isinstance(node, SequenceNode) and part.isascii() and part.isdecimal() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
        else:
            break
    return line


class _Loader(yaml.SafeLoader):
    yaml_constructors: dict[str, Any] = {}
    _depth = _nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _problem("aliases (`*name`) are not read: write the value out", event)
        if self._depth >= MAX_DEPTH:
            raise _problem(f"nested more than {MAX_DEPTH} deep", event)
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _problem(f"more than {MAX_NODES:,} values", event)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def _problem(reason: str, node: Any) -> ConstructorError:
    return ConstructorError(None, None, reason, node.start_mark)


def _construct(loader: _Loader, node: Node) -> Any:
    """The value of any node: by its kind first, then, of a scalar, by its tag."""
    kind = _PLAIN_TAGS.get(node.tag)
    if kind is None:
        raise _problem(f"tag {node.tag.replace(_TAG, '!!')[:80]} is not known", node)
    if (kind == "map") != isinstance(node, MappingNode) or (kind == "seq") != isinstance(node, SequenceNode):
        raise _problem(f"this is no !!{kind}", node)
    if isinstance(node, MappingNode):
        return _mapping(loader, node)
    if isinstance(node, SequenceNode):
        return [_construct(loader, entry) for entry in node.value]
    return _scalar(loader, kind, node)


def _mapping(loader: _Loader, node: MappingNode) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, ScalarNode) or _PLAIN_TAGS.get(key_node.tag) not in ("str", "timestamp"):
            shown = f"key {key_node.value[:80]}" if isinstance(key_node, ScalarNode) else "a key"
            raise _problem(f"{shown} is no text: put it into quotes", key_node)
        key = _scalar(loader, "str", key_node)
        if key in found:
            raise _problem(f"key '{key}' is given twice", key_node)
        found[key] = _construct(loader, value_node)
    return found


def _scalar(loader: _Loader, kind: str, node: ScalarNode) -> Any:
    text = node.value
    if kind in ("str", "timestamp"):
        if _SURROGATE.search(text):
            raise _problem("half a character (a lone surrogate)", node)
        return text
    if kind == "null":
        return None
    if len(text) > _LONGEST_NUMBER:
        raise _problem(f"a number of {len(text)} characters", node)
    try:
        value = getattr(loader, f"construct_yaml_{kind}")(node)
    except (ValueError, LookupError, ArithmeticError) as error:
        raise _problem(f"'{text}' is no !!{kind}", node) from error
    if isinstance(value, float) and not math.isfinite(value):
        raise _problem(f"{text} is no number that can stand here", node)
    return value


_Loader.yaml_constructors[None] = _construct  # type: ignore[index]
