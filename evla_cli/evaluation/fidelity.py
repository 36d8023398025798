"""How far two policies' predictions lie apart on the same samples with the same noise.

Letters used here: N samples, H action horizon, A action dim, D language-model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evla_cli.calibration import Sample
from evla_cli.errors import EvlaError
from evla_cli.evaluation.intervals import mean_estimate
from evla_cli.models.processing import GRIPPER, unnormalize_actions
from evla_cli.runtime.policy import Policy

_POSITION = slice(0, 3)  # the first action dimensions move the hand by so much: x, y, z


@dataclass(frozen=True)
class Predictions:
    """All float64: cognition tokens (N, D), normalised actions and actions in the robot's units (N, H, A)."""

    cognition: np.ndarray
    normalized: np.ndarray
    actions: np.ndarray


def predict_samples(
    policy: Policy,
    samples: Sequence[Sample],
    *,
    unnorm_key: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> Predictions:
    cognition = cognition_tokens(policy, samples, batch_size)
    return predict_from(policy, cognition, unnorm_key=unnorm_key, batch_size=batch_size, seed=seed)


@torch.inference_mode()
def cognition_tokens(policy: Policy, samples: Sequence[Sample], batch_size: int = 8) -> Tensor:
    """(N, 1, D). What depends on the calls before does so on the samples alone, not on how they are batched: a method
    that remembers frames sees every episode from its start, frame by frame; a random choice is drawn sample by sample.

    Errors: samples that a method which remembers frames cannot be judged by, see `check_episodes`.
    """
    tokens = policy.settings.visual_tokens
    tracks: Sequence[Sequence[int]] = [range(len(samples))]
    if tokens.remembers_frames:
        tracks = check_episodes(samples)
    size = 1 if tokens.depends_on_calls else batch_size
    found: dict[int, Tensor] = {}
    for track in tracks:
        policy.reset()
        for start in range(0, len(track), size):
            numbers = track[start : start + size]
            batch = [samples[number] for number in numbers]
            inputs = policy.prepare([sample.image for sample in batch], [sample.instruction for sample in batch])
            found |= zip(numbers, policy.think(inputs, policy.see(inputs))[0].split(1), strict=True)
    return torch.cat([found[number] for number in range(len(samples))])


def check_episodes(samples: Sequence[Sample]) -> list[list[int]]:
    """The samples' numbers by episode, in order. Errors: one of no episode; no frame that follows another one."""
    episodes: dict[str, list[int]] = {}
    for number, sample in enumerate(samples):
        if sample.episode is None:
            raise EvlaError(
                f"{sample.where}: no 'episode': visual_tokens.method vla_cache remembers the frame before, so each "
                "sample must say of which episode it is."
            )
        episodes.setdefault(sample.episode, []).append(number)
    if len(episodes) == len(samples):
        raise EvlaError(
            f"{samples[0].where}: visual_tokens.method vla_cache remembers the frame before, but none of these samples "
            "follows another one of its 'episode'; record frames that do."
        )
    return list(episodes.values())


@torch.inference_mode()
def predict_from(
    policy: Policy, cognition: Tensor, *, unnorm_key: str | None = None, batch_size: int = 8, seed: int = 0
) -> Predictions:
    """What follows from cognition tokens (N, 1, D).

    `seed` alone decides the noise: another policy with chunks of the same size is given the same.
    """
    stats = policy.action_stats(unnorm_key)
    generator = torch.Generator().manual_seed(seed)
    noise = policy.draw_noise(len(cognition), generator)
    chunks = [
        policy.act(cognition[start : start + batch_size], noise[start : start + batch_size], generator)
        for start in range(0, len(cognition), batch_size)
    ]
    actions, normalized = unnormalize_actions(torch.cat(chunks).float().cpu().numpy(), stats)
    return Predictions(cognition[:, 0].double().cpu().numpy(), normalized, actions)


@dataclass(frozen=True)
class Fidelity:
    """One row a sample in every array.

    Attributes:
        cognition_cosine: (N,), cosine of the two cognition tokens.
        normalized_error: (N, A), absolute difference of normalised actions (their range: [-1, 1]), mean over the chunk.
        physical_error: (N, A), the same in the robot's units.
        largest_error: (N,), the largest normalised difference in the chunk, gripper excluded.
        gripper_flips: (N,), share of the chunk's steps whose gripper command differs; None without a gripper.
        position_deviation: (N, H), distance of the positions that the actions so far add up to, in the robot's units.
    """

    cognition_cosine: np.ndarray
    normalized_error: np.ndarray
    physical_error: np.ndarray
    largest_error: np.ndarray
    gripper_flips: np.ndarray | None
    position_deviation: np.ndarray

    @property
    def action_error(self) -> np.ndarray:
        """(N,), mean normalised error, gripper excluded."""
        return np.delete(self.normalized_error, _gripper(self.normalized_error), axis=1).mean(axis=1)

    def to_record(self, seed: int = 0) -> dict[str, Any]:
        """Means over samples with their intervals."""
        values = {
            "cognition_cosine": self.cognition_cosine,
            "action_error": self.action_error,
            "normalized_error": self.normalized_error,
            "physical_error": self.physical_error,
            "gripper_flips": self.gripper_flips,
            "position_deviation": self.position_deviation,
        }
        record: dict[str, Any] = {
            name: None if value is None else mean_estimate(value, seed).to_record() for name, value in values.items()
        }
        return record | {"largest_action_error": float(self.largest_error.max())}


def fidelity(reference: Predictions, candidate: Predictions) -> Fidelity:
    normalized = np.abs(reference.normalized - candidate.normalized)
    gripper = _gripper(normalized)
    path = (candidate.actions - reference.actions)[..., _POSITION].cumsum(axis=1)  # (N, H, 3)
    norms = np.linalg.norm(reference.cognition, axis=1) * np.linalg.norm(candidate.cognition, axis=1)
    return Fidelity(
        cognition_cosine=(reference.cognition * candidate.cognition).sum(axis=1) / norms,
        normalized_error=normalized.mean(axis=1),
        physical_error=np.abs(reference.actions - candidate.actions).mean(axis=1),
        largest_error=np.delete(normalized, gripper, axis=2).max(axis=(1, 2)),
        gripper_flips=(normalized[..., GRIPPER] > 0).mean(axis=1) if gripper else None,
        position_deviation=np.linalg.norm(path, axis=2),
    )


def _gripper(values: np.ndarray) -> list[int]:
    return [GRIPPER] if values.shape[-1] > GRIPPER else []
