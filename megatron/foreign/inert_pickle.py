"""A pickle read as data: containers, numbers and text come out, whatever else it names becomes an inert `Stub`.

The instructions are carried out here, not by Python's unpickler, so that there is no way from a file to a class or a
function: a name that it wants to import, call or build is written down and no more. The few calls that make plain data
(`OrderedDict`, torch's tensors) are functions of the caller, looked up by name. Everything is bounded by the bytes that
are there: no count in the file is believed, and no object is made for a promise. The instructions are those of pickle
protocols 2 to 5 (Python's Lib/pickletools.py describes them), which is what torch.save has written since its beginning.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.config.errors import CheckpointError

MOST_BYTES = 64 * 2**20
"""Of instructions in one pickle. Tensors lie outside of it: a pickle of all of a rank's names is far smaller."""
MOST_OBJECTS = 4_000_000
_LONGEST_NAME = 1_000
_LONGEST_NUMBER = 1_024
_LARGEST_KEY = 2**60


@dataclass(eq=False)
class Stub:
    """Something that a pickle names and that is not made: a class, a function, or what calling it would have given.

    arguments: what it was to be called with, None for the name alone. state: what its attributes were to be set to.
    """

    name: str
    arguments: tuple[Any, ...] | None = None
    state: Any = None

    def __repr__(self) -> str:
        return self.name if self.arguments is None else f"<{self.name}>"


Calls = Mapping[str, Callable[[tuple[Any, ...]], Any]]
"""By full name, what of ours answers a call instead of it. Arguments are as the file has them: check each."""


class _Mark:
    """The beginning of a group on the stack."""


_MARK = _Mark()


class InertPickle:
    """One pickle in a buffer. `read` gives its object and leaves `position` behind its last byte."""

    def __init__(
        self,
        data: bytes,
        where: str,
        calls: Calls,
        persistent: Callable[[Any], Any],
        begin: int = 0,
    ) -> None:
        """begin: of the pickle in data. where: names the file in errors. persistent: answers a persistent id."""
        self._data = data
        self._where, self._calls, self._persistent = where, calls, persistent
        self.position = begin
        self._begin, self._end = begin, len(data)
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._objects = 0

    def read(self) -> Any:
        """The object. Raises CheckpointError where the pickle is damaged, hostile, or of another protocol."""
        try:
            while (code := self._code()) != _STOP:
                instruction = _INSTRUCTIONS.get(code)
                if instruction is None:
                    raise self._fault(f"instruction {bytes([code])!r}, which torch.save does not write")
                instruction(self)
            return self._pop()
        except (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, struct.error) as error:
            raise self._fault(f"{type(error).__name__}: {error}"[:200]) from None

    def _fault(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self._where}: not a pickle of plain data at byte {self.position}: {why}: "
            "the file is damaged, or was not written by torch.save"
        )

    def _code(self) -> int:
        if self.position >= self._end or self.position - self._begin >= MOST_BYTES:
            self._take(1)  # says which
        self.position += 1
        return self._data[self.position - 1]

    def _take(self, count: int) -> bytes:
        if count < 0 or self.position + count > self._end:
            raise self._fault(f"{count} bytes are promised, {self._end - self.position} are left")
        if self.position + count - self._begin > MOST_BYTES:
            raise self._fault(f"it has more than {MOST_BYTES} bytes of instructions")
        self.position += count
        return self._data[self.position - count : self.position]

    def _number(self, format: str) -> int:
        return int(struct.unpack(format, self._take(struct.calcsize(format)))[0])

    def _line(self) -> str:
        end = self._data.find(b"\n", self.position, min(self._end, self.position + _LONGEST_NAME))
        if end < 0:
            raise self._fault(f"a name without an end within {_LONGEST_NAME} bytes")
        return self._take(end - self.position + 1)[:-1].decode()

    def push(self, value: Any) -> None:
        """One more object on the stack."""
        self._objects += 1
        if self._objects > MOST_OBJECTS:
            raise self._fault(f"it makes more than {MOST_OBJECTS} objects")
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise self._fault("it takes something from an empty stack")
        return self._stack.pop()

    def _group(self) -> list[Any]:
        """What lies above the last mark."""
        at = len(self._stack) - 1
        while at >= 0 and self._stack[at] is not _MARK:
            at -= 1
        if at < 0:
            raise self._fault("a group has no beginning")
        group = self._stack[at + 1 :]
        del self._stack[at:]
        return group

    def _tuple(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def _counted(self, format: str, text: bool) -> None:
        raw = self._take(self._number(format))
        self.push(raw.decode("utf-8", "surrogatepass") if text else raw)

    def _long(self, format: str) -> None:
        count = self._number(format)
        if count > _LONGEST_NUMBER:
            raise self._fault(f"a number of {count} bytes")
        self.push(int.from_bytes(self._take(count), "little", signed=True))

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Stub):
            raise self._fault(f"a {type(target).__name__} is no list")

    def _set_items(self, flat: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict | Stub):
            raise self._fault(f"a {type(target).__name__} is no dictionary")
        if len(flat) % 2:
            raise self._fault("a key without a value")
        if isinstance(target, dict):
            for key, value in zip(flat[::2], flat[1::2], strict=True):
                target[self._key(key)] = value

    def _key(self, key: Any) -> Any:
        """What may be a key: things whose hash is quick and their own. That of a deep tuple would end the process, and
        large numbers can be chosen to have all the same."""
        for part in key if isinstance(key, tuple) else (key,):
            small = isinstance(part, int) and abs(part) < _LARGEST_KEY
            if not (small or part is None or isinstance(part, str | bytes | Stub)):
                raise self._fault(f"a {type(part).__name__} as a key")
        return key

    def _add(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, set):
            target.update(self._key(value) for value in values)
        elif not isinstance(target, Stub):
            raise self._fault(f"a {type(target).__name__} is no set")

    def _name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > _LONGEST_NAME:
            raise self._fault("a name that is no text")
        self.push(Stub(f"{module}.{name}"))

    def _call(self, arguments: Any, function: Any) -> None:
        """REDUCE and its like: our own answer, or a stub. Nothing that the file names is ever called."""
        if not isinstance(arguments, tuple):
            raise self._fault("arguments that are no tuple")
        if not isinstance(function, Stub):
            raise self._fault(f"a {type(function).__name__} is called")
        ours = self._calls.get(function.name) if function.arguments is None else None
        self.push(Stub(function.name, arguments) if ours is None else ours(arguments))

    def _build(self) -> None:
        state = self._pop()
        target = self._stack[-1]
        if isinstance(target, Stub):
            target.state = state

    def _new_with_names(self) -> None:
        names, arguments, function = self._pop(), self._pop(), self._pop()
        self._call((*arguments, names), function)

    def _old_object(self) -> None:
        function, *arguments = self._group()
        self._call(tuple(arguments), function)


