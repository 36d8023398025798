"""Meta-World as the demo model sees it: tasks with phrasings, one camera, 7-number actions, expert labels anywhere."""

import multiprocessing
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("MUJOCO_GL", "osmesa")  # read by mujoco when it is imported

import mujoco
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP

IMAGE_SIZE = 112
HORIZON = 16  # H: actions per chunk
ACTION_DIM = 7  # A: dx, dy, dz, three rotations (always 0), gripper (1 = open)
MAX_STEPS = 200
RECORDED_STEPS = 130  # a noisy expert that needs longer is stuck
SHARD_EPISODES = 20
FIRST_SEED = {"train": 0, "validation": 10_000, "samples": 20_000, "evaluation": 30_000}
STATE = mujoco.mjtState.mjSTATE_INTEGRATION


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


@dataclass(frozen=True)
class Keypoints:
    """Where the hand and the thing to be handled are: in metres, and as fractions of the picture's width and height."""

    position: np.ndarray  # (2, 3)
    pixel: np.ndarray  # (2, 2)


class DemoEnv:
    """One task; `reset(seed)` alone decides an episode."""

    def __init__(self, task: str, image_size: int = IMAGE_SIZE):
        self.task = task
        name = TASKS[task].env_name
        self.env = ALL_V3_ENVIRONMENTS[name]()
        self.env._set_task_called = True
        self.env._partially_observable = False
        self.env._freeze_rand_vec = False
        self.env.seeded_rand_vec = True
        self.env.__dict__.pop("sawyer_observation_space", None)  # cached before the goal became observable
        expert: Any = ENV_POLICY_MAP[name]
        self.expert = expert()
        self.renderer = mujoco.Renderer(self.env.model, image_size, image_size)
        self.env.model.vis.quality.offsamples = 0  # without antialiasing, shadows, reflections: 20 ms instead of 200
        for flag in ("SHADOW", "REFLECTION", "SKYBOX"):
            self.renderer.scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = 0
        self.camera = mujoco.MjvCamera()
        self.camera.lookat[:] = (0.0, 0.70, 0.17)
        self.camera.distance, self.camera.azimuth, self.camera.elevation = 1.15, 135, -35
        self.observation = np.zeros(39)

    def close(self) -> None:
        self.renderer.close()

    def reset(self, seed: int) -> None:
        self.env.seed(seed)
        self.env.reset()
        mujoco.mj_forward(self.env.model, self.env.data)  # else the first picture shows the scene before the reset
        self.observation = self._observe()

    def step(self, action: np.ndarray) -> bool:
        """Execute one un-normalised 7-number action; true when the task is solved."""
        self.observation, _, _, _, info = self.env.step(to_simulator(action))
        return bool(info["success"])

    def render(self) -> np.ndarray:
        self.renderer.update_scene(self.env.data, self.camera)
        return self.renderer.render().copy()  # (S, S, 3) uint8

    def expert_action(self) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experts ask for more than [-1, 1] and say so; the arm clips
            return from_simulator(self.expert.get_action(self.observation))

    def expert_chunk(self) -> np.ndarray:
        """The expert's next H actions from this very state, found by running the simulation on and going back."""
        model, data = self.env.model, self.env.data
        state = np.empty(mujoco.mj_stateSize(model, STATE))
        mujoco.mj_getState(model, data, state, STATE)
        kept = self.observation, self.env._prev_obs
        actions = np.empty((HORIZON, ACTION_DIM), np.float32)
        for i in range(HORIZON):
            actions[i] = self.expert_action()
            self._advance(to_simulator(actions[i]))
        mujoco.mj_setState(model, data, state, STATE)
        mujoco.mj_forward(model, data)
        mujoco.mj_setState(model, data, state, STATE)  # mj_forward moved the solver's warm start by 1e-16
        self.observation, self.env._prev_obs = kept
        return actions

    def keypoints(self) -> Keypoints:
        position = np.stack([self.observation[:3], self.observation[4:7]])
        self.renderer.update_scene(self.env.data, self.camera)
        cameras = self.renderer.scene.camera
        eye = (cameras[0].pos + cameras[1].pos) / 2  # MuJoCo keeps a stereo pair
        forward, up = cameras[0].forward, cameras[0].up
        offset = position - eye
        depth = offset @ forward
        half_height = cameras[0].frustum_top / cameras[0].frustum_near * depth
        pixel = np.stack([offset @ np.cross(forward, up), -(offset @ up)], axis=1) / (2 * half_height[:, None]) + 0.5
        return Keypoints(position.astype(np.float32), pixel.astype(np.float32))

    def _advance(self, action: np.ndarray) -> None:
        """`env.step` without reward and success."""
        self.env.set_xyz_action(action[:3])
        self.env.do_simulation([action[3], -action[3]], n_frames=self.env.frame_skip)
        mujoco.mj_forward(self.env.model, self.env.data)
        self.observation = self._observe()

    def _observe(self) -> np.ndarray:
        space = self.env.sawyer_observation_space
        return np.clip(self.env._get_obs(), space.low, space.high)


