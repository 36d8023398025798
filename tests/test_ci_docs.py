"""docs/ci.md does what it says: its recipe, its Makefile and its workflow's commands run, on the shipped checkpoint."""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from evla_cli.cli.main import cli

ROOT = Path(__file__).resolve().parent.parent


def block(language: str, start: str) -> str:
    """The block of docs/ci.md in this language that begins with `start`."""
    text = (ROOT / "docs/ci.md").read_text()
    (found,) = re.findall(rf"^```{language}\n({re.escape(start)}.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture(scope="module")
def make(quick_python) -> Callable[..., str]:
    """`make(directory, *targets, code=0)`, where `evla` is the module run by a python."""
    environment = {**os.environ, "EVLA": f"{quick_python} -m evla_cli", "PYTHONPATH": str(ROOT)}

    def run(directory: Path, *targets: str, code: int = 0) -> str:
        command = ["make", "--no-print-directory", *targets]
        result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == code, result.stderr
        return result.stdout

    return run


@pytest.fixture(scope="module")
def repository(make, tmp_path_factory) -> Path:
    """As the document draws it, before the first run. PruneNet is left out: it takes longer than all the rest."""
    root = tmp_path_factory.mktemp("repository")
    (root / "ci").mkdir()
    recipe = yaml.safe_load(block("yaml", "schema_version"))
    recipe["prune"]["mlp_method"] = "magnitude"
    (root / "ci/recipe.yaml").write_text(yaml.safe_dump(recipe))
    (root / "Makefile").write_text(block("make", "EVLA"))
    (root / "CogACT-Base").symlink_to(ROOT / "demo/cogact-metaworld")
    (root / "calibration").symlink_to(ROOT / "demo/samples")
    make(root, "publish")
    return root


def test_nothing_is_built_twice_and_the_bundle_is_the_published_one(make, repository):
    output = make(repository, "check", "check-manifest")
    assert output.count("unchanged, skipped") == 3
    assert "out/compressed/bundle and published are the same" in output


@pytest.mark.slow
def test_a_change_rebuilds_what_depends_on_it_and_fails_the_check(make, repository):
    recipe = repository / "ci/recipe.yaml"
    before = recipe.read_text()
    recipe.write_text(before.replace("num_keep: 14", "num_keep: 20"))
    try:
        output = make(repository, "--keep-going", "check", "check-manifest", code=2)
        assert "setting  visual_tokens.num_keep: 20 | 14" in output
        assert output.count("unchanged, skipped") == 2
        assert '"inference.yaml": {' in output  # in what diff prints around the hash
    finally:
        recipe.write_text(before)


def test_the_workflows_commands_run(repository, monkeypatch):
    workflow = yaml.safe_load(block("yaml", "name"))
    steps = workflow["jobs"]["regenerate"]["steps"]
    commands = [step["run"].split(" > ")[0] for step in steps if step.get("run", "").startswith("evla ")]
    monkeypatch.chdir(repository)
    results = [CliRunner().invoke(cli, shlex.split(command)[1:], catch_exceptions=False) for command in commands]
    assert [result.exit_code for result in results] == [0, 0]
    assert json.loads(results[1].stdout)["same"] is True
    (cache,) = (step["with"] for step in steps if step.get("uses", "").startswith("actions/cache"))
    assert (repository / cache["path"] / "run.json").is_file()
