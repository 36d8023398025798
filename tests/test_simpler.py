"""SIMPLER's interface: against loops written from CogACT's policy, and called as SimplerEnv's evaluator does."""

import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from test_cli import evla_error, evla_json

from evla_cli.errors import EvlaError
from evla_cli.evaluation.suites.simpler import TASKS, Simpler
from evla_cli.runtime.policy import Policy, load_policy, policy_from_checkpoint
from evla_cli.runtime.simpler import ROBOT_SETUPS, AdaptiveEnsemble, SimplerPolicy, StickyGripper, euler_to_axis_angle

STANDINS = Path(__file__).resolve().parent / "standins"


@pytest.fixture(scope="module")
def robot_run(cogact_run, tmp_path_factory) -> Path:
    """The pico run with the statistics of both robots' datasets."""
    run = tmp_path_factory.mktemp("robots") / "run"
    shutil.copytree(cogact_run, run)
    statistics = json.loads((run / "dataset_statistics.json").read_text())["kitchen"]
    (run / "dataset_statistics.json").write_text(
        json.dumps({setup.unnorm_key: statistics for setup in ROBOT_SETUPS.values()})
    )
    return run


@pytest.fixture(scope="module")
def robot_policy(robot_run) -> Policy:
    return policy_from_checkpoint(robot_run)


def frames(count: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 60, 80, 3), dtype=np.uint8))


# Literal references: one number at a time.


def ensemble_in_loops(chunks: list[np.ndarray], horizon: int, alpha: float) -> list[float]:
    """The last of `chunks` has just been predicted."""
    used = chunks[-horizon:]
    predictions = [list(chunk[len(used) - 1 - i]) for i, chunk in enumerate(used)]
    newest = predictions[-1]
    weights = []
    for prediction in predictions:
        dot = sum(a * b for a, b in zip(prediction, newest, strict=True))
        norms = math.sqrt(sum(a * a for a in prediction)) * math.sqrt(sum(b * b for b in newest))
        weights.append(math.exp(alpha * dot / (norms + 1e-7)))
    return [
        sum(weight * prediction[i] for weight, prediction in zip(weights, predictions, strict=True)) / sum(weights)
        for i in range(len(newest))
    ]


class StickyInLoops:
    """The state machine of CogACT's policy for the Google robot, variable by variable."""

    def __init__(self, num_repeat: int):
        self.num_repeat = num_repeat
        self.is_on, self.repeat, self.action, self.previous = False, 0, 0.0, None

    def __call__(self, current: float) -> float:
        if self.previous is None:
            relative = 0.0
            self.previous = current
        else:
            relative = self.previous - current
        if abs(relative) > 0.5 and not self.is_on:
            self.is_on = True
            self.action = relative
            self.previous = current
        if self.is_on:
            self.repeat += 1
            relative = self.action
        if self.repeat == self.num_repeat:
            self.is_on = False
            self.repeat = 0
            self.action = 0.0
        return relative


@pytest.mark.parametrize("horizon", [1, 2, 7])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 2.0])
def test_ensemble_is_the_loop(horizon, alpha):
    chunks = list(np.random.default_rng(3).normal(size=(12, 16, 7)))
    ensemble = AdaptiveEnsemble(horizon, alpha)
    for number, chunk in enumerate(chunks, start=1):
        assert ensemble(chunk) == pytest.approx(ensemble_in_loops(chunks[:number], horizon, alpha), rel=1e-12)
    ensemble.reset()
    assert ensemble(chunks[0]) == pytest.approx(chunks[0][0])


def test_ensemble_refuses_chunks_that_do_not_reach():
    with pytest.raises(EvlaError, match="ensemble_horizon is 17, the chunks have 16 actions"):
        AdaptiveEnsemble(17, 0.1)(np.zeros((16, 7)))


