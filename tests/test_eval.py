"""`evla eval` through the real entry point, in a suite that needs no simulator: one log, whatever happens to it."""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pico_suite
import pytest
import yaml
from PIL import Image
from processes import Evla, wait_for
from test_cli import evla, evla_error, evla_json

from evla_cli.evaluation.suites import Trial, act_in_chunks
from evla_cli.evaluation.suites.metaworld import TASKS
from evla_cli.runtime.policy import policy_from_checkpoint
from evla_cli.settings import ActionCacheSettings, InferenceSettings

SUITE = ("--suite", "pico_suite:PicoSuite")


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def episodes(log: Path) -> set[str]:
    return {json.dumps(line, sort_keys=True) for line in lines(log) if "episode" in line}


@pytest.fixture(scope="module")
def listed(cogact_run, bundle, tmp_path_factory) -> Path:
    """Four candidates: a run, its exported bundle, the run with other settings, and with other noise."""
    file = tmp_path_factory.mktemp("listed") / "candidates.yaml"
    run = os.path.relpath(cogact_run, file.parent)
    candidates = [
        {"name": "dense", "checkpoint": run},
        {"name": "exported", "checkpoint": str(bundle)},
        {"name": "cached", "checkpoint": run, "settings": {"action_cache": {"interval": 5}}},
        {"name": "other noise", "checkpoint": run, "noise_stream": 1},
    ]
    file.write_text(yaml.safe_dump({"schema_version": 1, "candidates": candidates}))
    return file


@pytest.fixture(scope="module")
def whole(listed, tmp_path_factory) -> Path:
    """The log of an undisturbed run."""
    log = tmp_path_factory.mktemp("whole") / "log.jsonl"
    evla("eval", listed, *SUITE, "-o", log)
    return log


def test_the_log_is_what_the_policies_do(whole, cogact_run, bundle):
    """Every line against the policies called by hand, in another order, in this process."""
    header, *others = lines(whole)
    assert (header["evla_eval"], header["first_seed"], header["facts"]) == (2, 100, {"max_steps": 12})
    cached = InferenceSettings(action_cache=ActionCacheSettings(interval=5))
    exported = InferenceSettings.load(bundle / "inference.yaml")
    policies = {
        "dense": (policy_from_checkpoint(cogact_run), 0),
        "exported": (policy_from_checkpoint(bundle, exported), 0),
        "cached": (policy_from_checkpoint(cogact_run, cached), 0),
        "other noise": (policy_from_checkpoint(cogact_run), 1),
    }
    done = [line for line in others if "episode" in line]
    assert len(done) == 4 * (2 + 2 + 3)
    for line in reversed(done):
        policy, stream = policies[line["candidate"]]
        trial = Trial(line["task"], line["episode"], line["seed"], stream)
        outcome = pico_suite.PicoSuite().run_episode(policy, trial)
        assert (outcome.success, outcome.steps) == (line["success"], line["steps"])
        assert line["seed"] == 100 + line["episode"]
    steps = {name: [line["steps"] for line in done if line["candidate"] == name] for name in policies}
    assert len(set(map(tuple, steps.values()))) == 4  # all four do otherwise
    assert {line["success"] for line in done} == {True, False}


@pytest.mark.slow
def test_two_processes_find_the_same(listed, whole, tmp_path):
    record = evla_json("eval", listed, *SUITE, "-o", tmp_path / "log.jsonl", "--workers", 2)
    assert episodes(tmp_path / "log.jsonl") == episodes(whole)
    before = whole.read_bytes()
    assert record == evla_json("eval", listed, *SUITE, "-o", whole)
    assert whole.read_bytes() == before


def test_result_counts_the_log(listed, whole):
    record = evla_json("eval", listed, *SUITE, "-o", whole)
    for row in record["candidates"]:
        mine = [line for line in lines(whole) if line.get("candidate") == row["name"] and "episode" in line]
        assert row["all"]["successes"] == sum(line["success"] for line in mine)
        assert row["all"]["episodes"] == 7
        assert {task: rate["episodes"] for task, rate in row["tasks"].items()} == {"left": 2, "right": 2, "far": 3}
    text = evla("eval", listed, *SUITE, "-o", whole)
    assert "points against dense" in text
    assert text.count("\nother noise ") == 2


