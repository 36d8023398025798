"""The log of `evla eval`: JSON lines, each written when an episode ends; a run goes on where the log ends.

{"evla_eval": 2, "suite": "metaworld", "first_seed": 30000, ...}                      what all episodes share
{"candidate": "bundle", "identity": {"manifest_sha256": "...", "settings": {...}}}    before its first episode
{"candidate": "bundle", "task": "drawer-open", "episode": 0, "repetition": 0, "seed": 30000, "success": true, ...}

`episode` counts a task's start states, `repetition` the episodes of one, each with other noise. In format 1 a start
state had one episode, and episodes of a number had the same noise in every task.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from evla_cli.checkpoint.files import parse_json
from evla_cli.checkpoint.outputs import locked
from evla_cli.errors import EvlaError
from evla_cli.evaluation.suites import Outcome, Trial

_VERSION = 2
Key = tuple[str, str, int, int]  # candidate, task, number of the start state, repetition


@dataclass
class LoggedEpisodes:
    """What stands in a log, in its order.

    Attributes:
        header: what all episodes share; None in an empty log.
        identities: of the candidates, by name.
    """

    header: dict[str, Any] | None = None
    identities: dict[str, Any] = field(default_factory=dict)
    success: dict[Key, bool] = field(default_factory=dict)

    def take(self, record: dict[str, Any]) -> None:
        if self.header is None:
            version = record.pop("evla_eval")
            if version != _VERSION:
                raise _OtherVersionError(version)
            self.header = record
        elif "identity" in record:
            self.identities[record["candidate"]] = record["identity"]
        else:
            key = (record["candidate"], record["task"], record["episode"], record["repetition"])
            self.success[key] = bool(record["success"])


class _OtherVersionError(Exception):
    pass


def read_log(path: Path) -> LoggedEpisodes:
    """What a log holds so far, whether it is being written or not. Errors: it is none, or it is empty."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EvlaError(f"Cannot read {path}: {error.strerror}.") from error
    logged = _parsed(data, path)
    if logged.header is None:
        raise EvlaError(f"{path} is empty; evla eval -o writes such a log.")
    return logged


def control_row(identities: Mapping[str, dict[str, Any]]) -> str | None:
    """The name of the first candidate's twin with other noise, if there is one.

    Args:
        identities: by name, the first candidate's first.
    """
    first, *others = identities
    for name in others:
        differ = {key for key, value in identities[name].items() if identities[first].get(key) != value}
        if differ == {"noise_stream"} and identities[name].keys() == identities[first].keys():
            return name
    return None


class EpisodeLog:
    """Held by one process at a time. What a killed process began to write, a line without its end, is cut off."""

    def __init__(self, path: Path, file: FileIO):
        self._path, self._file = path, file
        self._logged = LoggedEpisodes()
        self._whole = 0  # bytes up to the end of the last whole line

    @classmethod
    @contextmanager
    def open(
        cls, path: Path, header: Mapping[str, Any], identities: Mapping[str, dict[str, Any]]
    ) -> "Iterator[EpisodeLog]":
        """
        Args:
            header: what all episodes share.
            identities: of the candidates, by name.

        Errors: another process writes it; it is no such log, or one of other candidates or another header.
        """
        if not path.parent.is_dir():
            raise EvlaError(f"{path.parent} does not exist or is not a directory; create it first.")
        with locked(path.with_name(f".{path.name}.lock"), path), _opened(path) as file:
            log = cls(path, file)
            log._read()
            log._begin(json.loads(json.dumps(header)), identities)
            yield log

    def holds(self, candidate: str, trial: Trial) -> bool:
        return _key(candidate, trial) in self._logged.success

    def success(self, candidate: str, trial: Trial) -> bool:
        return self._logged.success[_key(candidate, trial)]

    def add(self, candidate: str, trial: Trial, outcome: Outcome) -> None:
        """Errors: the log holds the episode, and it ended otherwise."""
        if self.holds(candidate, trial):  # it was run again for its video
            if self.success(candidate, trial) != outcome.success:
                raise EvlaError(
                    f"{candidate}, {trial.task}, episode {trial.number} ended otherwise than {self._path} says: "
                    "something it does not know of has changed. Name another file."
                )
            return
        self._write(
            {
                "candidate": candidate,
                "task": trial.task,
                "episode": trial.number,
                "repetition": trial.repetition,
                "seed": trial.seed,
                "success": outcome.success,
                "steps": outcome.steps,
            }
        )
        self._logged.success[_key(candidate, trial)] = outcome.success

    def _begin(self, header: dict[str, Any], identities: Mapping[str, dict[str, Any]]) -> None:
        """Compare what was read with what is given, and write what is missing of it."""
        if self._logged.header is not None:
            self._refuse_other(self._logged.header, header, "")
            if self._logged.identities and not self._logged.identities.keys() & identities.keys():
                names = ", ".join(self._logged.identities)
                raise EvlaError(f"{self._path} is the log of other candidates ({names}). Name another file.")
        for name, identity in identities.items():
            if name in self._logged.identities:
                self._refuse_other(self._logged.identities[name], identity, f"{name}'s ")
        self._file.truncate(self._whole)
        if self._logged.header is None:
            self._write({"evla_eval": _VERSION, **header})
        for name, identity in identities.items():
            if name not in self._logged.identities:
                self._write({"candidate": name, "identity": identity})

    def _refuse_other(self, logged: dict[str, Any], given: dict[str, Any], whose: str) -> None:
        for key in {**logged, **given}:
            if logged.get(key) != given.get(key):
                raise EvlaError(
                    f"{self._path} is the log of another evaluation: {whose}{key} is {_short(logged.get(key))} there, "
                    f"{_short(given.get(key))} here. Name another file."
                )

    def _read(self) -> None:
        self._file.seek(0)
        data = self._file.read()
        self._whole = _whole_lines(data)
        self._logged = _parsed(data, self._path)

    def _write(self, record: dict[str, Any]) -> None:
        """One system call for a line: a process that is killed leaves a whole one, or none."""
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
        try:
            written = self._file.write(line)
        except OSError as error:
            raise EvlaError(f"Cannot write {self._path}: {error.strerror}.") from error
        if written < len(line):
            raise EvlaError(f"Cannot write {self._path}: the disk is full.")


def _whole_lines(data: bytes) -> int:
    """Bytes up to the end of the last whole line."""
    return data.rfind(b"\n") + 1


def _parsed(data: bytes, path: Path) -> LoggedEpisodes:
    logged = LoggedEpisodes()
    for number, line in enumerate(data[: _whole_lines(data) or None].splitlines(), start=1):
        try:
            logged.take(parse_json(line.decode()))
        except _OtherVersionError as error:
            raise EvlaError(
                f"{path} is a log of another version of evla (format {error}, not {_VERSION}), whose episodes had "
                "other noise: the two must not be mixed. Name another file, and run its episodes again."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvlaError(f"{path}, line {number}: this is not a log of evla eval. Name another file.") from error
    return logged


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    try:
        file = FileIO(path, "a+")
    except OSError as error:
        raise EvlaError(f"Cannot write {path}: {error.strerror}.") from error
    with file:
        yield file


def _key(candidate: str, trial: Trial) -> Key:
    return candidate, trial.task, trial.number, trial.repetition


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
