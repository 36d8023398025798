"""Outputs appear whole or not at all: stopped, starved of space or rights, beside other writers, after a kill."""

import os
import shutil
import signal
import subprocess
import time
from itertools import repeat
from pathlib import Path
from typing import Any

import processes
import pytest
from processes import Evla, FileLimit, Halt, wait_for
from test_bad_input import snapshot

from evla_cli.checkpoint import outputs
from evla_cli.checkpoint.outputs import locked, made_directory, new_directory, new_file, write_file
from evla_cli.cli.stopping import GRACE_SECONDS
from evla_cli.errors import EvlaError

PRUNE = ("prune", "run", "out", "--drop-layer-ids", "3", "--quiet")
EXPORT = ("export", "run", "out", "--max-shard-size", "300KB", "--quiet")
ANALYZE = ("analyze", "run", "--samples", "samples", "-o", "out.json", "--quiet")
RECIPE = """\
schema_version: 1
source: run
output: out
analyze: {samples: samples}
prune: {drop_layers: 1}
export: {settings: {visual_tokens: {num_keep: 8}}}
"""
RUN = ("run", "recipe.yaml", "--quiet")
COMMANDS = {"prune": PRUNE, "export": EXPORT, "analyze": ANALYZE, "run": RUN}
QUICK_SIGNALS = [("prune", signal.SIGINT), ("run", signal.SIGTERM)]


@pytest.fixture
def work(cogact_run, image_samples, tmp_path) -> Path:
    """A working directory with a checkpoint, samples and a recipe."""
    work = tmp_path / "work"
    shutil.copytree(cogact_run, work / "run")
    shutil.copytree(image_samples, work / "samples")
    (work / "recipe.yaml").write_text(RECIPE)
    return work


def refused(work: Path, command: tuple[str, ...], message: str, **options: Any) -> None:
    """One line, exit code 2, and nothing has changed."""
    before = snapshot(work)
    evla = Evla(work, *command, **options)
    assert evla.wait() == 2, evla.stderr
    assert message in evla.stderr
    assert evla.stderr.startswith("Error: ")
    assert evla.stderr.count("\n") == 1
    assert snapshot(work) == before


def done(work: Path, *command: str, **options: Any) -> str:
    """What a command that succeeds says on stderr."""
    evla = Evla(work, *command, **options)
    assert evla.wait() == 0, evla.stderr
    return evla.stderr


# Signals


def stopped(work: Path, command: tuple[str, ...], number: int, before_that: Any, has_begun: Any) -> float:
    """A signal, once it has begun: one line, its exit code, nothing left behind. Returns the seconds."""
    before = snapshot(work)
    evla = Evla(work, *command, before=before_that)
    has_begun(evla)
    begin = time.monotonic()
    evla.send(number)
    assert evla.wait() == 128 + number, evla.stderr
    seconds = time.monotonic() - begin
    line = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Terminated"}[signal.Signals(number)]
    assert evla.stderr == f"{line}; nothing unfinished was left behind.\n"
    assert snapshot(work) == before
    assert seconds < 4  # 2 on a machine that has nothing else to do
    return seconds


@pytest.mark.parametrize(
    ("command", "number"),
    [
        pytest.param(command, number, marks=() if (command, number) in QUICK_SIGNALS else pytest.mark.slow)
        for command in COMMANDS
        for number in (signal.SIGINT, signal.SIGTERM)
    ],
)
def test_a_signal_stops_at_once_and_leaves_nothing(work, command, number):
    halt = Halt(once="**/.*.lock")
    stopped(work, COMMANDS[command], number, halt, halt.reached)


@pytest.mark.parametrize("obstacle", ["stuck_in_a_library", pytest.param("deaf", marks=pytest.mark.slow)])
def test_a_signal_stops_what_does_not_listen(work, obstacle):
    def is_stuck(evla: Evla) -> None:
        wait_for(lambda: list(work.glob(".out.partial/*/*.pt")))
        time.sleep(0.1)  # what is stuck cannot say so

    seconds = stopped(work, PRUNE, signal.SIGTERM, getattr(processes, obstacle), is_stuck)
    assert seconds > GRACE_SECONDS


