"""A policy of evla in LIBERO's scenes, in LIBERO's environment: python -m pytest FILE

The model was trained for another robot: what is tested is that both work in one process, not success.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from libero.libero import benchmark, get_libero_path
from libero.libero.envs import OffScreenRenderEnv

from evla_cli.runtime.policy import policy_from_checkpoint

DEMO = Path(__file__).resolve().parent.parent.parent / "demo" / "cogact-metaworld"
STEPS = 3


@pytest.fixture(scope="module")
def scene():
    """The first task of libero_spatial, its first initial state, its instruction."""
    suite = benchmark.get_benchmark_dict()["libero_spatial"]()
    task = suite.get_task(0)
    file = Path(get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
    environment = OffScreenRenderEnv(bddl_file_name=str(file), camera_heights=128, camera_widths=128)
    yield environment, suite.get_task_init_states(0)[0], task.language
    environment.close()


def test_it_acts_and_does_the_same_again(scene):
    policy = policy_from_checkpoint(DEMO, dtype=torch.float32)
    first, second = (episode(policy, *scene) for _ in range(2))
    assert first["images"].shape == (STEPS + 1, 128, 128, 3)
    assert first["images"].std() > 10
    assert np.abs(np.diff(first["hand"], axis=0)).max() > 1e-3  # it moved
    assert all(np.array_equal(first[name], second[name]) for name in first)


def episode(policy, environment, state: np.ndarray, instruction: str) -> dict[str, np.ndarray]:
    environment.seed(0)
    environment.reset()
    observation = environment.set_init_state(state)
    policy.reset(0)
    images, hand, actions = [upright(observation)], [observation["robot0_eef_pos"]], []
    for step in range(STEPS):
        action = to_libero(policy.predict_action(images[-1], instruction, seed=step)[0])
        observation, _, _, _ = environment.step(action)
        images.append(upright(observation))
        hand.append(observation["robot0_eef_pos"])
        actions.append(action)
    return {"images": np.array(images), "hand": np.array(hand), "actions": np.array(actions)}


def upright(observation) -> np.ndarray:
    """LIBERO's pictures have their first row at the bottom."""
    return np.ascontiguousarray(observation["agentview_image"][::-1])


def to_libero(action: np.ndarray) -> np.ndarray:
    """Gripper: 1 closes in the demo, 0 opens; LIBERO wants 1 and -1."""
    return np.append(action[:6], 2 * action[6] - 1)
