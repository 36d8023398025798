"""The same input gives the same bytes, whoever runs it where, and the manifest says how to make a bundle again."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import evla_cli
from evla_cli import pipeline
from evla_cli.bundling import verify_bundle
from evla_cli.comparison import compare_checkpoints
from evla_cli.plan import LayerImportance
from evla_cli.running import run_recipe

DEMO = Path(__file__).resolve().parent.parent / "demo"

# Wide enough (512 x 160) for torch to divide its work among threads, which the pico checkpoints are not.
SCRIPT = """
import os, sys
import torch
from evla_cli.cli.main import cli

torch.set_num_threads(int(os.environ["THREADS"]))
source, samples, out = sys.argv[1:]
for arguments in (
    ["analyze", source, "--samples", samples, "-o", f"{out}/importance.json", "--num-samples", "4"],
    ["prune", source, f"{out}/pruned", "--drop-layer-ids", "3,4,5,6,7,8,9", "--mlp-prune-ratio", "0.25",
     "--importance", f"{out}/importance.json"],
    ["export", f"{out}/pruned", f"{out}/bundle", "--num-visual-tokens", "14", "--dtype", "float16"],
):
    cli(arguments, standalone_mode=False)
"""


def process(python: Path | str, directory: Path, source: Path, samples: Path, out: Path, **environment: str) -> None:
    command = [str(python), str(directory / "script.py"), *map(str, (source, samples, out))]
    (directory / "script.py").write_text(SCRIPT)
    # Passive: where other jobs share the cores, threads that wait by spinning would take minutes.
    environment = {**os.environ, "PYTHONPATH": str(DEMO.parent), "OMP_WAIT_POLICY": "PASSIVE", **environment}
    subprocess.run(command, cwd=directory, env=environment, check=True, capture_output=True)
    (directory / "script.py").unlink()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, quick_python) -> tuple[Path, Path]:
    """The same three commands by two people: other threads, directories, hash seeds, users and time zones."""
    first, second = tmp_path_factory.mktemp("alice"), tmp_path_factory.mktemp("bob") / "some" / "elsewhere0"
    second.mkdir(parents=True)
    checkpoint, samples = DEMO / "cogact-metaworld", DEMO / "samples"
    process(quick_python, first, checkpoint, samples, first, THREADS="1", USER="alice", TZ="UTC")
    relative = [Path(os.path.relpath(path, second)) for path in (checkpoint, samples)]
    seed = "3" if os.environ.get("PYTHONHASHSEED") == "2" else "2"  # not that of the first
    other = {"THREADS": "2", "PYTHONHASHSEED": seed, "USER": "bob", "TZ": "Asia/Tokyo"}
    process(sys.executable, second, *relative, Path("."), **other)
    return first, second


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["pruned", "bundle"])
def test_same_bytes(outputs, name):
    first, second = (files(out / name) for out in outputs)
    checks = [json.loads(made.pop("check.json")) for made in (first, second) if "check.json" in made]
    assert first == second
    if name == "bundle":
        assert [check["surroundings"].pop("threads") for check in checks] == [1, 2]
        actions = [np.array(check.pop("denoised_action")) for check in checks]
        assert checks[0] == checks[1]
        assert np.abs(actions[0] - actions[1]).max() < 0.1  # float16
        assert all(verify_bundle(out / name)["act"]["compared"] for out in outputs)
    assert compare_checkpoints(outputs[0] / name, outputs[1] / name).differences == ()


def test_no_path_user_or_process_is_written(outputs):
    for out in outputs:
        traces = {str(out), "alice", "bob", str(DEMO.parent)}
        for name, content in files(out).items():
            assert not [trace for trace in traces if trace.encode() in content], name


def test_same_ranking_and_scores(outputs):
    first, second = (LayerImportance.load(out / "importance.json") for out in outputs)
    assert first.ranking() == second.ranking()
    scores = [[score.importance for score in result.layers] for result in (first, second)]
    assert scores[0] == pytest.approx(scores[1], rel=0, abs=1e-6)


# The manifest


@pytest.fixture(scope="module")
def project(cogact_run, image_samples, tmp_path_factory) -> Path:
    """A recipe's output directory."""
    directory = tmp_path_factory.mktemp("project")
    recipe = {
        "schema_version": 1,
        "source": str(cogact_run),
        "output": "out",
        "analyze": {"samples": str(image_samples), "num_samples": 4, "batch_size": 2},
        "prune": {"drop_layers": 2, "drop_layer_ids": [4], "mlp_prune_ratio": 0.5, "mlp_method": "prunenet", "seed": 7},
        "export": {"dtype": "bfloat16", "max_shard_size": "0.4MB", "settings": {"visual_tokens": {"num_keep": 8}}},
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_recipe(directory / "recipe.yaml")
    return directory / "out"


@pytest.fixture(scope="module")
def manifest(project) -> dict[str, Any]:
    return json.loads((project / "bundle/manifest.json").read_text())


def test_versions_are_those_that_ran(manifest, project):
    plan = yaml.safe_load((project / "pruned/prune_plan.yaml").read_text())
    for record in (manifest, plan):
        assert record["evla_version"] == evla_cli.__version__
        assert record["libraries"] == {name: version(name) for name in ("numpy", "torch", "transformers")}


def test_hashes_lead_back_to_source_and_samples(manifest, project, cogact_run):
    importance = LayerImportance.load(project / "importance.json")
    assert manifest["plan"]["checkpoint_sha256"] == importance.checkpoint_sha256
    assert manifest["plan"]["samples_sha256"] == importance.samples_sha256
    pruned = pipeline.open_checkpoint(project / "pruned")
    assert manifest["source"] == {
        "family": "cogact",
        "layout": "native",
        "checkpoint_sha256": pruned.reader.sha256,
    }


def test_recipe_is_resolved(manifest):
    keep = manifest["plan"]["keep_layers"]
    assert len(keep) == 4
    assert 4 not in keep
    assert manifest["recipe"] == {
        "analyze": {"num_samples": 4, "batch_size": 2, "dtype": "float32"},
        "prune": {
            "drop_layers": 2,
            "drop_layer_ids": [4],
            "protect_first": 2,
            "mlp_prune_ratio": 0.5,
            "mlp_method": "prunenet",
            "seed": 7,
        },
        "export": {"dtype": "bfloat16", "max_shard_size": "400000"},
    }


def test_the_bundle_can_be_made_again_from_its_manifest(manifest, project, cogact_run, image_samples, tmp_path):
    """Its recipe needs only what a manifest cannot know: where things are."""
    recipe = manifest["recipe"]
    recipe["analyze"]["samples"] = str(image_samples)
    recipe["export"]["settings"] = yaml.safe_load((project / "bundle/inference.yaml").read_text())
    recipe |= {"schema_version": 1, "source": str(cogact_run), "output": "again"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_recipe(tmp_path / "recipe.yaml")
    assert files(tmp_path / "again/bundle") == files(project / "bundle")


def test_two_ways_to_say_the_same_give_the_same_bytes(project, cogact_run, tmp_path):
    """--keep-layers for --drop-layers, sizes in other units, defaults spelled out."""
    importance = project / "importance.json"
    pipeline.prune(
        cogact_run, tmp_path / "pruned", importance=importance, num_keep=4, drop_ids=[4, 4], protect_first=2,
        mlp_prune_ratio=0.5, mlp_method="prunenet", seed=7,
    )  # fmt: skip
    assert files(tmp_path / "pruned") == files(project / "pruned")
    settings = pipeline.settings_with(project / "bundle/inference.yaml")
    pipeline.export(
        tmp_path / "pruned", tmp_path / "bundle", settings, dtype="bfloat16", max_shard_size="400 kB", overwrite=False
    )
    assert files(tmp_path / "bundle") == files(project / "bundle")


def test_an_unpruned_bundle_has_no_plan(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["plan"] is None
    assert manifest["recipe"] == {"export": {"dtype": None, "max_shard_size": "5000000000"}}
