"""Streaming: what is held in memory, in which precision, and in which order files are read and written."""

import errno
import fcntl
import hashlib
import os
import shutil
import threading
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pico
import pytest
import torch
from torch import Tensor, nn

from evla_cli import pipeline
from evla_cli.calibration import load_samples
from evla_cli.checkpoint import output_file, read_ahead
from evla_cli.checkpoint.mapped_file import MappedFile
from evla_cli.checkpoint.output_file import OutputFile
from evla_cli.checkpoint.page_cache import ColdRegions, _absent
from evla_cli.checkpoint.read_ahead import ReadAheadHash, start_early
from evla_cli.checkpoint.tensors import LazyTensor, is_finite, prepared, tensor_bytes
from evla_cli.checkpoint.torch_format import write_torch
from evla_cli.errors import EvlaError
from evla_cli.families import open_checkpoint
from evla_cli.models import scratch, streaming, tiled_linear
from evla_cli.models.scratch import Scratch, move
from evla_cli.models.streaming import DecoderStream
from evla_cli.models.tiled_linear import TiledLinear, tile_linear
from evla_cli.models.upload import Upload


@pytest.fixture
def no_half_units(monkeypatch):
    """As on a processor that cannot multiply in half precision."""
    monkeypatch.setattr(tiled_linear, "multiplies_natively", lambda dtype: False)


class TestFinite:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_bits_tell_what_isfinite_tells(self, dtype):
        extremes = [torch.finfo(dtype).max, torch.finfo(dtype).min, torch.finfo(dtype).smallest_normal, -0.0, 1.0]
        assert is_finite(torch.tensor(extremes, dtype=dtype))
        for bad in (float("nan"), -float("nan"), float("inf"), -float("inf")):
            for position in (0, 3):
                values = torch.ones(4, 3, dtype=dtype)
                values[position, 1] = bad
                assert not is_finite(values)

    def test_every_piece_is_looked_at(self, monkeypatch):
        monkeypatch.setattr("evla_cli.checkpoint.tensors._CACHED_ELEMENTS", 4)
        for position in range(10):
            values = torch.zeros(10)
            values[position] = float("inf")
            assert not is_finite(values)
        assert is_finite(torch.zeros(10))

    def test_empty_and_whole_numbers(self):
        assert is_finite(torch.empty(0))
        assert is_finite(torch.tensor([2**40]))
        assert is_finite(torch.tensor([True]))


class TestTiledLinear:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("bias", [True, False])
    def test_sums_in_float32_and_rounds_once(self, monkeypatch, no_half_units, dtype, bias):
        monkeypatch.setattr(tiled_linear, "_PIECE_ELEMENTS", 200)  # several pieces, the last one narrower
        torch.manual_seed(0)
        linear = nn.Linear(24, 37, bias=bias).to(dtype)
        values = torch.randn(2, 5, 24).to(dtype)
        exact = nn.functional.linear(values.double(), linear.weight.double(), linear.bias.double() if bias else None)
        assert tile_linear(linear, dtype, dtype, "cpu")
        found = linear(values)
        assert found.dtype == dtype
        assert found.shape == (2, 5, 37)
        off = (found.double() - exact).abs() / exact.abs().clamp(min=1e-3)
        assert off.max() <= torch.finfo(dtype).eps  # one rounding of the exact sum, never more

    def test_float32_input_gives_float32(self, no_half_units):
        torch.manual_seed(0)
        linear = nn.Linear(16, 8).bfloat16()
        linear.bias.data = linear.bias.float()
        values = torch.randn(3, 16)
        expected = nn.functional.linear(values, linear.weight.float(), linear.bias)
        assert tile_linear(linear, torch.bfloat16, torch.float32, "cpu")
        torch.testing.assert_close(linear(values), expected, rtol=1e-6, atol=1e-6)
        assert linear(values[0]).shape == (8,)

    def test_only_where_it_is_needed(self, monkeypatch):
        monkeypatch.setattr(tiled_linear, "multiplies_natively", lambda dtype: dtype == torch.bfloat16)
        cases = {
            (torch.float32, torch.float32, "cpu"): False,
            (torch.bfloat16, torch.bfloat16, "cpu"): False,
            (torch.float16, torch.float16, "cpu"): True,
            (torch.bfloat16, torch.float32, "cpu"): True,
            (torch.float16, torch.float16, "cuda"): False,
        }
        for (weight, compute, device), tiled in cases.items():
            linear = nn.Linear(2, 2)
            assert tile_linear(linear, weight, compute, device) is tiled
            assert isinstance(linear, TiledLinear) is tiled