# Noise, start states and the control row


def test_noise_is_of_task_start_state_repetition_stream_and_step_and_of_nothing_else():
    trials = [
        Trial(task, number, 30_000 + number, stream, repetition)
        for task in ("left", "right")
        for number in range(3)
        for stream in range(2)
        for repetition in range(2)
    ]
    seeds = {trial.noise_seed(step) % 2**32 for trial in trials for step in (0, 8)}  # of which torch takes 32 bits
    others = {trial.episode_seed for trial in trials}
    assert len(seeds | others) == 24 * 2 + 24
    assert Trial("left", 1, 7).noise_seed(0) != Trial("left", 1, 8).noise_seed(0)
    assert Trial("left", 1, 7).noise_seed(0) == Trial("left", 1, 7, unnorm_key="kitchen", num_executed=2).noise_seed(0)
    digest = hashlib.sha256(b'[30002, "right", 2, 1, 5, 16]').digest()  # the same in every process and version
    assert Trial("right", 2, 30_002, 5, 1).noise_seed(16) == int.from_bytes(digest[:8], "little")


def test_start_states_repeat_with_other_noise(listed, whole, tmp_path):
    log = shutil.copy(whole, tmp_path / "log.jsonl")
    before = log.read_bytes()
    options = ("--tasks", "left,far", "--noise-seeds", 2)
    record = evla_json("eval", listed, *SUITE, "-o", log, *options, "--workers", 2)
    assert log.read_bytes().startswith(before)  # the first noise is there
    done = [line for line in lines(log) if "episode" in line]
    assert len(done) == 28 + 4 * (2 + 3)
    assert record == evla_json("eval", listed, *SUITE, "-o", log, *options)
    for row in record["candidates"]:
        mine = [line for line in done if line["candidate"] == row["name"] and line["task"] != "right"]
        assert (row["all"]["start_states"], row["all"]["episodes"]) == (5, 10)
        assert row["all"]["successes"] == sum(line["success"] for line in mine)
        assert sorted((line["task"], line["episode"], line["repetition"]) for line in mine) == [
            (task, number, repetition)
            for task, count in (("far", 3), ("left", 2))
            for number in range(count)
            for repetition in range(2)
        ]
        assert all(line["seed"] == 100 + line["episode"] for line in mine)
        steps = [[line["steps"] for line in mine if line["repetition"] == repetition] for repetition in range(2)]
        assert steps[0] != steps[1]
    text = evla("eval", listed, *SUITE, "-o", log, *options)
    assert "p: exact sign-flip test over start states" in text


@pytest.fixture(scope="module")
def two(cogact_run, bundle, tmp_path_factory) -> tuple[Path, Path]:
    """A list without a control row, and the log of its run, which has one."""
    root = tmp_path_factory.mktemp("two")
    candidates = [{"name": "dense", "checkpoint": str(cogact_run)}, {"name": "exported", "checkpoint": str(bundle)}]
    (root / "two.yaml").write_text(yaml.safe_dump({"schema_version": 1, "candidates": candidates}))
    evla("eval", root / "two.yaml", *SUITE, "-o", root / "log.jsonl")
    return root / "two.yaml", root / "log.jsonl"


def test_the_first_candidate_with_other_noise_comes_by_itself(two, whole, tmp_path):
    """It is what a list can name, and no difference but its own is judged without it."""
    file, log = two
    record = evla_json("eval", file, *SUITE, "-o", log)
    assert record["control"] == "dense, other noise"
    first, control, exported = record["candidates"]
    assert (first["against_first"], control["name"]) == (None, "dense, other noise")
    assert control["against_first"]["real"] is None
    assert exported["against_first"]["real"] in (True, False)
    by_hand = [
        line | {"candidate": "dense, other noise"} for line in lines(whole) if line.get("candidate") == "other noise"
    ]
    assert [line for line in lines(log) if line.get("candidate") == "dense, other noise"] == by_hand
    text = evla("eval", file, *SUITE, "-o", log)
    assert "the farther end of the interval of 'dense, other noise'" in text
    before = log.read_bytes()
    record = evla_json("eval", file, *SUITE, "-o", log, "--no-control")
    assert (record["control"], [row["name"] for row in record["candidates"]]) == (None, ["dense", "exported"])
    assert record["candidates"][1]["against_first"]["real"] is None
    assert "No difference is called real" in evla("eval", file, *SUITE, "-o", log, "--no-control")
    assert log.read_bytes() == before