@pytest.mark.slow
def test_a_second_signal_does_not_cut_the_clearing_short(work):
    before = snapshot(work)
    halt = Halt(once=".out.partial")
    evla = Evla(work, *PRUNE, before=halt)
    halt.reached(evla)
    for _ in range(20):
        evla.send(signal.SIGINT)
        time.sleep(0.001)
    assert evla.wait() == 130
    assert snapshot(work) == before


# Killed before


def test_a_failed_overwrite_keeps_what_was_there(work):
    done(work, *PRUNE)
    refused(work, (*PRUNE, "--overwrite"), "Cannot write out: File too large", before=FileLimit(100_000))


@pytest.mark.parametrize("command", ["prune", "export"])
def test_what_a_killed_run_left_is_found_named_and_removed(work, command):
    assert done(work, *COMMANDS[command]) == ""
    expected = snapshot(work / "out")
    shutil.rmtree(work / "out")
    halt = Halt(once=".out.partial/*")
    evla = Evla(work, *COMMANDS[command], before=halt)
    halt.reached(evla)
    evla.send(signal.SIGKILL)
    assert evla.wait() == -signal.SIGKILL
    assert not (work / "out").exists()
    found = work / ".out.partial"
    assert done(work, *COMMANDS[command]) == f"Found {found}, which a killed run had left; removed it.\n"
    assert snapshot(work / "out") == expected
    assert {path.name for path in work.iterdir()} == {"run", "samples", "recipe.yaml", "out"}


def test_what_was_put_aside_comes_back(work, caplog):
    """Killed between the two renames of a file system that has no exchange."""
    old, partial = work / ".out.old", work / ".out.partial"
    for directory in (old, partial):
        directory.mkdir()
        (directory / "manifest.json").write_text(directory.name)
    with pytest.raises(EvlaError, match="out already exists"), new_directory(work / "out", False):
        pass
    assert (work / "out/manifest.json").read_text() == ".out.old"
    assert len(caplog.messages) == 2
    assert "it is out again" in caplog.messages[0]
    assert not old.exists()
    assert not partial.exists()


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting(work, exchange, monkeypatch):
    if not exchange:
        monkeypatch.setattr(outputs, "_exchange", lambda first, second: False)
    for number in range(3):
        with new_directory(work / "out", overwrite=True) as staging:
            (staging / "manifest.json").write_text(str(number))
            assert number == 0 or (work / "out/manifest.json").read_text() == str(number - 1)
        assert (work / "out/manifest.json").read_text() == str(number)
    assert not list(work.glob(".out*"))


def test_this_file_system_exchanges_names(tmp_path):
    """The test above with `exchange` tests what it says."""
    for name in "ab":
        (tmp_path / name).write_text(name)
    assert outputs._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").read_text() == "b"


def test_files_are_replaced_whole(work):
    write_file(work / "file", "old", overwrite=False)
    with pytest.raises(EvlaError, match="Cannot write"), new_file(work / "file", overwrite=True):
        pass  # nothing was written that could be put in its place
    assert (work / "file").read_text() == "old"
    write_file(work / "file", "new", overwrite=True)
    assert (work / "file").read_text() == "new"
    assert not list(work.glob(".file*"))


