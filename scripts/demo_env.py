"""Demonstrations for the demo model in Meta-World: what a noisy expert sees, and what it would do from there."""

import multiprocessing
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evla_cli.evaluation.suites.metaworld import IMAGE_SIZE, TASKS, MetaWorldScene, to_simulator

HORIZON = 16  # H: actions per chunk
ACTION_DIM = 7  # A: dx, dy, dz, three rotations (always 0), gripper (1 = open)
RECORDED_STEPS = 130  # a noisy expert that needs longer is stuck
SHARD_EPISODES = 20
FIRST_SEED = {"train": 0, "validation": 10_000, "samples": 20_000}  # evaluation begins at 30000


@dataclass(frozen=True)
class Keypoints:
    """Where the hand and the thing to be handled are: in metres, and as fractions of the picture's width and height."""

    position: np.ndarray  # (2, 3)
    pixel: np.ndarray  # (2, 2)


class DemoEnv(MetaWorldScene):
    """A scene with Meta-World's scripted expert in it."""

    def __init__(self, task: str, image_size: int = IMAGE_SIZE):
        super().__init__(task, image_size)
        from metaworld.policies import ENV_POLICY_MAP

        expert: Any = ENV_POLICY_MAP[TASKS[task].env_name]
        self.expert = expert()

    def expert_action(self) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experts ask for more than [-1, 1] and say so; the arm clips
            return from_simulator(self.expert.get_action(self.observation))

    def expert_chunk(self) -> np.ndarray:
        """The expert's next H actions from this very state, found by running the simulation on and going back."""
        import mujoco

        model, data, everything = self.env.model, self.env.data, mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.empty(mujoco.mj_stateSize(model, everything))
        mujoco.mj_getState(model, data, state, everything)
        kept = self.observation, self.env._prev_obs
        actions = np.empty((HORIZON, ACTION_DIM), np.float32)
        for i in range(HORIZON):
            actions[i] = self.expert_action()
            self._advance(to_simulator(actions[i]))
        mujoco.mj_setState(model, data, state, everything)
        mujoco.mj_forward(model, data)
        mujoco.mj_setState(model, data, state, everything)  # mj_forward moved the solver's warm start by 1e-16
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
        self._forward(self.env.model, self.env.data)
        self.observation = self.observe()


def from_simulator(action: np.ndarray) -> np.ndarray:
    return np.array([*np.clip(action[:3], -1, 1), 0, 0, 0, float(action[3] < 0)], np.float32)


def noisy_episode(env: DemoEnv, seed: int, stride: int) -> Iterator[int]:
    """Every `stride`-th step of a noisy expert's episode, before it is taken: the noise takes the arm to places the
    expert alone never visits."""
    generator = np.random.default_rng(seed)
    sigma = generator.choice([0.0, 0.3, 0.6], p=[0.2, 0.4, 0.4])
    drift_start, drift_length = generator.integers(0, 60), generator.integers(5, 30)
    drift = generator.uniform(-1, 1, 3) if generator.random() < 0.4 else np.zeros(3)
    phase = generator.integers(stride)
    noise = np.zeros(3)
    env.reset(seed)
    for step in range(RECORDED_STEPS):
        if step % stride == phase:
            yield step
        noise = 0.8 * noise + 0.6 * sigma * generator.standard_normal(3)  # Ornstein-Uhlenbeck, deviation sigma
        action = env.expert_action()
        if drift.any() and drift_start <= step < drift_start + drift_length:
            action[:3] = drift
        action[:3] += noise
        if env.step(action):
            break


def record_episode(env: DemoEnv, seed: int, stride: int = 3) -> list[dict[str, Any]]:
    """Frames, expert chunks (what the expert would do from there) and keypoints of one noisy episode."""
    frames = []
    for step in noisy_episode(env, seed, stride):
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
