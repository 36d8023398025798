"""What fuzzing found in weight files, by name. Each was accepted, a traceback, or without bounds before."""

import io
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from evla_cli.checkpoint.safetensors_format import read_safetensors
from evla_cli.checkpoint.torch_format import read_torch, write_torch
from evla_cli.errors import EvlaError


def safetensors_file(path: Path, header: str, body: bytes = bytes(8)) -> Path:
    encoded = header.encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + body)
    return path


ENTRY = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
HEADERS = {
    "an offset of -0": ENTRY.replace("[0,", "[-0,"),
    "a shape that is an object": ENTRY.replace("[2]", "{}").replace("F32", "F64"),
    "metadata that are no texts": f'"__metadata__":{{"format":1}},{ENTRY}',
    "metadata that are a list": f'"__metadata__":[],{ENTRY}',
    "half a character in a name": ENTRY.replace('"a"', '"\\ud800"'),
    "a name that stands twice": f"{ENTRY},{ENTRY}",
}


@pytest.mark.parametrize("name", HEADERS)
def test_header_that_the_library_refuses(name, tmp_path):
    path = safetensors_file(tmp_path / "m.safetensors", "{" + HEADERS[name] + "}")
    if name != "a name that stands twice":  # there the library takes the last; here it is damage
        with pytest.raises(SafetensorError), safe_open(path, framework="pt"):
            pass
    with pytest.raises(EvlaError, match="header"):
        read_safetensors(path)


def test_empty_tensor_of_a_shape_beyond_torchs_arithmetic(tmp_path):
    header = '{"a":{"dtype":"F32","shape":[4611686018427387904,0,4],"data_offsets":[0,0]}}'
    with pytest.raises(EvlaError, match="a shape that no tensor can have"):
        read_safetensors(safetensors_file(tmp_path / "m.safetensors", header, b""))


# .pt


def saved(path: Path, record: Any) -> Path:
    torch.save(record, path)
    return path


def archive(path: Path, **changes: bytes | None) -> Path:
    """A file that torch.save wrote, with records replaced, added or (None) removed."""
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as dest:
        records = {name.split("/", 1)[1]: source.read(name) for name in source.namelist()}
        for name, content in (records | {name.replace("__", "/"): data for name, data in changes.items()}).items():
            if content is not None:
                dest.writestr(f"m/{name}", content)
    return path


def refused(path: Path, message: str) -> None:
    with pytest.raises(EvlaError, match=message):
        [lazy.load() for lazy in read_torch(path).tensors.values()]


def test_pending_negation_is_not_dropped(tmp_path):
    """The imaginary part of a conjugate is stored with the opposite sign and a note; without the note it is wrong."""
    view = torch.imag(torch.complex(torch.ones(3), torch.arange(3.0)).conj())
    assert view.is_neg()
    refused(saved(tmp_path / "m.pt", {"a": view}), "negation is pending")


def test_repeated_element_cannot_outgrow_memory(tmp_path):
    refused(saved(tmp_path / "m.pt", {"a": torch.ones(1).expand(2**40)}), "repeats its elements")


def test_single_element_with_a_stride_of_0_can_be_written(tmp_path):
    file = read_torch(saved(tmp_path / "m.pt", {"a": torch.ones(3).as_strided((1,), (0,))}))
    write_torch(tmp_path / "copy.pt", file.tensors, file.paths)
    assert torch.load(tmp_path / "copy.pt") == {"a": torch.ones(1)}


def test_checksums_may_be_left_out(tmp_path):
    options = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "m.pt", {"a": torch.ones(2)})
    finally:
        torch.serialization.set_crc32_options(options)
    assert torch.equal(read_torch(path).tensors["a"].load(), torch.ones(2))


def test_keys_that_are_numbers_and_empty_dicts_are_written_as_they_were(tmp_path):
    record = {"optimizer": {"state": {0: {"step": torch.ones(1)}, 1: {}}, "groups": [{"lr": 0.1, "params": [0, 1]}]}}
    file = read_torch(saved(tmp_path / "m.pt", record))
    write_torch(tmp_path / "copy.pt", file.tensors, file.paths, file.others)
    assert torch.load(tmp_path / "copy.pt") == record


def test_attributes_of_a_dict_cannot_replace_its_methods(tmp_path):
    content = b"\x80\x02ccollections\nOrderedDict\n)RX\x01\x00\x00\x00aK\x01s}X\x05\x00\x00\x00itemsNsb."
    assert read_torch(archive(tmp_path / "m.pt", **{"data.pkl": content})).others == {"a": 1}


def test_tensor_in_a_list_is_named(tmp_path):
    refused(saved(tmp_path / "m.pt", {"part": {"heads": [torch.ones(2)]}}), "part.heads holds a tensor in a list")


def test_dict_that_holds_itself(tmp_path):
    record: dict[str, Any] = {"a": torch.ones(2)}
    record["self"] = record
    refused(saved(tmp_path / "m.pt", record), "nested more than 16 deep")