class TestDecoderStream:
    def stream(self, run: Path, data: Path, dtype: torch.dtype) -> DecoderStream:
        checkpoint = open_checkpoint(run)
        with torch.inference_mode():
            return DecoderStream(checkpoint, load_samples(data, "image"), 2, dtype)

    def test_half_weights_stay_half(self, cogact_run, tmp_path, image_samples):
        stream = self.stream(pico.cast_run(cogact_run, tmp_path / "half", torch.bfloat16), image_samples, torch.float32)
        assert stream.batches[0].hidden_states.dtype == torch.float32
        for layer in stream.layers():
            linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
            assert len(linears) == 7
            assert all(isinstance(module, TiledLinear) for module in linears.values())
            assert {module.weight.dtype for module in linears.values()} == {torch.bfloat16}
            assert layer.input_layernorm.weight.dtype == torch.float32

    @pytest.mark.parametrize("native", [True, False])
    def test_float32_on_a_half_checkpoint_equals_float32_weights(
        self, cogact_run, tmp_path, image_samples, native, monkeypatch
    ):
        monkeypatch.setattr(tiled_linear, "multiplies_natively", lambda dtype: native)
        half = pico.cast_run(cogact_run, tmp_path / "half", torch.bfloat16)
        found = pipeline.analyze(half, image_samples)
        expected = pipeline.analyze(pico.cast_run(half, tmp_path / "wide", torch.float32), image_samples)
        for ours, theirs in zip(found.layers, expected.layers, strict=True):
            assert ours.importance == pytest.approx(theirs.importance, abs=1e-6)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_is_near_float32(self, cogact_run, image_samples, dtype, no_half_units):
        found = pipeline.analyze(cogact_run, image_samples, dtype=dtype)
        expected = pipeline.analyze(cogact_run, image_samples)
        for ours, theirs in zip(found.layers, expected.layers, strict=True):
            assert ours.importance == pytest.approx(theirs.importance, abs=5e-3)

    @pytest.mark.parametrize("budget", ["0.001KB", "20KB", "1GB"])
    def test_a_memory_budget_changes_nothing(self, cogact_run, image_samples, budget, monkeypatch):
        monkeypatch.setattr(scratch, "_REGION_BYTES", 2**16)
        expected = pipeline.analyze(cogact_run, image_samples, batch_size=2)
        assert pipeline.analyze(cogact_run, image_samples, batch_size=2, memory_budget=budget) == expected

    def test_beyond_the_budget_tensors_stand_in_a_file(self, cogact_run, image_samples):
        checkpoint = open_checkpoint(cogact_run)
        samples = load_samples(image_samples, "image")
        with torch.inference_mode():
            all_in_memory = DecoderStream(checkpoint, samples, 1, torch.float32)
            first = all_in_memory.batches[0]
            one = sum(t.nbytes for t in {id(t): t for t in scratch._tensors(vars(first))}.values())
            stream = DecoderStream(checkpoint, samples, 1, torch.float32, memory_budget=one)
        mapped = [in_mapped_file(batch.hidden_states) for batch in stream.batches]
        assert mapped == [False] + [True] * (len(samples) - 1)

    def test_the_next_layer_is_read_while_this_one_computes(self, cogact_run, image_samples):
        stream = self.stream(cogact_run, image_samples, torch.float32)
        read: list[int] = []
        plain = stream._read_layer
        second = threading.Event()

        def counted(index):
            state = plain(index)
            read.append(index)
            if index == 1:
                second.set()
            return state

        stream._read_layer = counted
        layers = stream.layers()
        next(layers)
        assert second.wait(20)  # layer 1 is there before anybody asked for it
        assert read == [0, 1]
        layers.close()

    def test_weights_are_waited_for_before_they_are_used(self, cogact_run, image_samples, monkeypatch):
        """What an upload on a stream of its own needs, checked with one that remembers."""
        complete: set[int] = set()  # weights that the computing thread may use

        class Remembering(Upload):
            def __init__(self, device):
                super().__init__(device)
                self.lately: list[Tensor] = []

            def put(self, tensor, dtype):
                self.lately.append(super().put(tensor, dtype))
                return self.lately[-1]

            def done(self):
                event, self.lately = self.lately, []
                return event

            def wait(self, event, tensors):
                assert threading.current_thread() is threading.main_thread()
                assert {id(tensor) for tensor in tensors} <= {id(tensor) for tensor in event}
                kept.extend(event)
                complete.update(tensor.data_ptr() for tensor in event)

        kept: list[Tensor] = []
        monkeypatch.setattr(streaming, "Upload", Remembering)
        stream = self.stream(cogact_run, image_samples, torch.float32)
        for layer in stream.layers():
            assert {weight.data_ptr() for weight in layer.parameters()} <= complete
        norm = stream.load_part("language_model.model.norm")
        assert norm.weight.data_ptr() in complete

    def test_a_device_that_is_too_small(self, cogact_run, image_samples, monkeypatch):
        def too_large(*_):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        monkeypatch.setattr(pipeline, "run_layer", too_large)
        with pytest.raises(EvlaError, match="smaller batch size, --memory-budget, beyond which"):
            pipeline.analyze(cogact_run, image_samples)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("budget", [None, "0.001KB"])
    def test_on_a_gpu(self, cogact_run, image_samples, budget):
        found = pipeline.analyze(cogact_run, image_samples, device="cuda", memory_budget=budget, with_action_head=True)
        expected = pipeline.analyze(cogact_run, image_samples)
        for ours, theirs in zip(found.layers, expected.layers, strict=True):
            assert ours.importance == pytest.approx(theirs.importance, abs=1e-4)


