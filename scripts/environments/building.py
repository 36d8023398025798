"""What every environment is built with: a Python, commands whose output goes to a log, and pip."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_NO_NETWORK = re.compile(
    "Failed to establish a new connection|Temporary failure in name resolution|Name or service not known|ProxyError"
    "|ConnectTimeout|Network is unreachable|Could not resolve|Could not connect"
    r"|\(from versions: none\)"
)


class Missing(Exception):
    """Something that this machine lacks, and how to get it."""


class Failed(Exception):
    """A step that did not work."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment in a folder that holds all that belongs to it.

    Attributes:
        variables: that a program of it needs, besides those of `activate`.
    """

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        return self.folder / "venv" / "bin" / "python"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def run(self, command: Sequence[object], failure: str, **more: str) -> str:
        """What the command printed, which also goes to the log. `more`: further variables.

        Errors: `failure`, with the last line of what it printed.
        """
        return run(command, self.log, failure, self._variables() | more)

    def pip(self, *arguments: str | Path, failure: str) -> str:
        command = [self.python, "-m", "pip", "--disable-pip-version-check", *arguments]
        # Its cache stays where it is: the next environment uses it.
        return run(command, self.log, failure, {"PYTHONNOUSERSITE": "1"})

    def packages(self) -> dict[str, str]:
        """Version of each that is installed."""
        listed = self.pip("list", "--format", "json", failure="pip list failed")
        (line,) = [line for line in listed.splitlines() if line.startswith("[")]
        return {entry["name"].lower().replace("_", "-"): entry["version"] for entry in json.loads(line)}

    def write_activate(self) -> None:
        """`. FOLDER/activate` in a shell gives what `run` gives its commands."""
        lines = [f"export {name}='{value}'" for name, value in self.variables.items()]
        lines.append(f". '{self.folder / 'venv' / 'bin' / 'activate'}'")
        (self.folder / "activate").write_text("\n".join(lines) + "\n")

    def _variables(self) -> dict[str, str]:
        return {
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}",
            "XDG_CACHE_HOME": str(self.folder / "cache"),  # shaders, fonts: nothing is left at home
            "MPLCONFIGDIR": str(self.folder / "cache" / "matplotlib"),
            "PYTHONNOUSERSITE": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",  # the models are small
            **self.variables,
        }


def run(
    command: Sequence[object], log: Path, failure: str, variables: Mapping[str, str] = {}, cwd: Path | None = None
) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    result = subprocess.run(
        [str(word) for word in command],
        env=inherited | dict(variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=cwd,
        check=False,
    )
    with open(log, "a") as file:
        file.write(f"$ {' '.join(map(str, command))}\n{result.stdout}\n")
    if result.returncode:
        if _NO_NETWORK.search(result.stdout):
            raise Missing(f"a package index that pip or apt reaches: {failure} (log: {log})")
        raise Failed(f"{failure}: {_last_line(result.stdout, result.returncode)} (log: {log})")
    return result.stdout


def _last_line(output: str, code: int) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    said = (errors or lines or [""])[-1][:300]
    return f"killed by signal {-code} after '{said}'" if code < 0 else said or f"exit code {code}"


def create(folder: Path, versions: Sequence[tuple[int, int]]) -> Environment:
    """The environment in `folder`, made if it is not there.

    Args:
        versions: of Python that do, the first one found is taken.

    Errors: none of them is here.
    """
    environment = Environment(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not _works(environment.python, versions):
        python = find_python(versions)
        shutil.rmtree(folder / "venv", ignore_errors=True)
        (folder / "installed.json").unlink(missing_ok=True)
        run([python, "-m", "venv", folder / "venv"], environment.log, f"{python} makes no virtual environment")
        write_versions(folder / "new.txt", environment.packages())
    return environment


def find_python(versions: Sequence[tuple[int, int]]) -> Path:
    """On the PATH, or among pyenv's."""
    for major, minor in versions:
        name = f"python{major}.{minor}"
        on_path = [Path(found)] if (found := shutil.which(name)) else []
        installed = sorted(Path.home().glob(f".pyenv/versions/{major}.{minor}.*/bin/{name}"), reverse=True)
        for candidate in on_path + installed:
            if _works(candidate, [(major, minor)]):
                return candidate
    wanted = " or ".join(f"{major}.{minor}" for major, minor in versions)
    raise Missing(f"Python {wanted} (python{wanted.split()[0]} on the PATH), with its venv module")


def _works(python: Path, versions: Sequence[tuple[int, int]]) -> bool:
    command = [str(python), "-c", "import sys, venv, ensurepip; print(*sys.version_info[:2])"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return False
    return result.returncode == 0 and tuple(map(int, result.stdout.split())) in versions


def write_versions(file: Path, packages: Mapping[str, str]) -> None:
    """Also a constraint for pip."""
    file.write_text("".join(f"{name}=={version}\n" for name, version in packages.items()))


def read_versions(file: Path) -> dict[str, str]:
    return dict(line.split("==", 1) for line in file.read_text().splitlines())


def install(environment: Environment, *arguments: str | Path) -> None:
    """`pip install`, unless exactly that was done before."""
    stamp = environment.folder / "installed.json"
    done = json.loads(stamp.read_text()) if stamp.exists() else []
    wanted = list(map(str, arguments))
    if wanted not in done:
        environment.pip("install", *arguments, failure=f"pip install {wanted[-1]} failed")
        stamp.write_text(json.dumps([*done, wanted], indent=1))
