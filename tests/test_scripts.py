"""The scripts that make checkpoints of real size, run at a size that a test can afford."""

import json
import subprocess
from pathlib import Path

import numpy as np
from transformers import AutoModelForCausalLM

from evla_cli import pipeline

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def make(python: Path, out: Path, *options: str) -> subprocess.CompletedProcess:
    command = [str(python), str(SCRIPTS / "make_synthetic_checkpoint.py"), str(out), *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_synthetic_llama_in_shards(quick_python, tmp_path, text_samples):
    options = ("--family", "llama", "--size", "64x6x4x2x128", "--dtype", "bfloat16", "--max-shard-size", "3MB")
    for name in ("a", "b"):
        done = make(quick_python, tmp_path / name, *options)
        assert done.returncode == 0, done.stderr
    index = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    for shard in shards:  # the same command gives the same bytes
        assert (tmp_path / "a" / shard).read_bytes() == (tmp_path / "b" / shard).read_bytes()
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert model.config.num_hidden_layers == 6
    found = pipeline.analyze(tmp_path / "a", text_samples)
    importance = np.array([layer.importance for layer in found.layers])
    assert np.isfinite(importance).all()
    assert (importance > 1e-4).all()
    assert np.abs(np.diff(importance)).min() > 1e-4  # layers differ


def test_jobs_that_need_an_earlier_one(quick_python, tmp_path):
    """One line that names it."""

    def said(jobs: str) -> str:
        command = [str(quick_python), str(SCRIPTS / "bench_scale.py"), str(tmp_path / "run"), "--work", str(tmp_path)]
        done = subprocess.run([*command, "--cache", "warm", "--jobs", jobs], capture_output=True, text=True)
        assert done.returncode == 2
        return done.stderr

    plan = f"--jobs prune needs {tmp_path / 'plan.yaml'}, which the job decide+prune makes"
    assert said("prune") == f"Error: {plan}; name it, too.\n"
    assert "importance.json, which the job analyze makes" in said("decide+prune,prune")
    assert "pruned, which the job decide+prune makes" in said("export,verify")
    assert "bundle, which the job export makes" in said("act")
    assert "unknown job 'prun'" in said("prun")


def test_synthetic_size_that_is_none(quick_python, tmp_path):
    for options in (("--family", "llama", "--size", "64x6"), ("--family", "cogact", "--size", "huge")):
        done = make(quick_python, tmp_path / "out", *options)
        assert done.returncode == 2
        assert "--size" in done.stderr
        assert not (tmp_path / "out").exists()
