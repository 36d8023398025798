"""Files around the weights: JSON and YAML with clear errors, copies, hashes."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from evla_cli.errors import EvlaError

_CHUNK = 2**22  # bytes


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(read_text(path))
    except ValueError as error:
        raise EvlaError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise EvlaError(f"{path} must hold a JSON object, found {type(value).__name__}.")
    return value


def parse_json(text: str, parse_int: Callable[[str], Any] = int) -> Any:
    """JSON with one meaning. Errors (ValueError): also a name that stands twice in an object, a lone surrogate."""
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates, parse_int=parse_int)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("a text in it is not valid Unicode (a lone surrogate)") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


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


Stamp = tuple[int, int, int]  # size, time of the last change (ctime) in ns, inode

# SHA-256 of weight files that were read or written whole, by their stamps: what one stage hashes the next need not.
known_sha256: dict[Stamp, str] = {}


def file_stamp(path: Path) -> Stamp:
    """A file that still has it is what it was: whoever writes to it or replaces it changes one of the three.

    The time is the one that programs cannot set: what they write and date back is noticed, too.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise EvlaError(f"Cannot read {path}: {error.strerror}.") from error
    return status.st_size, status.st_ctime_ns, status.st_ino


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def same_bytes(this: Path, other: Path) -> bool:
    """Whether two files hold the same. Reads both, up to where they differ."""
    try:
        if this.stat().st_size != other.stat().st_size:
            return False
        with open(this, "rb") as mine, open(other, "rb") as theirs:
            while (chunk := mine.read(_CHUNK)) == theirs.read(_CHUNK):
                if not chunk:
                    return True
    except OSError as error:
        raise EvlaError(f"Cannot compare {this} with {other}: {error.strerror}.") from error
    return False


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
