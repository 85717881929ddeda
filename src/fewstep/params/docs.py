"""What is made from the fields of the blocks: the schema for editors and docs/params.md's tables.

`python -m fewstep.params.docs --write` makes them anew, `--check` fails when they are stale.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fewstep.params.fields import Rule
from fewstep.params.schema import file_rules, rules, words

PAGE, SCHEMA = Path("docs/params.md"), Path("workflow/schemas/params.schema.yaml")
HEADER = (
    "# What params.yaml may hold. Made by `python -m fewstep.params.docs --write`; do not edit.\n"
)
# `<!-- keys of Noise -->`, the table, `<!-- end -->`
TABLE = re.compile(r"(<!-- keys of (\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)


class _Written(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # noqa: ANN401
        return True  # anchors would stand for rules that are equal only by chance


def schema_text() -> str:
    """The schema of the file, as YAML."""
    return HEADER + yaml.dump(_for_editors(file_rules()), Dumper=_Written, sort_keys=False)


def _for_editors(rule: Any) -> Any:  # noqa: ANN401
    """What an editor shows: it has no room for what the page adds."""
    if isinstance(rule, list):
        return [_for_editors(inner) for inner in rule]
    if isinstance(rule, float) and rule.is_integer():
        return int(rule)  # pydantic's versions differ in 0 and 0.0
    if not isinstance(rule, dict):
        return rule
    return {key: _for_editors(inner) for key, inner in rule.items() if key != "more"}


def page_text(text: str) -> str:
    """The page, its tables those of the fields."""
    own = {block for _, block in TABLE.findall(text)}
    return TABLE.sub(lambda found: found[1] + table(found[2], own), text)


def table(block: str, own: set[str]) -> str:
    """The keys of a block in Markdown, and those of inner blocks without a table of their `own`."""
    lines = ["| key | values | meaning |", "|---|---|---|"]
    for key, values, meaning in _rows(_rule(block), own):
        lines.append(f"| `{key}` | {values} | {meaning} |")
    return "\n".join(lines) + "\n"


def _rule(block: str) -> Rule:
    """Of a class of params, or of the settings of a method by its name."""
    of_method = {
        part["if"]["properties"]["method"]["const"]: part["then"]["properties"]["settings"]["$ref"]
        for part in rules()["$defs"]["Student"]["allOf"]
    }
    name = of_method.get(block, block).rpartition("/")[2]
    return rules() if block == "Params" else rules()["$defs"][name]


def _rows(block: Rule, own: set[str]) -> Iterator[tuple[str, str, str]]:
    for key, rule, when in _keys(block):
        more = rule.get("more", "")
        meaning = (
            f"{rule['description']}. {more[0].upper()}{more[1:]}" if more else rule["description"]
        )
        yield key, "; ".join(filter(None, (_values(rule), when))), meaning
        inner = rule.get("$ref", "").rpartition("/")[2]
        if inner and inner not in own:
            for below, values, meaning in _rows(_rule(inner), own):
                yield f"{key}.{below}", values, meaning


def _keys(block: Rule) -> Iterator[tuple[str, Rule, str]]:
    """Each key of a block, its rule, and when it is there if it need not be."""
    for part in (block, *block.get("allOf", ())):
        needed = part.get("required", ())
        for key, rule in part.get("properties", {}).items():
            if rule:
                yield key, rule, "" if key in needed or "default" in rule else "optional"
        for branch in ("then", "else"):
            own = part.get(branch, {})
            for key, rule in own.get("properties", {}).items():
                if "description" in rule:  # else it is refused, or is described elsewhere
                    may = "" if key in own.get("required", ()) else "; optional"
                    yield key, rule, _condition(part["if"], branch) + may


def _condition(rule: Rule, branch: str) -> str:
    word = "if" if branch == "then" else "unless"
    if "properties" in rule:
        [(key, value)] = rule["properties"].items()
        return f"{word} `{key}` is `{value['const']}`"
    return f"{word} `{rule['required'][0]}` is there"


def _values(rule: Rule) -> str:
    """What a key may be, its unit and its default."""
    if "enum" in rule:
        what = " ".join(f"`{choice}`" for choice in rule["enum"])
    elif rule.get("type", "object") == "object":
        what = "block" if "title" not in rule else words(rule)
    else:
        what = re.sub("^an? ", "", words(rule)).replace(">=", "≥").replace("<=", "≤")
    default = f"default `{str(rule['default']).lower()}`" if "default" in rule else ""
    return "; ".join(filter(None, (", ".join(filter(None, (what, rule.get("unit")))), default)))


def main() -> None:
    """Write what is stale, or say that it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--write", action="store_true", help="make the files anew")
    choice.add_argument("--check", action="store_true", help="fail when a file is stale")
    wanted = {SCHEMA: schema_text(), PAGE: page_text(PAGE.read_text())}
    stale = [file for file, text in wanted.items() if not _is(file, text)]
    if parser.parse_args().write:
        for file in stale:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(wanted[file])
    elif stale:
        sys.exit(f"{', '.join(map(str, stale))}: stale; run python -m fewstep.params.docs --write")


def _is(file: Path, text: str) -> bool:
    return file.exists() and file.read_text() == text


if __name__ == "__main__":
    main()
