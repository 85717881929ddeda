"""Edits of a params file's text that keep its comments and its order.

A comment that stands behind a value goes with the value that it was written for.
"""

import re
from collections.abc import Callable, Iterator

import yaml

KeyPath = tuple[str, ...]
Span = tuple[int, int]


class Text:
    """A params file, to be edited by paths of keys."""

    def __init__(self, text: str) -> None:
        self.text = text
        root = yaml.compose(text, yaml.SafeLoader)
        assert isinstance(root, yaml.MappingNode), "presets are mappings"
        self._nodes = dict(_nodes(root, ()))
        self._edits: dict[Span, str] = {}

    def paths(self) -> list[KeyPath]:
        """All keys, those of blocks before what is in them."""
        return list(self._nodes)

    def value(self, path: KeyPath) -> str:
        """A scalar as it is written."""
        return self._nodes[path][1].value

    def put(self, path: KeyPath, value: str) -> None:
        """Another value on the line of a key; its comment goes."""
        node = self._nodes[path][1]
        self._edits[node.start_mark.index, node.end_mark.index] = value
        line_end = self._line_end(node.end_mark.index)
        if comment := re.search(r"\s+#.*$", self.text[node.end_mark.index : line_end]):
            self._edits[node.end_mark.index + comment.start(), line_end] = ""

    def replace(self, path: KeyPath, block: str) -> None:
        """Whole lines, from that of a key to the last of its block; "" drops them."""
        self._edits[self.lines_of(path)] = block

    def lines_of(self, path: KeyPath) -> Span:
        """The characters from the line of a key to the end of its block, comments after it not."""
        key, value = self._nodes[path]
        start = self.text.rfind("\n", 0, key.start_mark.index) + 1
        end = self._line_end(value.end_mark.index)
        if isinstance(value, yaml.CollectionNode) and not value.flow_style:
            whole = self.text[start : value.end_mark.index].split("\n")
            while whole and re.match(r"\s*(#|$)", whole[-1]):
                whole.pop()
            end = start + len("\n".join(whole))
        return start, min(end + 1, len(self.text))

    def block(self, path: KeyPath) -> str:
        """The text of `lines_of`."""
        start, end = self.lines_of(path)
        return self.text[start:end]

    def scale(self, wanted: Callable[[KeyPath], bool], write: Callable[[float], str]) -> None:
        """Other numbers at all paths that are wanted."""
        for path, (_, node) in self._nodes.items():
            if wanted(path) and isinstance(node, yaml.ScalarNode):
                self.put(path, write(float(node.value)))

    def edited(self) -> str:
        """The text after all edits; what lies inside a replaced block is lost with it."""
        text, before = self.text, len(self.text) + 1
        outer = [s for s in self._edits if not any(_inside(s, o) for o in self._edits)]
        for start, end in sorted(outer, reverse=True):
            assert end <= before, "edits do not overlap"
            text, before = text[:start] + self._edits[start, end] + text[end:], start
        return text

    def _line_end(self, index: int) -> int:
        end = self.text.find("\n", index)
        return len(self.text) if end < 0 else end


def _inside(inner: Span, outer: Span) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]


def _nodes(
    node: yaml.MappingNode, path: KeyPath
) -> Iterator[tuple[KeyPath, tuple[yaml.Node, yaml.Node]]]:
    for key, value in node.value:
        here = (*path, str(key.value))
        yield here, (key, value)
        if isinstance(value, yaml.MappingNode):
            yield from _nodes(value, here)
