"""`evla eval`: closed-loop success of candidates in a suite's tasks, the same episodes for all of them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evla_cli.checkpoint.bundle import MANIFEST, library_versions
from evla_cli.checkpoint.files import sha256_file
from evla_cli.errors import EvlaError, suggest
from evla_cli.evaluation.candidates import (
    NUM_NOISE_STREAMS,
    check_settings,
    named_candidates,
    own_settings,
    with_denoise_steps,
)
from evla_cli.evaluation.episode_log import EpisodeLog, control_row
from evla_cli.evaluation.success import summarize
from evla_cli.evaluation.suites import Outcome, Suite, Trial, load_suite
from evla_cli.evaluation.video import check_video, write_video
from evla_cli.evaluation.workers import run_jobs
from evla_cli.families import open_checkpoint
from evla_cli.models.skeleton import check_device, out_of_memory
from evla_cli.progress import progress_bar
from evla_cli.runtime.policy import Policy, open_acting, policy_from_checkpoint
from evla_cli.schema import SCHEMA_VERSION
from evla_cli.settings import InferenceSettings

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """What is evaluated: a checkpoint under some settings.

    Attributes:
        name: in the log and the tables.
        noise_stream: of the diffusion noise; another one than 0 shows how much an outcome is left to chance.
        unnorm_key: the dataset whose statistics un-normalise its actions; None: the suite's, or the only one it knows.
    """

    name: str
    path: Path
    settings: InferenceSettings
    noise_stream: int = 0
    unnorm_key: str | None = None

    def identity(self) -> dict[str, Any]:
        """What it is, whatever it is called and wherever it stands. Reads weights that have no manifest."""
        checkpoint = open_checkpoint(self.path)
        manifest = checkpoint.root / MANIFEST
        if manifest.is_file():
            sha256 = {"manifest_sha256": sha256_file(manifest)}
        else:
            sha256 = {"weights_sha256": checkpoint.reader.sha256, "files_sha256": checkpoint.small_files_sha256()}
        own = {"settings": self.settings.to_record(), "noise_stream": self.noise_stream, "unnorm_key": self.unnorm_key}
        return {**sha256, **own}


def open_candidates(given: Sequence[Path], num_denoise_steps: int | None = None) -> list[Candidate]:
    """All that `given` name, see `named_candidates`.

    Errors: one that cannot act or obey its settings; two of one name.
    """
    candidates = [candidate for path in given for candidate in _opened(path)]
    candidates = [
        replace(candidate, settings=with_denoise_steps(candidate.settings, num_denoise_steps))
        for candidate in candidates
    ]
    names = [candidate.name for candidate in candidates]
    for name in names:
        if names.count(name) > 1:
            raise EvlaError(f"Two candidates are called '{name}'; give them names in a YAML list of candidates.")
    for candidate in candidates:
        _check(candidate)
    return candidates


def with_unnorm_keys(candidates: Sequence[Candidate], given: Sequence[str]) -> list[Candidate]:
    """Each with the dataset whose statistics it is to use.

    Args:
        given: `KEY` for all candidates, `NAME=KEY` for one. What stands behind the last `=` is the key.

    Errors: a name that no candidate has; two keys for one candidate.
    """
    keys: dict[str, str] = {}  # by name; "" is all others
    names = [candidate.name for candidate in candidates]
    for each in given:
        name, equals, key = each.rpartition("=")
        if not key or (equals and not name):
            raise EvlaError(f"--unnorm-key is '{each}'; give KEY, or NAME=KEY for one candidate.")
        if name and name not in names:
            raise EvlaError(f"--unnorm-key {each}: no candidate is called '{name}'. {suggest(name, names)}")
        if name in keys:
            raise EvlaError(f"--unnorm-key gives {name or 'all candidates'} two datasets; give one.")
        keys[name] = key
    return [replace(each, unnorm_key=keys.get(each.name, keys.get("", each.unnorm_key))) for each in candidates]


def _opened(given: Path) -> list[Candidate]:
    return [
        Candidate(
            entry.name,
            Path(entry.checkpoint),
            entry.settings or own_settings(open_acting(Path(entry.checkpoint))),
            entry.noise_stream,
        )
        for entry in named_candidates(given)
    ]


def _check(candidate: Candidate) -> None:
    checkpoint = open_acting(candidate.path)
    try:
        check_settings(candidate.settings, checkpoint)
    except EvlaError as error:
        raise EvlaError(f"{candidate.name}: {error}") from error


@dataclass(frozen=True)
class Videos:
    """Which episodes of every task and candidate are filmed, into which folder; `kind` is one of video.FORMATS."""

    directory: Path
    episodes: tuple[int, ...] = (0,)
    kind: str = "gif"

    def path(self, candidate: Candidate, trial: Trial) -> Path | None:
        """None where the trial is not filmed: of a start state's episodes the first one is."""
        if trial.number not in self.episodes or trial.repetition > 0:
            return None
        name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in candidate.name)
        return self.directory / f"{name}-{trial.task}-{trial.number:04d}.{self.kind}"