@pytest.mark.parametrize("seed", range(5))
def test_sticky_gripper_is_the_loop(seed):
    random = np.random.default_rng(seed)
    openness = np.clip(random.choice([0.0, 0.3, 1.0], size=200) + random.normal(0, 0.1, 200), 0, 1)
    ours, reference = StickyGripper(10), StickyInLoops(10)
    changes = [ours(np.array([value]))[0] for value in openness]
    assert changes == [reference(value) for value in openness]
    assert max(map(abs, changes)) > 0.5
    ours.reset()
    assert ours(np.ones(1)) == 0


@pytest.mark.parametrize(
    "angles", [(0.0, 0.0, 0.0), (0.1, -0.2, 0.3), (0.0, 0.0, 1e-9), (2.0, -1.0, 3.0), (3.1, 3.1, 0)]
)
def test_axis_angle_is_scipys(angles):
    found, rotation = euler_to_axis_angle(*angles), Rotation.from_euler("xyz", angles)
    assert Rotation.from_rotvec(found).as_matrix() == pytest.approx(rotation.as_matrix(), abs=1e-12)
    if max(map(abs, angles)) < 1:
        assert found == pytest.approx(rotation.as_rotvec(), rel=1e-9)


@pytest.mark.parametrize("setup", [pytest.param("google_robot", marks=pytest.mark.slow), "widowx_bridge"])
def test_steps_are_predictions_through_ensemble_and_gripper(setup, robot_policy, robot_run):
    """Against the policy itself, the loops above and scipy's rotations; another image each step."""
    robot, scale = ROBOT_SETUPS[setup], 0.7
    model = SimplerPolicy(robot_policy, setup, action_scale=scale, seed=5)
    generator = torch.Generator().manual_seed(5)
    model.reset("open drawer")
    chunks, sticky = [], StickyInLoops(10)
    for image in frames(12):
        raw, action = model.step(image, "open drawer")
        predicted = policy_from_checkpoint(robot_run).predict(
            [image], ["open drawer"], unnorm_key=robot.unnorm_key, generator=generator
        )
        chunks.append(predicted.actions[0])
        expected = ensemble_in_loops(chunks, robot.ensemble_horizon, 0.1)
        parts = (raw["world_vector"], raw["rotation_delta"], raw["open_gripper"])
        assert [part.shape for part in parts] == [(3,), (3,), (1,)]
        assert np.concatenate(parts) == pytest.approx(expected, rel=1e-9)
        assert action["world_vector"] == pytest.approx(scale * np.array(expected[:3]))
        turned = Rotation.from_rotvec(action["rot_axangle"] / scale).as_matrix()
        assert turned == pytest.approx(Rotation.from_euler("xyz", expected[3:6]).as_matrix(), abs=1e-9)
        gripper = sticky(expected[6]) if setup == "google_robot" else (1.0 if expected[6] > 0.5 else -1.0)
        assert action["gripper"] == pytest.approx([gripper])
        assert action["terminate_episode"].tolist() == [0.0]


def test_another_task_starts_anew(robot_policy):
    """As in the evaluator, which tells of a new subtask through `step` alone."""
    first, second = SimplerPolicy(robot_policy, seed=1), SimplerPolicy(robot_policy, seed=1)
    images = frames(6)
    first.reset("open drawer")
    for image in images[:3]:
        first.step(image, "open drawer")
        second.step(image, "open drawer")  # the first call is a reset
    goes_on, _ = first.step(images[3])  # None: the task before
    new, _ = second.step(images[3], "close the drawer")
    alone = SimplerPolicy(robot_policy, seed=1)
    for image in images[:3]:
        alone.step(image, "open")
    alone.reset("close the drawer")
    assert np.array_equal(alone.step(images[3])[0]["world_vector"], new["world_vector"])
    assert not np.array_equal(goes_on["world_vector"], new["world_vector"])


def test_bundles_load_by_path(robot_run, tmp_path):
    from evla_cli import pipeline

    pipeline.export(robot_run, tmp_path / "bundle", pipeline.settings_with(None))
    by_path = SimplerPolicy(tmp_path / "bundle", "google_robot")
    loaded = SimplerPolicy(load_policy(tmp_path / "bundle"), "google_robot")
    image = frames(1)[0]
    assert np.array_equal(*(m.step(image, "open drawer")[0]["world_vector"] for m in (by_path, loaded)))


