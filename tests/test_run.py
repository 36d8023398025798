"""`evla run`: a stage runs when its inputs, options or output changed, and only then; any subset of stages works."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from evla_cli import pipeline, running
from evla_cli.checkpoint import bundle, outputs, reader
from evla_cli.checkpoint.files import sha256_file
from evla_cli.checkpoint.read_ahead import ReadAheadHash
from evla_cli.cli.main import cli
from evla_cli.errors import EvlaError
from evla_cli.running import Resources, run_recipe


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
    written = {"importance.json", "importance.activations.safetensors", "pruned", "bundle", "run.json"}
    assert {path.name for path in done.out.iterdir()} == written
    state = json.loads((done.out / "run.json").read_text())
    assert state["schema_version"] == 1
    assert set(state["stages"]) == {"analyze", "prune", "export"}


@pytest.mark.slow
def test_changed_export_option_exports_again(done):
    done.recipe["export"]["settings"]["visual_tokens"]["num_keep"] = 12
    assert done.run() == ["export"]


@pytest.mark.slow
def test_changed_prune_option_prunes_and_exports_again(done):
    done.recipe["prune"]["drop_layers"] = 2
    assert done.run() == ["prune", "export"]


@pytest.mark.slow
def test_changed_samples_analyze_again(done):
    """The ranking changes with them, and so does what follows."""
    Image.new("RGB", (80, 60), (200, 30, 30)).save(done.path.parent / "samples/0.png")
    assert done.run()[0] == "analyze"


@pytest.mark.slow
def test_changed_analysis_option_analyzes_again(done):
    done.recipe["analyze"]["num_samples"] = 3
    assert done.run()[0] == "analyze"


@pytest.mark.slow
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


def test_what_the_bundle_did_on_some_machine_is_no_reason(done):
    (done.out / "bundle/check.json").unlink()
    assert done.run() == []


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


def test_a_failing_stage_keeps_what_was_done_before(project, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise EvlaError("No space left on device.")

    with monkeypatch.context() as disk:
        disk.setattr(pipeline, "prune", fail)
        with pytest.raises(EvlaError, match="No space left"):
            project.run()
    assert project.run() == ["prune", "export"]


def read_bytes(monkeypatch) -> list[Path]:
    """The files that are read for their hash from now on."""
    read: list[Path] = []

    def recorded(path: Path) -> str:
        read.append(path)
        return sha256_file(path)

    class Recorded(ReadAheadHash):
        def __init__(self, files: Any, **options: Any):
            read.extend(files)
            super().__init__(files, **options)

    for module in (bundle, running):
        monkeypatch.setattr(module, "sha256_file", recorded)
    for module in (bundle, reader):
        monkeypatch.setattr(module, "ReadAheadHash", Recorded)
    return read


def weights(paths: list[Path]) -> set[str]:
    return {path.name for path in paths} & {"pico.pt", "model.safetensors"}


class TestHashes:
    """Large files are hashed when they are read or written anyway, and never only to find that nothing changed."""

    def test_unchanged_files_are_not_read(self, done, monkeypatch):
        forget_hashes(monkeypatch)
        read = read_bytes(monkeypatch)
        assert done.run() == []
        assert weights(read) == set()

    def test_what_was_copied_is_compared_by_content_once(self, done, monkeypatch):
        """A cache that was brought back: other times and inodes, the same bytes."""
        for directory in (done.out, done.path.parent / "run"):
            shutil.copytree(directory, directory.with_name("copy"), copy_function=shutil.copyfile)
            shutil.rmtree(directory)
            directory.with_name("copy").rename(directory)
        forget_hashes(monkeypatch)
        read = read_bytes(monkeypatch)
        assert done.run() == []
        assert weights(read) == {"pico.pt", "model.safetensors"}
        read.clear()
        assert done.run() == []
        assert weights(read) == set()

    @pytest.mark.slow
    @pytest.mark.parametrize("dated_back", [False, True])
    def test_a_change_that_keeps_the_size_is_noticed(self, done, dated_back):
        weights = done.out / "bundle/model.safetensors"
        before = weights.stat()
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        if dated_back:
            os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert done.run() == ["export"]
        assert done.run() == []

    def test_an_entry_that_is_wrong_is_not_believed(self, done, monkeypatch):
        """It would make another checkpoint of the source, and the hash in every output a false one."""
        state = json.loads((done.out / "run.json").read_text())
        state["sha256"] = dict.fromkeys(state["sha256"], "0" * 64)
        (done.out / "run.json").write_text(json.dumps(state))
        forget_hashes(monkeypatch)
        assert done.run() == []


def forget_hashes(monkeypatch) -> None:
    """As in a new process."""
    forgotten: dict[Any, str] = {}
    for module in (bundle, reader, running):
        monkeypatch.setattr(module, "known_sha256", forgotten)


class TestChecksBeforeTheFirstStage:
    @pytest.mark.parametrize(
        ("section", "key", "value", "message"),
        [
            ("prune", "drop_layers", 5, "Cannot drop 5 of 6"),
            ("prune", "drop_layers", 6, "Cannot drop 6 of 6"),
            ("prune", "drop_layer_ids", [9], "9"),
            ("prune", "protect_first", 7, "between 0 and 6"),
            ("export", "max_shard_size", "many", "is not a size"),
            ("export", "settings", {"visual_tokens": {"num_keep": 17}}, "17"),
            ("export", "settings", {"visual_tokens": {"num_keep": 8, "prune_layer": 5}}, "prune_layer"),
        ],
    )
    def test_too_much(self, project, section, key, value, message):
        """Five layers are left: tokens cannot leave before layer 5, though the source has six."""
        project.recipe[section][key] = value
        with pytest.raises(EvlaError, match=message):
            project.run()
        assert not project.out.exists()

    def test_layers_by_rank_without_a_ranking(self, project):
        del project.recipe["analyze"]
        with pytest.raises(EvlaError, match="needs --importance"):
            project.run()
        assert not project.out.exists()

    def test_a_foreign_output_of_the_last_stage(self, project):
        (project.out / "bundle").mkdir(parents=True)
        with pytest.raises(EvlaError, match="bundle already exists and was not made by this recipe"):
            project.run()
        assert [path.name for path in project.out.iterdir()] == ["bundle"]

    def test_too_little_room_for_both_outputs(self, project, monkeypatch):
        """Room for the pruned checkpoint alone: what is to be written in all is what is asked for."""
        free = 3_000_000
        monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        with pytest.raises(EvlaError, match="bytes are to be written") as error:
            project.run()
        assert not project.out.exists()
        asked = int(re.search("[0-9,]+", str(error.value))[0].replace(",", ""))
        monkeypatch.undo()
        project.run()
        pruned = (project.out / "pruned/checkpoints/pico.pt").stat().st_size
        exported = (project.out / "bundle/model.safetensors").stat().st_size
        assert pruned < free < asked
        assert asked == pytest.approx(pruned + exported, rel=0.05)


def test_resources_for_no_stage_that_runs_the_model(project):
    del project.recipe["analyze"], project.recipe["prune"]
    with pytest.raises(EvlaError, match="--device and --memory-budget are for stages that run the model"):
        project.run(resources=Resources("cpu", "1GB"))


def test_another_dtype_analyzes_again_and_stands_above_the_recipe(done):
    done.recipe["analyze"]["dtype"] = "float32"  # the default, as before
    assert done.run(dtype="float32") == []
    assert "analyze" in done.run(dtype="bfloat16")
    assert json.loads((done.out / "importance.json").read_text())["dtype"] == "bfloat16"
    recipe = json.loads((done.out / "bundle/manifest.json").read_text())["recipe"]
    assert recipe["analyze"]["dtype"] == "bfloat16"
    assert recipe["export"]["dtype"] is None  # of weights: another question
    assert done.run(dtype="bfloat16") == []
    assert "analyze" in done.run()  # the recipe's own again


def test_device_and_memory_budget_reach_every_stage_and_leave_what_is_done(project, monkeypatch):
    given: dict[str, Any] = {}

    def noted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            parts = [options, *(vars(options[key]) for key in ("choice", "refit") if key in options)]
            given[name] = [(part["device"], part["memory_budget"]) for part in parts if "device" in part]
            return function(*arguments, **options)

        return call

    project.recipe["prune"] |= {"refit": True, "layer_method": "iterative"}
    with monkeypatch.context() as watched:
        for name in ("analyze_to_file", "prune"):
            watched.setattr(pipeline, name, noted(name, getattr(pipeline, name)))
        assert project.run(resources=Resources("cpu:0", "1KB")) == ["analyze", "prune", "export"]
    assert given == {"analyze_to_file": [("cpu:0", "1KB")], "prune": [("cpu:0", "1KB")] * 2}
    assert project.run() == []
    assert project.run(resources=Resources(memory_budget="2GB")) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "gpu"], "Unknown device 'gpu'"),
        (["--memory-budget", "much"], "is not a size"),
        (["--dtype", "float8"], "'float8' is not one of"),
        (["--dtype", "bfloat16"], "the recipe has no analyze section"),
    ],
)
def test_run_refuses_before_the_first_stage(project, options, message):
    if message.startswith("the recipe"):
        del project.recipe["analyze"], project.recipe["prune"]
    project.path.write_text(yaml.safe_dump(project.recipe))
    result = CliRunner().invoke(cli, ["run", str(project.path), *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not project.out.exists()


def test_command_says_what_it_did(done):
    result = CliRunner().invoke(cli, ["run", str(done.path)])
    assert result.output.count("unchanged, skipped") == 3
    result = CliRunner().invoke(cli, ["run", str(done.path), "--json", "--device", "cpu", "--dtype", "float32"])
    assert [stage["done"] for stage in json.loads(result.output)["stages"]] == [False] * 3