def test_list_that_holds_itself(tmp_path):
    record: list[Any] = [1]
    record.append(record)
    refused(saved(tmp_path / "m.pt", {"a": record}), "or without end")


@pytest.mark.parametrize("kind", [list, dict])
def test_few_objects_that_are_exponentially_many(kind, tmp_path):
    record: Any = {"a": 1}
    for _ in range(14):
        record = [record] * 10 if kind is list else dict.fromkeys("abcdefghij", record)
    refused(saved(tmp_path / "m.pt", {"a": record}), "or without end|more than 100000 entries")


PICKLES = {
    "memo far beyond what is in it": (b"\x80\x02}r\xff\xff\xff\xff.", "no dict of tensors"),
    "instance of a class": (b"\x80\x02ctorch\nTensor\n)\x81.", "the opcode NEWOBJ"),
    "call of a class": (b"\x80\x02}X\x01\x00\x00\x00actorch\nTensor\n)Rs.", "a is not a tensor as torch.save"),
    "attribute set on a class": (b"\x80\x02ctorch\nTensor\nN}X\x04\x00\x00\x00loadK\x01s\x86b.", "found tuple"),
    "sets, which take much memory": (b"\x80\x04\x8f.", "the opcode EMPTY_SET"),
    "number of 100 000 digits as a key": (b"\x80\x02}\x8b\x20\x4e\x00\x00" + b"\x7f" * 20_000 + b"K\x01s.", "LONG4"),
    "no end": (b"\x80\x02}", "cannot be read"),
    "nothing": (b"", "cannot be read"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickle(name, tmp_path):
    content, message = PICKLES[name]
    path = archive(tmp_path / "m.pt", **{"data.pkl": content})
    tracemalloc.start()
    if message == "no dict of tensors":
        assert read_torch(path).tensors == {}
    else:
        refused(path, message)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_storage_of_two_dtypes(tmp_path):
    float_pid = ("storage", torch.FloatStorage, "0", "cpu", 2)
    int_pid = ("storage", torch.IntStorage, "0", "cpu", 2)
    refused(archive(tmp_path / "m.pt", **{"data.pkl": _tensors(float_pid, int_pid)}), "two different things")


@pytest.mark.parametrize("num_elements", [1, 3, -1, 2**62])
def test_storage_that_lies_about_its_size(num_elements, tmp_path):
    content = _tensors(("storage", torch.FloatStorage, "0", "cpu", num_elements))
    refused(archive(tmp_path / "m.pt", **{"data.pkl": content}), "should have|not a tensor")


def _tensors(*pids: tuple[Any, ...]) -> bytes:
    """A pickle of tensors (2,) with these storages."""

    class Storage:
        def __init__(self, pid: Any):
            self.pid = pid

    class Tensor:
        def __init__(self, pid: Any):
            self.storage = Storage(pid)

        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (self.storage, 0, (2,), (1,), False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.pid if isinstance(obj, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({f"t{number}": Tensor(pid) for number, pid in enumerate(pids)})
    return buffer.getvalue()


ARCHIVES: dict[str, tuple[dict[str, bytes | None], str]] = {
    "no version": ({"version": None}, "no version"),
    "version of the future": ({"version": b"99\n"}, "another kind or version"),
    "TorchScript": ({"constants.pkl": b""}, "another kind or version"),
    "no pickle": ({"data.pkl": None}, "no data.pkl"),
    "endless byte order": ({"byteorder": b"x" * 1000}, "larger than 20 bytes"),
    "pickle of 9 MB": ({"data.pkl": b"\x80\x02" + b"}" * 9_000_000 + b"."}, "larger than 8000000 bytes"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archive(name, tmp_path):
    changes, message = ARCHIVES[name]
    refused(archive(tmp_path / "m.pt", **changes), message)


def changed(path: Path, old: bytes, new: bytes, last: bool = False) -> Path:
    data = saved(path, {"a": torch.ones(2)}).read_bytes()
    at = data.rfind(old) if last else data.find(old)
    assert at >= 0
    path.write_bytes(data[:at] + new + data[at + len(old) :])
    return path


def test_bytes_before_the_archive(tmp_path):
    refused(changed(tmp_path / "m.pt", b"PK", b"#!/bin/sh\nPK"), "something stands before its first record")


def test_bytes_after_the_archive(tmp_path):
    path = saved(tmp_path / "m.pt", {"a": torch.ones(2)})
    path.write_bytes(path.read_bytes() + b"\0" * 30)
    refused(path, "its last record")


def test_byte_order_with_a_wrong_checksum(tmp_path):
    refused(changed(tmp_path / "m.pt", b"little", b"littel"), "does not have the checksum")


def test_record_that_is_not_where_the_directory_says(tmp_path):
    refused(changed(tmp_path / "m.pt", b"m/data/0", b"m/data/1"), "record data/0 is not at byte")


def test_record_that_stands_twice(tmp_path):
    path = archive(tmp_path / "m.pt")
    with zipfile.ZipFile(path, "a") as dest, pytest.warns(UserWarning, match="Duplicate name"):
        dest.writestr("m/data/0", bytes(8))
    refused(path, "twice or outside")
