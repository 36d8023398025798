"""Simulated tasks in which policies act, and what such a suite must be able to do.

A suite of your own is a class with the members of `Suite` below in a module that Python can import:
`evla eval ... --suite my_package.my_module:MySuite`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from evla_cli.errors import EvlaError, suggest
from evla_cli.runtime.policy import Policy

SUITES = {
    "metaworld": "evla_cli.evaluation.suites.metaworld:MetaWorld",
    "simpler": "evla_cli.evaluation.suites.simpler:Simpler",
}

OnFrame = Callable[[np.ndarray], Any]  # is given every camera picture, (height, width, 3) uint8


@dataclass(frozen=True)
class Trial:
    """One episode to be run. It and the policy decide everything that happens in it.

    Attributes:
        number: counts a task's episodes from 0.
        seed: of the scene.
        noise_stream: which diffusion noise; 0 unless another one is asked for.
    """

    task: str
    number: int
    seed: int
    noise_stream: int = 0

    def noise_seed(self, step: int) -> int:
        """Of the prediction at a step, below 1000. Seeds are below 2**31, streams below 10**5: no two are the same."""
        return self.seed * 1000 + step + self.noise_stream * 10**13


@dataclass(frozen=True)
class Outcome:
    success: bool
    steps: int | None  # that were executed; None where the simulator does not say


class Suite(Protocol):
    """
    Attributes:
        tasks: all that it knows, in the order of reports.
        first_seed: of the first episode, unless another one is asked for.
    """

    tasks: tuple[str, ...]
    first_seed: int

    def check(self) -> None:
        """Errors: what it needs is not installed. Imports nothing heavy."""

    def facts(self) -> dict[str, Any]:
        """What decides an episode besides its seed and the policy, as JSON: limits, versions."""

    def num_episodes(self, task: str) -> tuple[int, int | None]:
        """How many episodes are run by default, and how many there are (None: any number)."""

    def run_episode(self, policy: Policy, trial: Trial, on_frame: OnFrame | None = None) -> Outcome:
        """Called in a process that may have run other episodes before: nothing of them may be left."""


def load_suite(name: str) -> Suite:
    """`name`: one of `SUITES`, or module:class. Errors: unknown, or what it needs is missing."""
    if name not in SUITES and ":" not in name:
        raise EvlaError(f"Unknown suite '{name}'. {suggest(name, SUITES)} A suite of your own is module:class.")
    module, _, attribute = SUITES.get(name, name).partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise EvlaError(f"--suite {name}: cannot import it: {error}.") from error
    suite = kind()
    suite.check()
    return suite


class Scene(Protocol):
    """A task's environment in which a policy acts chunk by chunk."""

    def reset(self, seed: int) -> str:
        """Start an episode that the seed alone decides. Returns the instruction."""

    def render(self) -> np.ndarray:
        """The camera's picture, (height, width, 3) uint8. Changes nothing."""

    def step(self, action: np.ndarray) -> bool:
        """Execute one un-normalised action, (A,); true when the task is solved."""


def act_in_chunks(
    scene: Scene, policy: Policy, trial: Trial, max_steps: int, num_executed: int, on_frame: OnFrame | None = None
) -> Outcome:
    """Look, predict a chunk, execute its first `num_executed` actions, look again, until the task is solved."""
    instruction = scene.reset(trial.seed)
    policy.reset(trial.seed)
    for step in range(max_steps):
        if on_frame:
            on_frame(scene.render())
        if step % num_executed == 0:
            actions = policy.predict_action(scene.render(), instruction, seed=trial.noise_seed(step))
        if scene.step(actions[step % num_executed]):
            return Outcome(True, step + 1)
    return Outcome(False, max_steps)
