"""SIGKILL at any instant: no destination is ever wrong, the next run says what it found and ends as if nothing was.

`make test` kills at a few instants while some MB are written, `make test-slow` at 60 random ones and at every step of
each command, which writes 40 MB.
"""

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pico
import pytest
import yaml
from processes import TIMEOUT, DieAtStep, Evla, without_exchange
from test_bad_input import snapshot

OPTIONS = ("--importance", "importance.json", "--mlp-prune-ratio", "0.25", "--mlp-method", "magnitude", "--quiet")
PRUNE = ("prune", "run", "out", "--drop-layers", "1", *OPTIONS)
OLD_PRUNE = ("prune", "run", "out", "--drop-layers", "2", *OPTIONS)
EXPORT = ("export", "run", "out", "--max-shard-size", "10MB", "--quiet")
RECIPE = {
    "schema_version": 1,
    "source": "run",
    "output": "out",
    "analyze": {"samples": "samples"},
    "prune": {"drop_layers": 1, "mlp_prune_ratio": 0.25, "mlp_method": "magnitude"},
    "export": {"settings": {"visual_tokens": {"num_keep": 8}}},
}
RUN = ("run", "recipe.yaml", "--quiet")
INPUTS = {"run", "samples", "importance.json", "importance.activations.safetensors", "recipe.yaml"}
Before = Callable[[], object]


