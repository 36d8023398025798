"""What is measured: checkpoints and bundles, and the settings each is run with."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from evla_cli.checkpoint.bundle import SETTINGS, open_bundle
from evla_cli.checkpoint.files import read_yaml
from evla_cli.errors import EvlaError
from evla_cli.families.base import Checkpoint
from evla_cli.runtime.policy import open_acting
from evla_cli.schema import check_schema_version, from_mapping
from evla_cli.settings import InferenceSettings

NUM_NOISE_STREAMS = 10**5


@dataclass(frozen=True)
class ListedCandidate:
    """One in a `CandidateList`. Without `settings`, a bundle's own; neutral ones for any other checkpoint."""

    name: str
    checkpoint: str
    settings: InferenceSettings | None = None
    noise_stream: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.noise_stream < NUM_NOISE_STREAMS:
            raise EvlaError(f"noise_stream must be between 0 and {NUM_NOISE_STREAMS - 1}, got {self.noise_stream}.")


@dataclass(frozen=True)
class CandidateList:
    """A YAML file that names candidates; paths are relative to it."""

    schema_version: int
    candidates: tuple[ListedCandidate, ...]

    def __post_init__(self) -> None:
        check_schema_version(self.schema_version)
        if not self.candidates:
            raise EvlaError("candidates is empty; name at least one.")


def named_candidates(given: Path) -> list[ListedCandidate]:
    """What one argument names: a checkpoint, a checkpoint and its settings (`PATH@SETTINGS.yaml`), or all of a
    `CandidateList`. The paths in the result are as good as `given`'s."""
    if given.suffix in (".yaml", ".yml") and given.is_file():
        listed = from_mapping(CandidateList, read_yaml(given), str(given)).candidates
        return [replace(entry, checkpoint=str(given.parent / entry.checkpoint)) for entry in listed]
    checkpoint, at, settings = str(given).rpartition("@")
    if at and not given.exists():
        name = f"{Path(checkpoint).resolve().name}@{Path(settings).stem}"
        return [ListedCandidate(name, checkpoint, InferenceSettings.load(Path(settings)))]
    return [ListedCandidate(given.resolve().name, str(given))]


@dataclass(frozen=True)
class Candidate:
    """
    Attributes:
        label: in a list its name; else the directory's, or whatever tells the candidates apart.
        settings: those it was named with, else a bundle's own; neutral ones for any other checkpoint.
    """

    label: str
    path: Path
    checkpoint: Checkpoint
    settings: InferenceSettings

    @cached_property
    def config(self) -> Any:
        """The model's."""
        return self.checkpoint.family.build_config(self.checkpoint.config)

    def check_settings(self) -> None:
        check_settings(self.settings, self.checkpoint)


def open_candidates(given: Sequence[Path], num_denoise_steps: int | None = None) -> list[Candidate]:
    """All that `given` name, see `named_candidates`. Errors: one that cannot act or obey its settings."""
    entries = [entry for argument in given for entry in named_candidates(argument)]
    candidates = []
    for label, entry in zip(_labels(entries), entries, strict=True):
        path = Path(entry.checkpoint)
        checkpoint = open_acting(path)
        settings = with_denoise_steps(entry.settings or own_settings(checkpoint), num_denoise_steps)
        candidates.append(Candidate(label, path, checkpoint, settings))
        candidates[-1].check_settings()
    return candidates


def own_settings(checkpoint: Checkpoint) -> InferenceSettings:
    """A bundle's; neutral ones for any other checkpoint."""
    if checkpoint.layout != "bundle":
        return InferenceSettings()
    open_bundle(checkpoint.root)
    return InferenceSettings.load(checkpoint.root / SETTINGS)


def with_denoise_steps(settings: InferenceSettings, num_denoise_steps: int | None) -> InferenceSettings:
    """The same settings where `num_denoise_steps` is None."""
    if num_denoise_steps is None:
        return settings
    return replace(settings, diffusion=replace(settings.diffusion, num_denoise_steps=num_denoise_steps))


def check_settings(settings: InferenceSettings, checkpoint: Checkpoint) -> None:
    """Errors: the model cannot obey them."""
    config = checkpoint.family.build_config(checkpoint.config)
    head = config.action_config
    settings.check(config.num_visual_tokens, checkpoint.num_layers, head.num_hidden_layers, head.num_train_steps)


def neutral(settings: InferenceSettings) -> InferenceSettings:
    """All tokens, no caching; actions are sampled as before."""
    return InferenceSettings(diffusion=settings.diffusion)


def _labels(entries: Sequence[ListedCandidate]) -> list[str]:
    """Names where they differ, else paths instead of directories' names; the same twice is numbered."""
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        paths = [entry.checkpoint for entry in entries]
        names = [path if Path(path).resolve().name == name else name for name, path in zip(names, paths, strict=True)]
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return labels
