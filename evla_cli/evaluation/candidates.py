"""What is measured: checkpoints and bundles, and the settings each is run with."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from evla_cli.checkpoint.bundle import SETTINGS, open_bundle
from evla_cli.families.base import Checkpoint
from evla_cli.runtime.policy import open_acting
from evla_cli.settings import InferenceSettings


@dataclass(frozen=True)
class Candidate:
    """
    Attributes:
        label: the directory's name, or whatever tells the candidates apart.
        settings: a bundle's own; neutral ones for any other checkpoint.
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


def open_candidates(paths: Sequence[Path], num_denoise_steps: int | None = None) -> list[Candidate]:
    """Errors: one of them cannot act, or its settings cannot be obeyed."""
    candidates = []
    for label, path in zip(_labels(paths), paths, strict=True):
        checkpoint = open_acting(path)
        settings = with_denoise_steps(own_settings(checkpoint), num_denoise_steps)
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


def _labels(paths: Sequence[Path]) -> list[str]:
    """Names where they differ, else paths; the same path twice is numbered."""
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return labels
