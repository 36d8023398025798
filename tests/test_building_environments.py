"""What `make test-environments` does before it downloads: sources found and copied, what is missing listed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from environments import sources
from environments.building import Missing
from test_environments import table

ROOT = Path(__file__).resolve().parent.parent
SETUP = {
    "SimplerEnv": 'setup(\n    name="simpler_env",\n)\n',
    "ManiSkill2_real2sim": "setup(name='mani_skill2_real2sim')\n",
}


@pytest.fixture
def repositories(tmp_path) -> Path:
    """Bare ones, two folders down, as a mirror keeps them; one lacks the object of a big file."""
    for name, text in SETUP.items():
        tree = tmp_path / "trees" / name
        (tree / "data").mkdir(parents=True)
        (tree / "setup.py").write_text(text)
        (tree / "data" / "big.glb").write_text(f"big file of {name}")
        (tree / "data" / "run.sh").touch(mode=0o755)
        (tree / "data" / "link").symlink_to("run.sh")
        git(tree, "init", "--quiet")
        git(tree, "add", ".")
        git(tree, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "all")
        mirror = tmp_path / "mirrors" / f"simpler-env+{name}" / "repo"
        git(tree, "clone", "--quiet", "--bare", "--no-hardlinks", ".", mirror)
    blob = git(mirror, "rev-parse", "HEAD:data/big.glb")
    for file in mirror.glob(f"objects/{blob[:2]}/{blob[2:]}"):
        file.unlink()
    return tmp_path


def git(folder: Path, *arguments: str | Path) -> str:
    command = ["git", "-C", folder, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_bare_repositories_are_found_and_copied_as_far_as_they_go(repositories):
    found = sources.find(repositories / "mirrors")
    assert {name: source.bare for name, source in found.items()} == {"SimplerEnv": True, "ManiSkill2_real2sim": True}
    assert found["SimplerEnv"].commit == git(repositories / "trees" / "SimplerEnv", "rev-parse", "--short", "HEAD")
    whole, partly = repositories / "whole", repositories / "partly"
    assert sources.copy(found["SimplerEnv"], whole) == []
    assert sources.copy(found["ManiSkill2_real2sim"], partly) == ["data/big.glb"]
    assert (whole / "data" / "big.glb").read_text() == "big file of SimplerEnv"
    for target in (whole, partly):
        assert os.access(target / "data" / "run.sh", os.X_OK)
        assert (target / "data" / "link").readlink() == Path("run.sh")


def test_a_work_tree_with_its_submodule_is_copied_apart(repositories):
    trees = repositories / "trees"
    shutil.move(trees / "ManiSkill2_real2sim", trees / "SimplerEnv" / "ManiSkill2_real2sim")
    (trees / "SimplerEnv" / "ManiSkill2_real2sim" / "data" / "big.glb").unlink()
    found = sources.find(trees / "SimplerEnv")
    assert not any(source.bare for source in found.values())
    assert sources.copy(found["SimplerEnv"], repositories / "one") == []
    assert not (repositories / "one" / "ManiSkill2_real2sim").exists()
    assert not (repositories / "one" / ".git").exists()
    assert sources.copy(found["ManiSkill2_real2sim"], repositories / "two") == ["data/big.glb"]


def test_a_repository_that_is_not_there_is_missing(repositories):
    with pytest.raises(Missing, match=r"ManiSkill2_real2sim in .*; expected there: a SimplerEnv work tree with"):
        sources.find(repositories / "trees" / "SimplerEnv")


def test_without_sources_the_run_says_what_it_lacks_and_fails(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "test_environments.py", "--only", "simpler", "--work", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Missing:\n  simpler: SIMPLER's sources: make test-environments SIMPLER=DIR" in result.stdout


def test_rows_of_several_lines_stay_together():
    columns = {"a": {"client": "one 1\ntwo 2", "numpy": "2"}, "b": {"client": "three 3"}}
    assert table(columns).splitlines() == [
        "        a      b",
        "client  one 1  three 3",
        "        two 2",
        "numpy   2      -",
    ]
