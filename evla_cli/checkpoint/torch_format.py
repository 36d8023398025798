"""The `.pt` format of `torch.save`: a zip archive of one pickle and one uncompressed record a storage.

The pickle is read by a reader that knows tensors, containers and plain values and nothing else: no code from the file
can run. Files are written record by record, so that no more than one tensor is held at a time; torch.load reads
them, with `weights_only=True` and with `mmap=True`.
"""

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from evla_cli.checkpoint.mapped_file import ALIGNMENT, MappedFile
from evla_cli.checkpoint.output_file import OutputFile
from evla_cli.checkpoint.plain_pickle import Call, Global, Persistent, read_plain_pickle
from evla_cli.checkpoint.tensors import LazyTensor, LazyTensors, prepared, tensor_bytes
from evla_cli.errors import EvlaError

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_STORAGE_NAMES = {dtype: name for name, dtype in _STORAGE_DTYPES.items()}
_END_RECORD = struct.Struct("<4s4H2LH")  # of a zip archive without a comment
_UTF8_NAME = 0x800
_ZIP_FLAGS = _UTF8_NAME | 0x8  # of a record: sizes repeated after its data
_VERSIONS = tuple(str(version).encode() for version in range(1, 11))  # of the archive; torch.save writes 3
_OTHER_KINDS = frozenset({"constants.pkl", ".data/version"})  # TorchScript's
# A 7 B checkpoint's pickle has 0.2 MB and a thousand entries. One byte of pickle can take 70 of memory.
_MAX_PICKLE_BYTES = 8_000_000
_MAX_ENTRIES = 100_000
_MAX_DEPTH = 16
_MAX_DIMS = 64  # torch's own limit for most operations


@dataclass(frozen=True)
class TorchFile:
    """What a `.pt` holds.

    Attributes:
        tensors: by name; the keys of nested dicts are joined by dots.
        others: values that are no tensors, by name.
        paths: the keys of the nested dicts for every name of both.
    """

    tensors: LazyTensors
    others: dict[str, Any]
    paths: dict[str, tuple[str | int, ...]]


def read_torch(path: Path) -> TorchFile:
    """Open a `.pt` file. Errors: not a zip archive, foreign pickle globals, storages that lie about their size."""
    archive = _Archive(path)
    tree = archive.tree()
    if not isinstance(tree, dict):
        raise EvlaError(f"{path} holds no dict of tensors.")
    tensors: LazyTensors = {}
    others: dict[str, Any] = {}
    paths: dict[str, tuple[str | int, ...]] = {}
    for keys, leaf in _leaves(path, tree):
        name = ".".join(map(str, keys))
        if name in paths:
            raise EvlaError(f"{path}: two entries have the name {name}.")
        if len(paths) == _MAX_ENTRIES:
            raise EvlaError(f"{path} holds more than {_MAX_ENTRIES} entries; this is no plain checkpoint.")
        paths[name] = keys
        if isinstance(leaf, Call):
            tensors[name] = archive.tensor(name, leaf)
        else:
            _check_plain(path, name, leaf)
            others[name] = leaf
    return TorchFile(tensors, others, paths)


def write_torch(
    path: Path,
    tensors: LazyTensors,
    paths: Mapping[str, tuple[str | int, ...]],
    others: dict[str, Any] | None = None,
    on_bytes: Callable[[int], Any] | None = None,
) -> str:
    """Write nested dicts of tensors as `torch.save` would, one tensor at a time; same input, same bytes.

    Returns the file's SHA-256.
    """
    tree: dict[str, Any] = {}
    keys: dict[str, int] = {}
    for number, (name, lazy) in enumerate(tensors.items()):
        if lazy.dtype not in _STORAGE_NAMES:
            raise EvlaError(f"{name} has dtype {lazy.dtype}, which a .pt file cannot hold here.")
        keys[name] = number
        _insert(tree, paths[name], _TensorRecord(lazy, str(number)))
    for name, value in (others or {}).items():
        _insert(tree, paths[name], value)
    root = path.stem
    with OutputFile(path) as file:
        archive = _ZipWriter(file)
        archive.write(f"{root}/data.pkl", *_with_crc(_pickle(tree)))
        archive.write(f"{root}/.format_version", *_with_crc(b"1"))
        archive.write(f"{root}/.storage_alignment", *_with_crc(str(ALIGNMENT).encode()))
        archive.write(f"{root}/byteorder", *_with_crc(b"little"))
        for name, (data, crc) in prepared(tensors, lambda _, tensor: _with_crc(tensor_bytes(tensor))):
            archive.write(f"{root}/data/{keys[name]}", data, crc)
            if on_bytes:
                on_bytes(tensors[name].num_bytes)
        archive.write(f"{root}/version", *_with_crc(b"3\n"))
        archive.close()
    return file.sha256


