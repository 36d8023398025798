"""A GPU that is too small: one line that says what to do, from every command that computes on one."""

import threading
from multiprocessing import Pipe
from typing import Any

import pico
import pytest
import torch
from click.testing import CliRunner

from evla_cli import pipeline
from evla_cli.cli.main import cli
from evla_cli.errors import EvlaError
from evla_cli.evaluation import memory
from evla_cli.evaluation.latency import Batch
from evla_cli.evaluation.rollout import Candidate, _Job, _Rollouts
from evla_cli.evaluation.suites import Trial
from evla_cli.methods.refit import NormalEquations
from evla_cli.models import skeleton
from evla_cli.models.skeleton import out_of_memory
from evla_cli.models.upload import Upload
from evla_cli.refitting import RefitOptions
from evla_cli.settings import InferenceSettings
from evla_cli.vision.planning import VisionOptions


def too_large(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1.00 GiB in all.")


def refused(*arguments: Any) -> str:
    """What the command prints on stderr: one line."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = [line for line in result.stderr.splitlines() if "it/s" not in line and "%|" not in line]
    assert line.startswith("Error: cpu is out of memory: use ")
    return line


class TestRefit:
    @pytest.mark.slow
    def test_of_the_decoder_where_the_next_layer_is_read(self, cogact_run, image_samples, tmp_path, monkeypatch):
        put = Upload.put

        def full_in_the_background(upload: Upload, *arguments: Any) -> torch.Tensor:
            if threading.current_thread() is not threading.main_thread():
                too_large()
            return put(upload, *arguments)

        monkeypatch.setattr(Upload, "put", full_in_the_background)
        options = ("--drop-layer-ids", "3", "--refit", "--samples", image_samples, "--quiet")
        line = refused("prune", cogact_run, tmp_path / "pruned", *options)
        for way_out in ("smaller batch size", "--memory-budget", "fewer samples", "--device cpu"):
            assert way_out in line
        assert list(tmp_path.iterdir()) == []

    def test_of_the_towers(self, cogact_run, image_samples, importance_file, tmp_path, monkeypatch):
        monkeypatch.setattr(NormalEquations, "add", too_large)
        with pytest.raises(EvlaError, match="cpu is out of memory: use a smaller batch size"):
            pipeline.prune(
                cogact_run,
                tmp_path / "pruned",
                importance=importance_file,
                vision=VisionOptions(drop_layers=1),
                refit=RefitOptions(image_samples),
            )
        assert list(tmp_path.iterdir()) == []


class TestLoadedModels:
    @pytest.fixture(autouse=True)
    def small_device(self, monkeypatch):
        monkeypatch.setattr(skeleton, "load_weights", too_large)

    def test_predict(self, bundle, image_samples):
        line = refused("predict", bundle, "--image", image_samples / "0.png", "--instruction", "open", "--quiet")
        assert "--dtype bfloat16, a smaller model, or --device cpu" in line

    def test_bench(self, bundle):
        assert "smaller --batch-size, a --memory-budget" in refused("bench", bundle, "--runs", 1, "--quiet")

    def test_compare(self, bundle, cogact_run, image_samples):
        line = refused("compare", cogact_run, bundle, "--samples", image_samples, "--quiet")
        assert "smaller --batch-size, --dtype bfloat16, or --device cpu" in line

    def test_report(self, bundle, image_samples, tmp_path):
        line = refused("report", bundle, "-o", tmp_path / "report", "--samples", image_samples, "--quiet")
        assert "--dtype bfloat16, or --device cpu" in line
        assert list(tmp_path.iterdir()) == []

    def test_eval(self, bundle):
        """What a worker process does, which passes an EvlaError on."""
        job = _Job(Candidate("bundle", bundle, InferenceSettings()), Trial("task", 0, 0), None)
        with pytest.raises(EvlaError, match="cpu is out of memory: use fewer --workers") as error:
            _Rollouts(suite=None, device="cpu", dtype=None)(job)
        assert isinstance(error.value.__cause__, torch.OutOfMemoryError)


def test_the_process_that_measures_memory():
    receiver, sender = Pipe(duplex=False)
    memory._answer(sender, too_large, Batch(pico.images(1), ["open"]), "cuda:0", torch.get_num_threads())
    assert str(receiver.recv()).startswith("cuda:0 is out of memory: use a smaller --batch-size")


def test_other_errors_pass():
    for text in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"):
        with pytest.raises(EvlaError, match="cuda is out of memory: leave it"), out_of_memory("cuda", "leave it"):
            raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory("cuda", "leave it"):
        raise RuntimeError("shapes cannot be multiplied")