def to_simulator(action: np.ndarray) -> np.ndarray:
    """(A,) -> Meta-World's dx, dy, dz, effort; effort 1 closes the gripper."""
    return np.array([*np.clip(action[:3], -1, 1), -1.0 if action[6] >= 0.5 else 1.0], np.float32)


def from_simulator(action: np.ndarray) -> np.ndarray:
    return np.array([*np.clip(action[:3], -1, 1), 0, 0, 0, float(action[3] < 0)], np.float32)


def record_episode(env: DemoEnv, seed: int, stride: int = 3) -> list[dict[str, Any]]:
    """Frames, expert chunks and keypoints of one noisy expert episode, every `stride` steps.

    The noise takes the arm to places the expert alone never visits; the label is what the expert would do from there.
    """
    generator = np.random.default_rng(seed)
    sigma = generator.choice([0.0, 0.3, 0.6], p=[0.2, 0.4, 0.4])
    drift_start, drift_length = generator.integers(0, 60), generator.integers(5, 30)
    drift = generator.uniform(-1, 1, 3) if generator.random() < 0.4 else np.zeros(3)
    phase = generator.integers(stride)
    noise = np.zeros(3)
    env.reset(seed)
    frames = []
    for step in range(RECORDED_STEPS):
        if step % stride == phase:
            chunk, keypoints = env.expert_chunk(), env.keypoints()
            frames.append(
                {
                    "image": env.render(),
                    "actions": chunk,
                    "position": keypoints.position,
                    "pixel": keypoints.pixel,
                    "step": np.int64(step),
                }
            )
        noise = 0.8 * noise + 0.6 * sigma * generator.standard_normal(3)  # Ornstein-Uhlenbeck, deviation sigma
        action = env.expert_action()
        if drift.any() and drift_start <= step < drift_start + drift_length:
            action[:3] = drift
        action[:3] += noise
        if env.step(action):
            break
    return frames


def record(directory: Path, split: str, episodes: int, processes: int = 2) -> None:
    """Write `directory/SPLIT-TASK-NNNN.npz`, `SHARD_EPISODES` episodes each; files that exist already are kept."""
    directory.mkdir(parents=True, exist_ok=True)
    missing = []
    for first in range(0, episodes, SHARD_EPISODES):
        for task in TASKS:
            path = directory / f"{split}-{task}-{first:04d}.npz"
            if not path.exists():
                missing.append((path, task, FIRST_SEED[split] + first, min(SHARD_EPISODES, episodes - first)))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for done, path in enumerate(pool.imap_unordered(_record_shard, missing), 1):
            print(f"{time.strftime('%H:%M:%S')} recorded {path.name} ({done}/{len(missing)})", flush=True)


def _record_shard(shard: tuple[Path, str, int, int]) -> Path:
    path, task, first_seed, episodes = shard
    env = DemoEnv(task)
    frames = [
        frame | {"episode": np.int64(seed)}
        for seed in range(first_seed, first_seed + episodes)
        for frame in record_episode(env, seed)
    ]
    env.close()  # two open OSMesa renderers in one process spoil each other's pictures
    partial = path.with_name(f"partial-{path.name}")
    np.savez(partial, allow_pickle=False, **{key: np.stack([frame[key] for frame in frames]) for key in frames[0]})
    partial.rename(path)
    return path
