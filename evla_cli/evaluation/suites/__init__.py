"""Simulated tasks in which policies act, and what such a suite must be able to do.

A suite of your own is a class with the members of `Suite` below in a module that Python can import:
`evla eval ... --suite my_package.my_module:MySuite`.
"""

import hashlib
import importlib
import json
from collections import deque
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
        number: counts a task's start states from 0.
        seed: of the scene.
        noise_stream: which diffusion noise; 0 unless another one is asked for.
        repetition: counts a start state's episodes from 0; each has other noise.
        unnorm_key: the dataset whose statistics un-normalise actions; None: the model knows one alone.
        num_executed: actions of a chunk that are executed before the model looks again; None: the suite's own number.
    """

    task: str
    number: int
    seed: int
    noise_stream: int = 0
    repetition: int = 0
    unnorm_key: str | None = None
    num_executed: int | None = None

    def noise_seed(self, step: int) -> int:
        """Of the prediction at a step: another in every task, start state and repetition, the same for all policies.

        64 bits of a hash, of which torch's generator on the CPU takes 32: that two predictions have the same noise
        happens by chance, and nowhere by rule.
        """
        return self._hash(step)

    @property
    def episode_seed(self) -> int:
        """Of what else is drawn at random in it, such as `Policy.reset` takes."""
        return self._hash(None)

    def _hash(self, step: int | None) -> int:
        said = json.dumps([self.seed, self.task, self.number, self.repetition, self.noise_stream, step])
        return int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "little")


@dataclass(frozen=True)
class Outcome:
    success: bool
    steps: int | None  # that were executed; None where the simulator does not say


class Suite(Protocol):
    """
    Attributes:
        tasks: all that it knows, in the order of reports.
        first_seed: of the first episode, unless another one is asked for.
        num_executed: actions of a chunk that are executed before the model looks again, where the chunk has as many
            and `--execute` does not say otherwise; None (or left out): the suite decides, and refuses `--execute`.
    """

    tasks: tuple[str, ...]
    first_seed: int

    @property
    def num_executed(self) -> int | None: ...

    def check(self) -> None:
        """Errors: what it needs is not installed. Imports nothing heavy."""

    def facts(self) -> dict[str, Any]:
        """What decides an episode besides its seed and the policy, as JSON: limits, versions."""

    def num_episodes(self, task: str) -> tuple[int, int | None]:
        """How many episodes are run by default, and how many there are (None: any number)."""

    def unnorm_key(self, task: str) -> str | None:
        """The dataset whose statistics un-normalise a task's actions, unless another one is asked for; None (or left
        out): that which the model knows."""

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
    """Look, predict a chunk, execute its first actions, look again, until the task is solved.

    Args:
        num_executed: how many; all of a chunk that is shorter. `trial.num_executed` goes before it.
    """
    instruction = scene.reset(trial.seed)
    policy.reset(trial.episode_seed)
    actions: deque[np.ndarray] = deque()  # still to be executed
    for step in range(max_steps):
        if on_frame:
            on_frame(scene.render())
        if not actions:
            seed = trial.noise_seed(step)
            chunk = policy.predict_action(scene.render(), instruction, unnorm_key=trial.unnorm_key, seed=seed)
            actions.extend(chunk[: trial.num_executed or num_executed])
        if scene.step(actions.popleft()):
            return Outcome(True, step + 1)
    return Outcome(False, max_steps)
