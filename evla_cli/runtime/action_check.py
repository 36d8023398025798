"""`check.json`: what a bundle did once, where it was written, and whether it still does the same where it is now."""

import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from evla_cli import __version__
from evla_cli.checkpoint.bundle import CHECK, library_versions
from evla_cli.checkpoint.files import read_json, write_json
from evla_cli.errors import EvlaError
from evla_cli.models.tiled_linear import multiplies_natively
from evla_cli.runtime.policy import Policy
from evla_cli.schema import SCHEMA_VERSION, check_schema_version, from_mapping, to_mapping

IMAGE = "gradients-1"  # name and version of what `fixed_image` draws
INSTRUCTION = "open the drawer"
SEED = 0
# What another processor or another number of threads may change. In bfloat16 the kernels for AVX-512 and for AVX2 give
# actions up to 0.05 apart.
_TOLERANCES = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 0.1, "float16": 0.1}
_MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class Surroundings:
    """What decides the bits of a prediction besides the bundle: where all of it is the same, so are they.

    Attributes:
        processor: its name and, since virtual machines hide that, its numbers.
        instructions: those that torch's own kernels use.
        native_dtypes: of half precision, those that the processor multiplies matrices in.
    """

    device: str
    threads: int
    processor: str
    num_cores: int
    instructions: str
    native_dtypes: tuple[str, ...]
    versions: dict[str, str]

    @classmethod
    def here(cls, device: str) -> "Surroundings":
        halves = (torch.bfloat16, torch.float16)
        return cls(
            device=device,
            threads=torch.get_num_threads(),
            processor=_processor(),
            num_cores=os.cpu_count() or 0,
            instructions=torch.backends.cpu.get_cpu_capability(),
            native_dtypes=tuple(_name(dtype) for dtype in halves if multiplies_natively(dtype)),
            versions={
                "evla": __version__,
                **library_versions(),
                **{name: version(name) for name in ("pillow", "tokenizers")},
            },
        )

    def differing(self, other: "Surroundings") -> list[str]:
        """Names of what is not the same."""
        mine, theirs = to_mapping(self), to_mapping(other)
        names = [name for name in mine if name != "versions" and mine[name] != theirs[name]]
        libraries = self.versions | other.versions
        return names + [name for name in libraries if self.versions.get(name) != other.versions.get(name)]


@dataclass(frozen=True)
class ActionCheck:
    """
    Attributes:
        dtype: what the vision-language model computed in.
        denoised_action: (H, A), as the action head gave it: not clipped, the gripper neither open nor closed.
    """

    schema_version: int
    image: str
    instruction: str
    seed: int
    dtype: str
    surroundings: Surroundings
    denoised_action: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        check_schema_version(self.schema_version)
        for name, expected in (("image", IMAGE), ("instruction", INSTRUCTION), ("seed", SEED)):
            if getattr(self, name) != expected:
                raise EvlaError(f"{name} must be {expected!r}, the one that this evla acts on.")
        if self.dtype not in _TOLERANCES:
            raise EvlaError(f"dtype must be one of {', '.join(_TOLERANCES)}.")
        rows = self.denoised_action
        if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
            raise EvlaError("denoised_action must have rows of one length.")
        if not np.isfinite(rows).all():
            raise EvlaError("denoised_action must be finite.")

    @classmethod
    def load(cls, root: Path) -> "ActionCheck | None":
        """That of the bundle `root`; None if it has none."""
        path = root / CHECK
        if not os.path.lexists(path):
            return None
        if not path.is_file():
            raise EvlaError(f"{path} is not a file.")
        return from_mapping(cls, read_json(path, _MAX_BYTES), str(path))

    def write(self, root: Path) -> None:
        write_json(root / CHECK, to_mapping(self))

    @property
    def size(self) -> str:
        return f"{len(self.denoised_action)} x {len(self.denoised_action[0])}"


@dataclass(frozen=True)
class CheckResult:
    """
    Attributes:
        largest_difference: between two denoised actions.
        tolerance: 0 where the surroundings are the same.
        elsewhere: what is different about the surroundings.
    """

    largest_difference: float
    tolerance: float
    elsewhere: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return self.largest_difference <= self.tolerance


def act_once(policy: Policy) -> ActionCheck:
    """One prediction for the fixed image and instruction, in the first of the model's datasets.

    Errors: whatever a library that does not fit the model raises; EvlaError where the result is not as it must be.
    """
    generator = torch.Generator().manual_seed(SEED)
    dataset = min(policy.model.config.norm_stats)
    found = policy.predict([fixed_image()], [INSTRUCTION], unnorm_key=dataset, generator=generator)
    config = policy.model.config.action_config
    shape = (1, config.action_horizon, config.action_dim)
    for actions in (found.denoised_actions, found.actions):
        if actions.shape != shape:
            raise EvlaError(f"Its action has shape {list(actions.shape)}, its config says {list(shape)}.")
        if not np.isfinite(actions).all():
            raise EvlaError("Its action is not finite.")
    parameter = next(policy.model.projector.parameters())
    return ActionCheck(
        schema_version=SCHEMA_VERSION,
        image=IMAGE,
        instruction=INSTRUCTION,
        seed=SEED,
        dtype=_name(parameter.dtype),
        surroundings=Surroundings.here(str(parameter.device)),
        denoised_action=tuple(tuple(row) for row in found.denoised_actions[0].astype(np.float64).tolist()),
    )


def compare_actions(then: ActionCheck, now: ActionCheck) -> CheckResult:
    """Errors: the two are of different models."""
    for name in ("dtype", "size"):
        if getattr(then, name) != getattr(now, name):
            raise EvlaError(f"{CHECK} is of another model: {name} {getattr(then, name)}, here {getattr(now, name)}.")
    elsewhere = tuple(then.surroundings.differing(now.surroundings))
    difference = float(np.abs(np.subtract(then.denoised_action, now.denoised_action)).max())
    return CheckResult(difference, _TOLERANCES[now.dtype] if elsewhere else 0.0, elsewhere)


def fixed_image() -> np.ndarray:
    """(224, 224, 3), from whole numbers alone: no library can draw it differently, and no two patches are alike."""
    x, y = np.meshgrid(np.arange(224), np.arange(224))
    return np.stack((x, y, x * y // 16 % 256), axis=-1).astype(np.uint8)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _processor() -> str:
    facts: dict[str, str] = {}
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:  # Linux
        for line in file:
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    known = [facts[key] for key in ("model name", "cpu family", "model", "stepping") if facts.get(key)]
    return " ".join(known) or platform.processor() or platform.machine()
