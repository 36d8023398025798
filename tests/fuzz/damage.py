"""Ways to damage bytes, and values that are no good anywhere."""

import json
from copy import deepcopy
from random import Random
from typing import Any

import yaml
from hypothesis import strategies as st

# Around the limits of the integer types, of memory and of Python's own conversions.
NUMBERS = [-1, 0, 1, 2, 3, 7, 8, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 2**64 + 8]
NUMBERS += [-(2**31), -(2**63), -(2**63) - 1, 10**30, 10**400]


def damage_bytes(random: Random, data: bytes, begin: int = 0, end: int | None = None) -> bytes:
    """One to four wrong bytes, a cut, a repeat, a hole or an insertion between `begin` and `end`."""
    end = len(data) if end is None else end
    if end <= begin:
        return data
    first, second = sorted((random.randrange(begin, end), random.randrange(begin, end)))
    kind = random.randrange(8)
    if kind < 4:
        damaged = bytearray(data)
        for _ in range(random.randint(1, 4)):
            at = random.randrange(begin, end)
            damaged[at] = random.choice([0, 1, 0x7F, 0x80, 0xFF, random.randrange(256), damaged[at] ^ 1])
        return bytes(damaged)
    if kind == 4:
        return data[:first]
    if kind == 5:
        return data[:first] + data[second:]
    if kind == 6:
        return data[:second] + data[first:]
    return data[:first] + random.randbytes(random.randint(1, 16)) + data[first:]


TEXTS = [
    "",
    " ",
    "0",
    "a",
    "\0",
    "\n",
    "\ud800",
    "größe",
    "x" * 5000,
    "../..",
    "/",
    ".",
    "~",
    "NaN",
    "${HOME}",
    "\x1b[31m",
]
VALUES: list[Any] = [None, True, False, *NUMBERS, *TEXTS, 0.5, 1.0, -0.0, 1e30, 1e308, float("nan"), float("inf")]
VALUES += [
    [],
    {},
    [[]],
    [None],
    {"": None},
    [{}],
    ["a"],
    [1],
    {"a": 1},
    [0] * 1000,
    {str(key): key for key in range(100)},
]

_STARTS = [b"\xef\xbb\xbf", b" ", b"\n\n", b"\xff", b"\0", b"\xff\xfe"]
# JSON, or nearly, that json.dumps would not write: stands for one value each.
_JSON_SNIPPETS = ["1e400", "-1e400", "1E0", "-0", "01", "1.", ".5", "0x10", "1_000", "+1", "1" * 5000, "True", "nan"]
_JSON_SNIPPETS += [
    '"\\ud800"',
    '"\\u0000"',
    "'a'",
    '"a\nb"',
    '{"a": 1, "a": 2}',
    "[1,]",
    "",
    "1 2",
    "/* */ 1",
    "[" * 5000,
]

# YAML that json would not write: stands for one value each.
_SNIPPETS = [
    "0x" + "f" * 5000,
    "1:" * 3000 + "1",
    "0b" + "1" * 20_000,
    ".nan",
    "-.inf",
    "1e999",
    "1_000",
    "0o17",
    "017",
    "1:30",
    "1e-1",
    "+1",
    "1.",
    "0x10",
    "0b11",
    "1_0.5",
    "190:20:30.15",
    "yes",
    "No",
    "~",
]
_SNIPPETS += [
    "!!python/object/apply:os.system ['touch ran']",
    "!!python/name:os.system",
    "!!int '3'",
    "!!float 1",
    "!x 1",
    "!!int ''",
    "!!bool x",
    "!!float ''",
    "!!timestamp x",
    "! 1",
    "!!str 1",
]
_SNIPPETS += [
    "&a [*a]",
    "&a {b: *a}",
    "*undefined",
    "2001-01-01",
    "2001-13-45",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "on",
]
_SNIPPETS += [
    "[" * 3000,
    "{a: " * 3000,
    "{? [a] : b}",
    "{? {a: 1} : b}",
    "{1: 2, 1: 3}",
    "<<",
    "{<<: {interval: 2}}",
    "'",
]
_SNIPPETS += [
    "[&l [1, 1], &m [*l, *l], &n [*m, *m], &o [*n, *n], *o]",
    "|\n  text",
    "- 1",
    "\t1",
    "%YAML 9.9",
    "---",
    "@",
    "`",
]
_LAUGHS = "[&a0 [lol]" + "".join(f", &a{n + 1} [" + ", ".join([f"*a{n}"] * 9) + "]" for n in range(12)) + "]"
_MERGES = "[&b0 {x: 1}" + "".join(f", &b{n + 1} {{<<: [*b{n}, *b{n}]}}" for n in range(30)) + "]"
_SNIPPETS += [_LAUGHS, _MERGES]


