"""`.pt` files, right and wrong, against torch: what evla accepts, torch.load(weights_only=True) reads the same.

Three ways to damage one: objects that no tensor is (pickled properly), opcodes of the pickle, and the zip archive.
"""

import builtins
import io
import itertools
import os
import pickle
import pickletools
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from damage import NUMBERS, damage_bytes
from guard import REFUSED, attempt, run_cases

from evla_cli.checkpoint.tensors import tensor_bytes
from evla_cli.checkpoint.torch_format import read_torch, write_torch

_STORAGES = ["FloatStorage", "DoubleStorage", "HalfStorage", "BFloat16Storage", "LongStorage", "ByteStorage"]
_OTHER_STORAGES = ["BoolStorage", "ComplexFloatStorage", "QInt8Storage", "UntypedStorage", "TypedStorage"]


@pytest.mark.parametrize("num_cases", [200, pytest.param(5000, marks=pytest.mark.fuzz)])
def test_torch(num_cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Any) -> None:
    path, copy = tmp_path / "m.pt", tmp_path / "copy.pt"

    def case(random: Random) -> bool:
        data, whole, intact = _file(random)
        path.write_bytes(data)
        ours = attempt(lambda: _read(path))
        assert not Path("ran").exists()
        if ours is REFUSED:
            assert not intact, "a valid file was refused"
            return False
        file, tensors = ours
        try:
            reference = _load(data)
        except RuntimeError:  # over a damaged field of the archive that says nothing of the content
            reference = _load(whole)
        assert_same(tensors, file.others, reference)
        copy.unlink(missing_ok=True)
        if attempt(lambda: write_torch(copy, file.tensors, file.paths, file.others)) is not REFUSED:
            assert _structure(_load(copy.read_bytes())) == _structure(reference)
        return True

    monkeypatch.chdir(tmp_path)
    counted("torch (.pt)", run_cases("torch", num_cases, case))


