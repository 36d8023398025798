"""What stands at a path that no family knows, if it is one of the things that are often taken for a checkpoint."""

from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

from evla_cli.checkpoint.files import read_json
from evla_cli.checkpoint.reader import ADAPTER_CONFIG, HOW_TO_MERGE, WEIGHT_SUFFIXES
from evla_cli.errors import EvlaError


def recognized(path: Path) -> str:
    """A sentence that says what it is and what to do; "" where nothing is recognised."""
    return _recognized_file(path) if path.is_file() else _recognized_directory(path)


def _recognized_file(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        return "It is a GGUF file, whose weights are quantised or laid out anew: take the model it was made from."
    if suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json") or path.name == "config.json":
        return f"Name the directory that it stands in, {path.parent}."
    return ""


def _recognized_directory(path: Path) -> str:
    config = _config(path)
    if (path / ADAPTER_CONFIG).is_file():
        return HOW_TO_MERGE
    if (path / "model_index.json").is_file():
        return "It is a pipeline of diffusers (model_index.json), which evla cannot handle."
    runs = [name for name in ("bundle", "pruned") if (path / name / "manifest.json").is_file()]
    if runs:
        return f"It is what evla run wrote: name {path / runs[0]}."
    snapshots = _directories(path, "snapshots/*/config.json")
    if snapshots:
        return f"It is an entry of Hugging Face's cache: name {snapshots[-1]}."
    lerobot = "type" in config and "model_type" not in config
    if lerobot or _directories(path, "checkpoints/*/pretrained_model/config.json"):
        policy = f", of type {short_repr(config['type'])}" if lerobot else ""
        return f"It is a policy of LeRobot{policy}, which evla cannot handle."
    if "auto_map" in config:
        return f"{_said(config)}, a model with code of its own (auto_map), which evla does not run."
    if "model_type" in config:
        return f"{_said(config)}, a model that evla cannot handle."
    if (path / "params.json").is_file() and any(path.glob("consolidated.*")):
        return "It is in Meta's or Mistral's own layout (params.json): convert it with transformers first."
    if any(path.glob("*.gguf")):
        return "It holds GGUF files, whose weights are quantised or laid out anew: take the model they were made from."
    nested = _directories(path, "checkpoint-*/config.json")
    if nested:
        return f"It is a folder of training checkpoints: name one of them, such as {nested[-1]}."
    if any(path.glob("*.safetensors")) and not (path / "config.json").is_file():
        return "It lacks config.json; copy it from where the model was saved."
    return ""


def _config(path: Path) -> dict[str, Any]:
    try:
        return read_json(path / "config.json")
    except EvlaError:  # none, or none that can be read
        return {}


def _said(config: dict[str, Any]) -> str:
    return f"Its config.json says model_type {short_repr(config.get('model_type'))}"


def _directories(path: Path, pattern: str) -> list[Path]:
    """Where files of this pattern stand, the latest last."""
    files = [file for file in path.glob(pattern) if file.is_file()]
    return [file.parent for file in sorted(files, key=lambda file: (file.stat().st_mtime, file))]
