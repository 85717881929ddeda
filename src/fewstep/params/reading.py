"""params.yaml as plain values, without what two readers of YAML would read differently.

This package and Snakemake read YAML 1.1, DVC reads YAML 1.2.
"""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from fewstep.budgets import PARAMS, PARAMS_VALUES, read_small, within
from fewstep.params.problems import KeyPath, ParamsError, Report, show
from fewstep.quoting import plain

_FLOAT = "tag:yaml.org,2002:float"
# What both versions read alike: not `on`, `010` or `1_000`.
_ALIKE = {
    "tag:yaml.org,2002:bool": re.compile("true|True|TRUE|false|False|FALSE"),
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9][0-9]*)"),
    _FLOAT: re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?"),
}


def read(path: Path, report: Report) -> dict[str, Any]:
    """The file as plain values; reports duplicate keys and values that YAMLs read differently.

    Raises:
        ParamsError: no such file, one that is no YAML mapping, or one that passes a budget.
    """
    try:
        text = read_small(path, PARAMS, "params")
    except FileNotFoundError:
        raise ParamsError(
            f"need a params file, got nothing at {path}; run in the repository's root, write one "
            "for your images with `fewstep new`, or copy a preset from config/"
        ) from None
    except OSError as error:
        raise ParamsError(f"need a file that can be read, got: {error.strerror} ({path})") from None
    except ValueError as error:
        raise ParamsError(f"need a file that can be read, got: {error} ({path})") from None
    try:
        raw = _parse(text, report)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ParamsError(f"need valid YAML, got: {where}{error.problem} ({path})") from None
    except RecursionError:
        raise ParamsError(f"need params, got values that are nested too deeply ({path})") from None
    except (yaml.YAMLError, ValueError) as error:
        reason = plain(" ".join(str(error).split()), 500)
        raise ParamsError(f"need valid YAML, got: {reason} ({path})") from None
    if not isinstance(raw, dict):
        got = "an empty file" if raw is None else show(raw)
        raise ParamsError(f"need a mapping of keys to values, got {got} ({path})")
    return raw


def _parse(text: bytes, report: Report) -> Any:  # noqa: ANN401
    loader = yaml.SafeLoader(text)
    root = loader.get_single_node()
    if root is None:
        return None
    _values(root, {})
    _check(root, (), report, set())
    return loader.construct_document(root)


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, with all aliases written out.

    Nine lists of nine aliases, one in the other, stand for a billion values. An alias inside its
    own anchor counts once here; whoever looks for the values refuses it.

    Raises:
        ValueError: more than params have.
    """
    if id(node) not in known:
        known[id(node)] = 1
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        else:
            parts = node.value if isinstance(node, yaml.SequenceNode) else []
        known[id(node)] += sum(_values(part, known) for part in parts)
        within(known[id(node)], PARAMS_VALUES, "values with aliases written out")
    return known[id(node)]


def _check(node: yaml.Node, path: KeyPath, report: Report, seen: set[int]) -> None:
    if id(node) in seen:  # an alias, which may even lie inside its own anchor
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        _check_mapping(node, path, report, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _check(item, (*path, index), report, seen)
    elif isinstance(node, yaml.ScalarNode) and node.style is None and _is_repr(node.value):
        node.tag = _FLOAT
    elif node.tag in _ALIKE:
        text = node.value
        if not _ALIKE[node.tag].fullmatch(text):
            message = f"YAML 1.1 and 1.2 may read {text} differently; write a finite decimal number"
            report.refuse(path, f"{message}, true or false, or put text in quotes")
        elif node.tag == _FLOAT and not math.isfinite(float(text)):
            report.refuse(path, f"need a finite number, got {text}")


def _check_mapping(node: yaml.MappingNode, path: KeyPath, report: Report, seen: set[int]) -> None:
    lines: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue  # a mapping as a key: `construct_document` refuses it
        line = key.start_mark.line + 1
        if key.value in lines:
            message = f"need each key once, got it in lines {lines[key.value]} and {line}"
            report.refuse((*path, key.value), message)
        lines[key.value] = line
        _check(value, (*path, key.value), report, seen)


def _is_repr(text: str) -> bool:
    """Whether `text` is Python's way of writing a small or large number, such as 1e-05.

    YAML 1.1 reads that as a string, but `dvc exp run -S` writes it and can write nothing else.
    """
    return re.fullmatch(r"-?[1-9]e[-+][0-9]+", text) is not None and repr(float(text)) == text