def _read(path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    file = read_torch(path)
    return file, {name: lazy.load().contiguous() for name, lazy in file.tensors.items()}


def _load(data: bytes) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def assert_same(tensors: dict[str, torch.Tensor], others: dict[str, Any], reference: Any) -> None:
    expected = {".".join(map(str, keys)): leaf for keys, leaf in _leaves(reference)}
    found = {name: leaf for name, leaf in expected.items() if isinstance(leaf, torch.Tensor)}
    assert set(tensors) == set(found)
    for name, tensor in tensors.items():
        assert (tensor.dtype, tensor.shape) == (found[name].dtype, found[name].shape), name
        assert tensor_bytes(tensor) == tensor_bytes(
            found[name].detach().clone(memory_format=torch.contiguous_format)
        ), name
    assert repr(others) == repr({name: leaf for name, leaf in expected.items() if name not in found})


def _leaves(tree: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(tree, dict) and (tree or not keys):
        for key, value in tree.items():
            yield from _leaves(value, (*keys, key))
    else:
        yield keys, tree


def _structure(tree: Any) -> Any:
    """For comparing with ==: keys and their types, tensors by content."""
    leaves = sorted(_leaves(tree), key=lambda leaf: repr(leaf[0]))
    return [
        (repr(keys), bytes(tensor_bytes(leaf.detach())), leaf.dtype, leaf.shape)
        if isinstance(leaf, torch.Tensor)
        else (repr(keys), repr(leaf))
        for keys, leaf in leaves
    ]


# Objects


@dataclass(eq=False)
class _Storage:
    pid: tuple[Any, ...]


@dataclass(eq=False)
class _Call:
    function: Any
    arguments: Any
    state: Any = None

    def reduced(self) -> Any:
        return (self.function, self.arguments) if self.state is None else (self.function, self.arguments, self.state)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if isinstance(obj, _Storage) else None

    def reducer_override(self, obj: Any) -> Any:
        return obj.reduced() if isinstance(obj, _Call) else NotImplemented


@dataclass
class _Record:
    """What a file is made of before it is bytes."""

    tree: dict[str, Any]
    tensors: list[_Call]
    storages: dict[str, bytes]


def _file(random: Random) -> tuple[bytes, bytes, bool]:
    """A file, the same before the archive was damaged, and whether it is a valid one."""
    record = _record(random)
    damages = random.choice([[], [], [_damage_tensor], [_damage_tensor], [_damage_storage], [_damage_tree]])
    damages += [] if damages == [_damage_tree] else random.choice([[], [], [_damage_tree]])
    intact = not damages
    for damage in damages:
        damage(random, record)
    content = _dump(record.tree, random.choice([2, 2, 2, 4]) if not intact else 2)
    if random.random() < 0.3:
        content, intact = _damage_pickle(random, content), False
    names = {"data.pkl": content, "byteorder": b"little", "version": b"3\n"}
    names |= {f"data/{key}": data for key, data in record.storages.items()}
    if random.random() < 0.2:
        _damage_records(random, names)
        intact = False
    whole, plain = _zip(random, names, plain=random.random() < 0.8)
    if random.random() < 0.2:
        return _damage_zip(random, whole), whole, False
    return whole, whole, intact and plain


def _record(random: Random) -> _Record:
    storages: dict[str, bytes] = {}
    tensors: list[_Call] = []
    model: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    for number in range(random.randint(1, 4)):
        kind = random.choice(_STORAGES)
        dtype = getattr(torch, kind).dtype
        shape = [random.choice([1, 2, 3, 4]) for _ in range(random.randint(0, 3))]
        values = torch.randn(torch.Size(shape).numel() + random.choice([0, 0, 3]), generator=generator)
        values = values.mul(50).to(dtype)
        storages[str(number)] = bytes(tensor_bytes(values))
        stride = [torch.Size(shape[axis + 1 :]).numel() for axis in range(len(shape))]
        if len(shape) == 2 and random.random() < 0.3:
            shape, stride = shape[::-1], stride[::-1]
        storage = _Storage(("storage", getattr(torch, kind), str(number), "cpu", values.numel()))
        tensor: Any = _Call(
            torch._utils._rebuild_tensor_v2, (storage, 0, tuple(shape), tuple(stride), False, OrderedDict())
        )
        tensors.append(tensor)
        if random.random() < 0.2:
            tensor = _Call(torch._utils._rebuild_parameter, (tensor, dtype.is_floating_point, OrderedDict()))
        model[f"layers.{number}.weight"] = tensor
    part = OrderedDict(model) if random.random() < 0.5 else model
    return _Record({"model": {"part": part}, "epoch": 3}, tensors, storages)


def _damage_tensor(random: Random, record: _Record) -> None:
    call = random.choice(record.tensors)
    storage, offset, shape, stride, *tail = call.arguments
    number = random.choice(NUMBERS)
    kind = random.randrange(12)
    if kind == 0:
        offset = random.choice([number, 1, -1, 1.0, None, True])
    elif kind == 1 and shape:
        shape = [*shape]
        shape[random.randrange(len(shape))] = random.choice([number, 0, 1.0, None, True, "1"])
        shape = tuple(shape)
    elif kind == 2 and stride:
        stride = [*stride]
        stride[random.randrange(len(stride))] = random.choice([number, 0, 0, 1, -1, 2.0])
        stride = tuple(stride)
    elif kind == 3:
        shape, stride = random.choice(
            [
                ((number,), (0,)),
                ((2**20, 2**20), (0, 0)),
                ((10**6, 10), (0, 1)),
                ((0, 2**62), (1, 1)),
                ((2**31, 1), (0, 1)),
            ]
        )
    elif kind == 4:
        shape, stride = random.choice([((1,) * 70, (1,) * 70), ((1,) * 2000, (0,) * 2000), ((2,) * 70, (0,) * 70)])
    elif kind == 5:
        shape = random.choice([None, [*shape], "12", {1: 2}, (*shape, 1), 3, {2}, ((),)])
    elif kind == 6:
        stride = random.choice([None, [*stride], "", stride[:-1], (*stride, 0), {}])
    elif kind == 7:
        tail = random.choice([[], [True], [False, None], [False, {}], [False, OrderedDict(a=1)], [1, 2], [0, 1, 2, 3]])
    elif kind == 8:
        metadata = random.choice([None, {}, {"neg": True}, {"conj": True}, {"neg": True, "conj": True}, {"a": 1}, 7])
        tail = [False, OrderedDict(), metadata]
    elif kind == 9:
        call.state = random.choice([{"shape": (2**40,)}, {"load": OrderedDict}, (None, {"dtype": 1}), [], 3, {"a": 1}])
    elif kind == 10:
        storage = random.choice([None, 7, "storage", record.storages, _Call(OrderedDict, ()), torch.FloatStorage])
    else:
        call.function = random.choice(
            [torch._utils._rebuild_tensor, torch._utils._rebuild_parameter, torch.Tensor, torch.nn.Parameter, dict,
             OrderedDict, torch._tensor._rebuild_from_type_v2, torch._utils._rebuild_qtensor, torch.FloatStorage]
        )  # fmt: skip
    call.arguments = (storage, offset, shape, stride, *tail)


def _damage_storage(random: Random, record: _Record) -> None:
    storage = random.choice(record.tensors).arguments[0]
    kind, dtype, key, device, size = storage.pid
    change = random.randrange(7)
    if change == 0:
        size = random.choice([size + 1, size - 1, size * 2, size // 2, *NUMBERS, float(size), None, True])
    elif change == 1:
        dtype = getattr(torch, random.choice(_STORAGES + _OTHER_STORAGES[:3]))
    elif change == 2:
        dtype = random.choice([torch.float32, "FloatStorage", torch.Tensor, None, 3, OrderedDict, [], {"a": 1}])
    elif change == 3:
        key = random.choice(["0", "1", "9", "../version", "", 0, None, ("0",), "0\0", "\ud800", b"0"])
    elif change == 4:
        kind = random.choice(["module", None, b"storage", "Storage"])
    elif change == 5:
        device = random.choice(["cuda:0", "meta", None, 3, "cpu:9"])
    storage.pid = (kind, dtype, key, device, size)
    if change == 6:
        storage.pid = random.choice([(), ("storage",), (*storage.pid, 1), "storage", 7, [*storage.pid], None, {}])


def _damage_tree(random: Random, record: _Record) -> None:
    tensor = random.choice(record.tensors)
    cyclic_dict: dict[str, Any] = {"a": tensor}
    cyclic_dict["self"] = cyclic_dict
    cyclic_list: list[Any] = [tensor]
    cyclic_list.append(cyclic_list)
    nested: Any = tensor
    for _ in range(random.choice([5, 14, 15, 16, 17, 100])):
        nested = {"a": nested} if random.random() < 0.9 else [nested]
    laughs: Any = {"a": tensor}
    for _ in range(random.choice([2, 14, 16, 40])):
        laughs = {"a": laughs, "b": laughs, "c": laughs}
    laughing: Any = [1]
    for _ in range(random.choice([2, 14, 16, 40])):
        laughing = [laughing, laughing, laughing]
    number = random.choice(NUMBERS)
    values = [
        *(number, 1 << 100_000, float("nan"), 1e308, 1j, b"bytes", bytearray(b"b"), "x" * 10_000, "\ud800", None, True),
        *({1, 2}, frozenset({1}), {number}, (), [], {}, OrderedDict(), [OrderedDict(a=1)], (1, [2, {"a": 3}])),
        *([tensor], (tensor,), [{"a": tensor}], {"a": [tensor]}, cyclic_dict, cyclic_list, nested, laughs, laughing),
        *(
            torch.FloatStorage,
            torch.Tensor,
            OrderedDict,
            torch._utils._rebuild_tensor_v2,
            torch.float32,
            torch.Size([1]),
        ),
        *(os.system, builtins.eval, np.float64(1), np.arange(3), torch.device("cpu"), complex, getattr),
        *(_Call(os.system, ("touch ran",)), _Call(builtins.eval, ("open('ran', 'w')",)), _Call(io.open, ("ran", "w"))),
        *(_Call(OrderedDict, (), {"items": torch.Tensor}), _Call(OrderedDict, (), {"_metadata": OrderedDict(a=1)})),
        *(_Call(OrderedDict, ([["a", tensor]],)), _Call(OrderedDict, (7,)), _Call(OrderedDict, ({"a": tensor},))),
        *(_Call(torch.Tensor, (torch.float32, (2,), OrderedDict)), _Call(torch.Tensor, (2**40,))),
        _Call(torch._tensor._rebuild_from_type_v2, (OrderedDict, torch.Tensor, (), {})),
        _Call(torch._tensor._rebuild_from_type_v2, (torch.Tensor, torch.Tensor, (1, 2, 3), {})),
        _Call(torch._utils._rebuild_parameter, (random.choice([tensor, 3, None, OrderedDict]), True, OrderedDict())),
    ]
    types = [torch.Tensor, torch.nn.Parameter]
    attributes = [{}, {}, {"a": 1}, {"data": 1}, {"shape": (1,)}, None]
    arguments = (tensor.function, random.choice(types), tensor.arguments, random.choice(attributes))
    values.append(_Call(torch._tensor._rebuild_from_type_v2, arguments))
    keys = ["a", "model", "part", "", "a.b", 0, number, None, (1, 2), b"k", 1.5, True, "\n", "\ud800", "x" * 1000]
    target = random.choice([record.tree, record.tree["model"]])
    for _ in range(random.choice([1, 1, 2])):
        value = random.choice(values)
        key = random.choice(keys)
        if random.random() < 0.2 and isinstance(target.get("part"), dict):
            target["part"][key] = value
        else:
            target[key] = value
    if random.random() < 0.05:
        record.tree = random.choice(values)  # type: ignore[assignment]
        record.tree = record.tree if isinstance(record.tree, dict) else {"x": record.tree}


def _dump(tree: Any, protocol: int) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=protocol).dump(tree)
    return buffer.getvalue()


# Opcodes


def _damage_pickle(random: Random, content: bytes) -> bytes:
    try:
        ends = [position for _, _, position in pickletools.genops(content)]
    except Exception:
        return damage_bytes(random, content)
    spans = list(itertools.pairwise([*ends, len(content)]))
    kind = random.randrange(6)
    if kind == 0:
        return damage_bytes(random, content)
    if kind == 1:
        return random.choice(_bombs(random))
    parts = [content[begin:end] for begin, end in spans]
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(parts))
        if kind == 2:
            parts[at : at + 1] = []
        elif kind == 3:
            parts.insert(at, random.choice(parts))
        elif kind == 4:
            parts.insert(at, _opcode(random))
        else:
            other = random.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        if not parts:
            break
    return b"".join(parts)


def _opcode(random: Random) -> bytes:
    opcode = random.choice(pickletools.opcodes)
    argument = opcode.arg
    code = opcode.code.encode("latin-1")
    if argument is None:
        return code
    if argument.n > 0:
        return code + random.choice([random.randbytes(argument.n), b"\0" * argument.n, b"\xff" * argument.n])
    if argument.n == pickletools.UP_TO_NEWLINE:
        return code + random.choice(
            [b"1\n", b"torch\nTensor\n", b"os\nsystem\n", b"collections\nOrderedDict\n", b"0\n"]
        )
    length = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8}.get(argument.n, 4)
    text = random.randbytes(random.randint(0, 4))
    lies = random.choice([len(text), len(text), 2 ** (8 * length) - 1, 2 ** (8 * length - 1) - 1])
    return code + lies.to_bytes(length, "little") + text


def _bombs(random: Random) -> list[bytes]:
    many = random.choice([1000, 20_000])
    return [
        b"\x80\x02}r\xff\xff\xff\x0f.",  # memo index 2**28 - 1
        b"\x80\x02}r\xff\xff\xff\xff.",
        b"\x80\x02}p9999999999\n.",
        b"\x80\x02" + b"]" * many + b"a" * (many - 1) + b".",
        b"\x80\x02" + b"}" + b"K\x01}" * many + b"s" * many + b".",
        b"\x80\x02(" + b"\x8f" * many + b"l.",
        b"\x80\x04" + b"\x8e" + (2**40).to_bytes(8, "little") + b"a.",
        b"\x80\x05" + b"\x96" + (2**33).to_bytes(8, "little") + b"a.",
        b"\x80\x04" + b"\x8d" + (2**62).to_bytes(8, "little") + b"a.",
        b"\x80\x04" + b"\x95" + (2**33).to_bytes(8, "little") + b"}.",
        b"\x80\x02}X\x01\x00\x00\x00aL" + b"9" * many + b"L\ns.",
        b"\x80\x02}X\x01\x00\x00\x00a\x8b" + many.to_bytes(4, "little") + b"\x7f" * many + b"s.",
        b"\x80\x02}\x8b" + many.to_bytes(4, "little") + b"\x7f" * many + b"K\x01s.",
        b"\x80\x02}F1e999\nK\x01s.",
        b"\x80\x02(ios\nsystem\n.",
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        b"\x80\x02ctorch\nTensor\n)\x81.",
        b"\x80\x02}X\x01\x00\x00\x00actorch\nTensor\n)\x81s.",
        b"\x80\x02ctorch\nTensor\nN}X\x04\x00\x00\x00loadK\x01s\x86b.",
        b"(I1\nI2\nd.",
        b"",
        b".",
        b"\x80\x63.",
    ]


# The archive


def _damage_records(random: Random, names: dict[str, bytes]) -> None:
    name = random.choice([*names])
    kind = random.randrange(6)
    if kind == 0:
        del names[name]
    elif kind == 1:
        names[name] = random.choice([b"", names[name][:-1], names[name] + b"\0", b"big", b"x" * 1000])
    elif kind == 2:
        extra = [
            "constants.pkl",
            "code/a.py",
            "a/data.pkl",
            "data",
            "data/",
            "../x",
            ".format_version",
            ".data/version",
        ]
        names[random.choice(extra)] = random.choice([b"", b"1", b"little"])
    elif kind == 3:
        names["version"] = random.choice(
            [b"", b"0\n", b"1\n", b"2", b"10\n", b"11\n", b"99", b"-1", b"x", b"3 x", b" 3"]
        )
    elif kind == 4:
        names["byteorder"] = random.choice([b"big", b"Little", b"", b"little\n", b"x" * 100])
    else:
        items = [*names.items()]
        random.shuffle(items)
        names.clear()
        names.update(items)


def _zip(random: Random, names: dict[str, bytes], plain: bool) -> tuple[bytes, bool]:
    """The archive, and whether it is one that torch.save could have written."""
    buffer = io.BytesIO()
    tricks = set() if plain else {random.choice(["other root", "twice", "deflate", "two pickles", "no root", "nested"])}
    root = random.choice(["archive", "m", "größe"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names that stand twice
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for name, content in names.items():
                prefix = random.choice([root, "b"]) if "other root" in tricks else root
                prefix = f"{prefix}/deep" if "nested" in tricks else prefix
                full = name if "no root" in tricks else f"{prefix}/{name}"
                if "twice" in tricks and random.random() < 0.5:
                    archive.writestr(full, random.randbytes(len(content)))
                kind = zipfile.ZIP_DEFLATED if "deflate" in tricks and random.random() < 0.5 else zipfile.ZIP_STORED
                archive.writestr(full, content, kind)
            if "two pickles" in tricks:
                archive.writestr("other/data.pkl", names.get("data.pkl", b""))
    return buffer.getvalue(), not tricks


def _damage_zip(random: Random, data: bytes) -> bytes:
    directory = data.find(b"PK\x01\x02")
    kind = random.randrange(8)
    if kind == 0 or directory < 0:
        return damage_bytes(random, data)
    if kind in (1, 2, 3):
        return damage_bytes(random, data, directory)
    if kind == 4:
        return random.choice([b"#!/bin/sh\n", b"\0" * 100, data]) + data
    if kind == 5:
        return data + random.choice([b"\0", b"x" * 70_000, data])
    # A field of one central directory entry: flags, method, sizes, lengths, offset of the local header.
    entries = [at for at in range(directory, len(data) - 46) if data[at : at + 4] == b"PK\x01\x02"]
    at = random.choice(entries)
    field, size = random.choice(
        [(6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4)]
    )
    old = int.from_bytes(data[at + field : at + field + size], "little")
    new = random.choice([old + 1, old - 1, 0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), old ^ 1, old * 2])
    changed = bytearray(data)
    changed[at + field : at + field + size] = (new % 2 ** (8 * size)).to_bytes(size, "little")
    if kind == 7 and field in (20, 24):  # both sizes alike
        changed[at + 20 : at + 28] = (new % 2**32).to_bytes(4, "little") * 2
    return bytes(changed)
