"""`torchrun -m evla_cli analyze`: the result of one process, said once; and no way in which a job hangs."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evla_cli import pipeline
from evla_cli.plan import LayerImportance
from evla_cli.ranks import Ranks

ROOT = Path(__file__).resolve().parent.parent


def start(python: Path | str, num_ranks: int, *arguments: Any, job: str = "") -> subprocess.Popen:
    """torchrun on this machine. Everything that it starts carries `job` in its environment.

    Args:
        python: what runs torchrun and what torchrun runs; the slow tests take a real one.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "EVLA_TEST_JOB": job}
    environment["PYTHON_EXEC"] = str(python)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [str(python), *torchrun, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(job: subprocess.Popen, seconds: float = 300) -> tuple[str, str]:
    try:
        return job.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        job.terminate()  # torchrun ends what it started
        raise


def errors(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("Error: ")]


def scores(importance: LayerImportance) -> list[float]:
    return [number for layer in importance.layers for number in (layer.importance, layer.standard_error or 0.0)]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 100])
def test_shares_are_everything_in_order_and_even(size, count):
    shares = [list(Ranks(rank, size).share(count)) for rank in range(size)]
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_two_ranks_give_what_one_gives(quick_python, cogact_run, image_samples, tmp_path):
    """Batches of 2, 2 and 1 samples, padded to different lengths; the action head sees the tokens of all."""
    pytest.importorskip("matplotlib")
    one = pipeline.analyze(cogact_run, image_samples, batch_size=2, with_action_head=True)
    out, figures = tmp_path / "two.json", tmp_path / "figures"
    options = ("--samples", image_samples, "-o", out, "--batch-size", 2, "--figures", figures, "--json")
    job = start(quick_python, 2, "-m", "evla_cli", "analyze", cogact_run, *options)
    stdout, stderr = finish(job)
    assert (job.returncode, errors(stderr)) == (0, [])
    assert json.loads(stdout) == json.loads(out.read_text())  # printed by one rank
    two = LayerImportance.load(out)
    assert (two.num_samples, two.samples_sha256, two.checkpoint_sha256) == (
        one.num_samples,
        one.samples_sha256,
        one.checkpoint_sha256,
    )
    assert two.ranking() == one.ranking()
    assert scores(two) == pytest.approx(scores(one), rel=0, abs=1e-9)  # gathered per sample, added up in one place
    assert one.action_head is not None
    assert two.action_head is not None
    for kind, blocks in one.action_head["step_similarity"].items():
        for block, similarity in enumerate(blocks):
            assert two.action_head["step_similarity"][kind][block] == pytest.approx(similarity, abs=1e-6)
    assert {path.name for path in tmp_path.iterdir()} == {"figures", "two.activations.safetensors", "two.json"}


@pytest.mark.slow
def test_more_ranks_than_batches(decoders, text_samples, tmp_path):
    one = pipeline.analyze(decoders("qwen2"), text_samples)
    options = ("--samples", text_samples, "-o", tmp_path / "three.json", "--quiet")
    job = start(sys.executable, 3, "-m", "evla_cli", "analyze", decoders("qwen2"), *options)
    stdout, stderr = finish(job)
    assert (job.returncode, errors(stderr)) == (0, [])
    assert stdout.count("rank 1 does least") == 1
    three = LayerImportance.load(tmp_path / "three.json")
    assert scores(three) == pytest.approx(scores(one), rel=0, abs=1e-9)
    assert three.samples_sha256 == one.samples_sha256


def test_an_error_of_one_rank_ends_the_job_and_is_said_once(quick_python, cogact_run, image_samples, tmp_path):
    """The damaged image is the last one, which the second rank reads."""
    samples = shutil.copytree(image_samples, tmp_path / "samples")
    (samples / "4.png").write_bytes(b"no image")
    options = ("--samples", samples, "-o", tmp_path / "i.json", "--batch-size", 1)
    job = start(quick_python, 2, "-m", "evla_cli", "analyze", cogact_run, *options)
    stdout, stderr = finish(job)
    assert (job.returncode, stdout) == (1, "")  # torchrun's own code
    (error,) = errors(stderr)
    assert "samples.jsonl:5" in error
    assert "not an image" in error
    assert "exitcode  : 2" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]


@pytest.mark.slow
def test_what_is_wrong_for_all_ranks_is_said_once(cogact_run, image_samples, tmp_path):
    (tmp_path / "i.json").write_text("mine")
    options = ("--samples", image_samples, "-o", tmp_path / "i.json")
    job = start(sys.executable, 2, "-m", "evla_cli", "analyze", cogact_run, *options)
    stdout, stderr = finish(job)
    assert (job.returncode, stdout) == (1, "")
    assert errors(stderr) == [f"Error: {tmp_path / 'i.json'} already exists. Pass --overwrite to replace it."]
    assert (tmp_path / "i.json").read_text() == "mine"


def test_a_killed_rank_ends_the_job(quick_python, tmp_path):
    """In the middle of the analysis: the output's lock stands, so all ranks have met; no output does."""
    out, name = tmp_path / "i.json", uuid.uuid4().hex
    demo = ROOT / "demo"
    options = ("--samples", demo / "samples", "-o", out, "--batch-size", 1)
    job = start(quick_python, 2, "-m", "evla_cli", "analyze", demo / "cogact-metaworld", *options, job=name)
    while not (tmp_path / ".i.json.lock").exists():
        assert job.poll() is None, finish(job)
        time.sleep(0.02)
    (victim,) = processes(EVLA_TEST_JOB=name, RANK="1")
    os.kill(victim, signal.SIGKILL)
    stdout, stderr = finish(job, seconds=120)
    assert (job.returncode, stdout) == (1, "")
    assert "rank      : 1" in stderr  # torchrun's report
    assert "SIGKILL" in stderr
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import os, signal, sys
from evla_cli.cli.main import cli
from evla_cli.ranks import torchrun_ranks

@cli.command("exchange")
def command():
    with torchrun_ranks("cpu") as (ranks, _):
        assert ranks.gather([10 * ranks.rank, ranks.rank] if ranks.rank else []) == [10, 1, 20, 2]
        if ranks.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.gather([])

cli(["exchange"])
"""


@pytest.mark.slow
def test_who_waits_for_a_dead_rank_says_so(quick_python, tmp_path):
    """All but the dead one wait for it; the first alone speaks."""
    (tmp_path / "script.py").write_text(SCRIPT)
    first, second, dead = without_torchrun(quick_python, 3, tmp_path / "script.py")
    _, stderr = finish(first, seconds=120)
    assert first.returncode == 2
    (error,) = errors(stderr)
    assert error.startswith("Error: Another process of this job ended before its time; torchrun's report says which")
    assert (finish(second)[1], second.returncode) == ("", 2)
    assert (finish(dead)[1], dead.returncode) == ("", -signal.SIGKILL)


def without_torchrun(python: Path, num_ranks: int, script: Path) -> list[subprocess.Popen]:
    """A job of which nobody ends the others once one is dead, as torchrun would, sooner or later than they notice."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    job = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "job"}
    job |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for size in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        job[size] = str(num_ranks)
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([str(python), str(script)], env={**job, "RANK": rank, "LOCAL_RANK": rank}, **pipes)
        for rank in map(str, range(num_ranks))
    ]


def processes(**environment: str) -> Iterator[int]:
    wanted = {f"{key}={value}".encode() for key, value in environment.items()}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = set(path.read_bytes().split(b"\0"))
        except OSError:  # ended meanwhile, or somebody else's
            continue
        if wanted <= variables:
            yield int(path.parent.name)