class Scene:
    """A directory in which a command is killed, and what it makes when it is not.

    Attributes:
        old: what stands at the destination before; None for nothing.
        new: what stands there after, file by file.
        seconds: that the command takes.
        seen: how often the destination was found how, and whether something unfinished lay beside it.
    """

    def __init__(self, work: Path, command: tuple[str, ...], old: tuple[str, ...] | None, before: Before | None):
        self.work, self.command, self._before = work, command, before
        self.out, self._backup = work / "out", work.with_name("old")
        self.old: dict[str, str] | None = None
        if old is not None:
            self._finish(old)
            self.old = snapshot(self.out)
            self.out.rename(self._backup)
            self.command = (*command, "--overwrite")
        self._source = snapshot(work / "run")
        begin = time.monotonic()
        self.reset()
        self._finish(self.command)
        self.seconds = time.monotonic() - begin
        self.new = self._outputs()
        self.seen: Counter[str] = Counter()

    def reset(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        if self.old is not None:
            shutil.copytree(self._backup, self.out)

    def kill_after(self, seconds: float) -> None:
        self.reset()
        evla = Evla(self.work, *self.command, before=self._before)
        time.sleep(seconds)
        evla.send(signal.SIGKILL)
        code = evla.wait()
        if code == 0:
            self.seconds = seconds  # the first run took longer: the machine was busier
        self._check(code)

    def kill_once_writing(self, seconds: float) -> None:
        """So long after something was written."""
        self.reset()
        evla = Evla(self.work, *self.command, before=self._before)
        begin = time.monotonic()
        while not any(path.is_file() for path in self.work.glob("**/.*.partial/**/*")):
            if evla.ended or time.monotonic() > begin + TIMEOUT:
                break
            time.sleep(0.0005)
        time.sleep(seconds)
        evla.send(signal.SIGKILL)
        self._check(evla.wait())

    def killed(self) -> int:
        return sum(count for kind, count in self.seen.items() if kind.startswith("killed"))

    def kill_at_step(self, step: int) -> bool:
        """False where the command has no such step."""
        self.reset()
        code = Evla(self.work, *self.command, before=Both(self._before, DieAtStep(step))).wait()
        self._check(code)
        return code != 0

    def _check(self, code: int) -> None:
        assert code in (0, -signal.SIGKILL)
        found = self._outputs() if self.out.exists() else None
        left = sorted(path.name for path in self.work.glob("**/.*") if not path.name.endswith(".lock"))
        finished = self._finished(found)
        self.seen[f"{'ended' if code == 0 else 'killed'}: {finished}{', left something' if left else ''}"] += 1
        inodes = {path: path.stat().st_ino for path in self.out.glob("*") if path.name in finished}
        said = self._finish(self.command, finished == "new")
        assert all(name in said for name in left), (left, said)
        assert not left or "killed run" in said
        assert said.count("\n") == len(left)
        assert {path: path.stat().st_ino for path in inodes} == inodes  # what was finished was not done again
        assert self._outputs() == self.new
        assert snapshot(self.work / "run") == self._source
        assert {path.name for path in self.work.iterdir()} == {*INPUTS, "out"}

    def _outputs(self) -> dict[str, str]:
        """All but run.json, which holds times and inodes."""
        return {path: sha256 for path, sha256 in snapshot(self.out).items() if path != "run.json"}

    def _finished(self, found: dict[str, str] | None) -> str:
        """What of `new` stands there; everything else is wrong."""
        if self.command[0] != "run":
            kinds = {"nothing": found is None, "old": found == self.old, "new": found == self.new}
            return next(kind for kind, is_so in kinds.items() if is_so)
        stages = []
        for name in ("importance.json", "pruned", "bundle"):
            if found and name in found:
                stages.append(name)
                assert _below(found, name) == _below(self.new, name)
        return " ".join(stages) or "nothing"

    def _finish(self, command: tuple[str, ...], complete: bool = False) -> str:
        """The next run, left alone. Returns what it says."""
        evla = Evla(self.work, *command)
        code = evla.wait()
        if complete and "--overwrite" not in command and command[0] != "run":
            assert code == 2
            assert evla.stderr.splitlines()[-1].startswith("Error: out already exists.")
            return "".join(evla.stderr.splitlines(keepends=True)[:-1])
        assert code == 0, evla.stderr
        return evla.stderr


def _below(files: dict[str, str], name: str) -> dict[str, str]:
    return {path: sha256 for path, sha256 in files.items() if path == name or path.startswith(f"{name}/")}


class Both:
    def __init__(self, *parts: Before | None):
        self._parts = parts

    def __call__(self) -> None:
        for part in self._parts:
            if part is not None:
                part()


SCENES: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None, Before | None]] = {
    "prune": (PRUNE, None, None),
    "prune, overwriting": (PRUNE, OLD_PRUNE, None),
    "prune, overwriting without an exchange": (PRUNE, OLD_PRUNE, without_exchange),
    "export": (EXPORT, None, None),
    "run": (RUN, None, None),
}


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Callable[[int], Path]:
    """`material(width)`: a checkpoint of 5 kB for each MLP row, and what else a command needs."""

    @cache
    def directory(width: int) -> Path:
        work = tmp_path_factory.mktemp("kill") / "work"
        work.mkdir()
        pico.write_cogact(work / "run", intermediate_size=width)
        pico.write_image_samples(work / "samples")
        (work / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        evla = Evla(work, "analyze", "run", "--samples", "samples", "-o", "importance.json", "--quiet")
        assert evla.wait() == 0, evla.stderr
        return work

    return directory


def scenes(width: int, names: Iterable[str] = SCENES) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("scene", [(name, width) for name in names], indirect=True, ids=names)


@pytest.fixture
def scene(request, material, tmp_path, capsys) -> Iterator[Scene]:
    name, width = request.param
    shutil.copytree(material(width), tmp_path / "work", copy_function=os.link)
    scene = Scene(tmp_path / "work", *SCENES[name])
    yield scene
    with capsys.disabled():
        runs = sum(scene.seen.values())
        print(f"\n{name}, {scene.killed()} kills in {runs} runs: {dict(sorted(scene.seen.items()))}")


def kill_at_random(scene: Scene, count: int) -> None:
    """Until so many runs were killed: half of the instants anywhere, half of them while something is written. A run
    that ended before its instant does not count."""
    instants = random.Random(0)
    for _ in range(2 * count):
        if scene.killed() >= count:
            return
        scene.kill_after(instants.uniform(0, scene.seconds))
        scene.kill_once_writing(instants.uniform(0, scene.seconds / 2))
    raise AssertionError(f"Only {scene.killed()} of {4 * count} runs were killed before they ended.")


@scenes(1024, ["prune, overwriting"])
def test_a_few_random_instants(scene):
    kill_at_random(scene, 2)


@pytest.mark.slow
@scenes(2048, ["prune, overwriting without an exchange"])
def test_some_steps(scene):
    """Where directories change is where being killed could hurt most."""
    for step in range(random.Random(0).randrange(12), 1000, 12):
        if not scene.kill_at_step(step):
            break


@pytest.mark.slow
@scenes(8192)
def test_random_instants(scene):
    kill_at_random(scene, 60)
    assert any("left something" in kind for kind in scene.seen)


@pytest.mark.slow
@scenes(8192)
def test_every_step(scene):
    step = 0
    while scene.kill_at_step(step):
        step += 1
    assert step > 10