class TestUpload:
    def test_elsewhere_than_on_cuda_it_is_a_plain_copy(self):
        upload = Upload("cpu")
        values = torch.randn(3)
        assert upload.put(values, torch.float32) is values
        copied = upload.put(values, torch.bfloat16)
        assert torch.equal(copied, values.bfloat16())
        upload.wait(upload.done(), [copied])

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_copies_beside_what_computes(self):
        upload, values = Upload("cuda"), torch.randn(2**24)
        torch.cuda._sleep(2**28)  # the computing stream has something to do
        copied = upload.put(values, torch.bfloat16)
        event = upload.done()
        event.synchronize()
        assert not torch.cuda.current_stream().query()
        upload.wait(event, [copied])
        assert torch.equal(copied.cpu(), values.bfloat16())


class TestScratch:
    def test_move_keeps_what_is_there_already(self):
        value = {"a": (torch.ones(2), None), "b": [torch.ones(1), 3]}
        moved = move(value, "cpu")
        assert moved["a"][0] is value["a"][0]
        assert moved["a"][1] is None
        assert moved["b"][0] is value["b"][0]
        assert moved["b"][1] == 3
        assert move(value, "meta")["a"][0].is_meta

    def test_full_disk_is_an_error_that_says_what_to_do(self, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(scratch.os, "posix_fallocate", full)
        with pytest.raises(EvlaError, match="TMPDIR"):
            Scratch(0).hold(torch.ones(3))

    def test_shared_tensors_are_held_once(self):
        tensor = torch.arange(6.0).view(2, 3)
        held = Scratch(0).hold({"a": tensor, "b": [tensor, (tensor, 1)], "c": None, "d": torch.empty(0)})
        assert held["a"] is held["b"][0] is held["b"][1][0]
        assert held["a"] is not tensor
        assert torch.equal(held["a"], tensor)
        assert held["c"] is None
        assert held["b"][1][1] == 1


class TestReadAhead:
    def write(self, directory: Path) -> list[Path]:
        files = [directory / "a", directory / "b"]
        files[0].write_bytes(b"x" * 3000)
        files[1].write_bytes(b"y" * 5000)
        return files

    def test_hashes(self, tmp_path):
        files = self.write(tmp_path)
        expected = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        assert ReadAheadHash(files).digests() == expected
        assert list(ReadAheadHash(files).digests()) == files

    def test_stays_a_window_ahead_of_the_work(self, tmp_path, monkeypatch):
        monkeypatch.setattr("evla_cli.checkpoint.read_ahead._CHUNK_BYTES", 1000)
        monkeypatch.setattr("evla_cli.checkpoint.page_cache._absent", lambda path: [True])
        files = self.write(tmp_path)
        ahead = ReadAheadHash(files, ahead_bytes=1000, start_bytes=2000)

        def settles_at() -> int:
            seen = -1
            for _ in range(200):
                time.sleep(0.03)
                if ahead.read_bytes == seen:
                    return seen
                seen = ahead.read_bytes
            raise AssertionError("never settles")

        assert settles_at() == 3000  # what is read before the work begins, and the chunk that crosses it
        work = MappedFile(files[1])
        ahead.follow([work])
        work.tensor("a", torch.uint8, (10,), 500, 5000).load()  # at byte 3500 of both files
        assert settles_at() == 5000
        assert len(ahead.digests()) == 2
        assert ahead.read_bytes == 8000

    def test_does_not_wait_for_the_work_where_the_file_is_in_memory_anyway(self, tmp_path, monkeypatch):
        monkeypatch.setattr("evla_cli.checkpoint.page_cache._absent", lambda path: [False])
        ahead = ReadAheadHash(self.write(tmp_path), ahead_bytes=0, start_bytes=0)
        ahead._thread.join(20)
        assert ahead.read_bytes == 8000

    def test_known_hashes_are_not_computed_again(self, tmp_path):
        files = self.write(tmp_path)
        digests = ReadAheadHash(files, known={files[0]: "known"}).digests()
        assert digests == {files[0]: "known", files[1]: hashlib.sha256(files[1].read_bytes()).hexdigest()}

    @pytest.mark.slow
    @pytest.mark.parametrize("warm", [False, True])
    def test_leaves_the_page_cache_as_it_was(self, tmp_path, warm):
        """What was not in it is dropped behind the work, what was in it stays; the values are the same."""
        path = tmp_path / "f"
        values = torch.arange(2**24)  # 128 MiB
        path.write_bytes(tensor_bytes(values))
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if not all(_absent(path)):
                pytest.skip("this file system keeps what it is asked to drop")
            if warm:
                file.read()
        work = MappedFile(path)
        pieces = [work.tensor(str(n), torch.int64, (2**18,), n * 2**21, 2**27) for n in range(64)]
        ahead = ReadAheadHash([path])
        ahead.follow([work])
        ahead._thread.join(20)  # everything has been read and nothing used
        held = [piece.load() for piece in pieces]
        assert _absent(path) == [not warm] * 4 + [False] * 4  # 32 tensors of 2 MiB are kept
        assert torch.equal(torch.cat(held), values)

    def test_what_is_used_again_is_dropped_when_it_is_said(self, tmp_path):
        path = tmp_path / "f"
        values = torch.arange(2**24)  # 128 MiB
        path.write_bytes(tensor_bytes(values))
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if not all(_absent(path)):
                pytest.skip("this file system keeps what it is asked to drop")
        work = MappedFile(path)
        pieces = [work.tensor(str(n), torch.int64, (2**18,), n * 2**21, 2**27) for n in range(64)]
        ahead = ReadAheadHash([path])
        ahead.follow([work], drop_behind=False)
        ahead.digests()
        held = [piece.load() for piece in pieces]
        assert not any(_absent(path))
        ahead.drop()
        assert all(_absent(path))
        assert torch.equal(torch.cat(held), values)

    def test_a_part_that_lies_elsewhere_is_no_progress(self, tmp_path):
        """A projector at the end of the file that is read before the layers: their pages must not be dropped."""
        path = tmp_path / "f"
        path.write_bytes(bytes(2**26))
        work = MappedFile(path)
        ahead = ReadAheadHash([path])
        ahead.follow([work])
        ahead.digests()
        ahead._cold[path] = everything = ColdRegions(path)
        everything._cold = [True] * 4
        allowed = ahead._allowed
        for number in (0, 1, 31, *range(2, 30)):
            work.tensor("a", torch.uint8, (1,), number * 2**21, 2**26).load()
        assert everything._next == 0
        assert ahead._allowed == max(allowed, ahead._ahead_bytes)

    def test_analysis_follows_the_layers_alone(self, cogact_run, image_samples, monkeypatch):
        """What comes before them (the vision towers) may stand behind them in the file."""
        used: list[int] = []
        monkeypatch.setattr(ReadAheadHash, "_use", lambda ahead, file, offset: used.append(offset))
        pipeline.analyze(cogact_run, image_samples)
        checkpoint = open_checkpoint(cogact_run)
        assert len(used) == sum(name.startswith(f"{checkpoint.layer_prefix}.") for name in checkpoint.reader.tensors)
        assert used == sorted(used)

    def test_a_file_that_vanishes(self, tmp_path):
        files = self.write(tmp_path)
        ahead = ReadAheadHash([files[0]])
        ahead.digests()
        with pytest.raises(FileNotFoundError):
            ReadAheadHash([tmp_path / "none"])


class TestEarlyStart:
    """Reading begins before the libraries are imported that are needed to open a checkpoint."""

    @pytest.mark.parametrize("name", ["", "checkpoints/pico.pt"])
    def test_the_reader_takes_over_what_was_begun(self, cogact_run, name):
        start_early(cogact_run / name)
        ((_, begun),) = read_ahead._early
        reader = open_checkpoint(cogact_run / name).reader
        assert reader.read_ahead is begun
        assert reader.sha256 == hashlib.sha256((cogact_run / "checkpoints/pico.pt").read_bytes()).hexdigest()
        assert read_ahead._early == []

    def test_not_if_the_file_changed_meanwhile(self, cogact_run, tmp_path):
        run = shutil.copytree(cogact_run, tmp_path / "run")
        start_early(run)
        ((_, begun),) = read_ahead._early
        os.utime(run / "checkpoints/pico.pt")
        assert open_checkpoint(run).reader.read_ahead is not begun

    def test_nothing_to_begin_with(self, tmp_path):
        start_early(tmp_path / "none")
        start_early(tmp_path)
        assert read_ahead._early == []


@pytest.fixture
def direct(tmp_path):
    """Skips where the file system cannot bypass its cache."""
    descriptor = os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_DIRECT)
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    finally:
        os.close(descriptor)


