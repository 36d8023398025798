"""Files around the weights: JSON and YAML with clear errors, hashes, directories that appear whole or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from evla_cli.errors import EvlaError

# Any of these marks a directory as a checkpoint that evla wrote, and so one that --overwrite may replace.
MARKERS = ("manifest.json", "prune_plan.yaml")


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise EvlaError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise EvlaError(f"{path} must hold a JSON object, found {type(value).__name__}.")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.load(read_text(path), _StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise EvlaError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise EvlaError(f"{path} must hold a YAML mapping, found {type(value).__name__}.")
    return value


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping; YAML's own loader silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key stands twice in a mapping", node.start_mark)
        return mapping


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise EvlaError(f"{path} is not a UTF-8 text file.") from error
    except OSError as error:
        raise EvlaError(f"Cannot read {path}: {error.strerror}.") from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_yaml(path: Path, value: dict[str, Any], comment: str = "") -> None:
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)
    write_text(path, "".join(f"# {line}\n" for line in comment.splitlines()) + text)


def write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_file(source: Path, dest: Path) -> None:
    try:
        shutil.copyfile(source, dest)
    except OSError as error:
        raise EvlaError(f"Cannot copy {source} to {dest}: {error.strerror}.") from error


def inside(directory: Path, name: Any, where: str) -> Path:
    """`directory / name`, refused if the name would lead out of the directory."""
    parts = Path(str(name)).parts
    if not isinstance(name, str) or not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise EvlaError(f"{where}: '{name}' is not a path inside {directory}.")
    if any(len(part.encode("utf-8", "surrogatepass")) > 255 for part in parts):
        raise EvlaError(f"{where}: '{name[:40]}...' is longer than a file name can be.")
    return directory / name


def check_apart(dest: Path, source: Path) -> None:
    resolved, other = dest.resolve(), source.resolve()
    if resolved == other or resolved in other.parents or other in resolved.parents:
        raise EvlaError(f"{dest} and {source} are the same or one lies inside the other; choose another output.")


def check_output(dest: Path, overwrite: bool, source: Path) -> None:
    """Refuse a destination before any work is done for it."""
    check_apart(dest, source)
    if not dest.parent.is_dir():
        raise EvlaError(f"{dest.parent} does not exist or is not a directory; create it first.")
    if not os.path.lexists(dest):
        return
    if not overwrite:
        raise EvlaError(f"{dest} already exists. Pass --overwrite to replace it.")
    empty = dest.is_dir() and not any(dest.iterdir())
    if not empty and not any((dest / marker).is_file() for marker in MARKERS):
        raise EvlaError(f"{dest} is not a directory that evla wrote; delete it yourself if it can go.")


@contextmanager
def new_directory(dest: Path, overwrite: bool) -> Iterator[Path]:
    """A directory to write into that becomes `dest` if the block ends well, and vanishes if it does not."""
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{dest.name}.partial-", dir=dest.parent))
    except OSError as error:
        raise EvlaError(f"Cannot write into {dest.parent}: {error.strerror}.") from error
    try:
        os.chmod(staging, 0o777 & ~_umask())
        yield staging
        _sync_directory(staging)
        _replace(staging, dest, overwrite)
    except OSError as error:
        raise EvlaError(f"Cannot write {dest}: {error.strerror or error}. Nothing was left behind.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def made_directory(path: Path) -> Iterator[None]:
    """`path` and its parents exist inside the block; those that were made here go again if it fails."""
    made = [directory for directory in (path, *path.parents) if not directory.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvlaError(f"Cannot make the directory {path}: {error.strerror}.") from error
    try:
        yield
    except BaseException:
        for directory in made:
            with suppress(OSError):  # not empty: an earlier stage's output stands there
                directory.rmdir()
        raise


def check_output_file(dest: Path, overwrite: bool) -> None:
    """Refuse an output file before any work is done for it."""
    if dest.is_dir():
        raise EvlaError(f"{dest} is a directory; name a file.")
    if not dest.parent.is_dir():
        raise EvlaError(f"{dest.parent} does not exist or is not a directory; create it first.")
    if os.path.lexists(dest) and not overwrite:
        raise EvlaError(f"{dest} already exists. Pass --overwrite to replace it.")


def write_file(dest: Path, text: str, overwrite: bool) -> None:
    """A single text file, written aside and renamed."""
    check_output_file(dest, overwrite)
    staging = dest.with_name(f".{dest.name}.partial-{os.getpid()}")
    try:
        write_text(staging, text)
        os.replace(staging, dest)
    except OSError as error:
        raise EvlaError(f"Cannot write {dest}: {error.strerror or error}.") from error
    finally:
        staging.unlink(missing_ok=True)


def _replace(staging: Path, dest: Path, overwrite: bool) -> None:
    old = None
    if os.path.lexists(dest):
        if not overwrite:
            raise EvlaError(f"{dest} appeared while this command ran; nothing was replaced.")
        old = Path(tempfile.mkdtemp(prefix=f".{dest.name}.old-", dir=dest.parent))
        os.replace(dest, old / dest.name)
    try:
        os.rename(staging, dest)
        _sync_directory(dest.parent)
    except BaseException:  # an interrupt too: what was there comes back
        if old is not None and not os.path.lexists(dest):
            os.replace(old / dest.name, dest)
        raise
    finally:
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
