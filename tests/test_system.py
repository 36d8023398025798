"""Another system: what only Linux, or this build of torch, has is taken away; results stay the same."""

import ctypes
import errno
import mmap
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evla_cli import pipeline
from evla_cli.bundling import verify_bundle
from evla_cli.checkpoint import output_file, outputs, page_cache, read_ahead, system
from evla_cli.checkpoint.mapped_file import MappedFile
from evla_cli.checkpoint.outputs import new_directory
from evla_cli.errors import EvlaError
from evla_cli.evaluation import bench, memory
from evla_cli.models.scratch import Scratch
from evla_cli.models.tiled_linear import multiplies_natively
from evla_cli.refitting import RefitOptions

ABSENT = ("posix_fadvise", "posix_fallocate", "fdatasync", "preadv", "sched_getaffinity", "POSIX_FADV_DONTNEED")


@pytest.fixture
def elsewhere(monkeypatch):
    """As on macOS, and with a torch without oneDNN."""
    for name in ABSENT:
        monkeypatch.delattr(os, name)
    monkeypatch.delattr(os, "O_DIRECT")
    monkeypatch.setattr(output_file, "_DIRECT", 0)  # read when it was imported
    monkeypatch.setattr(output_file, "_SYNC_BYTES", 1)  # so that a small file, too, is synced on the way
    monkeypatch.delattr(mmap, "MADV_DONTNEED")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace())
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    nowhere = Path("/nowhere")
    for module, name in ((memory, "_STATUS"), (memory, "_MEMINFO"), (bench, "_CPUINFO")):
        monkeypatch.setattr(module, name, nowhere)


def make_all(run: Path, samples: Path, out: Path) -> dict[str, bytes]:
    """Analyze, prune with refit, export, export again in the same place, verify. All files that came out."""
    importance, pruned, bundle = out / "importance.json", out / "pruned", out / "bundle"
    settings = pipeline.settings_with(None, visual_tokens={"num_keep": 8})
    refit = RefitOptions(samples, memory_budget="1KB")  # hidden states go to a file
    pipeline.analyze_to_file(run, samples, importance, memory_budget="1KB")
    pipeline.prune(run, pruned, importance=importance, num_drop=2, refit=refit)
    for _ in range(2):
        pipeline.export(pruned, bundle, settings, max_shard_size="0.4MB", overwrite=True)
    verify_bundle(bundle)
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_the_same_bytes_come_out(cogact_run, image_samples, tmp_path, request):
    for name in ("linux", "elsewhere"):
        (tmp_path / name).mkdir()
    expected = make_all(cogact_run, image_samples, tmp_path / "linux")
    request.getfixturevalue("elsewhere")
    found = make_all(cogact_run, image_samples, tmp_path / "elsewhere")
    assert len(expected) > 10
    assert list(found) == list(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


class TestReplacing:
    """Without renameat2: what is replaced stands aside for a moment, and comes back if that is where it ends."""

    def write(self, dest: Path, text: str, overwrite: bool) -> None:
        with new_directory(dest, overwrite) as staging:
            (staging / "manifest.json").write_text(text)

    def test_whole_or_not_at_all(self, elsewhere, tmp_path, monkeypatch):
        dest = tmp_path / "out"
        self.write(dest, "first", overwrite=False)
        with pytest.raises(EvlaError, match="already exists"):
            self.write(dest, "second", overwrite=False)
        renamed = os.rename

        def fails_once(source: Any, target: Any) -> None:
            if Path(source).name == ".out.partial":
                raise OSError(errno.EIO, "Input/output error")
            renamed(source, target)

        with monkeypatch.context() as broken:
            broken.setattr(outputs.os, "rename", fails_once)
            with pytest.raises(EvlaError, match="Input/output error"):
                self.write(dest, "second", overwrite=True)
        assert (dest / "manifest.json").read_text() == "first"
        self.write(dest, "second", overwrite=True)
        assert (dest / "manifest.json").read_text() == "second"
        assert list(tmp_path.iterdir()) == [dest]

    def test_what_appeared_meanwhile_stays(self, elsewhere, tmp_path):
        dest = tmp_path / "out"

        def publish() -> None:
            with new_directory(dest, overwrite=False) as staging:
                (staging / "manifest.json").write_text("mine")
                dest.mkdir()
                (dest / "theirs").write_text("theirs")

        with pytest.raises(EvlaError, match="appeared while this command ran"):
            publish()
        assert [path.name for path in dest.iterdir()] == ["theirs"]


class TestReserving:
    @pytest.mark.parametrize("number", [None, errno.EOPNOTSUPP, errno.EINVAL])
    def test_zeros_are_written_where_room_cannot_be_asked_for(self, tmp_path, monkeypatch, number):
        def refuses(*_: Any) -> None:
            raise OSError(number, "not here")

        if number is None:
            monkeypatch.delattr(os, "posix_fallocate")
        else:
            monkeypatch.setattr(os, "posix_fallocate", refuses)
        with open(tmp_path / "file", "w+b") as file:
            file.write(b"abc")
            file.flush()
            system.reserve(file.fileno(), 4096, 2**20 + 5)
            assert os.fstat(file.fileno()).st_size == 4096 + 2**20 + 5
            assert os.fstat(file.fileno()).st_blocks * 512 >= 2**20  # no hole that a full disk could not fill
            file.seek(0)
            assert file.read(3) == b"abc"

    def test_a_full_disk_is_an_error_all_the_same(self, elsewhere, monkeypatch):
        def full(*_: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(EvlaError, match="No room for hidden states"):
            Scratch(0).hold(torch.ones(3))


def test_what_the_system_does_not_tell(elsewhere, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(2**16))
    assert page_cache.ColdRegions(tmp_path / "file").covers(0) is False
    assert read_ahead.ReadAheadHash([tmp_path / "file"]).digests()[tmp_path / "file"]
    assert memory.available_bytes("cpu") == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    assert bench._processor_name()
    with memory._Sampler() as sampler:
        assert memory._peak_resident_bytes() > 2**20
    assert sampler.peak is None
    assert not multiplies_natively(torch.bfloat16)
    assert not multiplies_natively(torch.float16)
    monkeypatch.delattr(os, "sysconf")
    assert system.physical_bytes() is None
    assert memory.available_bytes("cpu") == 0


def test_pages_are_not_dropped_where_they_cannot_be(elsewhere, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 2**18)  # 64 MiB: four regions
    cold, mapped = page_cache.ColdRegions(file), MappedFile(file)
    cold._cold = [True] * 4
    tensor = mapped.tensor("a", torch.uint8, (2**26,), 0, 2**26).load()
    cold.drop_before(2**26, mapped)
    assert tensor[::256].sum() == 0
    assert tensor[255::256].float().mean() == 255
