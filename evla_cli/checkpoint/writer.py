"""Write named tensors in Hugging Face's layout: shards of bounded size and an index, one tensor in memory at a time."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evla_cli.checkpoint.files import write_json
from evla_cli.checkpoint.safetensors_format import write_safetensors
from evla_cli.checkpoint.tensors import LazyTensors, total_bytes
from evla_cli.errors import EvlaError

DEFAULT_SHARD_BYTES = 5_000_000_000
_MIN_BYTES = 100_000  # that a size without a unit can mean
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def write_huggingface_weights(
    directory: Path,
    tensors: LazyTensors,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    on_bytes: Callable[[int], Any] | None = None,
) -> dict[str, str]:
    """`model.safetensors`, or `model-00001-of-0000N.safetensors` with `model.safetensors.index.json`.

    Returns the SHA-256 of every weight file by name.
    """
    metadata = {"format": "pt"}
    shards = split_into_shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        path = directory / "model.safetensors"
        return {path.name: write_safetensors(path, tensors, metadata, on_bytes)}
    hashes, weight_map = {}, {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        hashes[name] = write_safetensors(directory / name, shard, metadata, on_bytes)
        weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {"total_size": total_bytes(tensors)}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)
    return hashes


def split_into_shards(tensors: LazyTensors, max_shard_bytes: int) -> list[LazyTensors]:
    """Consecutive tensors, together at most `max_shard_bytes` (a larger single tensor gets a shard of its own)."""
    shards: list[LazyTensors] = [{}]
    size = 0
    for name, lazy in tensors.items():
        if shards[-1] and size + lazy.num_bytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = lazy
        size += lazy.num_bytes
    return shards


def parse_size(text: str) -> int:
    """`"500MB"`, `"2GiB"` or a number of bytes. Errors: also a number so small that a unit was meant with it."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([KMG]i?B)?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if match is None or size <= 0:
        raise EvlaError(f"'{text[:40]}' is not a size such as 500MB, 2GiB or a number of bytes.")
    if size < _MIN_BYTES and not match[2]:
        raise EvlaError(f"A size of {size} bytes? Give its unit, such as {size}GB, {size}MiB or {size}KB.")
    return size