@st.composite
def damaged_records(draw: st.DrawFn, valid: Any) -> Any:
    """A JSON value with up to three wrong places: replaced, removed, renamed, doubled, added."""
    record = deepcopy(valid)
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        path = draw(st.sampled_from(list(_paths(record))))
        if not path:
            record = draw(_values())
            continue
        *way, last = path
        parent = record
        for key in way:
            parent = parent[key]
        kind = draw(st.integers(0, 7))
        if kind < 3:
            parent[last] = draw(_values())
        elif kind == 3:
            parent[last] = draw(_near(parent[last]).map(deepcopy))
        elif kind == 4:
            del parent[last]
        elif isinstance(parent, list):
            parent.insert(last, draw(_values(parent[last])))
        elif kind == 5:
            name = draw(st.sampled_from([str(last)[:-1], f"{last}s", str(last).upper(), *TEXTS]))
            parent[name] = parent.pop(last)
        else:
            parent[draw(st.sampled_from(["extra", *TEXTS]))] = draw(_values(parent[last]))
        if not isinstance(record, dict | list) or not record:
            break
    return record


@st.composite
def damaged_json(draw: st.DrawFn, valid: Any) -> bytes:
    """The text of a damaged record, or damaged text."""
    text = json.dumps(draw(damaged_records(valid)), indent=draw(st.sampled_from([None, 2]))).encode()
    kind = draw(st.integers(0, 19))
    if kind == 0:
        first = text.find(b"{") + 1
        text = text[:first] + b'"schema_version": 1, "schema_version": 1, ' + text[first:]
    if kind == 1:
        text = draw(st.sampled_from([*_STARTS, b"[" * 100_000, b'{"a":' * 100_000])) + text
    if kind == 2:
        text = text.replace(b"\n", b"\r\n")
    if 2 < kind < 6:
        text = damage_bytes(draw(st.randoms(use_true_random=False)), text)
    if 5 < kind < 10:
        marked = json.dumps(_with_mark(valid, draw(st.sampled_from([path for path in _paths(valid) if path]))))
        text = marked.replace('"MARK"', draw(st.sampled_from(_JSON_SNIPPETS))).encode()
    return text


@st.composite
def damaged_yaml(draw: st.DrawFn, valid: Any) -> bytes:
    kind = draw(st.integers(0, 9))
    if kind < 5:
        return _yaml(draw(damaged_records(valid))).encode("utf-8", "surrogatepass")
    if kind < 8:
        text = _yaml(_with_mark(valid, draw(st.sampled_from([path for path in _paths(valid) if path]))))
        return text.replace("MARK", draw(st.sampled_from(_SNIPPETS))).encode()
    text = _yaml(valid).encode()
    if kind == 8:
        return draw(st.sampled_from([*(start + text for start in _STARTS), text.replace(b"\n", b"\r\n"), text * 2]))
    return damage_bytes(draw(st.randoms(use_true_random=False)), text)


def _values(*more: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from([*more, *VALUES]).map(deepcopy)  # what is put into a record may be damaged there


def _yaml(record: Any) -> str:
    return yaml.safe_dump(record, sort_keys=False, allow_unicode=True)


def _near(value: Any) -> st.SearchStrategy[Any]:
    """Values of the same type."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.integers(value - 3, value + 3)
    if isinstance(value, float):
        return st.floats()
    if isinstance(value, str):
        return st.one_of(st.text(max_size=10), st.just(value + " "), st.just(value.upper()))
    if isinstance(value, list):
        return st.permutations(value)
    return st.dictionaries(st.text(max_size=5), st.sampled_from(VALUES), max_size=2)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, item in inner for deeper in _paths(item, (*path, key)))]


def _with_mark(valid: Any, path: tuple[Any, ...]) -> Any:
    record = deepcopy(valid)
    parent = record
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = "MARK"
    return record