def evaluate(
    candidates: Sequence[Candidate],
    suite: str | Suite,
    log: Path,
    *,
    tasks: Sequence[str] | None = None,
    episodes: int | None = None,
    num_noises: int = 1,
    seed: int | None = None,
    num_executed: int | None = None,
    control: bool = True,
    num_workers: int = 1,
    device: str = "cpu",
    dtype: str | None = None,
    videos: Videos | None = None,
) -> dict[str, Any]:
    """Run what the log lacks, and sum up.

    Args:
        log: a JSON line for every episode, written when it ends. It is gone on with if it is there.
        tasks: None: all of the suite's.
        episodes: start states of each task; None: as many as the suite does by default.
        num_noises: episodes of each start state, with other noise each.
        seed: of the first start state of each task, the next one has the next; None: the suite's own.
        num_executed: actions of a chunk that are executed before the policy looks again; None: the suite's own number,
            or all of a chunk that is shorter.
        control: add a row, the first candidate with other noise, by which the differences of the others are judged;
            where there are no others, or one is that already, none is added.

    Errors: a log of other candidates, seeds, versions or of another suite; what `load_suite` and `run_jobs` say.
    """
    check_device(device)
    loaded = load_suite(suite) if isinstance(suite, str) else suite
    if videos is not None:
        check_video(videos.directory, videos.kind)
    first_seed = loaded.first_seed if seed is None else seed
    trials = _trials(loaded, tasks, episodes, num_noises, first_seed)
    _check_executed(loaded, num_executed, candidates)
    candidates = [_with_known_statistics(candidate, loaded, trials) for candidate in candidates]
    header = {
        "suite": suite if isinstance(suite, str) else type(suite).__name__,
        "facts": loaded.facts(),
        "first_seed": first_seed,
        "num_executed": num_executed or _num_executed(loaded),
        "device": torch.device(device).type,
        "dtype": dtype or "as stored",
        "libraries": library_versions(),
    }
    identities = {candidate.name: candidate.identity() for candidate in candidates}
    added = control and len(candidates) > 1 and control_row(identities) is None
    if added:
        candidates, identities = _with_control(candidates, identities)
    judge = control_row(identities)
    with EpisodeLog.open(log, header, identities) as results:
        jobs = [
            job
            for candidate in candidates
            for trial in trials
            if (job := _job(candidate, _told(trial, candidate, loaded, num_executed), results, videos))
        ]
        if added:
            _note_control(judge, jobs)
        start = partial(_Rollouts, loaded, device, dtype)
        with progress_bar("episodes", len(jobs), "episode") as bar:
            for job, outcome in run_jobs(start, jobs, num_workers):
                results.add(job.candidate.name, job.trial, outcome)
                bar.update()
        successes = {
            candidate.name: _by_task(trials, partial(results.success, candidate.name)) for candidate in candidates
        }
    return {
        "schema_version": SCHEMA_VERSION,
        **header,
        "control": judge,
        "candidates": summarize(successes, judge),
    }


def _with_control(
    candidates: Sequence[Candidate], identities: Mapping[str, dict[str, Any]]
) -> tuple[list[Candidate], dict[str, dict[str, Any]]]:
    """The control row comes second: once it is there, every further row can be judged."""
    first, *others = candidates
    name, stream = f"{first.name}, other noise", (first.noise_stream + 1) % NUM_NOISE_STREAMS
    if name in identities:
        raise EvlaError(f"'{name}' is the control row's name; call that candidate otherwise, or pass --no-control.")
    twin = identities[first.name] | {"noise_stream": stream}
    others_identities = {other.name: identities[other.name] for other in others}
    return (
        [first, replace(first, name=name, noise_stream=stream), *others],
        {first.name: identities[first.name], name: twin, **others_identities},
    )


def _note_control(control: str | None, jobs: Sequence["_Job"]) -> None:
    """What the row costs."""
    more = sum(job.candidate.name == control for job in jobs)
    if more:
        LOG.warning(
            "%d of %d episodes are of '%s', which tells what chance alone does; --no-control leaves it out.",
            more,
            len(jobs),
            control,
        )


def _num_executed(suite: Suite) -> int | None:
    return getattr(suite, "num_executed", None)  # a suite of one's own may lack it