def test_what_it_refuses(robot_policy, policy):
    with pytest.raises(EvlaError, match=r"Unknown policy_setup 'google'. .*google_robot, widowx_bridge"):
        SimplerPolicy(robot_policy, "google")
    with pytest.raises(EvlaError, match="Unknown unnorm_key 'bridge_orig'"):
        SimplerPolicy(policy)
    with pytest.raises(EvlaError, match="call reset"):
        SimplerPolicy(robot_policy).step(frames(1)[0])


# The suite


@pytest.fixture
def with_simpler(tmp_path, monkeypatch) -> Path:
    """A checkout of the stand-in, importable here and in processes that start here."""
    checkout = tmp_path / "SimplerEnv"
    shutil.copytree(STANDINS, checkout)
    overlays = checkout / "ManiSkill2_real2sim" / "data" / "real_inpainting"
    overlays.mkdir(parents=True)
    for task in TASKS.values():
        for arguments in task.each:
            (overlays / (task.shared | arguments)["rgb_overlay_path"]).touch()
    ffmpeg = checkout / "bin" / "ffmpeg"
    ffmpeg.parent.mkdir()
    ffmpeg.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(ffmpeg.parent), prepend=os.pathsep)
    monkeypatch.syspath_prepend(checkout)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_evaluator_runs_our_policy(with_simpler, robot_run):
    tasks = ("widowx_put_eggplant_in_basket", "google_robot_close_drawer")
    log = with_simpler / "log.jsonl"
    options = ("--suite", "simpler", "-o", log, "--tasks", ",".join(tasks), "--episodes", 2)
    record = evla_json("eval", robot_run, *options, "--video", with_simpler / "videos")
    assert [row["all"]["episodes"] for row in record["candidates"]] == [4]
    assert record["facts"] == {
        "conditions": "visual matching, as in CogACT's scripts",
        "sapien": "3.0.0",
        "numpy": np.__version__,
        "renderer": "A GPU of that name",
    }
    logged = [json.loads(line) for line in log.read_text().splitlines()[2:]]
    assert [(line["task"], line["episode"], line["steps"]) for line in logged] == [
        (task, number, 6) for task in tasks for number in range(2)
    ]
    trace = [json.loads(line) for line in (with_simpler / "trace.jsonl").read_text().splitlines()]
    eggplant, drawer = trace[1]["given"], trace[3]["given"]
    assert eggplant["obj_episode_id"] == 1
    assert (eggplant["robot_name"], eggplant["control_freq"], eggplant["max_episode_steps"]) == (
        "widowx_sink_camera_setup",
        5,
        120,
    )
    assert eggplant["control_mode"] == "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos"
    assert drawer["env_name"] == "CloseTopDrawerCustomInScene-v0"
    assert drawer["rgb_overlay_path"].endswith("real_inpainting/open_drawer_a1.png")
    assert drawer["robot_init_quat"] == pytest.approx([math.sin(0.01), 0, 0, math.cos(0.01)])
    assert drawer["enable_raytracing"] is True
    assert drawer["additional_env_build_kwargs"]["urdf_version"] == "recolor_cabinet_visual_matching_1"
    assert len({json.dumps(entry["sent"]) for entry in trace}) == 4  # each episode has noise of its own
    assert {abs(action[6]) for entry in trace[:2] for action in entry["sent"]} == {1.0}
    names = {path.name for path in (with_simpler / "videos").iterdir()}
    assert names == {f"run-{task}-0000.gif" for task in tasks}


def test_what_it_executes_is_its_own_matter(with_simpler, robot_run):
    """It asks for an action at every step, and averages those that were predicted for it."""
    options = ("--suite", "simpler", "-o", with_simpler / "log.jsonl", "--tasks", "widowx_stack_cube")
    error = evla_error("eval", robot_run, *options, "--execute", 4)
    assert error == "Error: --execute: this suite decides itself which actions of a chunk it executes; leave it out.\n"


