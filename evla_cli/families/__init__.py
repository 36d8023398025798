"""The kinds of VLA that evla knows, and which one a path holds."""

from importlib import import_module
from pathlib import Path

from evla_cli.checkpoint.bundle import MANIFEST, open_manifest
from evla_cli.checkpoint.files import check_exists
from evla_cli.errors import EvlaError
from evla_cli.families.base import Checkpoint
from evla_cli.families.unknown import recognized
from evla_cli.versions import warn_of_untested_versions

# Asked in this order; each module's `open_checkpoint(path)` returns None for what is not its own.
FAMILIES = {
    "cogact": "evla_cli.families.cogact",
    "decoder": "evla_cli.families.decoder",
}


def open_checkpoint(path: Path, check_manifest: bool = True) -> Checkpoint:
    """Open the checkpoint at `path`: a directory, or CogACT's `<RUN>/checkpoints/<name>.pt`.

    Errors: it is none, or files that its manifest lists (where evla wrote one) are missing or of another size.
    """
    check_exists(path)
    warn_of_untested_versions()
    for module in FAMILIES.values():
        checkpoint = import_module(module).open_checkpoint(path)
        if checkpoint is not None:
            if check_manifest and (checkpoint.root / MANIFEST).is_file():
                _check_listed(checkpoint)
            return checkpoint
    found = recognized(path)
    raise EvlaError(
        f"{path} is not a checkpoint that evla knows. {found}{' ' if found else ''}Expected a CogACT run (config.json, "
        "dataset_statistics.json, checkpoints/*.pt), a bundle made by evla export, or a Hugging Face decoder directory "
        "(config.json with a known model_type, model.safetensors or pytorch_model.bin)."
    )


def _check_listed(checkpoint: Checkpoint) -> None:
    """Errors: the manifest is broken, or does not list files that decide what the model computes."""
    listed = open_manifest(checkpoint.root).files
    for path in (checkpoint.root / "config.json", *checkpoint.reader.files):
        name = path.relative_to(checkpoint.root).as_posix()
        if name not in listed:
            raise EvlaError(f"{checkpoint.root / MANIFEST} does not list {name}, which is no part of what evla wrote.")
