"""Reads pickles without executing them.

`pickle.load` imports and calls whatever a file names. `Reader` interprets the opcodes itself and
can do neither: known names become inert objects, tensors come from the bytes of the file, and
every other name is refused. Time and memory stay proportional to the size of the file.
"""

import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Name:
    """A class or function that the file names. Nothing is imported."""

    name: str


@dataclass(eq=False)
class Inert:
    """Stands for the object that calling `name` with `args` would have made, and its state."""

    name: str
    args: tuple[Any, ...]
    state: Any = None


Rule = Callable[..., Any]
NN_CLASS = re.compile(r"torch\.nn\.modules\.[a-z]+\.[A-Za-z0-9]+")
PERSISTENT_ID = "persistent id"

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_CONTAINERS: dict[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}
_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 STRING BINSTRING SHORT_BINSTRING "
    "BINBYTES SHORT_BINBYTES BINBYTES8".split()
)


class Reader:
    """One pass over a pickle: a stack machine without calls and imports.

    `rules` maps each permitted name to the replacement of its call: a function of the reader and
    the arguments, or None for an inert object. The names of torch.nn's classes are always
    permitted. A rule for PERSISTENT_ID resolves what the file stores outside the pickle.
    Dict keys are strings, bytes or small integers, because other keys can be made slow to hash.
    """

    def __init__(self, stream: Any, size: int, rules: Mapping[str, Rule | None]) -> None:  # noqa: ANN401
        self.stream, self.size, self.rules = stream, size, rules
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.charged = 0

    def read(self) -> Any:  # noqa: ANN401
        """The next object; the stream is left right after it."""
        self.stack, self.memo = [], {}
        try:
            for op, arg, at in pickletools.genops(self.stream):
                if op.name == "STOP":
                    return self.pop()
                self.step(op.name, arg, at)
        except (IndexError, KeyError, AttributeError, TypeError, OverflowError) as error:
            raise ValueError(f"the pickle is malformed ({type(error).__name__})") from error
        raise AssertionError("genops ends at STOP or raises")

    def step(self, op: str, arg: Any, at: int | None) -> None:  # noqa: ANN401
        push = self.stack.append
        if op in _LITERALS:
            push(arg)
        elif op in _CONSTANTS:
            push(_CONSTANTS[op])
        elif op in _CONTAINERS:
            push(_CONTAINERS[op]())
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            push(tuple(reversed([self.pop() for _ in range(int(op[-1]))])))
        elif op in ("TUPLE", "LIST"):
            push(tuple(self.pop_mark()) if op == "TUPLE" else self.pop_mark())
        elif op in ("DICT", "SETITEMS", "SETITEM"):
            items = [self.pop(), self.pop()][::-1] if op == "SETITEM" else self.pop_mark()
            target = {} if op == "DICT" else self.pop()
            for key, value in zip(items[::2], items[1::2], strict=True):
                require(target, dict)[key_of(key)] = value
            push(target)
        elif op in ("APPEND", "APPENDS"):
            items = [self.pop()] if op == "APPEND" else self.pop_mark()
            require(self.stack[-1], list).extend(items)
        elif op == "ADDITEMS":
            items = self.pop_mark()
            require(self.stack[-1], set).update(key_of(item) for item in items)
        elif op in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            index = len(self.memo) if op == "MEMOIZE" else arg
            if not 0 <= index < self.size:
                raise ValueError(f"it puts an object at {index:.3g} of its memo")
            self.memo[index] = self.stack[-1]
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            push(self.memo[arg])
        elif op in ("GLOBAL", "INST"):
            push(self.named(*arg.split(" ", 1)))
            if op == "INST":
                raise ValueError("the opcode INST has no place in a file of weights")
        elif op == "STACK_GLOBAL":
            name, module = self.pop(), self.pop()
            push(self.named(require(module, str), require(name, str)))
        elif op in ("REDUCE", "NEWOBJ"):
            args, function = self.pop(), self.pop()
            push(self.call(require(function, Name).name, require(args, tuple)))
        elif op == "BUILD":
            state = self.pop()
            if type(self.stack[-1]) is not OrderedDict:  # whose state is torch's _metadata
                require(self.stack[-1], Inert).state = state
        elif op == "BINPERSID":
            push(self.call(PERSISTENT_ID, require(self.pop(), tuple)))
        elif op == "FRAME":
            if arg > self.size:
                raise ValueError(f"a frame of {arg} bytes in a file of {self.size}")
        elif op != "PROTO":
            raise ValueError(f"the opcode {op} at byte {at} has no place in a file of weights")

    def pop(self) -> Any:  # noqa: ANN401
        item = self.stack.pop()
        if item is _MARK:
            raise IndexError("mark")
        return item

    def pop_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def charge(self, cost: int) -> None:
        """Count the bytes a call reads: a memoised object could otherwise be copied without end."""
        self.charged += cost
        if self.charged > self.size:
            raise ValueError("it uses the same bytes repeatedly: more than the file holds")

    def named(self, module: str, name: str) -> Name:
        dotted = f"{module}.{name}"
        known = dotted in self.rules or NN_CLASS.fullmatch(dotted)
        if not known or "." in name:
            raise ValueError(f"it names {dotted[:200]!r}, which weights do not need")
        return Name(dotted)

    def call(self, name: str, args: tuple[Any, ...]) -> Any:  # noqa: ANN401
        rule = self.rules.get(name)
        return Inert(name, args) if rule is None else rule(self, *args)


def require(item: Any, *kinds: type) -> Any:  # noqa: ANN401
    if not isinstance(item, kinds):
        need = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"need {need}, got {type(item).__name__}: not a file of weights")
    return item


class OrderedDict(dict[Any, Any]):
    """Stands for a collections.OrderedDict, the only dict that may be given attributes."""


def key_of(item: object) -> str | bytes | int:
    # Multiples of 2^61 - 1 all hash to 0, so a dict of them takes quadratic time.
    if isinstance(item, int) and abs(item) >= 1 << 31:
        raise ValueError("need small integers as keys, got a large one")
    return require(item, str, bytes, int)
