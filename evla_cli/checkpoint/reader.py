"""All tensors of a checkpoint behind one view, whatever files they stand in. Nothing is read before it is used."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from evla_cli.checkpoint.files import Stamp, file_stamp, inside, known_sha256, read_json
from evla_cli.checkpoint.mapped_file import MappedFile
from evla_cli.checkpoint.read_ahead import ReadAheadHash, started_early
from evla_cli.checkpoint.safetensors_format import read_safetensors
from evla_cli.checkpoint.tensors import LazyTensors
from evla_cli.checkpoint.torch_format import read_torch
from evla_cli.errors import EvlaError

_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz"}
ADAPTER_CONFIG = "adapter_config.json"  # of peft, beside adapter_model.safetensors
HOW_TO_MERGE = (
    f"It holds an adapter ({ADAPTER_CONFIG}), which is no model by itself: merge it into its base model with peft's "
    "merge_and_unload(), save that, and name it instead."
)


@dataclass(frozen=True)
class CheckpointReader:
    """The tensors of a checkpoint by weight name.

    Attributes:
        stamps: the weight files, sorted, each as it was when it was opened.
        tensors: every tensor, unread.
        others, paths: of a nested `.pt`, see `TorchFile`.
    """

    stamps: dict[Path, Stamp]
    tensors: LazyTensors
    others: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, tuple[str | int, ...]] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self.stamps)

    @cached_property
    def sha256(self) -> str:
        """Of the weight files' content; a single file's is what `sha256sum` prints."""
        digests = self._known()
        if len(digests) < len(self.stamps):
            try:
                digests = {path: self.read_ahead.digests()[path] for path in self.files}
            except OSError as error:
                raise EvlaError(f"Cannot read {self.files[0].parent}: {error.strerror}.") from error
            self.check_unchanged()
            known_sha256.update(zip(self.stamps.values(), digests.values(), strict=True))
        if len(digests) == 1:
            return digests[self.files[0]]
        lines = [f"{digest}  {path.name}\n" for path, digest in digests.items()]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @cached_property
    def read_ahead(self) -> ReadAheadHash:
        """Reading and hashing start at the first use, in the background; `sha256` waits for their end."""
        return self._reading_ahead(self._known())

    def start_reading(self, in_order: bool = True) -> None:
        """Read ahead of whoever uses the tensors; see `ReadAheadHash`.

        Args:
            in_order: from now on they are used in about the order in which they stand in the files.
        """
        if in_order:
            self.read_ahead.follow(self._mapped_files())
        else:
            _ = self.read_ahead

    @contextmanager
    def reading_again(self) -> Iterator[Callable[[], None]]:
        """As `start_reading`, inside the block, for files that were read before; known hashes are not made again.

        Gives what is to be called once tensors are used in about the order in which they stand in the files.
        """
        ahead = self._reading_ahead(self._known())
        try:
            yield lambda: ahead.follow(self._mapped_files())
        finally:
            ahead.stop()

    def start_hashing(self, drop_behind: bool = True) -> ReadAheadHash:
        """The same, in order, and the hash of every file as it is now, even if one is known."""
        ahead = self._reading_ahead({})
        ahead.follow(self._mapped_files(), drop_behind)
        return ahead

    def _reading_ahead(self, known: dict[Path, str]) -> ReadAheadHash:
        return started_early(self.stamps) or ReadAheadHash(self.files, known=known)

    def _mapped_files(self) -> list[MappedFile]:
        return list({lazy.file.path: lazy.file for lazy in self.tensors.values() if lazy.file}.values())

    def _known(self) -> dict[Path, str]:
        return {path: known_sha256[stamp] for path, stamp in self.stamps.items() if stamp in known_sha256}

    @property
    def bytes_on_disk(self) -> int:
        return sum(size for size, _, _ in self.stamps.values())

    def check_unchanged(self) -> None:
        """Errors: a weight file is no longer the one that was opened."""
        for path, stamp in self.stamps.items():
            if file_stamp(path) != stamp:
                raise EvlaError(f"{path} changed while it was being read; run the command again.")


def open_torch_checkpoint(path: Path) -> CheckpointReader:
    stamps = _stamps(path)
    file = read_torch(path)
    if not file.tensors:
        raise EvlaError(f"{path} holds no tensors.")
    return CheckpointReader(stamps, file.tensors, file.others, file.paths)


def open_huggingface_checkpoint(directory: Path) -> CheckpointReader:
    """A directory in Hugging Face's layout: one file, or shards with an index; safetensors is preferred to .bin.

    Errors: one file and an index of others. Which of the two is the model, only who put them there can know;
    transformers takes the one file.
    """
    for single, index in zip(_SINGLE_FILES, _INDEX_FILES, strict=True):
        if (directory / index).is_file():
            weight_map = _weight_map(directory / index)
            if (directory / single).is_file() and set(map(str, weight_map.values())) != {single}:
                raise EvlaError(
                    f"{directory} holds two sets of weights, {single} and the shards of {index}; move away those that "
                    "are not the model."
                )
            return _open_shards(directory, directory / index, weight_map)
        if (directory / single).is_file():
            return CheckpointReader(_stamps(directory / single), _read_file(directory / single))
    raise EvlaError(
        f"{directory} holds no weights: none of {', '.join((*_SINGLE_FILES, *_INDEX_FILES))}.{_instead(directory)}"
    )


def _instead(directory: Path) -> str:
    """What else stands there, for who took it for the weights."""
    if (directory / ADAPTER_CONFIG).is_file():
        return f" {HOW_TO_MERGE}"
    others = sorted(path.name for path in directory.iterdir() if path.suffix in (*WEIGHT_SUFFIXES, ".incomplete"))
    return f" {others[0]} is not read; save the model with transformers' save_pretrained." if others else ""


def _weight_map(index: Path) -> dict[str, Any]:
    """Tensor -> shard, as it stands there."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise EvlaError(f"{index} has no weight_map.")
    return weight_map


def _open_shards(directory: Path, index: Path, weight_map: dict[str, Any]) -> CheckpointReader:
    shards = {name: inside(directory, name, str(index)) for name in sorted(map(str, weight_map.values()))}
    missing = [name for name, path in shards.items() if not path.is_file()]
    if missing:
        raise EvlaError(f"{directory} lacks {len(missing)} of {len(shards)} shards (first: {missing[0]}).")
    stamps = _stamps(*shards.values())
    found: LazyTensors = {}
    where: dict[str, str] = {}
    for shard, path in shards.items():
        for name, lazy in _read_file(path).items():
            if name in found:
                raise EvlaError(f"{name} stands in two shards: {where[name]} and {shard}.")
            found[name], where[name] = lazy, shard
    absent = [name for name, shard in weight_map.items() if where.get(name) != shard]
    if absent:
        raise EvlaError(f"{index} names {len(absent)} tensors that their shard does not hold (first: {absent[0]}).")
    return CheckpointReader(stamps, found)


def _stamps(*paths: Path) -> dict[Path, Stamp]:
    return {path: file_stamp(path) for path in paths}


def _read_file(path: Path) -> LazyTensors:
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path).tensors
