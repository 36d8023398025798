"""Files around the weights: JSON and YAML with clear errors, copies, hashes."""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from evla_cli.errors import EvlaError

_CHUNK = 2**22  # bytes
_MAX_JSON_BYTES = 100_000_000  # the index of a trillion parameters has some ten million
_MAX_LINE_BYTES = 100_000_000
_MAX_YAML_BYTES = 4_000_000  # the plan of a 70 B model has half a million; PyYAML reads a million in some ten seconds


def read_json(path: Path, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    try:
        value = parse_json(read_text(path, max_bytes))
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
        value = yaml.load(read_text(path, _MAX_YAML_BYTES), _StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise EvlaError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise EvlaError(f"{path} must hold a YAML mapping, found {type(value).__name__}.")
    return value


class _StrictLoader(yaml.SafeLoader):
    """YAML with one meaning: plain scalars, lists and mappings.

    Refused: a key that stands twice, of which YAML's own loader silently takes the last; aliases, with which a short
    text is a structure without end; tags, `<<`, dates, `.nan` and `.inf`; and the numbers of YAML 1.1 that nobody else
    reads so (010 is 8, 1:30 is 90).
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(None, None, "aliases and tags are not read", event.start_mark)
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode) and not _is_plain(node):
            problem = "write a number in decimal digits, a text that could be something else in quotes"
            raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key stands twice in a mapping", node.start_mark)
        return mapping


def _is_plain(node: yaml.ScalarNode) -> bool:
    kind = node.tag.rpartition(":")[2]
    if kind in ("int", "float"):
        return re.fullmatch(_DECIMAL, node.value) is not None and math.isfinite(float(node.value))
    return kind in ("str", "bool", "null")


_DECIMAL = r"[-+]?(0|[1-9][0-9]*)?(\.[0-9]*([eE][-+][0-9]+)?)?"


def check_exists(path: Path) -> None:
    """Of a checkpoint or a bundle, which may have been named as other tools name it."""
    if os.path.exists(path):
        return
    name = path.as_posix()  # of a URL, with a single slash after its colon
    hub = re.fullmatch(r"(https:/huggingface\.co/)?([\w-][\w.-]*/[\w.-]+)", name)
    if hub and (hub[1] or not path.parent.exists()):
        hint = f"hf download {hub[2]} --local-dir DIRECTORY"
        raise EvlaError(f"{name} does not exist: evla reads local directories only. Download it first: {hint}.")
    if re.match("[a-z0-9]{2,}:/", name):
        raise EvlaError(f"{name} does not exist: evla reads local directories only. Download it first.")
    raise EvlaError(f"{path} does not exist.")


def read_text(path: Path, max_bytes: int | None = None) -> str:
    """A UTF-8 text file. Errors: it has more than `max_bytes`."""
    try:
        with open(path, "rb") as file:
            data = file.read(-1 if max_bytes is None else max_bytes + 1)
        if max_bytes is not None and len(data) > max_bytes:
            raise EvlaError(f"{path} has more than {max_bytes:,} bytes; that is no file of this kind.")
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise EvlaError(f"{path} is not a UTF-8 text file.") from error
    except OSError as error:
        raise EvlaError(f"Cannot read {path}: {error.strerror}.") from error


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 text file with their numbers, read as far as they are asked for."""
    number = 0
    try:
        with open(path, "rb") as file:
            while data := file.readline(_MAX_LINE_BYTES + 1):
                number += 1
                if len(data) > _MAX_LINE_BYTES:
                    raise EvlaError(
                        f"{path}:{number} has more than {_MAX_LINE_BYTES:,} bytes; that is no line of text."
                    )
                line = data.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, line[:-2] if line.endswith("\r\n") else line.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise EvlaError(f"{path} is not a UTF-8 text file (line {number}).") from error
    except OSError as error:
        raise EvlaError(f"Cannot read {path}: {error.strerror}.") from error


def write_json(path: Path, value: dict[str, Any], allow_nan: bool = False) -> None:
    """
    Args:
        allow_nan: write `Infinity`, which is no JSON, where the value holds it. Configs do that transformers writes
            and reads (the `time_step_limit` of Mamba-2 and its kin); nothing of evla's own does.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n")


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
    path = directory / name
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass  # the caller knows what it misses
    except (OSError, ValueError) as error:  # too long, forbidden, links in a circle, no text of this system
        raise EvlaError(f"{where}: '{name:.40}' cannot be used: {getattr(error, 'strerror', error)}.") from error
    return path
