"""The part of pickle that `torch.save` uses for tensors in containers, read without calling or making any object.

Everything that is no container and no plain value comes back as a record of what the pickle says: `Global`, `Call`,
`Persistent`. The opcodes are those of torch's own weights-only reader, less what makes instances.
"""

import pickletools
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from evla_cli.errors import EvlaError


class Global(NamedTuple):
    """A class or function, by name. It is never imported."""

    module: str
    name: str


class Call(NamedTuple):
    function: Global
    arguments: tuple[Any, ...]


class Persistent(NamedTuple):
    """What stands outside of the pickle: a storage."""

    id: Any


_ORDERED_DICT = Global("collections", "OrderedDict")
_IGNORED = ("PROTO",)
_PLAIN = ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_plain_pickle(content: bytes, known: Collection[Global], path: Path) -> Any:
    """The tree of dicts, lists, tuples and plain values in a pickle.

    Args:
        known: classes and functions that may be named, besides OrderedDict.
        path: for errors.

    Errors: any other class or function, any other opcode, a damaged pickle. Memory is bounded by a multiple of
    `content`'s size.
    """
    try:
        return _run(content, {*known, _ORDERED_DICT}, path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:  # what a damaged pickle leads to
        raise EvlaError(
            f"{path} is corrupt: its pickle cannot be read ({type(error).__name__}: {str(error)[:200]})."
        ) from error


def _run(content: bytes, known: Collection[Global], path: Path) -> Any:
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks below the marks
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in _PLAIN:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            items = tuple(stack.pop() for _ in range(_TUPLES[name]))
            stack.append(items[::-1])
        elif name == "MARK":
            outer.append(stack)
            stack = []
        elif name == "TUPLE":
            items, stack = tuple(stack), outer.pop()
            stack.append(items)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set_items(stack[-1], [key, value])
        elif name == "SETITEMS":
            pairs, stack = stack, outer.pop()
            _set_items(stack[-1], pairs)
        elif name == "APPEND":
            value = stack.pop()
            _checked(stack[-1], list).append(value)
        elif name == "APPENDS":
            values, stack = stack, outer.pop()
            _checked(stack[-1], list).extend(values)
        elif name == "GLOBAL":
            stack.append(_known(Global(*argument.split(" ", 1)), known, path))
        elif name == "REDUCE":
            arguments = _checked(stack.pop(), tuple)
            call = Call(_checked(stack.pop(), Global), arguments)
            stack.append(OrderedDict() if call == (_ORDERED_DICT, ()) else call)
        elif name == "BUILD":  # attributes, such as the `_metadata` of a state dict: no part of the content
            _checked(stack.pop(), dict)
            _checked(stack[-1], OrderedDict)
        elif name == "BINPERSID":
            stack.append(Persistent(stack.pop()))
        elif name == "STOP":
            return stack.pop()
        elif name not in _IGNORED:
            raise ValueError(f"the opcode {name} is not one that torch.save writes")
    raise ValueError("it has no end")


def _set_items(target: Any, pairs: list[Any]) -> None:
    if type(target) not in (dict, OrderedDict) or len(pairs) % 2:
        raise ValueError("a key is set in something that is no dict")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        # Texts hash with a secret, small whole numbers all differ: no keys can be made that all collide.
        if type(key) is not str and (type(key) is not int or abs(key) >= 2**60):
            raise ValueError(f"a dict has a key of type {type(key).__name__}, not a text or a small whole number")
        target[key] = value


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"found {type(value).__name__} where {kind.__name__} was expected")
    return value


def _known(found: Global, known: Collection[Global], path: Path) -> Global:
    if found not in known:
        raise EvlaError(
            f"{path} holds the Python object {'.'.join(found)[:200]}, which is not part of a plain checkpoint. "
            "It was not executed."
        )
    return found
