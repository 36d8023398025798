"""Eight Meta-World tasks with phrasings, as the demo model sees them: one camera, 7-number actions."""

import os
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np

from evla_cli.errors import EvlaError
from evla_cli.evaluation.suites import OnFrame, Outcome, Trial, act_in_chunks
from evla_cli.runtime.policy import Policy

IMAGE_SIZE = 112  # pixels a side
MAX_STEPS = 200
NUM_EXECUTED = 8  # actions of a chunk, or all of a shorter one, before the model looks again
FIRST_SEED = 30_000  # training, validation and calibration samples of the demo model lie below


@dataclass(frozen=True)
class Task:
    env_name: str
    phrasings: tuple[str, ...]
    opposite: str | None = None  # the task whose instruction asks for the reverse in a scene that looks alike


TASKS = {
    "drawer-open": Task(
        "drawer-open-v3",
        (
            "open the drawer",
            "pull the drawer open",
            "pull open the drawer",
            "slide the drawer open",
            "open the green drawer",
            "pull out the green drawer",
        ),
        "drawer-close",
    ),
    "drawer-close": Task(
        "drawer-close-v3",
        (
            "close the drawer",
            "push the drawer shut",
            "shut the drawer",
            "slide the drawer closed",
            "close the green drawer",
            "push in the green drawer",
        ),
        "drawer-open",
    ),
    "window-open": Task(
        "window-open-v3",
        (
            "open the window",
            "slide the window open",
            "push the window open",
            "slide open the window",
            "open the brown window",
            "push open the window",
        ),
        "window-close",
    ),
    "window-close": Task(
        "window-close-v3",
        (
            "close the window",
            "slide the window closed",
            "slide the window shut",
            "shut the window",
            "close the brown window",
            "push the window shut",
        ),
        "window-open",
    ),
    "faucet-open": Task(
        "faucet-open-v3",
        (
            "open the faucet",
            "turn on the faucet",
            "turn the faucet on",
            "open the tap",
            "turn on the tap",
            "turn the tap on",
        ),
        "faucet-close",
    ),
    "faucet-close": Task(
        "faucet-close-v3",
        (
            "close the faucet",
            "turn off the faucet",
            "turn the faucet off",
            "close the tap",
            "turn off the tap",
            "turn the tap off",
        ),
        "faucet-open",
    ),
    "button-press-topdown": Task(
        "button-press-topdown-v3",
        (
            "press the button",
            "push the button",
            "press the red button",
            "push the red button down",
            "press the button down",
            "press down the button",
        ),
    ),
    "coffee-button": Task(
        "coffee-button-v3",
        (
            "start the coffee machine",
            "make coffee",
            "make a coffee",
            "turn on the coffee machine",
            "press the button on the coffee machine",
            "push the coffee machine button",
        ),
    ),
}


class MetaWorld:
    """Meta-World's own success flag at any of 200 steps."""

    tasks = tuple(TASKS)
    first_seed = FIRST_SEED
    num_executed = NUM_EXECUTED

    def __init__(self) -> None:
        self._scene: MetaWorldScene | None = None

    def check(self) -> None:
        if find_spec("metaworld") is None:
            raise EvlaError(
                "--suite metaworld needs Meta-World: pip install 'evla[demo]', and to draw without a screen the system "
                "library libosmesa6 (with MUJOCO_GL=osmesa, which is the default here)."
            )

    def facts(self) -> dict[str, Any]:
        libraries = {name: version(name) for name in ("metaworld", "mujoco")}
        return {"image_size": IMAGE_SIZE, "max_steps": MAX_STEPS, **libraries}

    def num_episodes(self, task: str) -> tuple[int, int | None]:
        return 50, None

    def unnorm_key(self, task: str) -> None:
        return None  # statistics of this robot have no name that all checkpoints use

    def run_episode(self, policy: Policy, trial: Trial, on_frame: OnFrame | None = None) -> Outcome:
        if self._scene is None or self._scene.task != trial.task:
            if self._scene is not None:
                self._scene.close()
            self._scene = self.open(trial.task)
        return act_in_chunks(self._scene, policy, trial, MAX_STEPS, self.num_executed, on_frame)

    def open(self, task: str) -> "MetaWorldScene":
        return MetaWorldScene(task)


class MetaWorldScene:
    """One task; `reset(seed)` alone decides an episode.

    Two open OSMesa renderers in one process spoil each other's pictures: close one before opening the next.
    """

    def __init__(self, task: str, image_size: int = IMAGE_SIZE):
        os.environ.setdefault("MUJOCO_GL", "osmesa")  # read by mujoco when it is imported
        try:
            import mujoco
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        except (ImportError, AttributeError, RuntimeError) as error:  # PyOpenGL's ways to say that a library is missing
            raise EvlaError(
                f"MuJoCo cannot draw with MUJOCO_GL={os.environ['MUJOCO_GL']} ({error}): install the system library "
                "libosmesa6, or set MUJOCO_GL=egl on a machine with a GPU."
            ) from error

        self.task = task
        self.env: Any = ALL_V3_ENVIRONMENTS[TASKS[task].env_name]()
        self.env._set_task_called = True
        self.env._partially_observable = False
        self.env._freeze_rand_vec = False
        self.env.seeded_rand_vec = True
        self.env.__dict__.pop("sawyer_observation_space", None)  # cached before the goal became observable
        self.renderer = mujoco.Renderer(self.env.model, image_size, image_size)
        self.env.model.vis.quality.offsamples = 0  # without antialiasing, shadows, reflections: 20 ms instead of 200
        for flag in ("SHADOW", "REFLECTION", "SKYBOX"):
            self.renderer.scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = 0
        self.camera = mujoco.MjvCamera()
        self.camera.lookat[:] = (0.0, 0.70, 0.17)
        self.camera.distance, self.camera.azimuth, self.camera.elevation = 1.15, 135, -35
        self.observation = np.zeros(39)
        self._forward = mujoco.mj_forward

    def close(self) -> None:
        self.renderer.close()

    def reset(self, seed: int) -> str:
        self.env.seed(seed)
        self.env.reset()
        self._forward(self.env.model, self.env.data)  # else the first picture shows the scene before the reset
        self.observation = self.observe()
        return phrasing(self.task, seed)

    def step(self, action: np.ndarray) -> bool:
        """Execute one un-normalised 7-number action; true when the task is solved."""
        self.observation, _, _, _, info = self.env.step(to_simulator(action))
        return bool(info["success"])

    def render(self) -> np.ndarray:
        self.renderer.update_scene(self.env.data, self.camera)
        return self.renderer.render().copy()  # (S, S, 3) uint8

    def observe(self) -> np.ndarray:
        space = self.env.sawyer_observation_space
        return np.clip(self.env._get_obs(), space.low, space.high)


def phrasing(task: str, seed: int) -> str:
    phrasings = TASKS[task].phrasings
    return phrasings[seed % len(phrasings)]


def to_simulator(action: np.ndarray) -> np.ndarray:
    """(A,) -> Meta-World's dx, dy, dz, effort; effort 1 closes the gripper."""
    return np.array([*np.clip(action[:3], -1, 1), -1.0 if action[6] >= 0.5 else 1.0], np.float32)
