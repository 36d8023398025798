"""The `.pt` format of `torch.save`: a zip archive of one pickle and one uncompressed record a storage.

The pickle is read by an unpickler that knows tensors, containers and plain values and nothing else: no code from the
file can run. Files are written record by record, so that no more than one tensor is held at a time; torch.load reads
them, with `weights_only=True` and with `mmap=True`.
"""

import io
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evla_cli.checkpoint.mapped_file import ALIGNMENT, MappedFile
from evla_cli.checkpoint.output_file import OutputFile
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
_MAX_PICKLE_BYTES = 256_000_000


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
    paths: dict[str, tuple[str, ...]]


def read_torch(path: Path) -> TorchFile:
    """Open a `.pt` file. Errors: not a zip archive, foreign pickle globals, storages that lie about their size."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise EvlaError(
            f"{path} is not a checkpoint that can be read: {error}. It may be truncated, or saved by torch before "
            "1.6; in that case load it with torch and save it again."
        ) from error
    with archive:
        root, records = _records(path, archive)
        tree = _read_pickle(path, archive, root, MappedFile(path), records)
    tensors: LazyTensors = {}
    others: dict[str, Any] = {}
    paths: dict[str, tuple[str, ...]] = {}
    for keys, leaf in _leaves(tree):
        name = ".".join(keys)
        if name in paths:
            raise EvlaError(f"{path}: two entries have the name {name}.")
        paths[name] = keys
        if isinstance(leaf, LazyTensor):
            tensors[name] = leaf
        else:
            others[name] = leaf
    return TorchFile(tensors, others, paths)


def write_torch(
    path: Path,
    tensors: LazyTensors,
    paths: dict[str, tuple[str, ...]],
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


def _records(path: Path, archive: zipfile.ZipFile) -> tuple[str, dict[str, tuple[int, int]]]:
    """The archive's root folder, and for every record its first byte in the file and its size."""
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise EvlaError(f"{path} is a zip archive, but not one that torch.save wrote (no data.pkl).")
    records = {}
    with open(path, "rb") as file:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise EvlaError(f"{path}: record {info.filename} is compressed; torch.save never does that.")
            file.seek(info.header_offset)
            header = file.read(30)  # the local header repeats name and extra field, with lengths of its own
            if len(header) != 30 or header[:4] != b"PK\x03\x04":
                raise EvlaError(f"{path} is truncated or corrupt: no record at byte {info.header_offset}.")
            start = info.header_offset + 30 + int.from_bytes(header[26:28], "little")
            records[info.filename] = (start + int.from_bytes(header[28:30], "little"), info.file_size)
    root = pickles[0].removesuffix("/data.pkl")
    if f"{root}/byteorder" in records and archive.read(f"{root}/byteorder") != b"little":
        raise EvlaError(f"{path} was written on a big-endian machine, which is not supported.")
    return root, records


def _read_pickle(
    path: Path, archive: zipfile.ZipFile, root: str, file: MappedFile, records: dict[str, tuple[int, int]]
) -> Any:
    if records[f"{root}/data.pkl"][1] > _MAX_PICKLE_BYTES:
        raise EvlaError(f"{path}: data.pkl is larger than {_MAX_PICKLE_BYTES} bytes; this is no plain checkpoint.")
    try:
        stream = io.BytesIO(archive.read(f"{root}/data.pkl"))
        return _TensorUnpickler(stream, file, root, records).load()
    except EvlaError:
        raise
    except (pickle.UnpicklingError, zipfile.BadZipFile, zlib.error) as error:
        raise EvlaError(f"{path} is corrupt: {error}.") from error
    except Exception as error:  # a damaged pickle can fail in any way inside the unpickler
        raise EvlaError(f"{path} is corrupt: its pickle cannot be read ({type(error).__name__}: {error}).") from error


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    offset: int
    num_elements: int


class _TensorUnpickler(pickle.Unpickler):
    """Knows what `torch.save` writes for tensors in containers; any other global is an error."""

    def __init__(self, stream: io.BytesIO, file: MappedFile, root: str, records: dict[str, tuple[int, int]]):
        super().__init__(stream, encoding="utf-8")
        self._file, self._root, self._records = file, root, records

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch._tensor", "_rebuild_from_type_v2"): lambda function, _type, arguments, _state: function(*arguments),
            ("torch", "Tensor"): LazyTensor,
            ("torch.nn.parameter", "Parameter"): LazyTensor,
        }
        if (module, name) in known:
            return known[(module, name)]
        raise EvlaError(
            f"{self._file.path} holds the Python object {module}.{name}, which is not part of a plain checkpoint. "
            "It was not executed."
        )

    def persistent_load(self, pid: Any) -> _Storage:
        try:
            kind, dtype, key, _device, num_elements = pid
            start, size = self._records[f"{self._root}/data/{key}"]
            valid = kind == "storage" and isinstance(dtype, torch.dtype) and type(num_elements) is int
        except (TypeError, ValueError, KeyError):
            valid = False
        if not valid or num_elements < 0 or num_elements * dtype.itemsize > size:
            raise EvlaError(f"{self._file.path} is truncated or corrupt: a storage is missing or too short ({pid}).")
        return _Storage(dtype, start, num_elements)

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> LazyTensor:
        shape, stride = tuple(shape), tuple(stride)
        numbers = [offset, *shape, *stride]
        if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
            raise EvlaError(f"{self._file.path} is corrupt: a tensor has no valid storage, shape or stride.")
        if len(shape) != len(stride):
            raise EvlaError(f"{self._file.path} is corrupt: shape {shape} with stride {stride}.")
        dtype, limit = storage.dtype, storage.offset + storage.num_elements * storage.dtype.itemsize
        start = storage.offset + offset * dtype.itemsize
        if 0 in shape or stride == _row_major(shape):
            return self._file.tensor("a tensor", dtype, shape, start, limit)
        # A transposed or strided view: map the span that it covers.
        span = 1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
        base = self._file.tensor("a tensor", dtype, (span,), start, limit)
        return LazyTensor(dtype, shape, lambda: base.load().as_strided(shape, stride).contiguous())


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, strides = 1, []
    for length in reversed(shape):
        strides.append(stride)
        stride *= length
    return tuple(reversed(strides))


def _leaves(tree: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, dict):
        if len(keys) > 16:
            raise EvlaError("The checkpoint's dicts are nested more than 16 deep.")
        for key, value in tree.items():
            yield from _leaves(value, (*keys, str(key)))
    else:
        yield keys, tree


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


def _insert(tree: dict[str, Any], keys: tuple[str, ...], leaf: Any) -> None:
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
