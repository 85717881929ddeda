"""The part of params that a network is built and sampled with, read from a model's own JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import TypeAdapter, ValidationError

from fewstep.params.blocks import Network, Performance
from fewstep.quoting import plain, quoted


class Sizes(Protocol):
    """What is asked of `data`."""

    @property
    def resolution(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def classes(self) -> int: ...


class Policy(Protocol):
    """What is asked of `generate`."""

    @property
    def labels(self) -> Literal["balanced", "random"]: ...


class Described(Protocol):
    """What is asked of params to build a network and to draw images: `Params`, or `Description`."""

    @property
    def network(self) -> Network: ...
    @property
    def data(self) -> Sizes: ...
    @property
    def precision(self) -> str: ...
    @property
    def performance(self) -> Performance: ...
    @property
    def generate(self) -> Policy: ...


@dataclass(frozen=True)
class Images:
    """Height and width, channels, and the length of a label row."""

    resolution: int
    channels: int
    classes: int


@dataclass(frozen=True)
class Balanced:
    """Labels that nobody names are the seeds modulo the classes, as in `generate`."""

    labels: Literal["balanced", "random"] = "balanced"


@dataclass(frozen=True)
class Description:
    """Of one model. Precision and performance are the caller's: no JSON says them."""

    network: Network
    data: Images
    precision: str = "fp32"
    performance: Performance = field(default_factory=Performance)
    generate: Balanced = Balanced()


def read_description(
    network: object, data: object, precision: str, performance: Performance
) -> Description:
    """A description from the blocks `network` and `data` of a model's JSON.

    Raises:
        ValueError: they describe no network; names the first key that is wrong.
    """
    try:
        block = TypeAdapter(Network).validate_python(network, strict=False)
    except (ValidationError, RecursionError) as error:
        raise ValueError(f"need a network in its JSON, got {_first_problem(error)}") from error
    return Description(block, _images(data), precision, performance)


def _first_problem(error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "one that is nested too deeply"
    first = error.errors(include_url=False)[0]
    key = ".".join(plain(str(part)) for part in ("network", *first["loc"]))
    return f"{key} {quoted(first['input'])}: {plain(first['msg'])}"


def _images(data: object) -> Images:
    said: Mapping[str, Any] = data if isinstance(data, Mapping) else {}
    for key, least in (("resolution", 1), ("channels", 1), ("classes", 0)):
        value = said.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(
                f"need an integer >= {least} as data.{key} in its JSON, got {quoted(value)}"
            )
    return Images(said["resolution"], said["channels"], said["classes"])
