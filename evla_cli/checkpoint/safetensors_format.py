"""The safetensors format: 8 bytes of header length, a JSON header, then the tensors' bytes without gaps.

Specification: https://github.com/huggingface/safetensors#format. Written header first, since all sizes are known
beforehand, so that no more than one tensor is held at a time.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from evla_cli.checkpoint.files import parse_json
from evla_cli.checkpoint.mapped_file import ALIGNMENT, MappedFile
from evla_cli.checkpoint.output_file import OutputFile
from evla_cli.checkpoint.tensors import LazyTensors, prepared, tensor_bytes
from evla_cli.errors import EvlaError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit


def read_safetensors(path: Path) -> LazyTensors:
    """The tensors of one file, unread. Errors: truncated, overlapping or inconsistent headers."""
    file = MappedFile(path)
    header, start = _read_header(path, file.size)
    tensors: LazyTensors = {}
    spans = []
    for name, entry in header.items():
        dtype, shape, (begin, end) = _checked_entry(path, name, entry)
        lazy = file.tensor(name, dtype, shape, start + begin, start + end)
        if lazy.num_bytes != end - begin:
            raise EvlaError(f"{path} is corrupt: {name} has {end - begin} bytes, its shape needs {lazy.num_bytes}.")
        tensors[name] = lazy
        spans.append((begin, end, name))
    expected = 0
    for begin, end, name in sorted(spans):
        if begin != expected:
            raise EvlaError(f"{path} is corrupt: {name} starts at byte {begin} of the data, expected {expected}.")
        expected = end
    if start + expected != file.size:
        raise EvlaError(f"{path} is truncated or corrupt: {file.size} bytes, its header describes {start + expected}.")
    return tensors


def write_safetensors(
    path: Path,
    tensors: LazyTensors,
    metadata: dict[str, str],
    on_bytes: Callable[[int], Any] | None = None,
) -> str:
    """Write `tensors` in the given order, one at a time. Returns the file's SHA-256."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, lazy in tensors.items():
        if lazy.dtype not in _CODES:
            raise EvlaError(f"{name} has dtype {lazy.dtype}, which a safetensors file cannot hold here.")
        header[name] = {
            "dtype": _CODES[lazy.dtype],
            "shape": list(lazy.shape),
            "data_offsets": [offset, offset + lazy.num_bytes],
        }
        offset += lazy.num_bytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)  # the format allows spaces here
    with OutputFile(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, data in prepared(tensors, lambda _, tensor: tensor_bytes(tensor)):
            file.write(data)
            if on_bytes:
                on_bytes(tensors[name].num_bytes)
    return file.sha256


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise EvlaError(f"{path} is not a safetensors file, or it is truncated.")
        try:
            header = parse_json(file.read(length).decode("utf-8"), parse_int=_natural)
        except ValueError as error:
            raise EvlaError(f"{path} is corrupt: its header is not valid JSON ({error}).") from error
    if not isinstance(header, dict):
        raise EvlaError(f"{path} is corrupt: its header is not a JSON object.")
    metadata = header.pop("__metadata__", None)
    texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if metadata is not None and not texts:
        raise EvlaError(f"{path} is corrupt: the metadata in its header are not texts by name.")
    return header, 8 + length


def _checked_entry(path: Path, name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], tuple[int, int]]:
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        lists = isinstance(shape, list) and isinstance(offsets, list)
        whole = all(type(number) is int and number >= 0 for number in [*shape, *offsets])
        if len(entry) == 3 and lists and whole and len(offsets) == 2 and offsets[0] <= offsets[1]:
            return DTYPES[dtype], tuple(shape), (offsets[0], offsets[1])
    except (KeyError, TypeError):
        pass
    raise EvlaError(f"{path}: the header entry of {name} is not one that can be read: {str(entry)[:200]}.")


def _natural(digits: str) -> int:
    if digits.startswith("-"):  # "-0", too: the format's own reader knows natural numbers only
        raise ValueError(f"{digits[:40]} is not a natural number")
    return int(digits)
