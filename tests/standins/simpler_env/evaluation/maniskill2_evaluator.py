"""Calls a model as `run_maniskill2_eval_single_episode` of simpler-env/SimplerEnv (4ab7178) does, in the same order.

The environment is a stand-in: what it was given and what it was sent stands in `trace.jsonl` of the working directory.
"""

import json
import os

import numpy as np


class Environment:
    """The instruction changes once, after step 3; an episode ends after 6 steps."""

    def __init__(self, **kwargs):
        self.kwargs, self.sent, self.subtask = kwargs, [], 0

    def image(self) -> np.ndarray:
        """Another one after every step."""
        seed = len(self.sent)
        return np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)

    def step(self, action: np.ndarray):
        assert action.shape == (7,)
        assert np.isfinite(action).all()
        self.sent.append(action.tolist())
        self.subtask = int(len(self.sent) > 3)
        done = bool(np.sin(1e4 * sum(map(sum, self.sent))) > 0.7)
        return done, len(self.sent) >= 6

    def get_language_instruction(self) -> str:
        return ("open drawer", "close the drawer")[self.subtask]


def run_maniskill2_eval_single_episode(
    model,
    ckpt_path,
    robot_name,
    env_name,
    scene_name,
    robot_init_x,
    robot_init_y,
    robot_init_quat,
    control_mode,
    obj_init_x=None,
    obj_init_y=None,
    obj_episode_id=None,
    additional_env_build_kwargs=None,
    rgb_overlay_path=None,
    obs_camera_name=None,
    control_freq=3,
    sim_freq=513,
    max_episode_steps=80,
    instruction=None,
    enable_raytracing=False,
    additional_env_save_tags=None,
    logging_dir="./results",
):
    given = {key: value for key, value in locals().items() if key != "model"}
    assert (obj_init_x is None) == (obj_init_y is None) == (obj_episode_id is not None)
    assert os.path.isfile(rgb_overlay_path)
    assert np.asarray(robot_init_quat).shape == (4,)
    env = Environment(**given)
    task_description = env.get_language_instruction()
    print(task_description)
    image = env.image()
    images = [image]
    predicted_actions = []
    predicted_terminated, done, truncated = False, False, False
    model.reset(task_description)
    timestep = 0
    success = "failure"
    while not (predicted_terminated or truncated):
        raw_action, action = model.step(image, task_description)
        predicted_actions.append(raw_action)
        predicted_terminated = bool(action["terminate_episode"][0] > 0)
        done, truncated = env.step(
            np.concatenate([action["world_vector"], action["rot_axangle"], action["gripper"]]),
        )
        success = "success" if done else "failure"
        new_task_description = env.get_language_instruction()
        if new_task_description != task_description:
            task_description = new_task_description
            print(task_description)
        print(timestep, {})
        image = env.image()
        images.append(image)
        timestep += 1
    ckpt_path_basename = ckpt_path if ckpt_path[-1] != "/" else ckpt_path[:-1]
    action_root = os.path.join(logging_dir, ckpt_path_basename.split("/")[-1], "actions")
    os.makedirs(action_root, exist_ok=True)
    action_path = os.path.join(action_root, f"{success}.png")
    model.visualize_epoch(predicted_actions, images, save_path=action_path)
    assert os.path.getsize(action_path) > 1000
    with open("trace.jsonl", "a") as trace:
        trace.write(json.dumps({"given": given, "sent": env.sent}, default=list) + "\n")
    return success == "success"