def test_no_control_row_is_added_where_there_is_one_or_nothing_to_judge(listed, whole, cogact_run, tmp_path, caplog):
    assert evla_json("eval", listed, *SUITE, "-o", whole)["control"] == "other noise"
    one = ("--tasks", "left", "--episodes", 1)
    record = evla_json("eval", cogact_run, *SUITE, *one, "-o", tmp_path / "log.jsonl")
    assert (record["control"], len(record["candidates"])) == (None, 1)
    assert caplog.text == ""


def test_the_control_rows_cost_is_told_once(two, tmp_path, caplog):
    evla("eval", two[0], *SUITE, "--tasks", "left", "--episodes", 1, "-o", tmp_path / "log.jsonl")
    assert (
        "1 of 3 episodes are of 'dense, other noise', which tells what chance alone does; --no-control" in caplog.text
    )
    caplog.clear()
    evla("eval", *two[:1], *SUITE, "--tasks", "left", "--episodes", 1, "-o", tmp_path / "log.jsonl")
    assert caplog.text == ""


def test_a_candidate_of_the_control_rows_name_is_refused(two, tmp_path):
    candidates = yaml.safe_load(two[0].read_text())
    candidates["candidates"][1]["name"] = "dense, other noise"
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(candidates))
    error = evla_error("eval", tmp_path / "list.yaml", *SUITE, "-o", tmp_path / "log.jsonl")
    assert (
        "'dense, other noise' is the control row's name; call that candidate otherwise, or pass --no-control." in error
    )
    assert error.count("\n") == 1


# Whose statistics, and how much of a chunk


@pytest.fixture(scope="module")
def two_datasets(cogact_run, tmp_path_factory) -> Path:
    """The run, with statistics of a robot that moves otherwise beside its own."""
    run = tmp_path_factory.mktemp("datasets") / "both"
    shutil.copytree(cogact_run, run)
    statistics = json.loads((run / "dataset_statistics.json").read_text())
    other = {name: [2 * value for value in statistics["kitchen"]["action"][name]] for name in ("q01", "q99")}
    statistics["garden"] = {"action": statistics["kitchen"]["action"] | other}
    (run / "dataset_statistics.json").write_text(json.dumps(statistics))
    return run


def test_unnorm_key_says_whose_statistics(two_datasets, cogact_run, whole, tmp_path):
    def steps(log: str, name: str) -> list[int]:
        return [line["steps"] for line in lines(tmp_path / log) if line.get("candidate") == name and "steps" in line]

    both = (two_datasets, f"{two_datasets}@{write_neutral(tmp_path / 'same.yaml')}", cogact_run)
    options = ("--tasks", "far", "--no-control", "--unnorm-key", "kitchen")
    evla("eval", *both, *SUITE, "-o", tmp_path / "a.jsonl", *options, "--unnorm-key", "both@same=garden")
    dense = steps_of_dense(whole)
    assert steps("a.jsonl", "both") == steps("a.jsonl", "run") == dense
    assert steps("a.jsonl", "both@same") != dense
    evla("eval", two_datasets, *SUITE, "-o", tmp_path / "b.jsonl", "--tasks", "far", "--unnorm-key", "garden")
    assert steps("b.jsonl", "both") == steps("a.jsonl", "both@same")
    refused(
        tmp_path / "b.jsonl", 'both\'s unnorm_key is "garden" there, "kitchen" here', two_datasets, *SUITE, *options
    )


def steps_of_dense(log: Path) -> list[int]:
    return [line["steps"] for line in lines(log) if (line.get("candidate"), line.get("task")) == ("dense", "far")]


