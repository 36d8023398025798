"""The layout of an exported bundle, and the manifest of what evla writes: every file with size and SHA-256."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evla_cli import __version__
from evla_cli.checkpoint.files import check_exists, file_stamp, inside, known_sha256, read_json, sha256_file, write_json
from evla_cli.checkpoint.read_ahead import ReadAheadHash
from evla_cli.errors import EvlaError
from evla_cli.schema import SCHEMA_VERSION, check_schema_version, check_sha256, from_mapping

MANIFEST = "manifest.json"
SETTINGS = "inference.yaml"
# What the bundle did where it was made. It depends on that machine, so the manifest must not hold its hash.
CHECK = "check.json"
REQUIRED = ("config.json", SETTINGS, "tokenizer.json", "dataset_statistics.json", "README.md")


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of a file."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        check_sha256("sha256", self.sha256)


@dataclass(frozen=True)
class _Manifest:
    """`manifest.json`. Where the content comes from is for people and for `evla verify --against`."""

    schema_version: int
    files: dict[str, FileEntry]
    evla_version: str = ""
    libraries: dict[str, str] = field(default_factory=dict)
    source: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    recipe: dict[str, Any] | None = None
    checked: bool | None = None  # whether prune ran what it wrote against its source; None: of another command

    def __post_init__(self) -> None:
        check_schema_version(self.schema_version)


@dataclass(frozen=True)
class Bundle:
    """A directory that export or prune wrote, whose manifest has been read.

    Attributes:
        unpruned_sha256: hash of the checkpoint that was exported as it was; None if it was pruned before.
    """

    root: Path
    files: dict[str, FileEntry]
    unpruned_sha256: str | None


def library_versions() -> dict[str, str]:
    """Of the libraries that compute what is written; another version may give other bytes."""
    return {name: _version(name) for name in ("numpy", "torch", "transformers")}


_version = cache(version)  # which reads and parses a file each time


def write_manifest(root: Path, provenance: dict[str, Any], hashes: Mapping[str, str]) -> None:
    """Every file under `root`; those not in `hashes` are read. No time, user or path goes in: the same content gives
    the same manifest."""
    files = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            name = path.relative_to(root).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": hashes.get(name) or sha256_file(path)}
            if name in hashes:
                known_sha256[file_stamp(path)] = hashes[name]
    versions = {"evla_version": __version__, "libraries": library_versions()}
    write_json(root / MANIFEST, {"schema_version": SCHEMA_VERSION, **versions, **provenance, "files": files})


def open_bundle(root: Path) -> Bundle:
    """`open_manifest` of what export wrote."""
    bundle = open_manifest(root)
    unlisted = [name for name in REQUIRED if name not in bundle.files]
    if unlisted:
        raise EvlaError(f"{root / MANIFEST} does not list {unlisted[0]}, which every bundle has.")
    return bundle


def open_manifest(root: Path) -> Bundle:
    """Read the manifest and check, cheaply, that every file is there with its size."""
    check_is_bundle(root)
    manifest = from_mapping(_Manifest, read_json(root / MANIFEST), str(root / MANIFEST))
    files = manifest.files
    for name, entry in files.items():
        path = inside(root, name, str(root / MANIFEST))
        if not path.is_file():
            raise EvlaError(f"{root} lacks {name}, which its manifest lists; copy it again.")
        if path.stat().st_size != entry.bytes:
            raise EvlaError(f"{path} has {path.stat().st_size} bytes, the manifest says {entry.bytes}; copy it again.")
    source = manifest.source if manifest.plan is None else None
    return Bundle(root, files, (source or {}).get("checkpoint_sha256"))


def check_is_bundle(root: Path) -> None:
    check_exists(root)
    if not (root / MANIFEST).is_file():
        raise EvlaError(f"{root} is not a bundle (no {MANIFEST}); make one with evla export.")


def differing_files(bundle: Bundle, known: Mapping[Path, str] | None = None) -> list[str]:
    """Files whose SHA-256 is not the manifest's. Reads every byte of those whose hash is not `known`."""
    digests = dict(known or {})
    try:
        digests |= ReadAheadHash([p for name in bundle.files if (p := bundle.root / name) not in digests]).digests()
    except OSError as error:
        raise EvlaError(f"Cannot read {bundle.root}: {error.strerror}.") from error
    return [name for name, entry in bundle.files.items() if digests[bundle.root / name] != entry.sha256]
