"""`evla run`: a stage runs when its inputs, options or output changed, and only then; any subset of stages works."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from evla_cli.cli.main import cli
from evla_cli.errors import EvlaError
from evla_cli.running import run_recipe


class Project:
    """A directory with a checkpoint, samples and a recipe."""

    def __init__(self, root: Path):
        self.path = root / "recipe.yaml"
        self.out = root / "out"
        self.recipe: dict[str, Any] = {
            "schema_version": 1,
            "source": "run",
            "output": "out",
            "analyze": {"samples": "samples"},
            "prune": {"drop_layers": 1},
            "export": {"settings": {"visual_tokens": {"num_keep": 8}}},
        }

    def run(self, **options: Any) -> list[str]:
        """The stages that were done."""
        self.path.write_text(yaml.safe_dump(self.recipe))
        return [stage for stage, _, done in run_recipe(self.path, **options) if done]


@pytest.fixture
def project(cogact_run, image_samples, tmp_path) -> Project:
    shutil.copytree(cogact_run, tmp_path / "run")
    shutil.copytree(image_samples, tmp_path / "samples")
    return Project(tmp_path)


@pytest.fixture
def done(project) -> Project:
    assert project.run() == ["analyze", "prune", "export"]
    return project


def test_nothing_runs_twice(done):
    before = {path: path.stat().st_mtime_ns for path in done.out.rglob("*")}
    assert done.run() == []
    assert {path: path.stat().st_mtime_ns for path in done.out.rglob("*")} == before


def test_outputs_stand_where_the_documentation_says(done):
    assert {path.name for path in done.out.iterdir()} == {"importance.json", "pruned", "bundle", "run.json"}
    state = json.loads((done.out / "run.json").read_text())
    assert state["schema_version"] == 1
    assert set(state["stages"]) == {"analyze", "prune", "export"}


def test_changed_export_option_exports_again(done):
    done.recipe["export"]["settings"]["visual_tokens"]["num_keep"] = 12
    assert done.run() == ["export"]


def test_changed_prune_option_prunes_and_exports_again(done):
    done.recipe["prune"]["drop_layers"] = 2
    assert done.run() == ["prune", "export"]


def test_changed_samples_analyze_again(done):
    """The ranking changes with them, and so does what follows."""
    Image.new("RGB", (80, 60), (200, 30, 30)).save(done.path.parent / "samples/0.png")
    assert done.run()[0] == "analyze"


def test_changed_analysis_option_analyzes_again(done):
    done.recipe["analyze"]["num_samples"] = 3
    assert done.run()[0] == "analyze"


def test_changed_statistics_reach_the_bundle(done):
    file = done.path.parent / "run/dataset_statistics.json"
    file.write_text(file.read_text().replace("-3.0", "-2.5"))
    assert "export" in done.run()
    assert "-2.5" in (done.out / "bundle/dataset_statistics.json").read_text()


def test_changed_checkpoint_runs_everything(done):
    run = done.path.parent / "run"
    shutil.rmtree(run)
    shutil.copytree(done.out / "pruned", run)
    assert done.run() == ["analyze", "prune", "export"]


@pytest.mark.parametrize("damage", ["bundle/README.md", "bundle/model.safetensors"])
def test_damaged_output_is_made_again(done, damage):
    (done.out / damage).write_text("damaged")
    assert done.run() == ["export"]
    assert done.run() == []


def test_deleted_output_is_made_again(done):
    shutil.rmtree(done.out / "pruned")
    assert done.run() == ["prune"]  # what it exports is as before


def test_other_layers_by_name_need_no_analysis(project):
    del project.recipe["analyze"], project.recipe["export"]
    project.recipe["prune"] = {"drop_layer_ids": [3, 5]}
    assert project.run() == ["prune"]
    plan = yaml.safe_load((project.out / "pruned/prune_plan.yaml").read_text())
    assert plan["keep_layers"] == [0, 1, 2, 4]


def test_export_alone_exports_the_source(project):
    del project.recipe["analyze"], project.recipe["prune"]
    assert project.run() == ["export"]
    assert not (project.out / "bundle/prune_plan.yaml").exists()


def test_analyze_alone(project):
    del project.recipe["prune"], project.recipe["export"]
    assert project.run() == ["analyze"]


def test_foreign_output_is_replaced_only_on_request(project):
    project.out.mkdir()
    (project.out / "importance.json").write_text("{}")
    with pytest.raises(EvlaError, match="not made by this recipe"):
        project.run()
    assert project.run(overwrite=True) == ["analyze", "prune", "export"]


def test_a_failing_stage_keeps_what_was_done_before(project):
    project.recipe["prune"]["drop_layers"] = 5
    with pytest.raises(EvlaError, match="Cannot drop 5 of 6"):
        project.run()
    project.recipe["prune"]["drop_layers"] = 1
    assert project.run() == ["prune", "export"]


def test_command_says_what_it_did(done):
    result = CliRunner().invoke(cli, ["run", str(done.path)])
    assert result.output.count("unchanged, skipped") == 3
    result = CliRunner().invoke(cli, ["run", str(done.path), "--json"])
    assert [stage["done"] for stage in json.loads(result.output)["stages"]] == [False] * 3