def write_neutral(path: Path) -> Path:
    path.write_text("schema_version: 1\n")
    return path


def test_the_only_dataset_may_be_named_or_not(cogact_run, tmp_path):
    log, one = tmp_path / "log.jsonl", ("--tasks", "left", "--episodes", 1)
    evla("eval", cogact_run, *SUITE, *one, "-o", log)
    before = log.read_bytes()
    evla("eval", cogact_run, *SUITE, *one, "-o", log, "--unnorm-key", "run=kitchen")
    assert log.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (),
            "both knows 2 datasets; say which one's statistics are meant: --unnorm-key both=KEY, with one of garden, k",
        ),
        (
            ("--unnorm-key", "kitchn"),
            "both has no statistics of 'kitchn' for left; --unnorm-key names others. Did you mean 'kitchen'?",
        ),
        (
            ("--unnorm-key", "bth=kitchen"),
            "--unnorm-key bth=kitchen: no candidate is called 'bth'. Did you mean 'both'?",
        ),
        (("--unnorm-key", "both="), "--unnorm-key is 'both='; give KEY, or NAME=KEY for one candidate."),
        (("--unnorm-key", "=kitchen"), "--unnorm-key is '=kitchen'; give KEY"),
        (("--unnorm-key", "a", "--unnorm-key", "b"), "--unnorm-key gives all candidates two datasets; give one."),
        (("--unnorm-key", "both=a", "--unnorm-key", "both=b"), "--unnorm-key gives both two datasets; give one."),
    ],
)
def test_statistics_that_are_not_clear_are_refused_before_the_first_episode(arguments, message, two_datasets, tmp_path):
    error = evla_error("eval", two_datasets, *SUITE, "-o", tmp_path / "log.jsonl", *arguments)
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "log.jsonl").exists()


def test_execute_says_how_much_of_a_chunk(cogact_run, whole, tmp_path):
    def run(log: str, *arguments: Any) -> list[int]:
        evla("eval", cogact_run, *SUITE, "--tasks", "far", "-o", tmp_path / log, *arguments)
        header, _, *done = lines(tmp_path / log)
        assert header["num_executed"] == (arguments[1] if arguments else 4)
        return [line["steps"] for line in done]

    dense = steps_of_dense(whole)
    assert run("a.jsonl", "--execute", 4) == run("b.jsonl") == dense
    assert run("c.jsonl", "--execute", 12) != dense
    refused(tmp_path / "c.jsonl", "num_executed is 12 there, 4 here", cogact_run, *SUITE)


def test_execute_goes_no_farther_than_a_chunk(cogact_run, tmp_path):
    error = evla_error("eval", cogact_run, *SUITE, "-o", tmp_path / "log.jsonl", "--execute", 17)
    assert error == "Error: --execute is 17, but run predicts 16 actions at a time.\n"
    assert not (tmp_path / "log.jsonl").exists()


class Endless(pico_suite.PicoScene):
    """Keeps what was done; nothing solves it."""

    def __init__(self) -> None:
        self.done: list[np.ndarray] = []

    def step(self, action: np.ndarray) -> bool:
        self.done.append(action)
        super().step(action)
        return False


def test_a_chunk_that_is_shorter_is_executed_whole(cogact_run):
    """40 actions are asked for, 16 are predicted at a time."""
    policy, scene, trial = policy_from_checkpoint(cogact_run), Endless(), Trial("left", 0, 100)
    assert act_in_chunks(scene, policy, trial, 40, 40).steps == 40
    again = Endless()
    act_in_chunks(again, policy, trial, 40, 16)
    assert np.array_equal(scene.done, again.done)
    looked = policy.predict_action(again_at(scene.done[:16]), "open drawer", seed=trial.noise_seed(16))
    assert np.array_equal(scene.done[16:32], looked)


def again_at(done: list[np.ndarray]) -> np.ndarray:
    """The picture after these actions in the scene of seed 100."""
    scene = Endless()
    scene.reset(100)
    for action in done:
        scene.step(action)
    return scene.render()