def _check_executed(suite: Suite, num_executed: int | None, candidates: Sequence[Candidate]) -> None:
    if num_executed is None:
        return
    if _num_executed(suite) is None:
        raise EvlaError("--execute: this suite decides itself which actions of a chunk it executes; leave it out.")
    for candidate in candidates:
        chunk = _config(candidate).action_config.action_horizon
        if num_executed > chunk:
            raise EvlaError(f"--execute is {num_executed}, but {candidate.name} predicts {chunk} actions at a time.")


def _with_known_statistics(candidate: Candidate, suite: Suite, trials: Sequence[Trial]) -> Candidate:
    """The same candidate, the only dataset that it knows named. Errors: it lacks one, or it is not clear which."""
    known = list(_config(candidate).norm_stats)
    for task in dict.fromkeys(trial.task for trial in trials):
        key = candidate.unnorm_key or _unnorm_key(suite, task)
        if key is None and len(known) != 1:
            raise EvlaError(
                f"{candidate.name} knows {len(known)} datasets; say which one's statistics are meant: --unnorm-key "
                f"{candidate.name}=KEY, with one of {', '.join(sorted(known))}."
            )
        if key is not None and key not in known:
            raise EvlaError(
                f"{candidate.name} has no statistics of '{key}' for {task}; --unnorm-key names others. "
                f"{suggest(key, known)}"
            )
    if candidate.unnorm_key is None and all(_unnorm_key(suite, task) is None for task in suite.tasks):
        return replace(candidate, unnorm_key=known[0])
    return candidate


def _unnorm_key(suite: Suite, task: str) -> str | None:
    named = getattr(suite, "unnorm_key", None)  # a suite of one's own may lack it
    return None if named is None else named(task)


def _config(candidate: Candidate) -> Any:
    """The model's."""
    checkpoint = open_acting(candidate.path)
    return checkpoint.family.build_config(checkpoint.config)


def _told(trial: Trial, candidate: Candidate, suite: Suite, num_executed: int | None) -> Trial:
    """The trial as this candidate runs it."""
    key = candidate.unnorm_key or _unnorm_key(suite, trial.task)
    return replace(trial, noise_stream=candidate.noise_stream, unnorm_key=key, num_executed=num_executed)


def _trials(
    suite: Suite, tasks: Sequence[str] | None, episodes: int | None, num_noises: int, first_seed: int
) -> list[Trial]:
    trials = []
    for task in dict.fromkeys(suite.tasks if tasks is None else tasks):
        if task not in suite.tasks:
            raise EvlaError(f"Unknown task '{task}'. {suggest(task, suite.tasks)}")
        default, most = suite.num_episodes(task)
        count = default if episodes is None else episodes
        if count < 1 or (most is not None and count > most):
            raise EvlaError(f"--episodes is {count}; {task} has {'any number from 1 on' if most is None else most}.")
        trials += [
            Trial(task, number, first_seed + number, repetition=repetition)
            for number in range(count)
            for repetition in range(num_noises)
        ]
    return trials


def _by_task(trials: Sequence[Trial], success: Callable[[Trial], bool]) -> dict[str, list[list[bool]]]:
    """By task, then by start state."""
    states: dict[str, dict[int, list[bool]]] = {}
    for trial in trials:
        states.setdefault(trial.task, {}).setdefault(trial.number, []).append(success(trial))
    return {task: list(of_task.values()) for task, of_task in states.items()}


@dataclass(frozen=True)
class _Job:
    candidate: Candidate
    trial: Trial
    video: Path | None


def _job(candidate: Candidate, trial: Trial, results: EpisodeLog, videos: Videos | None) -> _Job | None:
    """None where the log holds the episode and its video, if one is wanted, is there."""
    video = videos.path(candidate, trial) if videos else None
    if results.holds(candidate.name, trial) and (video is None or video.exists()):
        return None
    return _Job(candidate, trial, video)


class _Rollouts:
    """What one process keeps between episodes: the suite with its open scene, and the last candidate's policy."""

    def __init__(self, suite: Suite, device: str, dtype: str | None):
        self.suite, self.device = suite, device
        self.dtype = None if dtype is None else getattr(torch, dtype)
        self._loaded: tuple[Candidate, Policy] | None = None

    def __call__(self, job: _Job) -> Outcome:
        frames: list[np.ndarray] = []
        with out_of_memory(self.device, "use fewer --workers, --dtype bfloat16, or --device cpu"):
            policy = self._policy(job.candidate)
            outcome = self.suite.run_episode(policy, job.trial, None if job.video is None else frames.append)
        if job.video is not None:
            write_video(job.video, frames)
        return outcome

    def _policy(self, candidate: Candidate) -> Policy:
        if self._loaded is None or self._loaded[0] != candidate:
            self._loaded = None  # its memory first
            policy = policy_from_checkpoint(candidate.path, candidate.settings, device=self.device, dtype=self.dtype)
            self._loaded = (candidate, policy)
        return self._loaded[1]
