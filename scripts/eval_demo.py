"""Closed-loop success of a policy in the demo's Meta-World tasks, with controls that show what the policy relies on."""

import math
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from demo_env import FIRST_SEED, MAX_STEPS, TASKS, DemoEnv


class Policy(Protocol):
    def predict_action(self, image: Any, instruction: str, *, seed: int) -> np.ndarray:
        """uint8 (S, S, 3) and text -> un-normalised actions (H, A); `seed` decides the diffusion noise."""


@dataclass(frozen=True)
class Trial:
    """How episodes are run.

    Attributes:
        executed: how many of a chunk's actions are executed before the next prediction.
        instruct: "own" gives the task's instruction, "opposite" that of the reversed task.
        blind: the camera shows the first frame of another episode for ever.
    """

    executed: int = 8
    instruct: str = "own"
    blind: bool = False


def evaluate(
    load_policy: Callable[[], Policy], episodes: int, trial: Trial = Trial(), processes: int = 2
) -> dict[str, list[bool]]:
    """Success of every episode by task. Episode i of a task is the same for every policy: one seed decides it all."""
    tasks = [task for task in TASKS if trial.instruct == "own" or TASKS[task].opposite]
    jobs = [(task, first, min(first + 10, episodes)) for first in range(0, episodes, 10) for task in tasks]
    with multiprocessing.get_context("spawn").Pool(processes, _start, (load_policy,)) as pool:
        parts = pool.map(partial(_run_episodes, trial=trial), jobs, chunksize=1)
    return {
        task: [success for job, part in zip(jobs, parts, strict=True) if job[0] == task for success in part]
        for task in tasks
    }


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a success rate (Wilson)."""
    rate, spread = successes / trials, z * z / trials
    centre = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / trials + spread / trials / 4) / (1 + spread)
    return centre - half, centre + half


_policy: Policy


def _start(load_policy: Callable[[], Policy]) -> None:
    global _policy
    torch.set_num_threads(1)
    _policy = load_policy()


def _run_episodes(job: tuple[str, int, int], trial: Trial) -> list[bool]:
    task, first, end = job
    env = DemoEnv(task)
    successes = [run_episode(env, _policy, FIRST_SEED["evaluation"] + i, trial) for i in range(first, end)]
    env.close()
    return successes


def run_episode(env: DemoEnv, policy: Policy, seed: int, trial: Trial) -> bool:
    task = TASKS[env.task]
    if trial.instruct == "opposite":
        task = TASKS[str(task.opposite)]
    instruction = task.phrasings[seed % len(task.phrasings)]
    frozen = None
    if trial.blind:
        env.reset(seed + 1000)
        frozen = env.render()
    env.reset(seed)
    for step in range(MAX_STEPS):
        if step % trial.executed == 0:
            image = env.render() if frozen is None else frozen
            actions = policy.predict_action(image, instruction, seed=seed * 1000 + step)
        if env.step(actions[step % trial.executed]):
            return True
    return False