@pytest.mark.slow
def test_more_episodes_tasks_and_candidates_are_added(listed, whole, cogact_run, tmp_path):
    log, first = tmp_path / "log.jsonl", tmp_path / "first.yaml"
    candidates = yaml.safe_load(listed.read_text())
    candidates["candidates"] = candidates["candidates"][:1]
    candidates["candidates"][0]["checkpoint"] = str(cogact_run)
    first.write_text(yaml.safe_dump(candidates))
    evla("eval", first, *SUITE, "-o", log, "--tasks", "far", "--episodes", 1)
    assert len(lines(log)) == 3
    begin = log.read_bytes()
    evla("eval", listed, *SUITE, "-o", log, "--workers", 2)
    assert log.read_bytes().startswith(begin)
    assert episodes(log) == episodes(whole)
    assert len(lines(log)) == 1 + 4 + 28


def test_settings_by_file_and_by_option(cogact_run, tmp_path):
    (tmp_path / "two.yaml").write_text("schema_version: 1\ndiffusion: {num_denoise_steps: 2}\n")
    with_file = f"{cogact_run}@{tmp_path / 'two.yaml'}"
    record = evla_json("eval", cogact_run, with_file, *SUITE, "-o", tmp_path / "a.jsonl", "--no-control")
    assert [row["name"] for row in record["candidates"]] == ["run", "run@two"]
    evla("eval", cogact_run, *SUITE, "-o", tmp_path / "b.jsonl", "--denoise-steps", 2)
    steps = [
        [
            line["steps"]
            for line in lines(tmp_path / f"{log}.jsonl")
            if line.get("candidate") == name and "steps" in line
        ]
        for log, name in (("a", "run"), ("a", "run@two"), ("b", "run"))
    ]
    assert steps[1] == steps[2] != steps[0]


# What becomes of a log


def seven(log: Path, *arguments: Any) -> tuple[Any, ...]:
    return ("eval", *arguments, "--suite", "pico_suite:Slow", "-o", log, "--workers", 2, "--quiet")


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGKILL, -9),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_ended_is_gone_on_with(number, code, listed, whole, tmp_path):
    log = tmp_path / "log.jsonl"
    process = Evla(tmp_path, *seven(log, listed))
    wait_for(lambda: log.exists() and len(episodes(log)) >= 3)
    workers = [path.name.removeprefix("pid-") for path in tmp_path.glob("pid-*")]
    process.send(number)
    assert process.wait() == code
    assert len(workers) == 2
    wait_for(lambda: not any(running(worker) for worker in workers))
    left = log.read_bytes()
    assert left.endswith(b"\n")
    assert 3 <= len(episodes(log)) < 28
    assert Evla(tmp_path, *seven(log, listed)).wait() == 0
    assert log.read_bytes().startswith(left)
    assert len(lines(log)) == 1 + 4 + 28
    assert episodes(log) == episodes(whole)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("pid-")] == ["log.jsonl"]


def running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_line_without_its_end_is_done_again(listed, whole, tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_bytes(whole.read_bytes()[:-20])
    evla("eval", listed, *SUITE, "-o", log)
    assert episodes(log) == episodes(whole)
    assert len(lines(log)) == len(lines(whole))


def test_one_process_at_a_time(listed, tmp_path):
    log = tmp_path / "log.jsonl"
    process = Evla(tmp_path, *seven(log, listed))
    wait_for(log.exists)
    assert "log.jsonl" in evla_error("eval", listed, "--suite", "pico_suite:Slow", "-o", log)
    process.send(signal.SIGTERM)
    process.wait()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed", 7), "first_seed is 100 there, 7 here"),
        (("--dtype", "bfloat16"), 'dtype is "as stored" there, "bfloat16" here'),
        (("--suite", "pico_suite:Slow"), 'suite is "pico_suite:PicoSuite" there'),
        (("--denoise-steps", 5), "dense's settings is {"),
    ],
)
def test_a_log_of_another_evaluation_is_refused(arguments, message, listed, whole, tmp_path):
    log = shutil.copy(whole, tmp_path / "log.jsonl")
    refused(log, message, listed, *SUITE, *arguments)