class TestOutputFile:
    @pytest.mark.parametrize("sizes", [[], [1], [8192], [3, 0, 4096, 5000], [4096, 20_000, 1], [12_288 * 20]])
    def test_holds_what_was_written(self, sizes, tmp_path, monkeypatch):
        monkeypatch.setattr(output_file, "_BUFFER_BYTES", 12_288)
        parts = [np.random.default_rng(size).bytes(size) for size in sizes]
        file = write_all(tmp_path / "f", parts)
        assert file.position == sum(sizes)
        assert (tmp_path / "f").read_bytes() == b"".join(parts)
        assert file.sha256 == hashlib.sha256(b"".join(parts)).hexdigest()

    def test_on_a_file_system_that_refuses_direct_writes_after_all(self, direct, tmp_path, monkeypatch):
        write, refused = os.write, []

        def picky(descriptor: int, data: memoryview) -> int:
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                refused.append(len(data))
                raise OSError(errno.EINVAL, "Invalid argument")
            return write(descriptor, data)

        monkeypatch.setattr(output_file.os, "write", picky)
        with OutputFile(tmp_path / "f") as file:
            file.write(bytes(10_000))
        assert (tmp_path / "f").read_bytes() == bytes(10_000)
        assert len(refused) == 1

    def test_writes_in_parts(self, tmp_path, monkeypatch):
        write = os.write
        monkeypatch.setattr(output_file.os, "write", lambda descriptor, data: write(descriptor, data[:4096]))
        data = np.random.default_rng(0).bytes(50_001)
        with OutputFile(tmp_path / "f") as file:
            file.write(data)
        assert (tmp_path / "f").read_bytes() == data

    def test_does_not_overwrite(self, tmp_path):
        (tmp_path / "f").write_bytes(b"mine")
        with pytest.raises(FileExistsError):
            OutputFile(tmp_path / "f")
        assert (tmp_path / "f").read_bytes() == b"mine"

    @pytest.mark.parametrize("num_writes", [1, 5, 40])  # fewer and more than there are buffers
    def test_an_error_of_the_disk_is_raised(self, num_writes, tmp_path, monkeypatch):
        def broken(*_):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(output_file.os, "write", broken)
        monkeypatch.setattr(output_file, "_BUFFER_BYTES", 4096)
        with pytest.raises(OSError, match="Input/output"):
            write_all(tmp_path / "f", [bytes(4096)] * num_writes)
        assert threading.active_count() < 50

    def test_an_error_of_what_the_cache_holds_is_raised(self, tmp_path, monkeypatch):
        def broken(*_):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(output_file.os, "fdatasync", broken)
        monkeypatch.setattr(output_file, "_SYNC_BYTES", 1)
        with pytest.raises(OSError, match="Input/output"):
            write_all(tmp_path / "f", [b"abc"])

    def test_bypasses_the_page_cache(self, direct, tmp_path, monkeypatch):
        write, flags = os.write, []

        def noted(descriptor: int, data: memoryview) -> int:
            flags.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT))
            return write(descriptor, data)

        monkeypatch.setattr(output_file.os, "write", noted)
        write_all(tmp_path / "f", [bytes(2**20)])
        assert flags == [True]

    def test_an_error_of_the_caller_is_not_hidden_by_one_of_the_disk(self, tmp_path, monkeypatch):
        monkeypatch.setattr(output_file.os, "write", lambda *_: 1 / 0)

        def parts() -> Iterator[bytes]:
            yield bytes(output_file._BUFFER_BYTES)
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            write_all(tmp_path / "f", parts())


