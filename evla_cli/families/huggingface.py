"""Checkpoints in Hugging Face's layout: one config.json beside safetensors (or .bin) shards."""

import logging
import math
from collections.abc import Callable, Collection
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

from evla_cli.checkpoint.bundle import CHECK, SETTINGS
from evla_cli.checkpoint.files import copy_file, read_json, write_json
from evla_cli.checkpoint.outputs import MARKERS
from evla_cli.checkpoint.reader import ADAPTER_CONFIG, WEIGHT_SUFFIXES, open_huggingface_checkpoint
from evla_cli.checkpoint.tensors import LazyTensors
from evla_cli.checkpoint.writer import write_huggingface_weights
from evla_cli.errors import EvlaError
from evla_cli.families.base import Checkpoint, ModelFamily, config_section, find_tokenizer
from evla_cli.plan import PrunePlan

LOG = logging.getLogger(__name__)

_MAX_LAYERS = 1000
_MAX_INTEGER = 2**31
# Of another state of the model: manifest and settings belong to the exact weights they were made for.
_STALE = {*MARKERS, SETTINGS, "model.safetensors.index.json", "pytorch_model.bin.index.json"}
_CHAT_TEMPLATES = "additional_chat_templates"  # the one folder in which transformers keeps what is no weights


def read_config(path: Path) -> dict[str, Any]:
    """A config.json. Numbers that no model has are refused here: transformers would count up to them, or compute with
    them and fail somewhere else."""
    config = read_json(path)
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key, value in section.items():
            if isinstance(value, int | float) and not abs(value) < (_MAX_INTEGER if type(value) is int else math.inf):
                raise EvlaError(
                    f"{path}: {key} is {short_repr(value)}; it must be a finite number, of 31 bits if whole."
                )
        layers = section.get("num_hidden_layers", 1)
        if type(layers) is not int or not 1 <= layers <= _MAX_LAYERS:
            raise EvlaError(f"{path}: num_hidden_layers must be between 1 and {_MAX_LAYERS}, found {layers!r}.")
    return config


def open_huggingface(
    directory: Path, family: ModelFamily, config: dict[str, Any], layer_entries: dict[str, Any] | None = None
) -> Checkpoint:
    """
    Args:
        config: the whole config, defaults filled in.
        layer_entries: config entries about single layers; those that config.json leaves out, because they follow from
            the layer's index, no longer do once layers are removed, and a pruned config must spell them out.
    """
    if config.get("transformers_weights") is not None:
        raise EvlaError(
            f"{directory / 'config.json'}: transformers_weights names {short_repr(config['transformers_weights'])} as "
            "the weights, which is not read; save the model with transformers' save_pretrained."
        )
    reader = open_huggingface_checkpoint(directory)
    written = read_json(directory / "config.json")
    target = config_section(written, family.config_path)
    target.update({key: value for key, value in (layer_entries or {}).items() if not target.get(key)})

    def write_pruned(
        source: Checkpoint,
        dest: Path,
        tensors: LazyTensors,
        plan: PrunePlan,
        on_bytes: Callable[[int], Any] | None = None,
    ) -> dict[str, str]:
        write_json(dest / "config.json", source.pruned_config(plan), allow_nan=True)
        hashes = write_huggingface_weights(dest, tensors, on_bytes=on_bytes)
        # The README of a bundle tells what is in it and how to run it, its check what it did: none of it holds longer.
        stale = {"README.md", CHECK} if source.layout == "bundle" else set()
        copy_other_files(directory, dest, stale, read={path.relative_to(directory).parts[0] for path in reader.files})
        return hashes

    return Checkpoint(
        root=directory,
        family=family,
        layout="bundle" if (directory / SETTINGS).is_file() else "huggingface",
        reader=reader,
        config=config,
        weights=reader.tensors,
        layer_prefix=family.decoder_layers,
        tokenizer_dir=find_tokenizer(directory),
        written_config=written,
        write_pruned=write_pruned,
    )


def other_files(directory: Path) -> list[Path]:
    """Every file of a checkpoint but weights and hidden ones: those at its top, and chat templates."""
    paths = [*sorted(directory.iterdir()), *sorted((directory / _CHAT_TEMPLATES).glob("*.jinja"))]
    return [p for p in paths if p.is_file() and p.suffix not in WEIGHT_SUFFIXES and not p.name.startswith(".")]


def copy_other_files(source: Path, dest: Path, leave_out: Collection[str] = (), read: Collection[str] = ()) -> None:
    """All `other_files` but those of another state of the model, and but what `dest` already has. Says what else is
    left behind: an adapter fits the weights as they were, and so do weights in other forms and folders.

    Args:
        leave_out: names of files that are not to be copied.
        read: names at the top of `source` that hold what is written otherwise, such as its weights.
    """
    for path in other_files(source):
        name = path.relative_to(source)
        if path.name not in {*_STALE, ADAPTER_CONFIG, *leave_out} and not (dest / name).exists():
            (dest / name).parent.mkdir(exist_ok=True)
            copy_file(path, dest / name)
    passed_over = {*_STALE, _CHAT_TEMPLATES, *leave_out, *read}
    left = [p.name + "/" * p.is_dir() for p in sorted(source.iterdir()) if not p.name.startswith(".")]
    left = [name for name in left if name.rstrip("/") not in passed_over and not (dest / name).exists()]
    if left:
        LOG.warning("Not copied from %s, since it fits the model as it was: %s.", source, ", ".join(left))
