"""SimplerEnv and ManiSkill2_real2sim below a folder: found by what they hold, and copied."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from environments.building import Failed, Missing

EXPECTED = (
    "a SimplerEnv work tree with its submodule, or a folder with both repositories somewhere in it (work trees, plain "
    "folders or bare repositories)"
)
_PACKAGES = {"SimplerEnv": "simpler_env", "ManiSkill2_real2sim": "mani_skill2_real2sim"}  # as their setup.py says
_DEPTH = 4  # of folders that are looked into: DIR/.git/modules/ManiSkill2_real2sim of a clone without work tree
_NOT_ENTERED = {"objects", "refs", "hooks", "logs", "data", "venv", ".venv", "node_modules", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """A repository's HEAD, or the files as they lie in a folder."""

    path: Path
    bare: bool

    @property
    def commit(self) -> str:
        if not self.bare and not (self.path / ".git").exists():
            return "no commit"  # git would name the one of a repository around it
        return git(self.path, "rev-parse", "--short", "HEAD").decode().strip() or "no commit"


def find(folder: Path) -> dict[str, Source]:
    """By repository. Errors: one is not there."""
    if not folder.is_dir():
        raise Missing(f"the folder {folder} with SIMPLER's sources: {EXPECTED}")
    found: dict[str, Source] = {}
    for path in _folders(folder):
        for name, package in _PACKAGES.items():
            for bare in (False, True):
                if name not in found and re.search(rf"""name=["']{package}["']""", _setup(path, bare)):
                    found[name] = Source(path, bare)
    for name in _PACKAGES:
        if name not in found:
            raise Missing(f"{name} in {folder}; expected there: {EXPECTED}")
    return found


def _folders(folder: Path) -> Iterator[Path]:
    """`folder` and those below it, the least deep first."""
    level = [folder.resolve()]
    for _ in range(_DEPTH + 1):
        yield from level
        level = [
            child
            for path in level
            for child in sorted(path.iterdir())
            if child.is_dir() and os.access(child, os.R_OK | os.X_OK) and child.name not in _NOT_ENTERED
        ]


def _setup(path: Path, bare: bool) -> str:
    if not bare:
        file = path / "setup.py"
        return file.read_text(errors="replace") if file.is_file() else ""
    if not (path / "HEAD").is_file() or not (path / "objects").is_dir():
        return ""
    return git(path, "show", "HEAD:setup.py").decode(errors="replace")


def copy(source: Source, target: Path) -> list[str]:
    """Returns: files that the source does not hold, which are left out."""
    target.mkdir(parents=True, exist_ok=True)
    if source.bare:
        return _export(source.path, target)
    submodule = source.path / "ManiSkill2_real2sim"

    def left_out(at: str, names: list[str]) -> list[str]:
        return [name for name in names if name in (".git", "__pycache__") or Path(at, name) == submodule]

    shutil.copytree(source.path, target, symlinks=True, ignore=left_out, dirs_exist_ok=True)
    tracked = git(source.path, "ls-files", "-z", "--deleted") if (source.path / ".git").exists() else b""
    return [os.fsdecode(name) for name in tracked.split(b"\0") if name]


def _export(repository: Path, target: Path) -> list[str]:
    """`git archive` and `git checkout` give up where a repository lacks objects, as snapshots without big files do."""
    walk = git(repository, "rev-list", "--objects", "--missing=print", "--no-walk", "HEAD")
    absent = {line[1:] for line in walk.split(b"\n") if line.startswith(b"?")}
    lacking = []
    reader = subprocess.Popen(
        [*_GIT, "-C", str(repository), "cat-file", "--batch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert reader.stdin is not None
    assert reader.stdout is not None
    with reader:
        for entry in git(repository, "ls-tree", "-r", "-z", "HEAD").split(b"\0")[:-1]:
            mode, kind, blob = entry.split(b"\t")[0].split()
            name = os.fsdecode(entry.split(b"\t", 1)[1])
            if kind != b"blob":
                continue  # the submodule
            if blob in absent:
                lacking.append(name)
                continue
            reader.stdin.write(blob + b"\n")
            reader.stdin.flush()
            header = reader.stdout.readline().split()
            if len(header) != 3:
                raise Failed(f"{repository} does not give {name}")
            content = reader.stdout.read(int(header[2]))
            reader.stdout.read(1)
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if mode == b"120000":
                path.symlink_to(os.fsdecode(content))
            else:
                path.write_bytes(content)
                path.chmod(0o755 if mode == b"100755" else 0o644)
        reader.stdin.close()
    return lacking


_GIT = ("git", "-c", "safe.directory=*")  # another user's repository is read, nothing in it is run


def git(repository: Path, *arguments: str) -> bytes:
    """What it prints; nothing where it fails. Nothing is fetched."""
    command = [*_GIT, "-C", str(repository), *arguments]
    offline = os.environ | {"GIT_TERMINAL_PROMPT": "0", "GIT_ALLOW_PROTOCOL": "none", "GIT_NO_LAZY_FETCH": "1"}
    try:
        return subprocess.run(command, capture_output=True, env=offline, check=False).stdout
    except OSError as error:
        raise Missing("git") from error
