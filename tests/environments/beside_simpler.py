"""`--suite simpler` with SIMPLER itself, in its environment: python -m pytest FILE"""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from evla_cli.cli.main import cli
from evla_cli.evaluation.suites import Trial
from evla_cli.evaluation.suites import simpler as suite
from evla_cli.runtime.policy import policy_from_checkpoint

DEMO = Path(__file__).resolve().parent.parent.parent / "demo" / "cogact-metaworld"
TASK = "widowx_carrot_on_plate"
TASKS = (TASK, "widowx_stack_cube")
EPISODES = 5  # of each


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The demo, and statistics for both robots as if it had seen their datasets: it acts, and solves nothing."""
    run = tmp_path_factory.mktemp("robots") / "run"
    shutil.copytree(DEMO, run)
    file = run / "dataset_statistics.json"
    statistics = json.loads(file.read_text())
    (own,) = statistics.values()
    largest = [0.02, 0.02, 0.02, 0.05, 0.05, 0.05, 1.0]  # metres, radians, gripper: as far as these robots go a step
    by_hand = own | {"action": own["action"] | {"q01": [-value for value in largest[:6]] + [0.0], "q99": largest}}
    file.write_text(json.dumps(statistics | {"bridge_orig": by_hand, "fractal20220817_data": by_hand}))
    return run


def test_ten_episodes_in_two_tasks_are_the_same_again(run, tmp_path):
    """Log and films, byte for byte: in one process, then by two workers, to which episodes come in another order."""
    logs, films = [], []
    for workers in (1, 2):
        folder = tmp_path / f"by {workers}"
        folder.mkdir()
        options = ("--tasks", ",".join(TASKS), "--episodes", EPISODES, "--dtype", "float32", "--workers", workers)
        filmed = ("--video", folder / "films", "--video-episodes", ",".join(map(str, range(EPISODES))))
        log = folder / "log.jsonl"
        record = json.loads(evla("eval", run, "--suite", "simpler", "-o", log, *options, *filmed, "--json", "--quiet"))
        assert record["candidates"][0]["all"]["episodes"] == len(TASKS) * EPISODES
        header, identity, *lines = log.read_text().splitlines()
        logs.append((header, identity, sorted(lines)))
        films.append({path.name: path.read_bytes() for path in (folder / "films").iterdir()})
    assert [len(film) for film in films] == [len(TASKS) * EPISODES] * 2
    assert len(set(films[0].values())) == len(films[0])  # no episode is another's
    assert logs[0] == logs[1]
    assert films[0] == films[1]
    episodes = [json.loads(line) for line in logs[0][2]]
    assert [(line["task"], line["episode"], line["steps"]) for line in episodes] == [
        (task, number, 120) for task in TASKS for number in range(EPISODES)
    ]


def test_the_command_on_both_robots(run, tmp_path):
    tasks = {"widowx_put_eggplant_in_basket": 120, "google_robot_pick_coke_can": 80}
    log = tmp_path / "log.jsonl"
    options = ("--tasks", ",".join(tasks), "--episodes", 1, "--video", tmp_path / "videos", "--dtype", "float32")
    record = json.loads(evla("eval", run, "--suite", "simpler", "-o", log, *options, "--json", "--quiet"))
    assert record["facts"]["sapien"] == version("sapien") == "2.2.2"
    assert record["facts"]["numpy"] == version("numpy")
    assert record["facts"]["renderer"] not in ("", "unknown")
    episodes = [line for line in map(json.loads, log.read_text().splitlines()) if "episode" in line]
    assert [(line["task"], line["steps"]) for line in episodes] == list(tasks.items())
    assert len(list((tmp_path / "videos").iterdir())) == 2


def test_frames_do_not_depend_on_what_ran_before(run):
    """To the bit: in a process that has run other episodes and keeps its renderer, and in a fresh one that does not."""
    again = frames_in_a_process(run, "keep", 3, 0, 3)
    alone = frames_in_a_process(run, "drop", 3)
    assert again[0] == again[2] == alone[0]
    assert again[1] != alone[0]


def test_no_driver_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setenv("VK_ICD_FILENAMES", str(tmp_path / "none.json"))
    error = evla("eval", run, "--suite", "simpler", "-o", tmp_path / "log.jsonl", code=2)
    assert "SAPIEN cannot render here (Vulkan is incompatible with your driver" in error
    assert error.count("\n") == 1


def test_no_ffmpeg_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    error = evla("eval", run, "--suite", "simpler", "-o", tmp_path / "log.jsonl", code=2)
    assert "needs ffmpeg" in error
    assert error.count("\n") == 1


def evla(*arguments, code: int = 0) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


def frames_in_a_process(run: Path, renderer: str, *episodes: int) -> list[str]:
    command = [sys.executable, __file__, run, renderer, *episodes]
    output = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in output.splitlines() if line.startswith("frames of")]


def print_frames(run: Path, renderer: str, *episodes: int, steps: int = 8) -> None:
    """A hash for each episode's first frames."""
    task = suite.TASKS[TASK]
    suite.TASKS[TASK] = replace(task, shared=task.shared | {"max_episode_steps": steps})
    if renderer == "drop":
        suite._kept_renderer = suite._kept_renderer.__wrapped__  # made anew, dropped at once
    policy = policy_from_checkpoint(run, dtype=torch.float32)
    for number in episodes:
        frames: list[np.ndarray] = []
        suite.Simpler().run_episode(policy, Trial(TASK, number, number), frames.append)
        assert len(frames) == steps
        print("frames of", number, hashlib.sha256(np.stack(frames).tobytes()).hexdigest())


if __name__ == "__main__":
    print_frames(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