def test_a_log_of_other_checkpoints_is_refused(cogact_run, bundle, listed, whole, tmp_path):
    log = shutil.copy(whole, tmp_path / "log.jsonl")
    refused(log, "is the log of other candidates (dense, exported, cached, other noise)", bundle, *SUITE)
    shutil.copytree(cogact_run, tmp_path / "dense")
    statistics = tmp_path / "dense" / "dataset_statistics.json"
    statistics.write_text(statistics.read_text().replace("0.25", "0.26"))
    refused(log, "dense's files_sha256 is", tmp_path / "dense", *SUITE)
    log.write_text(whole.read_text().replace('"max_steps": 12', '"max_steps": 13'))
    refused(log, 'facts is {"max_steps": 13} there, {"max_steps": 12} here', listed, *SUITE)


@pytest.mark.parametrize("text", ["no log", "no log\n", '{"a": 1}\n', "[]\n", "\x80\n"])
def test_what_is_no_log_is_left_alone(text, cogact_run, tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(text, encoding="latin-1")
    refused(log, "line 1: this is not a log of evla eval", cogact_run, *SUITE)


def test_a_log_of_an_older_evla_is_refused(listed, whole, tmp_path):
    """Its episodes had other noise, which its lines do not tell."""
    log = tmp_path / "log.jsonl"
    log.write_text(whole.read_text().replace('"evla_eval": 2', '"evla_eval": 1').replace('"repetition": 0, ', ""))
    refused(
        log, "is a log of another version of evla (format 1, not 2), whose episodes had other noise", listed, *SUITE
    )
    refused(log, "Name another file, and run its episodes again.", listed, *SUITE)


def refused(log: Path, message: str, *arguments: Any) -> None:
    before = log.read_bytes()
    error = evla_error("eval", *arguments, "-o", log)
    assert message in error
    assert error.count("\n") == 1
    assert log.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "metawrld"), "Unknown suite 'metawrld'. Did you mean 'metaworld'?"),
        (("--suite", "nowhere:Suite"), "--suite nowhere:Suite: cannot import it"),
        (("--suite", "pico_suite:Nothing"), "has no attribute 'Nothing'"),
        ((*SUITE, "--tasks", "left,middle"), "Unknown task 'middle'. Known: far, left, right."),
        ((*SUITE, "--episodes", "4"), "--episodes is 4; far has 3."),
        ((*SUITE, "--denoise-steps", "11"), "run: diffusion.num_denoise_steps 11 is not a whole stride"),
        ((*SUITE, "--video", "no/where"), "create the folder above it first"),
        (("--suite", "pico_suite:Refusing"), "The simulator cannot draw; install it anew."),
    ],
)
def test_refused_in_one_line(arguments, message, cogact_run, tmp_path):
    error = evla_error("eval", cogact_run, "-o", tmp_path / "log.jsonl", *arguments)
    assert message in error
    assert error.count("\n") == 1


def test_candidates_that_are_none(cogact_run, decoders, tmp_path):
    def error(*candidates: Any) -> str:
        return evla_error("eval", *candidates, *SUITE, "-o", tmp_path / "log.jsonl")

    assert "no action head" in error(decoders("llama"))
    assert "Two candidates are called 'run'" in error(cogact_run, cogact_run)
    assert "does not exist" in error(tmp_path / "nowhere")
    assert "nowhere.yaml" in error(f"{cogact_run}@{tmp_path / 'nowhere.yaml'}")
    (tmp_path / "list.yaml").write_text("schema_version: 1\ncandidates: []\n")
    assert "list.yaml: candidates is empty" in error(tmp_path / "list.yaml")
    (tmp_path / "list.yaml").write_text("schema_version: 1\ncandidates: [{name: a, checkpoint: b, layers: 3}]\n")
    assert "unknown key 'layers'" in error(tmp_path / "list.yaml")
    (tmp_path / "list.yaml").write_text("schema_version: 1\ncandidates: [{name: a, checkpoint: b, noise_stream: -1}]\n")
    assert "noise_stream must be between 0 and 99999, got -1" in error(tmp_path / "list.yaml")
    assert not (tmp_path / "log.jsonl").exists()