# Reading

_REBUILD_TENSOR = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_REBUILD_FROM_TYPE = Global("torch._tensor", "_rebuild_from_type_v2")
_TENSOR_TYPES = (Global("torch", "Tensor"), Global("torch.nn.parameter", "Parameter"))
_STORAGE_TYPES = {Global("torch", name): dtype for name, dtype in _STORAGE_DTYPES.items()}
_KNOWN = (*_STORAGE_TYPES, *_TENSOR_TYPES, _REBUILD_TENSOR, _REBUILD_PARAMETER, _REBUILD_FROM_TYPE)


class _Archive:
    """A zip archive as torch.save writes it: the records of one folder, one after the other, uncompressed."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
                end = archive.start_dir
            self._file = MappedFile(path)
            with open(path, "rb") as file:
                self._find_records(file, entries, end)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise EvlaError(
                f"{path} is not a checkpoint that can be read: {error}. It may be truncated, or saved by torch before "
                "1.6; in that case load it with torch and save it again."
            ) from error
        self._storages: dict[str, tuple[Any, ...]] = {}

    def _find_records(self, file: BinaryIO, entries: list[zipfile.ZipInfo], end: int) -> None:
        """For every record its first byte in the file, its size, and the checksum that the archive gives for it."""
        root = entries[0].filename.split("/")[0] if entries else ""
        self._records: dict[str, tuple[int, int, int]] = {}
        file.seek(-_END_RECORD.size, os.SEEK_END)
        signature, *disks, num_here, num_entries, _, _, comment = _END_RECORD.unpack(file.read())
        counted = num_here == num_entries and num_entries in (len(entries), 0xFFFF)  # 0xFFFF: more, or in zip64's form
        if signature != b"PK\x05\x06" or any(disks) or comment or not counted:
            raise ValueError("its last record is not the end of a directory of all the others")
        borders = [entry.header_offset for entry in entries] + [end]
        if borders[0] != 0:
            raise ValueError("something stands before its first record")
        for entry, next_header in zip(entries, borders[1:], strict=True):
            name = entry.filename.removeprefix(f"{root}/")
            stored = entry.compress_type == zipfile.ZIP_STORED and entry.file_size == entry.compress_size
            if not stored or entry.flag_bits & ~_ZIP_FLAGS or entry.volume:
                raise ValueError(f"record {name} is compressed or encrypted; torch.save never does that")
            if name == entry.filename or name in self._records:
                raise ValueError(f"record {name} stands in it twice or outside of its folder {root}/")
            file.seek(entry.header_offset)
            header = file.read(30)  # the local header repeats name and extra field, with lengths of its own
            own_name = file.read(int.from_bytes(header[26:28], "little"))
            if header[:4] != b"PK\x03\x04" or own_name != entry.orig_filename.encode(_encoding(entry)):
                raise ValueError(f"record {name} is not at byte {entry.header_offset}")
            start = file.tell() + int.from_bytes(header[28:30], "little")
            if start + entry.file_size > next_header:
                raise ValueError(f"record {name} runs into the next one")
            self._records[name] = (start, entry.file_size, entry.CRC)

    def read(self, name: str, max_bytes: int) -> bytes:
        if name not in self._records:
            raise EvlaError(f"{self.path} is a zip archive, but not one that torch.save wrote (no {name}).")
        start, size, checksum = self._records[name]
        if size > max_bytes:
            raise EvlaError(f"{self.path}: {name} is larger than {max_bytes} bytes; this is no plain checkpoint.")
        with open(self.path, "rb") as file:
            file.seek(start)
            content = file.read(size)
        # 0: torch was told not to compute them (torch.serialization.set_crc32_options)
        if checksum not in (0, zlib.crc32(content)):
            raise EvlaError(f"{self.path} is corrupt: {name} does not have the checksum that the archive gives.")
        return content

    def tree(self) -> Any:
        """The pickled dicts, lists and plain values, with `Call`s for the tensors. Errors: not a plain checkpoint."""
        if self.read("version", 20).strip() not in _VERSIONS or not _OTHER_KINDS.isdisjoint(self._records):
            raise EvlaError(f"{self.path} is a torch archive of another kind or version, not a plain checkpoint.")
        if "byteorder" in self._records and self.read("byteorder", 20) != b"little":
            raise EvlaError(f"{self.path} was written on a big-endian machine, which is not supported.")
        return read_plain_pickle(self.read("data.pkl", _MAX_PICKLE_BYTES), _KNOWN, self.path)

    def tensor(self, name: str, call: Call) -> LazyTensor:
        """The tensor that `call` would make. Errors: anything that torch.save does not write, storages that lie."""
        function, arguments = call
        if function == _REBUILD_FROM_TYPE and len(arguments) == 4 and arguments[1] in _TENSOR_TYPES:
            function, _, arguments, attributes = arguments
            if type(attributes) is not dict or any(hasattr(torch.Tensor, str(key)) for key in attributes):
                raise self._corrupt(name)
        if function == _REBUILD_PARAMETER and type(arguments) is tuple and len(arguments) == 3:
            inner, needs_gradient, hooks = arguments
            if not isinstance(inner, Call) or inner.function != _REBUILD_TENSOR:
                raise self._corrupt(name)
            tensor = self.tensor(name, inner)
        elif function == _REBUILD_TENSOR and type(arguments) is tuple and len(arguments) in (6, 7):
            storage, offset, shape, stride, needs_gradient, hooks, *metadata = arguments
            if any(metadata):
                raise EvlaError(
                    f"{self.path}: {name} is a view whose negation is pending; save it as a tensor of its own "
                    "(torch.Tensor.resolve_neg)."
                )
            tensor = self._strided(name, storage, offset, shape, stride)
        else:
            raise self._corrupt(name)
        if type(needs_gradient) is not bool or hooks or (needs_gradient and not tensor.dtype.is_floating_point):
            raise self._corrupt(name)
        return tensor

    def _strided(self, name: str, storage: Any, offset: Any, shape: Any, stride: Any) -> LazyTensor:
        dtype, begin, limit = self._storage(name, storage)
        tuples = type(shape) is type(stride) is tuple and len(shape) == len(stride) <= _MAX_DIMS
        if not tuples or not all(type(number) is int and 0 <= number < 2**63 for number in (offset, *shape, *stride)):
            raise self._corrupt(name)
        begin += offset * dtype.itemsize
        steps = list(zip(shape, stride, _row_major(shape), strict=True))
        if 0 in shape or all(step == row_major for length, step, row_major in steps if length != 1):
            return self._file.tensor(name, dtype, shape, begin, limit)
        # A transposed or strided view: map the span that it covers.
        span = 1 + sum((length - 1) * step for length, step, _ in steps)
        base = self._file.tensor(name, dtype, (span,), begin, limit)
        if prod(shape) * dtype.itemsize > self._file.size:
            raise EvlaError(f"{self.path}: {name} repeats its elements until it is larger than the whole file.")
        return LazyTensor(dtype, shape, lambda: base.load().as_strided(shape, stride).contiguous())

    def _storage(self, name: str, storage: Any) -> tuple[torch.dtype, int, int]:
        """dtype, first byte and end of a storage's record."""
        pid = storage.id if isinstance(storage, Persistent) else None
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage" or type(pid[2]) is not str:
            raise self._corrupt(name)
        _, kind, key, device, num_elements = pid
        dtype = _STORAGE_TYPES.get(kind) if type(kind) is Global else None
        record = self._records.get(f"data/{key}")
        if dtype is None or record is None or type(device) is not str or type(num_elements) is not int:
            raise self._corrupt(name)
        start, size, _ = record
        if num_elements * dtype.itemsize != size:
            raise EvlaError(
                f"{self.path} is truncated or corrupt: the storage of {name} should have {num_elements} elements, its "
                f"record has {size} bytes."
            )
        if self._storages.setdefault(key, pid) != pid:
            raise EvlaError(f"{self.path} is corrupt: it says two different things of the storage of {name}.")
        return dtype, start, start + size

    def _corrupt(self, name: str) -> EvlaError:
        return EvlaError(f"{self.path} is corrupt: {name} is not a tensor as torch.save writes one.")