def write_all(path: Path, parts: Iterable[bytes]) -> OutputFile:
    with OutputFile(path) as file:
        for part in parts:
            file.write(part)
    return file


class TestPrepared:
    def test_keeps_order_and_stays_one_ahead(self):
        loaded: list[str] = []

        def lazy(name: str) -> LazyTensor:
            return LazyTensor(torch.float32, (1,), lambda: (loaded.append(name), torch.ones(1))[1])

        names = [str(number) for number in range(6)]
        found = []
        for name, _ in prepared({name: lazy(name) for name in names}, lambda _, tensor: tensor):
            found.append(name)
            time.sleep(0.02)
            assert len(loaded) <= len(found) + 1
        assert found == names == loaded

    def test_an_error_in_the_thread_arrives(self):
        bad = LazyTensor(torch.float32, (1,), lambda: torch.tensor([float("nan")]))
        with pytest.raises(EvlaError, match="w holds NaN"):
            list(prepared({"w": bad}, lambda _, tensor: tensor))


def test_the_zip_archive_is_one_that_others_read(tmp_path):
    tensors = {f"w{i}": torch.randn(3, i + 1) for i in range(5)}
    lazy = {name: LazyTensor(t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()}
    sha256 = write_torch(tmp_path / "m.pt", lazy, {name: ("é", name) for name in tensors})
    assert sha256 == hashlib.sha256((tmp_path / "m.pt").read_bytes()).hexdigest()
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        assert archive.testzip() is None  # reads every record and compares its checksum
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    for mmap in (False, True):
        loaded = torch.load(tmp_path / "m.pt", weights_only=True, mmap=mmap)["é"]
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def in_mapped_file(tensor: torch.Tensor) -> bool:
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            return "(deleted)" in line
    raise AssertionError("not mapped at all")
