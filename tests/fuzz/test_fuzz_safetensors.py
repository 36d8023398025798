"""safetensors files, right and wrong, against the reference implementation: what evla accepts must read the same."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from damage import NUMBERS, damage_bytes
from guard import REFUSED, attempt, run_cases
from safetensors import safe_open

from evla_cli.checkpoint.safetensors_format import DTYPES, read_safetensors
from evla_cli.checkpoint.tensors import tensor_bytes

_CODES = [*DTYPES, "F8_E4M3", "F8_E5M2", "F4", "U16", "U32", "U64", "C64", "f32", "F32 ", "", "F33"]
_NAMES = ["a", "b.weight", "größe", "", " ", "__metadata_", "a\n", "\u0000", "x" * 300, "🤖", "\\ud800", '"', "a/b"]


@pytest.mark.parametrize("num_cases", [150, pytest.param(3500, marks=pytest.mark.fuzz)])
def test_safetensors(num_cases: int, tmp_path: Path, counted: Any) -> None:
    path = tmp_path / "model.safetensors"

    def case(random: Random) -> bool:
        data, intact = _file(random)
        path.write_bytes(data)
        ours = attempt(lambda: {name: lazy.load() for name, lazy in read_safetensors(path).items()})
        if ours is REFUSED:
            assert not intact, "a valid file was refused"
            return False
        with safe_open(path, framework="pt") as file:
            assert set(file.keys()) == set(ours)
            for name, tensor in ours.items():
                reference = file.get_tensor(name)
                assert (tensor.dtype, tensor.shape) == (reference.dtype, reference.shape)
                assert tensor_bytes(tensor) == tensor_bytes(reference)
        return True

    counted("safetensors", run_cases("safetensors", num_cases, case))


def _file(random: Random) -> tuple[bytes, bool]:
    """A file, and whether it is a valid one."""
    entries, body = _entries(random)
    num_damages = random.choice([0, 1, 1, 1, 2])
    intact = num_damages == 0
    for _ in range(num_damages):
        random.choice([_damage_entry, _damage_entry, _damage_entry, _damage_names])(random, entries)
    header = _encode(entries).encode("utf-8", "surrogatepass")
    if random.random() < 0.3:
        header, intact = _damage_header(random, header), False
    length = len(header)
    if random.random() < 0.1:
        length, intact = random.choice([0, 1, abs(length - 1), length + 1, 2**31, 2**40, 2**63, 2**64 - 1]), False
    if random.random() < 0.1:
        body, intact = random.choice([body[:-1], body + b"\0", b"", body * 2]), False
    data = length.to_bytes(8, "little") + header + body
    if random.random() < 0.15:
        data, intact = damage_bytes(random, data), False
    return data, intact


Entries = list[tuple[str, Any]]  # names may stand twice; values are JSON values or, where str, JSON text


def _entries(random: Random) -> tuple[Entries, bytes]:
    entries: Entries = []
    body = b""
    for number in range(random.randint(0, 4)):
        dtype = random.choice(list(DTYPES))
        shape = [random.choice([0, 1, 1, 2, 3, 5]) for _ in range(random.randint(0, 3))]
        size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
        offsets = [len(body), len(body) + size]
        entries.append((f"t{number}.weight", {"dtype": dtype, "shape": shape, "data_offsets": offsets}))
        body += bytes(size) if dtype == "BOOL" else random.randbytes(size)
    random.shuffle(entries)
    if random.random() < 0.3:
        entries.insert(0, ("__metadata__", {"format": "pt"}))
    return entries, body


def _damage_entry(random: Random, entries: Entries) -> None:
    places = [number for number, (name, _) in enumerate(entries) if name != "__metadata__"]
    if not places:
        return
    at = random.choice(places)
    name, entry = entries[at]
    if not isinstance(entry, dict):
        return
    entry = dict(entry)
    number = random.choice(NUMBERS)
    kind = random.randrange(9)
    if kind == 0 and entry.get("data_offsets"):
        offsets = [*entry["data_offsets"]]
        offsets[random.randrange(2)] += random.choice([-8, -4, -1, 1, 4, 8])
        entry["data_offsets"] = offsets
    elif kind == 1:
        entry["data_offsets"] = random.choice([[number, number], [0, number], [number, 0], [0], [0, 1, 2], None, "ab"])
    elif kind == 2:
        entry["dtype"] = random.choice([*_CODES, None, 1, ["F32"]])
    elif kind == 3:
        shape = [*entry.get("shape", [])]
        shape.insert(random.randint(0, len(shape)), number)
        entry["shape"] = shape
    elif kind == 4:
        zero_and_huge = [
            [2**62, 0],
            [0, 2**62, 2**62],
            [2**32, 2**32],
            [2**63, 2, 0],
            [3.0],
            ["3"],
            [True],
            [[1]],
            [0.5],
        ]
        entry["shape"] = random.choice([*zero_and_huge, [1] * 100, [1] * 5000, None, {}, {"0": 1}, "12"])
    elif kind == 5:
        entry.pop(random.choice([*entry]))
    elif kind == 6:
        entry["extra"] = random.choice([1, None, "x"])
    elif kind == 7:
        other = entries[random.choice(places)][1]
        entry = other if isinstance(other, dict) else entry
    else:  # text that json.dumps would not write
        text = json.dumps(entry)
        changed = [text.replace("0", "-0"), text.replace("1", "1e0"), text.replace("1", "01"), text.replace("]", ",]")]
        twice = text[:-1] + ',"dtype":"F32"}'
        entries[at] = (name, random.choice([*changed, twice, "null", "[]", "1", "NaN", "{}", "[" * 5000]))
        return
    entries[at] = (name, entry)


def _damage_names(random: Random, entries: Entries) -> None:
    if entries and random.random() < 0.6:
        at = random.randrange(len(entries))
        entries[at] = (random.choice([*_NAMES, entries[0][0]]), entries[at][1])
    else:
        values = [{}, None, {"a": 1}, {"a": None}, {"a": {"b": "c"}}, [], "text", '{"a":"b","a":"c"}', {"größe": "ß"}]
        entries.append(("__metadata__", random.choice([*values, '{"a":"\\ud800"}'])))


def _encode(entries: Entries) -> str:
    def value(entry: Any) -> str:
        return entry if isinstance(entry, str) else json.dumps(entry)

    def key(name: str) -> str:
        return f'"{name}"' if name.startswith("\\") else json.dumps(name, ensure_ascii=False)

    return "{" + ",".join(f"{key(name)}:{value(entry)}" for name, entry in entries) + "}"


def _damage_header(random: Random, header: bytes) -> bytes:
    fixed = [b"", b"{}", b"[]", b"null", b"{", b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000, b"\xff\xfe", b"{} x"]
    around = [
        b" " + header,
        header + b" ",
        header + b"\0",
        header + b"\n\t ",
        b"\xef\xbb\xbf" + header,
        header + header,
    ]
    inside = [header.replace(b":", b" : "), header.replace(b"t0", b"t\xff"), header.replace(b"t1", b"t0")]
    return random.choice([*fixed, *around, *inside, damage_bytes(random, header)])
