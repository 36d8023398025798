"""Pico checkpoints, written once a session. Copy what you change: `shutil.copytree(cogact_run, tmp_path / "run")`.

torch and transformers are imported where they are used: the process that only hands tests to others needs neither, and
starts the others four seconds earlier.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING

import beforehand  # noqa: F401
import pytest

if TYPE_CHECKING:
    from evla_cli.runtime.policy import Policy

# Every process that a test or evla forks comes from one server, which has imported whatever any of them needs; evla's
# own choice of what to import there would hold for all that comes after.
PRELOADED = ["beforehand", "processes", "quick_python", "pico", "pytest", "matplotlib.pyplot", "torch.distributed.run"]
PRELOADED += [f"evla_cli.{name}" for name in ("running", "comparison", "cli.main", "evaluation.rollout")]
PRELOADED += [f"evla_cli.evaluation.{name}" for name in ("bench", "compare", "report", "pictures", "stock")]
PRELOADED += ["frozen"]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
forkserver.set_forkserver_preload(PRELOADED)
forkserver.set_forkserver_preload = lambda modules: None


# Handed out first, so that no process is left with one of them when the others are done.
LONG_FILES = ["eval", "families", "outputs", "run", "reproducible", "report", "decoder_types", "vision", "system"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    long = {f"test_{name}.py": number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: long.get(item.path.name, len(long)))


def pytest_collection_finish() -> None:
    import frozen  # noqa: F401
    import torch

    from evla_cli.evaluation import memory

    torch.set_num_threads(1)  # pico tensors are too small to share
    memory.START_METHOD = "forkserver"  # test-slow measures in a process of its own


@pytest.fixture(scope="session")
def cogact_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pico

    run = tmp_path_factory.mktemp("cogact") / "run"
    pico.write_cogact(run)
    return run


@pytest.fixture(scope="session")
def decoders(tmp_path_factory: pytest.TempPathFactory):
    """`decoders("qwen2")` is the directory of that pico decoder."""
    import pico

    root = tmp_path_factory.mktemp("decoders")

    def directory(model_type: str) -> Path:
        path = root / model_type
        if not path.exists():
            path.mkdir()
            pico.write_decoder(path, model_type)
        return path

    return directory


@pytest.fixture(scope="session")
def image_samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pico

    directory = tmp_path_factory.mktemp("images") / "samples"
    pico.write_image_samples(directory)
    return directory


@pytest.fixture(scope="session")
def text_samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pico

    file = tmp_path_factory.mktemp("texts") / "samples.jsonl"
    pico.write_text_samples(file)
    return file


@pytest.fixture(scope="session")
def policy(cogact_run: Path) -> Policy:
    """The pico CogACT under neutral settings; `policy.with_settings(...)` for others."""
    from evla_cli.runtime.policy import policy_from_checkpoint

    return policy_from_checkpoint(cogact_run)


@pytest.fixture(scope="session")
def policy64(cogact_run: Path) -> Policy:
    """The same in float64, where equality up to rounding can be asked for tightly."""
    import torch

    from evla_cli.runtime.policy import policy_from_checkpoint

    return policy_from_checkpoint(cogact_run, dtype=torch.float64)


@pytest.fixture(scope="session")
def importance_file(cogact_run: Path, image_samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from evla_cli import pipeline

    file = tmp_path_factory.mktemp("importance") / "importance.json"
    pipeline.analyze_to_file(cogact_run, image_samples, file)
    return file


@pytest.fixture(scope="session")
def bundle(cogact_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico CogACT exported with 8 of its 16 visual tokens and the paper's interval of 5."""
    from evla_cli import pipeline

    directory = tmp_path_factory.mktemp("bundle") / "bundle"
    settings = pipeline.settings_with(None, visual_tokens={"num_keep": 8}, action_cache={"interval": 5})
    pipeline.export(cogact_run, directory, settings)
    return directory


@pytest.fixture(scope="session")
def quick_python() -> Iterator[Path]:
    """A `python` for `-m evla_cli ...` and scripts that starts at once; see quick_python.py for what it is not."""
    from quick_python import start_server

    with tempfile.TemporaryDirectory(prefix="evla-") as directory:
        python, server = start_server(Path(directory))
        yield python
        server.kill()
        server.join()
