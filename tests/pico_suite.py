"""A suite as small as the pico checkpoints: `evla eval ... --suite pico_suite:PicoSuite`.

Whether an episode succeeds hangs on the last digits of every action: whoever computes them otherwise is found out.
"""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from evla_cli.errors import EvlaError
from evla_cli.evaluation.suites import OnFrame, Outcome, Trial, act_in_chunks
from evla_cli.runtime.policy import Policy


class PicoScene:
    def reset(self, seed: int) -> str:
        self._background = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        self._position = np.zeros(7)
        return ("open drawer", "close the drawer")[seed % 2]

    def render(self) -> np.ndarray:
        image = self._background.copy()
        image[:10, :10] = np.uint8(100 * abs(self._position[0]) % 256)
        return image

    def step(self, action: np.ndarray) -> bool:
        self._position += action
        return bool(np.sin(1e4 * self._position.sum()) > 0.98)


class PicoSuite:
    tasks = ("left", "right", "far")
    first_seed = 100
    num_executed = 4

    def check(self) -> None:
        pass

    def facts(self) -> dict[str, Any]:
        return {"max_steps": 12}

    def num_episodes(self, task: str) -> tuple[int, int | None]:
        return (2, None) if task != "far" else (3, 3)

    def run_episode(self, policy: Policy, trial: Trial, on_frame: OnFrame | None = None) -> Outcome:
        shifted = replace(trial, seed=trial.seed + 50 * self.tasks.index(trial.task))
        return act_in_chunks(PicoScene(), policy, shifted, 12, self.num_executed, on_frame)


class Slow(PicoSuite):
    """Time enough to be interrupted; tells who is at work."""

    def run_episode(self, policy: Policy, trial: Trial, on_frame: OnFrame | None = None) -> Outcome:
        Path(f"pid-{os.getpid()}").touch()
        time.sleep(0.3)
        return super().run_episode(policy, trial, on_frame)


class OtherFacts(PicoSuite):
    def facts(self) -> dict[str, Any]:
        return {"max_steps": 13}


class Killed(PicoSuite):
    """Something kills the process in the second task."""

    def run_episode(self, policy: Policy, trial: Trial, on_frame: OnFrame | None = None) -> Outcome:
        if trial.task == "right":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run_episode(policy, trial, on_frame)


class Refusing(PicoSuite):
    def run_episode(self, policy: Policy, trial: Trial, on_frame: OnFrame | None = None) -> Outcome:
        raise EvlaError("The simulator cannot draw; install it anew.")
