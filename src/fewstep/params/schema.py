"""The JSON schema of params.yaml, made from the blocks, and what it finds wrong.

pydantic would stop at types that it can convert and words its errors for programmers; the schema
made from its models finds the same problems, in words that this module chooses.
"""

import re
from copy import deepcopy
from functools import cache
from typing import Any, cast

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from fewstep import methods
from fewstep.params.blocks import Params
from fewstep.params.fields import Rule, describe
from fewstep.params.merging import BY_KEY, UNSHARED
from fewstep.params.methods import settings_of
from fewstep.params.problems import KeyPath, Report, did_you_mean, nearest, show
from fewstep.quoting import plain


class _Rules(GenerateJsonSchema):
    """pydantic's JSON schema, in which only the words written at a field are `title`s."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ANN401
        return False

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        rule = super().dataclass_schema(schema)
        del rule["title"]
        rule.pop("description", None)  # the class's docstring is for programmers
        describe(schema["cls"], rule)
        return rule

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])  # an optional key is absent, never null

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        rule, default = self.generate_inner(schema["schema"]), schema.get("default")
        return rule if default is None else {**rule, "default": default}

    def literal_schema(self, schema: core_schema.LiteralSchema) -> JsonSchemaValue:
        return {"enum": list(schema["expected"])}

    def dict_schema(self, schema: core_schema.DictSchema) -> JsonSchemaValue:
        of = cast(Any, schema)  # every mapping here says what its keys and values are
        return {
            "type": "object",
            "propertyNames": self.generate_inner(of["keys_schema"]),
            "additionalProperties": self.generate_inner(of["values_schema"]),
        }


@cache
def rules() -> Rule:
    """The schema of params whose students are merged with `training`, which may still be there."""
    names = methods.names()
    kinds = {"": Params, **{name: settings_of(name) for name in names}}
    adapters = [(name, "validation", TypeAdapter(kind)) for name, kind in kinds.items()]
    references, rest = TypeAdapter.json_schemas(cast(Any, adapters), schema_generator=_Rules)
    defs: dict[str, Rule] = rest["$defs"]
    student, teacher = defs["Student"], defs["Teacher"]["properties"]["train"]
    student["allOf"] = [
        {
            "if": {"required": ["method"], "properties": {"method": {"const": name}}},
            "then": {"properties": {"settings": references[name, "validation"]}},
        }
        for name in names
    ]
    alone = [name for name in names if not settings_of(name).needs_teacher]
    teacher["properties"]["method"] = {"enum": alone, "title": " or ".join(alone)}
    defs["SharedValidation"] = {k: v for k, v in defs["Validation"].items() if k != "required"}
    whole = defs.pop("Params")
    whole["properties"] = _before("students", {"training": _training(student)}, whole["properties"])
    return {**whole, "$defs": defs}


def _before(key: str, new: Rule, properties: Rule) -> Rule:
    """Properties with new ones before one of them."""
    at = list(properties).index(key)
    pairs = list(properties.items())
    return dict([*pairs[:at], *new.items(), *pairs[at:]])


def _training(student: Rule) -> Rule:
    """Any of the keys that students can share."""
    shared = [key for key in student["properties"] if key not in UNSHARED]
    properties = {key: {"$ref": f"#/$defs/Student/properties/{key}"} for key in shared}
    return {
        "type": "object",
        "description": "keys of students, shared by all that do not override them; absent = none",
        "additionalProperties": False,
        "properties": properties | {BY_KEY: {"$ref": "#/$defs/SharedValidation"}},
    }


def file_rules() -> Rule:
    """The schema of the file itself, for editors: what `training` may hold, a student may lack."""
    whole = deepcopy(rules())
    student, properties = whole["$defs"]["Student"], whole["$defs"]["Student"]["properties"]
    for key in properties.keys() - {*student["required"], *UNSHARED}:  # null leaves it out
        rule = properties[key]
        properties[key] = {"description": rule["description"], "anyOf": [rule, {"type": "null"}]}
    student["required"] = [key for key in student["required"] if key in UNSHARED]
    whole["$defs"]["Validation"] = whole["$defs"].pop("SharedValidation")
    whole["properties"]["training"]["properties"][BY_KEY]["$ref"] = "#/$defs/Validation"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole}


def check_values(params: dict[str, Any], report: Report) -> None:
    """Report each value of merged params that breaks a rule."""
    from jsonschema import Draft202012Validator  # 0.1 s that importing a block need not pay

    errors = list(Draft202012Validator(rules()).iter_errors(params))
    misspelt: set[KeyPath] = set()
    for error in errors:
        if error.validator == "additionalProperties":
            path, known = tuple(error.absolute_path), cast(Rule, error.schema)["properties"]
            for key in [key for key in error.instance if key not in known]:
                hint = did_you_mean(key, known) or f"; known keys: {', '.join(known)}"
                report.refuse((*path, key), f"unknown key '{plain(str(key))}'{hint}", at=path)
                misspelt.add((*path, nearest(key, known)))
    for error in errors:
        path, value = tuple(error.absolute_path), error.instance
        rule = cast(Rule, error.schema)
        if error.validator in ("required", "dependentRequired"):
            for key in [key for key in _lacking(rule, value) if (*path, key) not in misspelt]:
                of = _resolved(_resolved(rule)["properties"][key])
                unit = f" ({of['unit']})" if "unit" in of else ""
                message = f"need {words(of)}: {of['description']}{unit}, got no such key"
                report.refuse((*path, key), message)
        elif error.validator != "additionalProperties":
            is_key = "propertyNames" in error.absolute_schema_path
            message = f"need {words(rule)}, got {show(value, rule)}{_repair(value, rule)}"
            report.refuse((*path, value) if is_key else path, message, at=path)


def _lacking(rule: Rule, block: Rule) -> list[str]:
    """Keys that a block lacks, always or beside others that it has."""
    pairs = rule.get("dependentRequired", {})
    beside = [key for other, keys in pairs.items() if other in block for key in keys]
    return [key for key in (*rule.get("required", ()), *beside) if key not in block]


def _resolved(rule: Rule) -> Rule:
    """A rule with its `$ref`, if it has one, followed."""
    name = rule.get("$ref", "").rpartition("/")[2]
    return {**rules()["$defs"][name], **rule} if name else rule


def words(rule: Rule) -> str:
    """What a rule asks for, in words."""
    if "title" in rule:
        return rule["title"]
    if "enum" in rule:
        return "one of " + ", ".join(rule["enum"])
    nouns = {
        "boolean": "true or false",
        "integer": "an integer",
        "number": "a number",
        "object": "a mapping",
        "string": "a string",
    }
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {rule[bound]:g}" for bound, sign in bounds.items() if bound in rule]
    return " ".join(filter(None, (nouns[rule["type"]], " and ".join(limits))))


def _repair(value: object, rule: Rule) -> str:
    """How to write `value` so that it passes `rule`, where that can be guessed."""
    if rule.get("type") == "string" and isinstance(value, int | float):
        return "; put it in quotes"
    if not isinstance(value, str):
        return ""
    if "enum" in rule:
        return did_you_mean(value, rule["enum"])
    if "@" in value and " name of " in rule.get("title", ""):
        return "; '@' is for rows, where NAME@best is the model that validation chose"
    if re.search(rule.get("pattern", "^$"), dashed := value.replace(".", "-")):
        return f"; write {dashed}, because DVC splits names at dots"
    number = re.fullmatch(r"([-+]?[0-9]+)(\.[0-9]*)?(?:[eE]([-+]?)([0-9]+))?", value)
    if number is None or rule.get("type") not in ("integer", "number"):
        return ""
    if rule["type"] == "integer":
        return f"; write {float(value):.0f}" if float(value).is_integer() else ""
    whole, fraction, sign, exponent = number.groups()
    if exponent is None:
        return f"; write {value}"
    # YAML 1.1 reads a number with an exponent only where it has a point and a sign.
    return f"; write {whole}{fraction or '.0'}e{sign or '+'}{exponent}"