def test_a_directory_made_for_nothing_goes_again(tmp_path):
    with pytest.raises(ZeroDivisionError), made_directory(tmp_path / "a/b"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_where_a_symlink_leads(work, tmp_path):
    """The output stands where the link points to, on that disk, and the link stays."""
    (tmp_path / "elsewhere").mkdir()
    (work / "out").symlink_to(tmp_path / "elsewhere")
    done(work, *PRUNE, "--overwrite")
    assert (work / "out").is_symlink()
    assert (tmp_path / "elsewhere/prune_plan.yaml").is_file()


# Two writers


def test_of_two_writers_the_second_is_refused(work):
    halt = Halt(once=".out.partial")
    first = Evla(work, *PRUNE, before=halt)
    halt.reached(first)
    second = Evla(work, *PRUNE, "--overwrite")
    assert second.wait() == 2
    assert second.stderr == "Error: Another process is writing out; wait for it or choose another output.\n"
    halt.go_on()
    assert first.wait() == 0
    assert not list(work.glob(".*"))


def test_of_two_runs_of_a_recipe_the_second_is_refused(work):
    halt = Halt(once="out/.run.lock")
    first = Evla(work, *RUN, before=halt)
    halt.reached(first)
    second = Evla(work, *RUN)
    assert second.wait() == 2
    assert second.stderr == "Error: Another process is writing out; wait for it or choose another output.\n"
    halt.go_on()
    assert first.wait() == 0
    assert not list(work.glob("out/.*"))


def test_a_lock_that_is_removed_meanwhile_is_not_taken_for_held(tmp_path, monkeypatch):
    """Between opening the lock file and locking it, its holder may have removed it."""
    flock, calls = outputs.fcntl.flock, []

    def remove_first(descriptor: int, how: int) -> None:
        if not calls:
            (tmp_path / ".out.lock").unlink()
        calls.append(how)
        flock(descriptor, how)

    monkeypatch.setattr(outputs.fcntl, "flock", remove_first)
    lock = tmp_path / ".out.lock"
    with locked(lock, tmp_path / "out"):
        assert len(calls) == 2
        with pytest.raises(EvlaError, match="Another process"), locked(lock, tmp_path / "out"):
            pass
    assert not list(tmp_path.iterdir())


# Space and rights


@pytest.fixture
def small_disk(work):
    """`small_disk(kilobytes)` is a file system of that size, mounted at `work / "disk"`."""
    disk = work / "disk"
    disk.mkdir()

    def mounted(kilobytes: int) -> Path:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting a small file system needs root")
        return disk

    yield mounted
    subprocess.run(["umount", str(disk)], capture_output=True, check=False)


@pytest.mark.parametrize("command", ["prune", "export"])
def test_too_little_space_is_said_before_the_first_byte(work, small_disk, command):
    small_disk(1000)
    refused(work, (command, "run", "disk/out", *COMMANDS[command][3:]), "bytes are to be written, the disk of")


@pytest.mark.parametrize("command", ["prune", "export"])
def test_a_disk_that_fills_up_meanwhile(work, small_disk, command):
    disk = small_disk(3000)
    halt = Halt(once="disk/.out.partial/**/*.*")
    evla = Evla(work, command, "run", "disk/out", *COMMANDS[command][3:], before=halt)
    halt.reached(evla)
    with open(disk / "filler", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        file.writelines(repeat(bytes(4096)))
    halt.go_on()
    assert evla.wait() == 2
    assert evla.stderr == "Error: Cannot write disk/out: No space left on device. Nothing was left behind.\n"
    assert [path.name for path in disk.iterdir()] == ["filler"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["prune", "export", "run"])
def test_no_file_may_grow_so_large(work, command):
    """The nearest to a full disk that needs no root; a recipe's finished analysis stays."""
    if command == "run":
        done(work, "analyze", "run", "--samples", "samples", "-o", "out.json")
        evla = Evla(work, *RUN, before=FileLimit(100_000))
        assert evla.wait() == 2
        assert evla.stderr == "Error: Cannot write out/pruned: File too large. Nothing was left behind.\n"
        analyzed = {"importance.json", "importance.activations.safetensors"}
        assert {path.name for path in (work / "out").iterdir()} == {*analyzed, "run.json"}
    else:
        refused(work, COMMANDS[command], "Cannot write out: File too large", before=FileLimit(100_000))


@pytest.mark.parametrize("command", ["prune", "export", "analyze"])
def test_a_read_only_file_system(work, small_disk, command):
    disk = small_disk(3000)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    arguments = [f"disk/{argument}" if argument.startswith("out") else argument for argument in COMMANDS[command]]
    refused(work, tuple(arguments), f"Cannot write into {disk}: Read-only file system")


@pytest.mark.parametrize("command", ["prune", "export", "analyze"])
def test_no_permission_to_write(work, command):
    work.chmod(0o555)
    refused(work, COMMANDS[command], f"into {work}: Permission denied", before=processes.without_privileges)
    work.chmod(0o755)


def test_no_permission_to_write_into_a_recipes_output(work):
    (work / "out").mkdir(mode=0o555)
    refused(work, RUN, "Cannot write into out: Permission denied", before=processes.without_privileges)


def test_no_permission_to_read(work):
    (work / "run/checkpoints/pico.pt").chmod(0)
    evla = Evla(work, *PRUNE, before=processes.without_privileges)
    assert evla.wait() == 2
    assert "Permission denied" in evla.stderr
    assert evla.stderr.count("\n") == 1


def test_a_source_that_may_only_be_read(work):
    expected = snapshot(work / "run")
    for path in [*(work / "run").rglob("*"), work / "run"]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    for name, command in {"p": PRUNE, "e": EXPORT}.items():
        done(work, command[0], command[1], name, *command[3:], before=processes.without_privileges)
    assert snapshot(work / "run") == expected


# The source


@pytest.mark.parametrize("change", ["touched", "replaced", "grown"])
@pytest.mark.parametrize("command", ["prune", "export", "analyze"])
def test_a_source_that_changes_meanwhile(work, command, change):
    weights, halt = work / "run/checkpoints/pico.pt", Halt()
    evla = Evla(work, *COMMANDS[command], before=halt)
    halt.reached(evla)
    if change == "touched":
        os.utime(weights)
    elif change == "replaced":
        shutil.copy2(weights, work / "copy")
        os.replace(work / "copy", weights)
    else:
        with open(weights, "ab") as file:
            file.write(b"more")
    halt.go_on()
    assert evla.wait() == 2
    assert "pico.pt changed while it was being read" in evla.stderr
    assert evla.stderr.count("\n") == 1
    assert {path.name for path in work.iterdir()} == {"run", "samples", "recipe.yaml"}


@pytest.mark.parametrize("command", ["prune", "export", "analyze"])
def test_a_source_that_is_cut_short_meanwhile(work, command):
    """As `torch.save` to the same path does first of all: what is mapped and not yet read is gone."""
    weights, halt = work / "run/checkpoints/pico.pt", Halt()
    evla = Evla(work, *COMMANDS[command], before=halt)
    halt.reached(evla)
    os.truncate(weights, 0)
    halt.go_on()
    assert evla.wait() == 2
    assert evla.stderr.startswith("Error: ")
    assert "cut short" in evla.stderr or "changed while it was being read" in evla.stderr
    assert evla.stderr.count("\n") == 1
    assert {path.name for path in work.iterdir()} == {"run", "samples", "recipe.yaml"}


@pytest.mark.slow
def test_symlinked_shards(work):
    """As the Hugging Face hub's cache stores them."""
    done(work, *EXPORT)
    bundle = work / "out"
    blobs = work / "blobs"
    blobs.mkdir()
    done(work, "prune", "out", "expected", *PRUNE[3:])
    for number, path in enumerate(sorted(bundle.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../blobs/{number}")
    before = snapshot(blobs)
    done(work, "prune", "out", "pruned", *PRUNE[3:])
    assert snapshot(work / "pruned") == snapshot(work / "expected")
    assert not any(path.is_symlink() for path in (work / "pruned").rglob("*"))
    assert snapshot(blobs) == before


@pytest.mark.parametrize("dest", ["run", "run/out", "link", "link/out", "."])
def test_source_and_destination_the_same_or_nested(work, dest):
    (work / "link").symlink_to("run")
    refused(work, ("prune", "run", dest, *PRUNE[3:], "--overwrite"), "are the same or one lies inside the other")
