"""Reads pickles without executing them.

`pickle.load` imports and calls whatever a file names. `Reader` interprets the opcodes itself and
can do neither: known names become inert objects, tensors come from the bytes of the file, and
every other name is refused. Time and memory are bounded by `fewstep.budgets`, and no numbers of
tensors are read here.
"""

import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fewstep.interop.stream import Span, Stream
from fewstep.quoting import quoted


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
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 STRING BINSTRING SHORT_BINSTRING".split()
)
_BYTES = {"SHORT_BINBYTES": 1, "BINBYTES": 4, "BINBYTES8": 8}  # and the bytes of their length
_OPCODES = {op.code.encode("latin-1"): op for op in pickletools.opcodes}
_READ_LATER = {"Span": "bytes", "Stored": "Tensor"}
_LONGEST = 200  # characters of a name


class Reader:
    """One pass over a pickle: a stack machine without calls and imports.

    `rules` maps each permitted name to the replacement of its call: a function of the reader and
    the arguments, or None for an inert object. The names of torch.nn's classes are always
    permitted. A rule for PERSISTENT_ID resolves what the file stores outside the pickle.
    Dict keys are strings, bytes or small integers, because other keys can be made slow to hash.
    """

    def __init__(self, stream: Stream, rules: Mapping[str, Rule | None]) -> None:
        self.stream, self.size, self.rules = stream, stream.size, rules
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.charged = 0

    def read(self) -> Any:  # noqa: ANN401
        """The next object; the stream is left right after it.

        Raises:
            ValueError: no pickle, a name or opcode that weights do not need, a budget passed.
        """
        self.stack, self.memo = [], {}
        try:
            while (step := self.next())[0] != "STOP":
                self.step(*step)
            return self.pop()
        except (IndexError, KeyError, AttributeError, TypeError, OverflowError) as error:
            raise ValueError(f"the pickle is malformed ({type(error).__name__})") from error

    def next(self) -> tuple[str, Any, int]:
        """Name, argument and place of the next opcode."""
        self.stream.spent.step()
        at = self.stream.tell()
        if (op := _OPCODES.get(code := self.stream.read(1))) is None:
            got = repr(code) if code else "its end"
            raise ValueError(f"need an opcode at byte {at} of the pickle, got {got}")
        if (length := _BYTES.get(op.name)) is not None:
            return op.name, self.stream.span(int.from_bytes(self.stream.read(length), "little")), at
        # pickletools only calls read and readline
        return op.name, op.arg.reader(self.stream) if op.arg else None, at  # pyright: ignore[reportArgumentType]

    def step(self, op: str, arg: Any, at: int) -> None:  # noqa: ANN401
        push = self.stack.append
        if op in _LITERALS or op in _BYTES:
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
                raise ValueError(f"it puts an object at {quoted(index)} of its memo")
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
        """Count the bytes that a call reads: a memoised object could be read without end."""
        self.charged += cost
        if self.charged > self.size:
            raise ValueError("it uses the same bytes repeatedly: more than the file holds")

    def named(self, module: str, name: str) -> Name:
        if len(module) + len(name) > _LONGEST:  # a regular expression would take its time
            raise ValueError(f"it names {quoted(module)}, {quoted(name)}: longer than a name is")
        dotted = f"{module}.{name}"
        known = dotted in self.rules or NN_CLASS.fullmatch(dotted)
        if not known or "." in name:
            raise ValueError(f"it names {dotted!r}, which weights do not need")
        return Name(dotted)

    def call(self, name: str, args: tuple[Any, ...]) -> Any:  # noqa: ANN401
        rule = self.rules.get(name)
        return Inert(name, args) if rule is None else rule(self, *args)


def require(item: Any, *kinds: type) -> Any:  # noqa: ANN401
    if not isinstance(item, kinds):
        names = (_READ_LATER.get(kind.__name__, kind.__name__) for kind in kinds)
        need = " or ".join(dict.fromkeys(names))
        raise ValueError(f"need {need}, got {type(item).__name__}: not a file of weights")
    return item


class OrderedDict(dict[Any, Any]):
    """Stands for a collections.OrderedDict, the only dict that may be given attributes."""


def bytes_of(item: object) -> bytes:
    """A few bytes, as of a number."""
    return require(item, bytes) if not isinstance(item, Span) else item.small()


def key_of(item: object) -> str | bytes | int:
    # Multiples of 2^61 - 1 all hash to 0, so a dict of them takes quadratic time.
    if isinstance(item, int) and abs(item) >= 1 << 31:
        raise ValueError("need small integers as keys, got a large one")
    return require(item, str, bytes, int)
