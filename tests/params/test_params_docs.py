"""The schema, the blocks and the PAGE agree."""

import re
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from fewstep import params as module
from fewstep.methods import names as method_names
from fewstep.params import settings_of
from fewstep.params.docs import PAGE, SCHEMA, page_text, schema_text, table
from fewstep.params.schema import rules
from params_edits import PRESETS
from places import ROOT


def blocks(rule: object, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping of properties in the schema, with where it is."""
    if isinstance(rule, dict):
        if isinstance(rule.get("properties"), dict):
            yield path, rule["properties"]
        for key, inner in rule.items():
            yield from blocks(inner, f"{path}/{key}")
    elif isinstance(rule, list):
        for index, inner in enumerate(rule):
            yield from blocks(inner, f"{path}/{index}")


RULES = rules()
CLASSES = [getattr(module, name) for name in RULES["$defs"] if hasattr(module, name)]


def test_schema_is_a_schema_and_describes_every_key() -> None:
    Draft202012Validator.check_schema(RULES)
    described = {
        key
        for _, properties in blocks(RULES)
        for key, rule in properties.items()
        if isinstance(rule, dict) and "description" in rule
    }
    assert described == {key for _, properties in blocks(RULES) for key in properties}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_dataclass_has_the_keys_and_choices_of_its_block(kind: Any) -> None:  # noqa: ANN401
    parts = [RULES["$defs"][kind.__name__]]
    parts += [part[branch] for part in parts for branch in ("then", "else") if branch in part]
    parts += [branch["then"] for branch in parts[0].get("allOf", ())]
    properties = {k: rule for part in parts for k, rule in part.get("properties", {}).items()}
    hints = typing.get_type_hints(kind)
    assert is_dataclass(kind)
    assert {f.name for f in fields(kind)} == properties.keys()
    for key, rule in properties.items():
        if isinstance(rule, dict) and "enum" in rule and hints[key] is not str:
            choices = typing.get_args(hints[key])
            if type(None) in choices:  # an optional key
                choices = typing.get_args(choices[0])
            assert list(choices) == rule["enum"], key


def test_a_method_is_one_of_those_that_have_settings() -> None:
    assert RULES["$defs"]["Student"]["properties"]["method"]["enum"] == method_names()
    branches = RULES["$defs"]["Student"]["allOf"]
    assert [b["if"]["properties"]["method"]["const"] for b in branches] == method_names()
    for branch in branches:
        rules = RULES["$defs"][branch["then"]["properties"]["settings"]["$ref"].split("/")[-1]]
        method = branch["if"]["properties"]["method"]["const"]
        assert set(rules["properties"]) == {f.name for f in fields(settings_of(method))}
    with pytest.raises(ValueError, match="need a method of .*, got 'gan'"):
        settings_of("gan")


def test_page_explains_every_key() -> None:
    page = (ROOT / PAGE).read_text()
    keys = {key for _, properties in blocks(RULES) for key in properties}
    assert not [key for key in sorted(keys) if not re.search(rf"`([a-z_]+\.)?{key}\b", page)]


def test_schema_and_page_are_fresh() -> None:
    stale = "run python -m fewstep.params.docs --write"
    assert (ROOT / SCHEMA).read_text() == schema_text(), stale
    page = (ROOT / PAGE).read_text()
    assert page == page_text(page), stale


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_an_editor_finds_nothing_wrong_with_a_preset(preset: Any) -> None:  # noqa: ANN401
    schema = yaml.safe_load((ROOT / SCHEMA).read_text())
    Draft202012Validator(schema).validate(yaml.safe_load(preset.read_text()))


def test_a_row_of_a_table_has_range_unit_and_meaning() -> None:
    assert "| `sigma_max` | number > 0, sigma | highest noise level" in table("Noise", set())
    assert "| `kimg` | number > 0, kimg; if `kind` is `half_life` | half-life |" in table(
        "Ema", set()
    )
    assert "| `kid.subsets` | integer ≥ 2 |" in table("Metric", set())
    assert "kid.subsets" not in table("Metric", {"KidSettings"})


@pytest.mark.parametrize("preset", sorted((ROOT / "config").glob("*.yaml")), ids=lambda p: p.stem)
def test_snakemakes_own_validation_takes_every_preset(preset: Path) -> None:
    from snakemake.common.configfile import load_configfile
    from snakemake.utils import validate

    validate(load_configfile(str(preset)), str(ROOT / SCHEMA))
