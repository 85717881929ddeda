"""The words in which the blocks of params describe their keys.

A key's type says its range, `asks` what a type cannot say, and the string below it what it means:
one sentence for error messages and editors, then what only docs/params.md adds. Like docstrings,
these strings are no part of the code's identity: better wording retrains nothing.
"""

import ast
import inspect
import itertools
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import field
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic.dataclasses
from pydantic import AfterValidator, ConfigDict, Field, WithJsonSchema

Rule = dict[str, Any]  # a JSON schema, or a part of one
Condition = Callable[[Rule], None]
T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")


def asks(need: str = "", **rules: Any) -> Any:  # noqa: ANN401
    """What a key's type does not say.

    Args:
        need: how an error message asks for the value, where type and range do not say it well.
        rules: words of JSON Schema, or `unit` of a number.
    """
    extra: Any = rules | ({"title": need} if need else {})
    return Field(json_schema_extra=extra)


def one_of(names: Iterable[str]) -> Any:  # noqa: ANN401
    """A string that is one of these, where a Literal would say again what a table says."""
    return WithJsonSchema({"enum": list(names)})


Natural = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Several = Annotated[int, Field(ge=2)]  # fewer have no spread, or no interval between them
Steps = Annotated[  # `own` becomes a number before pydantic sees it: fewstep.params.steps
    int,
    WithJsonSchema(
        {
            "anyOf": [{"type": "integer", "minimum": 1}, {"enum": ["own"]}],
            "title": "an integer >= 1, or own",
        }
    ),
]
Amount = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
ProperShare = Annotated[float, Field(gt=0, lt=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Width = Annotated[float, Field(gt=0, lt=0.289)]  # of a power-function average; EDM2, eq. 123
Kimg = Annotated[float, Field(gt=0), asks(unit="kimg")]
KimgOrZero = Annotated[float, Field(ge=0), asks(unit="kimg")]
Sigma = Annotated[float, Field(gt=0), asks(unit="sigma")]
SigmaOrZero = Annotated[float, Field(ge=0), asks(unit="sigma")]
Pixels = Annotated[int, Field(ge=1), asks(unit="pixels")]
Resolutions = Annotated[tuple[Count, ...], asks("a list of integers >= 1", unit="pixels")]
Betas = Annotated[tuple[Rate, Rate], asks("a list of two numbers in [0, 1)")]  # of Adam
Text = Annotated[str, asks(minLength=1)]
Frozen = Annotated[Mapping[K, V], AfterValidator(MappingProxyType)]
Model = Annotated[
    str, asks("teacher, the name of a student or of an import, or NAME@best of a training")
]


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def block(*conditions: Condition, kw_only: bool = False) -> Callable[[type[T]], type[T]]:
    """A frozen dataclass of params; `conditions` say which optional keys need or exclude others."""
    config = ConfigDict(defer_build=True, extra="forbid")  # most commands build Params alone
    make: Any = pydantic.dataclasses.dataclass

    def decorate(cls: type[T]) -> type[T]:
        _CONDITIONS[made := make(cls, frozen=True, kw_only=kw_only, config=config)] = conditions
        return made

    return decorate


_CONDITIONS: dict[type, tuple[Condition, ...]] = {}


def describe(cls: type, rule: Rule) -> None:
    """Add to the JSON schema of a block what its keys mean and what its conditions ask for."""
    blocks = [base for base in reversed(cls.__mro__) if base in _CONDITIONS]
    texts = [_meanings(base.__module__)[base.__name__] for base in blocks]
    for key, text in (pair for some in texts for pair in some.items()):
        meaning, _, more = text.partition(". ")
        said = {"description": meaning} | ({"more": more} if more else {})
        rule["properties"][key] = rule["properties"][key] | said
    for condition in _CONDITIONS[cls]:
        condition(rule)


@cache
def _meanings(module: str) -> dict[str, dict[str, str]]:
    """By class and field, the strings below the fields, which Python itself does not keep."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef))
    return {cls.name: dict(_texts(cls.body)) for cls in classes}


def _texts(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for node, below in itertools.pairwise(body):
        match node, below:
            case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                yield name, " ".join(text.split())


# --- conditions edit the JSON schema of a block, which editors and messages both read ---


def together(*names: str) -> Condition:
    """All of these keys, or none."""

    def apply(schema: Rule) -> None:
        schema["dependentRequired"] = {n: [o for o in names if o != n] for n in names}

    return apply


def unless(other: str, *names: str, optional: tuple[str, ...] = ()) -> Condition:
    """These keys are there exactly when `other` is not; the optional ones may be there then."""

    def apply(schema: Rule) -> None:
        own = _taken(schema, (*names, *optional))
        refused = {"not": {}, "title": f"no such key beside {other}"}
        schema["if"] = {"required": [other]}
        schema["then"] = {"properties": dict.fromkeys((*names, *optional), refused)}
        schema["else"] = {"required": list(names), "properties": own}

    return apply


def only_when(other: str, choice: str, *names: str) -> Condition:
    """These keys are there exactly when `other` has this value."""

    def apply(schema: Rule) -> None:
        own = _taken(schema, names)
        refused = {"not": {}, "title": f"no such key unless {other} is {choice}"}
        schema["if"] = _is(other, choice)
        schema["then"] = {"required": list(names), "properties": own}
        schema["else"] = {"properties": dict.fromkeys(names, refused)}

    return apply


def by_choice(other: str, **names: tuple[str, ...]) -> Condition:
    """Each value of `other` brings its own keys, and excludes the rest."""

    def apply(schema: Rule) -> None:
        del schema["additionalProperties"]  # an unknown value of `other` is one problem, not many
        own = _taken(schema, {n for some in names.values() for n in some})
        for n in own:
            del schema["properties"][n]
        schema["allOf"] = [
            {
                "if": _is(other, choice),
                "then": {
                    "additionalProperties": False,
                    "required": list(some),
                    "properties": {other: {}, **{n: own[n] for n in some}},
                },
            }
            for choice, some in names.items()
        ]

    return apply


def _is(key: str, choice: str) -> Rule:
    return {"required": [key], "properties": {key: {"const": choice}}}


def _taken(schema: Rule, names: Collection[str]) -> Rule:
    """The rules of these keys, which hold in a branch only: elsewhere anything passes."""
    own = {n: rule for n, rule in schema["properties"].items() if n in names}
    schema["properties"] |= {n: {} for n in own}
    return own
