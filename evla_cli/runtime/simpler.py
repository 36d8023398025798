"""A policy as SimplerEnv's evaluator calls it: one image in, one action out, at every step of an episode.

    model = SimplerPolicy("bundle/", policy_setup="widowx_bridge")
    model.reset("put carrot on plate")
    raw_action, action = model.step(image, "put carrot on plate")

Follows CogACT's own policy for SimplerEnv (microsoft/CogACT b174a1b, sim_cogact/, MIT): the same ensemble, the same
sticky gripper, the same constants. What that policy keeps and never reads (a history of images) is left out.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from evla_cli.errors import EvlaError, suggest
from evla_cli.runtime.policy import Policy, load_policy

Action = dict[str, np.ndarray]


@dataclass(frozen=True)
class RobotSetup:
    """
    Attributes:
        unnorm_key: the dataset whose statistics un-normalise.
        ensemble_horizon: how many predictions of the same time step are averaged.
        sticky_steps: how long a change of the gripper is held; None: commands are absolute (1 open, -1 closed).
    """

    unnorm_key: str
    ensemble_horizon: int
    sticky_steps: int | None


ROBOT_SETUPS = {
    "google_robot": RobotSetup("fractal20220817_data", ensemble_horizon=2, sticky_steps=10),
    "widowx_bridge": RobotSetup("bridge_orig", ensemble_horizon=7, sticky_steps=None),
}


class SimplerPolicy:
    """The interface that `simpler_env.evaluation.maniskill2_evaluator` expects of a model."""

    def __init__(
        self,
        policy: Policy | str | Path,
        policy_setup: str = "widowx_bridge",
        *,
        unnorm_key: str | None = None,
        ensemble_horizon: int | None = None,
        ensemble_alpha: float = 0.1,
        action_scale: float = 1.0,
        image_size: tuple[int, int] = (224, 224),
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ):
        """
        Args:
            policy: a bundle's path, or what `load_policy` returned.
            policy_setup: "google_robot" or "widowx_bridge".
            ensemble_horizon: 1 takes each prediction's first action as it is.
            ensemble_alpha: how much more a past prediction counts that is like the newest one.
            action_scale: factor of translation and rotation.
            image_size: width and height of the pictures that `visualize_epoch` draws. What the model sees is resized
                by the model's own preprocessing.
            device, dtype: of a bundle that is loaded here.
            seed: of the diffusion noise, one stream over all episodes.

        Errors: an unknown setup; a model without that dataset's statistics.
        """
        if policy_setup not in ROBOT_SETUPS:
            raise EvlaError(f"Unknown policy_setup '{policy_setup}'. {suggest(policy_setup, ROBOT_SETUPS)}")
        setup = ROBOT_SETUPS[policy_setup]
        self.policy = policy if isinstance(policy, Policy) else load_policy(policy, device=device, dtype=dtype)
        self.unnorm_key = setup.unnorm_key if unnorm_key is None else unnorm_key
        self.policy.action_stats(self.unnorm_key)  # refuses an unknown key now, not after a scene was built
        self.action_scale, self.image_size = action_scale, image_size
        horizon = setup.ensemble_horizon if ensemble_horizon is None else ensemble_horizon
        self._ensemble = AdaptiveEnsemble(horizon, ensemble_alpha)
        self._gripper = AbsoluteGripper() if setup.sticky_steps is None else StickyGripper(setup.sticky_steps)
        self._generator = torch.Generator().manual_seed(seed)
        self._seed = seed
        self.task_description: str | None = None

    def reset(self, task_description: str) -> None:
        """An episode starts. The stream of noise goes on."""
        self.task_description = task_description
        self.policy.reset(self._seed)
        self._ensemble.reset()
        self._gripper.reset()

    def step(self, image: np.ndarray, task_description: str | None = None, *_: Any, **__: Any) -> tuple[Action, Action]:
        """
        Args:
            image: uint8, (height, width, 3), RGB.
            task_description: another one than before resets the policy; None goes on with the one before.

        Returns: as predicted, `world_vector` (3,) in metres, `rotation_delta` (3,) as roll, pitch and yaw in radians,
            `open_gripper` (1,) from 0 to 1; and for the environment, `world_vector`, `rot_axangle` (3,), `gripper`
            (1,), `terminate_episode` (1,), which is always 0.
        """
        if task_description is not None and task_description != self.task_description:
            self.reset(task_description)
        if self.task_description is None:
            raise EvlaError("SimplerPolicy.step needs a task: call reset(task_description) where an episode starts.")
        prediction = self.policy.predict(
            [image], [self.task_description], unnorm_key=self.unnorm_key, generator=self._generator
        )
        values = self._ensemble(prediction.actions[0])  # (H, A) -> (A,)
        raw_action = {"world_vector": values[:3], "rotation_delta": values[3:6], "open_gripper": values[6:7]}
        action = {
            "world_vector": raw_action["world_vector"] * self.action_scale,
            "rot_axangle": euler_to_axis_angle(*raw_action["rotation_delta"]) * self.action_scale,
            "gripper": self._gripper(raw_action["open_gripper"]),
            "terminate_episode": np.array([0.0]),
        }
        return raw_action, action

    def visualize_epoch(self, predicted_raw_actions: Sequence[Action], images: Sequence[np.ndarray], save_path: str):
        """Draw an episode: every third picture, and each action dimension over time. Needs matplotlib."""
        import matplotlib.pyplot as plt

        keys = ("world_vector", "rotation_delta", "open_gripper")
        actions = np.array([np.concatenate([action[key] for key in keys]) for action in predicted_raw_actions])
        labels = ["x", "y", "z", "roll", "pitch", "yaw", "grasp"]
        layout: Any = [["image"] * len(labels), labels]
        figure, axes = plt.subplot_mosaic(layout, figsize=(45, 10))
        axes["image"].imshow(np.concatenate([self._resized(image) for image in images[::3]], axis=1))
        axes["image"].set_xlabel("Time in one episode (subsampled)")
        for label, values in zip(labels, actions.T, strict=True):
            axes[label].plot(values)
            axes[label].set(title=label, xlabel="Time in one episode")
        figure.savefig(save_path)
        plt.close(figure)

    def _resized(self, image: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(image).resize(self.image_size, Image.Resampling.BOX))  # mean over areas


class AdaptiveEnsemble:
    """What the last predictions say about this time step, weighted by their likeness to the newest (CogACT, sec. 3.4).

    A chunk that was predicted k steps ago speaks of now in its row k; its weight is exp(alpha * cosine).
    """

    def __init__(self, horizon: int, alpha: float):
        if horizon < 1:
            raise EvlaError(f"ensemble_horizon must be at least 1, got {horizon}.")
        self.alpha = alpha
        self._chunks: deque[np.ndarray] = deque(maxlen=horizon)

    def reset(self) -> None:
        self._chunks.clear()

    def __call__(self, chunk: np.ndarray) -> np.ndarray:
        """(H, A) -> (A,). Errors: chunks shorter than the horizon."""
        if len(chunk) < (self._chunks.maxlen or 1):
            raise EvlaError(f"ensemble_horizon is {self._chunks.maxlen}, the chunks have {len(chunk)} actions.")
        self._chunks.appendleft(chunk)
        now = np.stack([past[age] for age, past in enumerate(self._chunks)])  # (predictions, A), newest first
        cosine = now @ now[0] / (np.linalg.norm(now, axis=1) * np.linalg.norm(now[0]) + 1e-7)
        weights = np.exp(self.alpha * cosine)
        return weights / weights.sum() @ now


class AbsoluteGripper:
    """WidowX: 1 opens, -1 closes."""

    def reset(self) -> None:
        pass

    def __call__(self, openness: np.ndarray) -> np.ndarray:
        """(1,), 0 closed to 1 open -> (1,)."""
        return 2.0 * (openness > 0.5) - 1.0


class StickyGripper:
    """Google robot: commands are changes (positive closes), and one is repeated until the fingers have moved.

    The openness that changes are measured from moves on only when a change begins.
    """

    def __init__(self, steps: int):
        self.steps = steps
        self.reset()

    def reset(self) -> None:
        self._from: np.ndarray | None = None
        self._change, self._left = np.zeros(1), 0

    def __call__(self, openness: np.ndarray) -> np.ndarray:
        """(1,), 0 closed to 1 open -> (1,)."""
        if self._from is None:
            self._from = openness
        change = self._from - openness
        if self._left == 0 and abs(change[0]) > 0.5:
            self._change, self._left, self._from = change, self.steps, openness
        if self._left == 0:
            return change
        self._left -= 1
        return self._change


def euler_to_axis_angle(roll: float, pitch: float, yaw: float) -> np.ndarray:
    """Rotations about the fixed x, y and z axes, in this order, in radians -> axis times angle, (3,)."""
    w, xyz = 1.0, np.zeros(3)
    for angle, axis in zip((roll, pitch, yaw), np.eye(3), strict=True):  # quaternions, each multiplied from the left
        c, s = np.cos(angle / 2), np.sin(angle / 2) * axis
        w, xyz = c * w - s @ xyz, c * xyz + w * s + np.cross(s, xyz)
    length = np.linalg.norm(xyz)
    return np.zeros(3) if length == 0 else xyz / length * 2 * np.arctan2(length, w)