@pytest.mark.slow
def test_statistics_are_each_robots_unless_told_otherwise(with_simpler, robot_run, cogact_run):
    log = with_simpler / "log.jsonl"
    options = ("--suite", "simpler", "-o", log, "--tasks", "widowx_stack_cube", "--episodes", 1)
    error = evla_error("eval", cogact_run, *options)
    assert "run has no statistics of 'bridge_orig' for widowx_stack_cube; --unnorm-key names others. " in error
    evla_json("eval", cogact_run, *options, "--unnorm-key", "kitchen")
    sent = [json.loads(line)["sent"] for line in (with_simpler / "trace.jsonl").read_text().splitlines()]
    log.unlink()
    evla_json("eval", robot_run, *options)
    (again,) = [json.loads(line)["sent"] for line in (with_simpler / "trace.jsonl").read_text().splitlines()][1:]
    assert sent == [again]  # the same numbers by another name


def test_conditions_are_those_of_the_scripts():
    counts = {name: len(task.each) for name, task in TASKS.items()}
    assert counts == {
        "google_robot_pick_coke_can": 4 * 3 * 25,
        "google_robot_move_near": 4 * 60,
        "google_robot_open_drawer": 4 * 3 * 9,
        "google_robot_close_drawer": 4 * 3 * 9,
        "google_robot_place_apple_in_closed_top_drawer": 4 * 3 * 9,
        **{name: 24 for name in TASKS if name.startswith("widowx")},
    }
    for task in TASKS.values():
        assert len({json.dumps(arguments, sort_keys=True) for arguments in task.each}) == len(task.each)


def refusal(run: Path, folder: Path) -> str:
    """Of the whole suite: one line."""
    error = evla_error("eval", run, "--suite", "simpler", "-o", folder / "log.jsonl")
    assert error.count("\n") == 1
    return error


def test_without_simpler_one_line_says_so(robot_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "simpler_env", None)  # as not installed, wherever the test runs
    assert "needs SIMPLER, which is not installed" in refusal(robot_run, tmp_path)


@pytest.mark.parametrize("name", ["mediapy", "matplotlib"])
def test_what_its_evaluator_needs_at_an_episodes_end_is_asked_for_before(name, robot_run, with_simpler, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    assert f"needs {name}, too: pip install {name}" in refusal(robot_run, with_simpler)


def test_without_ffmpeg(robot_run, with_simpler, monkeypatch):
    monkeypatch.setenv("PATH", str(with_simpler))
    assert "needs ffmpeg, with which SIMPLER's evaluator writes a video" in refusal(robot_run, with_simpler)


def test_sapien_2_under_numpy_2(robot_run, with_simpler):
    for name, version in (("sapien", "2.2.2"), ("numpy", "2.4.6")):
        shutil.rmtree(with_simpler / "SimplerEnv" / "sapien-3.0.0.dist-info", ignore_errors=True)
        metadata = with_simpler / "SimplerEnv" / f"{name}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    assert "SAPIEN 2.2.2 simulates without collisions under numpy 2.4.6" in refusal(robot_run, with_simpler)


def test_without_a_vulkan_driver(robot_run, with_simpler, monkeypatch):
    monkeypatch.setenv("VK_ICD_FILENAMES", "nowhere")
    error = refusal(robot_run, with_simpler)
    assert "SAPIEN cannot render here (Vulkan is incompatible with your driver. You may not use the" in error
    assert "it needs a Vulkan driver" in error
    with pytest.raises(EvlaError, match="SAPIEN cannot render here"):
        Simpler().check()


def test_a_checkout_without_its_pictures(with_simpler, robot_run):
    shutil.rmtree(with_simpler / "SimplerEnv" / "ManiSkill2_real2sim")
    options: tuple[Any, ...] = ("--suite", "simpler", "-o", with_simpler / "log.jsonl", "--tasks", "widowx_stack_cube")
    error = evla_error("eval", robot_run, *options)
    assert "bridge_real_eval_1.png does not exist; install SIMPLER from a checkout" in error
    assert error.count("\n") == 1