def _swapped(reader: InertPickle) -> None:
    arguments = reader._pop()
    reader._call(arguments, reader._pop())


_STOP = ord(".")
_INSTRUCTIONS: dict[int, Callable[[InertPickle], Any]] = {
    0x80: lambda r: r._take(1),  # PROTO
    0x95: lambda r: r._take(8),  # FRAME
    ord("("): lambda r: r.push(_MARK),
    ord("0"): lambda r: r._pop(),
    ord("1"): lambda r: r._group(),
    ord("2"): lambda r: r.push(r._stack[-1]),
    ord("N"): lambda r: r.push(None),
    0x88: lambda r: r.push(True),
    0x89: lambda r: r.push(False),
    ord("J"): lambda r: r.push(r._number("<i")),
    ord("K"): lambda r: r.push(r._number("<B")),
    ord("M"): lambda r: r.push(r._number("<H")),
    0x8A: lambda r: r._long("<B"),
    0x8B: lambda r: r._long("<i"),
    ord("G"): lambda r: r.push(struct.unpack(">d", r._take(8))[0]),
    ord("X"): lambda r: r._counted("<I", True),
    0x8C: lambda r: r._counted("<B", True),
    0x8D: lambda r: r._counted("<Q", True),
    ord("T"): lambda r: r._counted("<i", False),  # text of Python 2, in no encoding that is told
    ord("U"): lambda r: r._counted("<B", False),
    ord("B"): lambda r: r._counted("<I", False),
    ord("C"): lambda r: r._counted("<B", False),
    0x8E: lambda r: r._counted("<Q", False),
    0x96: lambda r: r._counted("<Q", False),
    ord("]"): lambda r: r.push([]),
    ord("a"): lambda r: r._append([r._pop()]),
    ord("e"): lambda r: r._append(r._group()),
    ord("l"): lambda r: r.push(r._group()),
    ord(")"): lambda r: r.push(()),
    ord("t"): lambda r: r.push(tuple(r._group())),
    0x85: lambda r: r._tuple(1),
    0x86: lambda r: r._tuple(2),
    0x87: lambda r: r._tuple(3),
    ord("}"): lambda r: r.push({}),
    ord("s"): lambda r: r._set_items([r._pop(), r._pop()][::-1]),
    ord("u"): lambda r: r._set_items(r._group()),
    0x8F: lambda r: r.push(set()),
    0x90: lambda r: r._add(r._group()),
    0x91: lambda r: r.push(frozenset(r._key(value) for value in r._group())),
    ord("h"): lambda r: r.push(r._memo[r._number("<B")]),
    ord("j"): lambda r: r.push(r._memo[r._number("<I")]),
    ord("q"): lambda r: r._put(r._number("<B")),
    ord("r"): lambda r: r._put(r._number("<I")),
    0x94: lambda r: r._put(len(r._memo)),
    ord("c"): lambda r: r._name(r._line(), r._line()),
    0x93: lambda r: r._name(*[r._pop(), r._pop()][::-1]),
    ord("R"): _swapped,
    0x81: _swapped,  # NEWOBJ
    0x92: InertPickle._new_with_names,
    ord("o"): InertPickle._old_object,
    ord("b"): InertPickle._build,
    ord("Q"): lambda r: r.push(r._persistent(r._pop())),
}
