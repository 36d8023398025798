"""How far two policies' predictions lie apart on the same samples with the same noise."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from evla_cli.calibration import Sample
from evla_cli.runtime.policy import Policy


@dataclass(frozen=True)
class Fidelity:
    """
    Attributes:
        cognition_cosine: mean over samples of the cosine of the two cognition tokens.
        action_error: mean absolute difference of normalised actions, gripper excluded (their range is [-1, 1]).
        action_error_max: the largest such difference.
        gripper_flips: share of time steps whose gripper command differs.
    """

    cognition_cosine: float
    action_error: float
    action_error_max: float
    gripper_flips: float


def compare_policies(
    reference: Policy,
    candidate: Policy,
    samples: Sequence[Sample],
    batch_size: int = 8,
    seed: int = 0,
    candidate_seed: int | None = None,
) -> Fidelity:
    """Both start denoising from the same noise, unless `candidate_seed` gives the candidate another stream.

    The samples are one episode: under `vla_cache`, give consecutive frames and a `batch_size` of 1.
    """
    for policy in (reference, candidate):
        policy.reset()
    generators = [torch.Generator().manual_seed(s) for s in (seed, seed if candidate_seed is None else candidate_seed)]
    key = sorted(reference.model.config.norm_stats)[0]  # normalised actions do not depend on it
    cosines, differences, flips = [], [], []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        images, instructions = [sample.image for sample in batch], [sample.instruction for sample in batch]
        ours, theirs = (
            policy.predict(images, instructions, unnorm_key=key, noise=policy.draw_noise(len(batch), generator))
            for policy, generator in zip((reference, candidate), generators, strict=True)
        )
        cosines.append(F.cosine_similarity(ours.cognition.float(), theirs.cognition.float(), dim=-1).flatten())
        difference = np.abs(ours.normalized_actions - theirs.normalized_actions)
        differences.append(difference[..., :6])
        flips.append(difference[..., 6:7])
    error = np.concatenate(differences)
    return Fidelity(
        cognition_cosine=float(torch.cat(cosines).mean()),
        action_error=float(error.mean()),
        action_error_max=float(error.max()),
        gripper_flips=float(np.concatenate(flips).mean()) if flips[0].size else 0.0,
    )
