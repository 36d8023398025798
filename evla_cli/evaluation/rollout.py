"""`evla eval`: closed-loop success of candidates in a suite's tasks, the same episodes for all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evla_cli.checkpoint.bundle import MANIFEST, library_versions
from evla_cli.checkpoint.files import sha256_file
from evla_cli.errors import EvlaError, suggest
from evla_cli.evaluation.candidates import check_settings, named_candidates, own_settings, with_denoise_steps
from evla_cli.evaluation.episode_log import EpisodeLog
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


@dataclass(frozen=True)
class Candidate:
    """What is evaluated: a checkpoint under some settings.

    Attributes:
        name: in the log and the tables.
        noise_stream: of the diffusion noise; another one than 0 shows how much an outcome is left to chance.
    """

    name: str
    path: Path
    settings: InferenceSettings
    noise_stream: int = 0

    def identity(self) -> dict[str, Any]:
        """What it is, whatever it is called and wherever it stands. Reads weights that have no manifest."""
        checkpoint = open_checkpoint(self.path)
        manifest = checkpoint.root / MANIFEST
        if manifest.is_file():
            sha256 = {"manifest_sha256": sha256_file(manifest)}
        else:
            sha256 = {"weights_sha256": checkpoint.reader.sha256, "files_sha256": checkpoint.small_files_sha256()}
        return {**sha256, "settings": self.settings.to_record(), "noise_stream": self.noise_stream}


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
        """None where the trial is not filmed."""
        if trial.number not in self.episodes:
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
    seed: int | None = None,
    num_workers: int = 1,
    device: str = "cpu",
    dtype: str | None = None,
    videos: Videos | None = None,
) -> dict[str, Any]:
    """Run what the log lacks, and sum up.

    Args:
        log: a JSON line for every episode, written when it ends. It is gone on with if it is there.
        tasks: None: all of the suite's.
        episodes: of each task; None: as many as the suite does by default.
        seed: of the first episode of each task, the next one has the next; None: the suite's own.

    Errors: a log of other candidates, seeds, versions or of another suite; what `load_suite` and `run_jobs` say.
    """
    check_device(device)
    loaded = load_suite(suite) if isinstance(suite, str) else suite
    if videos is not None:
        check_video(videos.directory, videos.kind)
    first_seed = loaded.first_seed if seed is None else seed
    trials = _trials(loaded, tasks, episodes, first_seed)
    header = {
        "suite": suite if isinstance(suite, str) else type(suite).__name__,
        "facts": loaded.facts(),
        "first_seed": first_seed,
        "device": torch.device(device).type,
        "dtype": dtype or "as stored",
        "libraries": library_versions(),
    }
    with EpisodeLog.open(log, header, {candidate.name: candidate.identity() for candidate in candidates}) as results:
        jobs = [job for candidate in candidates for trial in trials if (job := _job(candidate, trial, results, videos))]
        start = partial(_Rollouts, loaded, device, dtype)
        with progress_bar("episodes", len(jobs), "episode") as bar:
            for job, outcome in run_jobs(start, jobs, num_workers):
                results.add(job.candidate.name, job.trial, outcome)
                bar.update()
        successes = {
            candidate.name: _by_task(trials, partial(results.success, candidate.name)) for candidate in candidates
        }
    return {"schema_version": SCHEMA_VERSION, **header, "candidates": summarize(successes)}


def _trials(suite: Suite, tasks: Sequence[str] | None, episodes: int | None, first_seed: int) -> list[Trial]:
    trials = []
    for task in dict.fromkeys(suite.tasks if tasks is None else tasks):
        if task not in suite.tasks:
            raise EvlaError(f"Unknown task '{task}'. {suggest(task, suite.tasks)}")
        default, most = suite.num_episodes(task)
        count = default if episodes is None else episodes
        if count < 1 or (most is not None and count > most):
            raise EvlaError(f"--episodes is {count}; {task} has {'any number from 1 on' if most is None else most}.")
        trials += [Trial(task, number, first_seed + number) for number in range(count)]
    return trials


def _by_task(trials: Sequence[Trial], success: Callable[[Trial], bool]) -> dict[str, list[bool]]:
    values: dict[str, list[bool]] = {}
    for trial in trials:
        values.setdefault(trial.task, []).append(success(trial))
    return values


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
    return _Job(candidate, replace(trial, noise_stream=candidate.noise_stream), video)


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
