"""SIMPLER (SimplerEnv), where CogACT was published: its own evaluator runs every episode with our policy.

Tasks and initial conditions are those of the visual-matching scripts in microsoft/CogACT (b174a1b, sim_cogact/scripts).
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from evla_cli.errors import EvlaError
from evla_cli.evaluation.suites import OnFrame, Outcome, Trial
from evla_cli.runtime.policy import Policy
from evla_cli.runtime.simpler import ROBOT_SETUPS, SimplerPolicy


@dataclass(frozen=True)
class Episodes:
    """A task as the evaluator is given it: arguments that all its episodes share, and those of each."""

    policy_setup: str
    shared: dict[str, Any]
    each: Sequence[dict[str, Any]] = field(repr=False)


_CONTROL_MODES = {
    "google_robot": "arm_pd_ee_delta_pose_align_interpolate_by_planner_gripper_pd_joint_target_delta_pos_interpolate_by"
    "_planner",
    "widowx_bridge": "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos",
}
_CABINETS = (
    "recolor_cabinet_visual_matching_1",
    "recolor_tabletop_visual_matching_1",
    "recolor_tabletop_visual_matching_2",
    "None",  # as a text, which is what the scripts' command line makes of it
)
_DRAWER_POSES = {  # where the robot stands, and where it looks: x, y in metres, yaw in radians
    "a0": (0.644, -0.179, -0.03),
    "a1": (0.765, -0.182, -0.02),
    "a2": (0.889, -0.203, -0.06),
    "b0": (0.652, 0.009, 0.0),
    "b1": (0.752, 0.009, 0.0),
    "b2": (0.851, 0.035, 0.0),
    "c0": (0.665, 0.224, 0.0),
    "c1": (0.765, 0.222, -0.025),
    "c2": (0.865, 0.222, -0.025),
}


def _widowx(env_name: str, sink: bool = False) -> Episodes:
    pose = _robot_pose(0.127, 0.06, 0.0) if sink else _robot_pose(0.147, 0.028, 0.0)
    shared = {
        "env_name": env_name,
        "scene_name": "bridge_table_1_v2" if sink else "bridge_table_1_v1",
        "robot_name": "widowx_sink_camera_setup" if sink else "widowx",
        "rgb_overlay_path": "bridge_sink.png" if sink else "bridge_real_eval_1.png",
        "control_freq": 5,
        "sim_freq": 500,
        "max_episode_steps": 120,
        **pose,
    }
    return Episodes("widowx_bridge", shared, [{"obj_episode_id": number} for number in range(24)])


def _google_robot(max_episode_steps: int, each: Sequence[dict[str, Any]], **shared: Any) -> Episodes:
    robot = {"robot_name": "google_robot_static", "control_freq": 3, "sim_freq": 513}
    return Episodes("google_robot", robot | {"max_episode_steps": max_episode_steps} | shared, each)


def _robot_pose(x: float, y: float, yaw: float) -> dict[str, Any]:
    """The quaternion is that of the yaw times (0, 0, 0, 1), as the scripts have it: w, x, y, z."""
    quaternion = (-float(np.sin(yaw / 2)), 0.0, 0.0, float(np.cos(yaw / 2)))
    return {"robot_init_x": x, "robot_init_y": y, "robot_init_quat": quaternion}


def _grid(xs: tuple[float, float, int], ys: tuple[float, float, int]) -> list[dict[str, float]]:
    return [{"obj_init_x": float(x), "obj_init_y": float(y)} for x, y in product(np.linspace(*xs), np.linspace(*ys))]


def _coke_can() -> Episodes:
    each = [
        {"additional_env_build_kwargs": {orientation: True, "urdf_version": urdf}} | place
        for urdf in ("None", *_CABINETS[1:3], _CABINETS[0])
        for orientation in ("lr_switch", "upright", "laid_vertically")
        for place in _grid((-0.35, -0.12, 5), (-0.02, 0.42, 5))
    ]
    return _google_robot(
        80,
        each,
        env_name="GraspSingleOpenedCokeCanInScene-v0",
        scene_name="google_pick_coke_can_1_v4",
        rgb_overlay_path="google_coke_can_real_eval_1.png",
        **_robot_pose(0.35, 0.20, 0.0),
    )


def _move_near() -> Episodes:
    each = [
        {"additional_env_build_kwargs": {"urdf_version": urdf}, "obj_episode_id": number}
        for urdf in ("None", *_CABINETS[1:3], _CABINETS[0])
        for number in range(60)
    ]
    return _google_robot(
        80,
        each,
        env_name="MoveNearGoogleBakedTexInScene-v0",
        scene_name="google_pick_coke_can_1_v4",
        rgb_overlay_path="google_move_near_real_eval_1.png",
        additional_env_save_tags="baked_except_bpb_orange",
        **_robot_pose(0.35, 0.21, -0.09),
    )


def _drawer(
    max_episode_steps: int, env_names: Sequence[str], poses: Sequence[str], places: list[dict[str, float]], **build: Any
) -> Episodes:
    station = {"station_name": "mk_station_recolor", "light_mode": "simple", "disable_bad_material": True}
    each = [
        {
            "env_name": name,
            "additional_env_build_kwargs": station | {"urdf_version": urdf} | build,
            "rgb_overlay_path": f"open_drawer_{pose}.png",
        }
        | _robot_pose(*_DRAWER_POSES[pose])
        | place
        for urdf in _CABINETS
        for name in env_names
        for pose in poses
        for place in places
    ]
    return _google_robot(max_episode_steps, each, scene_name="dummy_drawer", enable_raytracing=True)


def _open_or_close(verb: str) -> Episodes:
    names = [f"{verb}{which}DrawerCustomInScene-v0" for which in ("Top", "Middle", "Bottom")]
    return _drawer(113, names, tuple(_DRAWER_POSES), _grid((0, 0, 1), (0, 0, 1)))


def _apple_into_drawer() -> Episodes:
    places = _grid((-0.08, -0.02, 3), (-0.02, 0.08, 3))
    name = "PlaceIntoClosedTopDrawerCustomInScene-v0"
    return _drawer(200, [name], ("a0", "b0", "c0"), places, model_ids="baked_apple_v2")


TASKS = {
    "google_robot_pick_coke_can": _coke_can(),
    "google_robot_move_near": _move_near(),
    "google_robot_open_drawer": _open_or_close("Open"),
    "google_robot_close_drawer": _open_or_close("Close"),
    "google_robot_place_apple_in_closed_top_drawer": _apple_into_drawer(),
    "widowx_stack_cube": _widowx("StackGreenCubeOnYellowCubeBakedTexInScene-v0"),
    "widowx_carrot_on_plate": _widowx("PutCarrotOnPlateInScene-v0"),
    "widowx_spoon_on_towel": _widowx("PutSpoonOnTableClothInScene-v0"),
    "widowx_put_eggplant_in_basket": _widowx("PutEggplantInBasketScene-v0", sink=True),
}


class Simpler:
    """Nine tasks on two robots; episode i of a task has its i-th initial condition."""

    tasks = tuple(TASKS)
    first_seed = 0  # of the diffusion noise; the initial conditions are listed above
    num_executed = None  # a prediction every step, the last ones averaged
    _renderer = ""  # the device's name, once it was asked for

    def check(self) -> None:
        if find_spec("simpler_env") is None:
            raise EvlaError(
                "--suite simpler needs SIMPLER, which is not installed: follow "
                "https://github.com/simpler-env/SimplerEnv#installation in this Python environment."
            )
        lacking = [name for name in ("sapien", "mediapy", "matplotlib") if find_spec(name) is None]
        if lacking:
            raise EvlaError(f"--suite simpler needs {' and '.join(lacking)}, too: pip install {' '.join(lacking)}.")
        # Its collision shapes come out empty, without an error: objects fall through the table.
        if version("sapien").startswith("2.") and not version("numpy").startswith("1."):
            raise EvlaError(
                f"SAPIEN {version('sapien')} simulates without collisions under numpy {version('numpy')}: "
                "pip install 'numpy<2' 'opencv-python<4.12'."
            )
        if shutil.which("ffmpeg") is None:
            raise EvlaError(
                "--suite simpler needs ffmpeg, with which SIMPLER's evaluator writes a video after every episode: "
                "install it, or put imageio-ffmpeg's on the PATH (docs/closed-loop.md)."
            )
        self._renderer = _rendering_device()

    def facts(self) -> dict[str, Any]:
        libraries = {name: version(name) for name in ("sapien", "numpy")}
        return {
            "conditions": "visual matching, as in CogACT's scripts",
            **libraries,
            "renderer": self._renderer or _rendering_device(),
        }

    def num_episodes(self, task: str) -> tuple[int, int | None]:
        count = len(TASKS[task].each)
        return count, count

    def unnorm_key(self, task: str) -> str:
        return ROBOT_SETUPS[TASKS[task].policy_setup].unnorm_key

    def run_episode(self, policy: Policy, trial: Trial, on_frame: OnFrame | None = None) -> Outcome:
        from simpler_env.evaluation.maniskill2_evaluator import run_maniskill2_eval_single_episode

        task = TASKS[trial.task]
        arguments = task.shared | task.each[trial.number]
        model = _Watched(policy, task.policy_setup, trial, on_frame)
        _kept_renderer().set_log_level("off")  # of the environment's own, which sets the level back
        with (
            tempfile.TemporaryDirectory(prefix="evla-simpler-") as videos,
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),  # it prints every step
        ):
            success = run_maniskill2_eval_single_episode(
                model=model,
                ckpt_path="evla",  # it names videos
                control_mode=_CONTROL_MODES[task.policy_setup],
                logging_dir=videos,
                **arguments
                | {
                    "rgb_overlay_path": str(_overlay(arguments["rgb_overlay_path"])),
                    "robot_init_quat": np.array(arguments["robot_init_quat"]),
                },
            )
        return Outcome(bool(success), model.steps)


class _Watched(SimplerPolicy):
    """Counts steps, and passes on what it is shown."""

    def __init__(self, policy: Policy, policy_setup: str, trial: Trial, on_frame: OnFrame | None):
        super().__init__(policy, policy_setup, unnorm_key=trial.unnorm_key, seed=trial.noise_seed(0))
        self.steps, self._on_frame = 0, on_frame

    def step(self, image: np.ndarray, task_description: str | None = None, *_: Any, **__: Any) -> tuple[Any, Any]:
        self.steps += 1
        if self._on_frame:
            self._on_frame(image)
        return super().step(image, task_description)


@cache
def _kept_renderer() -> Any:
    """Lives as long as the process: SIMPLER drops its own after each episode, and the compiled shaders with it.

    Without arguments, as an environment makes its own, which then shares this one's device.
    """
    from sapien.core import SapienRenderer

    SapienRenderer.set_log_level("off")
    return SapienRenderer()


_PROBE = """
from sapien.core import SapienRenderer
SapienRenderer.set_log_level("info")
SapienRenderer()
"""


def _rendering_device() -> str:
    """The name of the device that SAPIEN picks, from its log.

    Asked in a process of its own: without a driver SAPIEN makes a renderer all the same, and crashes when it is used.

    Errors: it finds none.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _PROBE]
    probe = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    log = probe.stderr + probe.stdout
    picked = re.search(r"picked device: (\d+)", log)
    if probe.returncode == 0 and picked:
        named = re.search(rf"^ *{picked[1]} {{2,}}(.*?) {{2,}}", log, re.MULTILINE)
        return named[1] if named else "unknown"
    # Its own errors, and an exception's last line. That of GLFW is there whenever there is no screen.
    errors = re.findall(r"^(?:.*\[error\] (?!GLFW)|\w+Error: )(.*?)\.?$", log, re.MULTILINE)
    said = errors[-1] if errors else f"exit code {probe.returncode}"
    raise EvlaError(
        f"SAPIEN cannot render here ({said}): it needs a Vulkan driver, a GPU's or lavapipe of Mesa 25 "
        "(docs/closed-loop.md)."
    )


def _overlay(name: str) -> Path:
    """The picture of the real background that SIMPLER's checkout holds."""
    spec = find_spec("simpler_env")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent.parent / "ManiSkill2_real2sim" / "data" / "real_inpainting" / name
    if not path.is_file():
        raise EvlaError(f"{path} does not exist; install SIMPLER from a checkout with its submodules, with pip -e.")
    return path