def _encoding(entry: zipfile.ZipInfo) -> str:
    return "utf-8" if entry.flag_bits & _UTF8_NAME else "cp437"


def _leaves(path: Path, tree: Any, keys: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """What stands in nested dicts; an empty dict inside counts."""
    if not isinstance(tree, dict) or (keys and not tree):
        yield keys, tree
        return
    if len(keys) == _MAX_DEPTH:
        raise EvlaError(f"{path}: its dicts are nested more than {_MAX_DEPTH} deep.")
    for key, value in tree.items():
        yield from _leaves(path, value, (*keys, key))


def _check_plain(path: Path, name: str, value: Any) -> None:
    """Refuse what cannot be written again as it is: tensors in lists, Python objects, nesting without end."""
    waiting, num_seen = [(value, 0)], 0
    while waiting:
        item, depth = waiting.pop()
        num_seen += 1
        if isinstance(item, Call | Global | Persistent):
            raise EvlaError(f"{path}: {name} holds a tensor in a list, or something that is no plain value.")
        if depth > _MAX_DEPTH or num_seen > _MAX_ENTRIES:
            raise EvlaError(f"{path}: {name} is nested more than {_MAX_DEPTH} deep, or without end.")
        if isinstance(item, dict):
            waiting += [(inner, depth + 1) for inner in item.values()]
        elif isinstance(item, list | tuple):
            waiting += [(inner, depth + 1) for inner in item]


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, strides = 1, []
    for length in reversed(shape):
        strides.append(stride)
        stride *= length
    return tuple(reversed(strides))


# Writing


@dataclass(frozen=True)
class _TensorRecord:
    lazy: LazyTensor
    key: str


@dataclass(frozen=True)
class _StorageRecord:
    lazy: LazyTensor
    key: str


class _TensorPickler(pickle.Pickler):
    """Pickles a `_TensorRecord` as torch.save pickles a tensor whose bytes stand in record `data/<key>`."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, _TensorRecord):
            shape = obj.lazy.shape
            storage = _StorageRecord(obj.lazy, obj.key)
            hooks: OrderedDict[str, Any] = OrderedDict()
            return torch._utils._rebuild_tensor_v2, (storage, 0, shape, _row_major(shape), False, hooks)
        return NotImplemented

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _StorageRecord):
            storage_class = getattr(torch, _STORAGE_NAMES[obj.lazy.dtype])
            return ("storage", storage_class, obj.key, "cpu", obj.lazy.num_elements)
        return None


def _pickle(tree: Any) -> bytes:
    buffer = io.BytesIO()
    _TensorPickler(buffer, protocol=2).dump(tree)
    return buffer.getvalue()


def _insert(tree: dict[Any, Any], keys: tuple[str | int, ...], leaf: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, OrderedDict())
    tree[keys[-1]] = leaf


def _with_crc(data: bytes | memoryview) -> tuple[bytes | memoryview, int]:
    return data, zlib.crc32(data)


class _ZipWriter:
    """Uncompressed zip archives, front to back: `zipfile` goes back to each header to fill in its checksum.

    Sizes are always written in zip64 fields, so that a header's length does not depend on what follows it. The time is
    fixed: the same input gives the same bytes. Specification: APPNOTE.TXT 6.3.9, 4.3.7 (local header), 4.3.12
    (directory), 4.3.14-16 (end), 4.5.3 (zip64 field).
    """

    _VERSION = 45  # the first with zip64
    _UTF8 = 0x800
    _JANUARY_1980 = 0x21
    _SEE_ZIP64 = 0xFFFF_FFFF

    def __init__(self, file: OutputFile):
        self._file = file
        self._directory: list[bytes] = []

    def write(self, name: str, data: bytes | memoryview, crc: int) -> None:
        encoded, begin, size = name.encode(), self._file.position, len(data)
        zip64 = struct.pack("<HHQQ", 1, 16, size, size)
        # A padding field ("FB", as torch writes it) of four bytes and more brings the data to an aligned byte.
        padding = -(begin + 30 + len(encoded) + len(zip64) + 4) % ALIGNMENT
        extra = zip64 + b"FB" + struct.pack("<H", padding) + b"Z" * padding
        common = self._common(crc, encoded)
        self._file.write(b"PK\3\4" + common + struct.pack("<H", len(extra)) + encoded + extra)
        self._file.write(data)
        extra = struct.pack("<HHQQQ", 1, 24, size, size, begin)
        tail = struct.pack("<HHHHII", len(extra), 0, 0, 0, 0, self._SEE_ZIP64)
        self._directory.append(b"PK\1\2" + struct.pack("<H", self._VERSION) + common + tail + encoded + extra)

    def close(self) -> None:
        begin, count = self._file.position, len(self._directory)
        directory = b"".join(self._directory)
        end = begin + len(directory)
        self._file.write(directory)
        version = self._VERSION
        self._file.write(
            b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, version, version, 0, 0, count, count, len(directory), begin)
        )
        self._file.write(b"PK\6\7" + struct.pack("<IQI", 0, end, 1))
        self._file.write(b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, *[self._SEE_ZIP64] * 2, 0))

    def _common(self, crc: int, name: bytes) -> bytes:
        """What a record's local header and its entry in the directory have in common."""
        sizes = [self._SEE_ZIP64] * 2
        return struct.pack("<HHHHHIIIH", self._VERSION, self._UTF8, 0, 0, self._JANUARY_1980, crc, *sizes, len(name))