def test_a_process_that_is_killed_is_told_and_its_episodes_are_kept(cogact_run, tmp_path):
    error = evla_error("eval", cogact_run, "--suite", "pico_suite:Killed", "-o", tmp_path / "log.jsonl")
    assert "killed by SIGKILL (out of memory?). What was finished is in the log" in error
    assert error.count("\n") == 1
    assert {json.loads(line)["task"] for line in episodes(tmp_path / "log.jsonl")} == {"left"}


def test_without_metaworld_one_line_says_what_to_install(cogact_run, tmp_path, monkeypatch):
    monkeypatch.setattr("evla_cli.evaluation.suites.metaworld.find_spec", lambda name: None)
    error = evla_error("eval", cogact_run, "--suite", "metaworld", "-o", tmp_path / "log.jsonl")
    assert "pip install 'evla[demo]'" in error
    assert "libosmesa6" in error
    assert "MUJOCO_GL=osmesa" in error
    assert error.count("\n") == 1


def test_metaworlds_opposites_are_each_others():
    assert len(TASKS) == 8
    for name, task in TASKS.items():
        assert len(set(task.phrasings)) == 6
        assert task.opposite is None or TASKS[task.opposite].opposite == name


# Videos


@pytest.mark.slow
def test_videos_show_the_chosen_episodes_and_change_nothing(listed, whole, tmp_path):
    log, folder = tmp_path / "log.jsonl", tmp_path / "videos"
    options = ("--video", folder, "--video-episodes", "1")
    evla("eval", listed, *SUITE, "-o", log, *options)
    assert episodes(log) == episodes(whole)
    names = ("dense", "exported", "cached", "other-noise")
    expected = {f"{name}-{task}-0001.gif" for name in names for task in ("left", "right", "far")}
    assert {path.name for path in folder.iterdir()} == expected
    shown = next(line for line in lines(log) if (line.get("task"), line.get("episode")) == ("right", 1))
    scene = pico_suite.PicoScene()
    scene.reset(101 + 50)
    with Image.open(folder / "dense-right-0001.gif") as video:
        assert video.size == (80, 60)
        assert getattr(video, "n_frames", 1) <= shown["steps"]  # equal pictures in a row are one, shown longer
        first = np.asarray(video.convert("RGB")).astype(int)
    assert np.abs(first - scene.render()).mean() < 20  # of 256 colours
    # Films of episodes that the log holds already.
    (folder / "dense-far-0001.gif").unlink()
    before = log.read_bytes()
    evla("eval", listed, *SUITE, "-o", log, *options)
    assert {path.name for path in folder.iterdir()} == expected
    assert log.read_bytes() == before


def test_an_episode_that_ends_otherwise_when_filmed_is_told(listed, whole, tmp_path):
    log = tmp_path / "log.jsonl"
    flipped = {"true": "false", "false": "true"}
    text = whole.read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(text) if '"task": "far", "episode": 0' in line)
    word = json.dumps(json.loads(text[at])["success"])
    text[at] = text[at].replace(f'"success": {word}', f'"success": {flipped[word]}')
    log.write_text("".join(text))
    error = evla_error("eval", listed, *SUITE, "-o", log, "--tasks", "far", "--video", tmp_path / "videos")
    assert "dense, far, episode 0 ended otherwise than" in error


def test_mp4_needs_its_package(cogact_run, tmp_path, monkeypatch):
    monkeypatch.setattr("evla_cli.evaluation.video.find_spec", lambda name: None)
    options = ("--video", tmp_path / "videos", "--video-format", "mp4")
    assert "pip install imageio-ffmpeg" in evla_error(
        "eval", cogact_run, *SUITE, "-o", tmp_path / "log.jsonl", *options
    )


def test_mp4(cogact_run, tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    options = ("--video", tmp_path / "videos", "--video-format", "mp4", "--tasks", "left", "--episodes", "1")
    evla("eval", cogact_run, *SUITE, "-o", tmp_path / "log.jsonl", *options)
    assert (tmp_path / "videos" / "run-left-0000.mp4").read_bytes()[4:8] == b"ftyp"
