"""The layout of an exported bundle, and the manifest of what evla writes: every file with size and SHA-256."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evla_cli import __version__
from evla_cli.checkpoint.files import file_stamp, inside, known_sha256, read_json, sha256_file, write_json
from evla_cli.checkpoint.read_ahead import ReadAheadHash
from evla_cli.errors import EvlaError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SETTINGS = "inference.yaml"
REQUIRED = ("config.json", SETTINGS, "tokenizer.json", "dataset_statistics.json", "README.md")


@dataclass(frozen=True)
class Bundle:
    """A directory that export or prune wrote, whose manifest has been read."""

    root: Path
    manifest: dict[str, Any]

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        return self.manifest["files"]


def library_versions() -> dict[str, str]:
    """Of the libraries that compute what is written; another version may give other bytes."""
    return {name: version(name) for name in ("numpy", "torch", "transformers")}


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
    if not (root / MANIFEST).is_file():
        raise EvlaError(f"{root} is not a bundle (no {MANIFEST}); make one with evla export.")
    manifest = read_json(root / MANIFEST)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise EvlaError(
            f"{root / MANIFEST} has schema {manifest.get('schema_version')}; this evla reads {SCHEMA_VERSION}."
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    ):
        raise EvlaError(f"{root / MANIFEST} does not list its files with bytes and sha256.")
    for name, entry in files.items():
        path = inside(root, name, str(root / MANIFEST))
        if not path.is_file():
            raise EvlaError(f"{root} lacks {name}, which its manifest lists; copy it again.")
        if path.stat().st_size != entry["bytes"]:
            raise EvlaError(
                f"{path} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}; copy it again."
            )
    return Bundle(root, manifest)


def start_hashing(bundle: Bundle) -> ReadAheadHash:
    """Of every file that the manifest lists, in the background."""
    return ReadAheadHash([bundle.root / name for name in bundle.files])


def differing_files(bundle: Bundle, hashing: ReadAheadHash | None = None) -> list[str]:
    """Files whose SHA-256 is not the manifest's. Reads every byte, if `hashing` has not done so yet."""
    try:
        digests = (hashing or start_hashing(bundle)).digests()
    except OSError as error:
        raise EvlaError(f"Cannot read {bundle.root}: {error.strerror}.") from error
    return [name for name, entry in bundle.files.items() if digests[bundle.root / name] != entry["sha256"]]
