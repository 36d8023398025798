"""What was measured (LayerImportance) and what was decided (PrunePlan): frozen records with a file form."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evla_cli import __version__
from evla_cli.checkpoint.bundle import library_versions
from evla_cli.checkpoint.files import read_json, read_yaml, sha256_file
from evla_cli.errors import EvlaError, suggest
from evla_cli.schema import SCHEMA_VERSION, check_schema_version, check_sha256, from_mapping, to_mapping

METRICS = ("block_influence",)
TOWER_METRIC = "relative_change"  # of the blocks in `vision`; older versions had none, and measured cosines there
PLAN = "prune_plan.yaml"
_OPTIONAL = ("action_head", "activations_sha256", "vision", "vision_metric", "position_weights")
_OPTIONAL_OF_LAYER = ("per_sample", "by_modality")
_NUMBER_LIST = re.compile(r"\[\n([\s\d.,e+-]*)\]")  # one line each: a number a line would make a file that nobody opens


@dataclass(frozen=True)
class LayerScore:
    """One decoder layer: 1 - mean cosine of its input and output. Higher means that the layer does more: keep it."""

    index: int  # 0-based, as in the source
    importance: float
    standard_error: float | None  # over samples; None for a single sample
    per_sample: tuple[float, ...] | None = None  # whose mean `importance` is; None in files of older versions
    by_modality: dict[str, float] | None = None  # the same over the positions of one kind; None for a plain decoder

    def __post_init__(self) -> None:
        if not math.isfinite(self.importance):
            raise EvlaError(f"Layer {self.index} has the importance {self.importance}; it must be a finite number.")
        if self.standard_error is not None and not 0 <= self.standard_error < math.inf:
            raise EvlaError(f"Layer {self.index} has the standard error {self.standard_error}; it cannot be that.")
        if not all(map(math.isfinite, [*(self.per_sample or ()), *(self.by_modality or {}).values()])):
            raise EvlaError(f"Layer {self.index} has per_sample or by_modality values that are not finite numbers.")


@dataclass(frozen=True)
class LayerImportance:
    """`importance.json`: what `evla analyze` found."""

    schema_version: int
    metric: str
    num_samples: int
    checkpoint_sha256: str
    samples_sha256: str
    layers: tuple[LayerScore, ...]
    family: str = ""
    dtype: str = ""
    batch_size: int | None = None
    evla_version: str = __version__
    action_head: dict[str, Any] | None = None  # similarity between denoising steps, with --figures
    activations_sha256: str | None = None  # of the file that `activations_file` names; None in older versions' files
    vision: dict[str, tuple[LayerScore, ...]] = field(default_factory=dict)  # tower -> every block that runs
    position_weights: dict[str, float] | None = None  # kind of position -> how often it counted; None: once
    vision_metric: str | None = None  # what `vision` was measured by

    def __post_init__(self) -> None:
        check_schema_version(self.schema_version)
        if self.metric not in METRICS:
            raise EvlaError(f"Unknown metric '{self.metric}'. {suggest(self.metric, METRICS)}")
        if self.vision_metric not in (None, TOWER_METRIC):
            raise EvlaError(
                f"Unknown vision_metric '{self.vision_metric}'. {suggest(self.vision_metric, [TOWER_METRIC])}"
            )
        if self.num_samples < 1:
            raise EvlaError(f"num_samples must be at least 1, got {self.num_samples}.")
        check_sha256("checkpoint_sha256", self.checkpoint_sha256)
        check_sha256("samples_sha256", self.samples_sha256)
        if [score.index for score in self.layers] != list(range(len(self.layers))) or not self.layers:
            raise EvlaError("The layers of an importance file must be listed in order: 0, 1, 2, ...")
        for tower, blocks in self.vision.items():
            if [score.index for score in blocks] != list(range(len(blocks))):
                raise EvlaError(f"The blocks of vision.{tower} must be listed in order: 0, 1, 2, ...")
        for score in self.layers:
            if score.per_sample is not None and len(score.per_sample) != self.num_samples:
                raise EvlaError(
                    f"Layer {score.index} has {len(score.per_sample)} per_sample values for {self.num_samples} samples."
                )

    def ranking(self) -> list[int]:
        """Layer indices, least important first; ties go to the lower index."""
        return ranked(self.layers)

    def to_json(self) -> str:
        record = to_mapping(self) | {"ranking": self.ranking()}
        scores = [*record["layers"], *(score for blocks in record["vision"].values() for score in blocks)]
        for part, optional in ((record, _OPTIONAL), *((score, _OPTIONAL_OF_LAYER) for score in scores)):
            for key in optional:
                if not part[key]:
                    del part[key]
        text = json.dumps(record, indent=2, allow_nan=False)
        return _NUMBER_LIST.sub(lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"

    @classmethod
    def load(cls, path: Path) -> "LayerImportance":
        record = read_json(path)
        record.pop("ranking", None)  # derived
        return from_mapping(cls, record, str(path))


def ranked(scores: Sequence[LayerScore]) -> list[int]:
    """Indices, least important first; ties go to the lower index."""
    return sorted(range(len(scores)), key=lambda index: (scores[index].importance, index))


def activations_file(importance: Path) -> Path:
    """What `evla analyze` writes beside the importance file: every MLP channel's root mean square."""
    return importance.with_name(f"{importance.stem}.activations.safetensors")


def has_activations(importance: Path) -> bool:
    """Whether that file is there and is the one made with this importance file."""
    path = activations_file(importance)
    return path.is_file() and sha256_file(path) == LayerImportance.load(importance).activations_sha256


@dataclass(frozen=True)
class StackPlan:
    """Which layers of one stack, the decoder or a vision tower, stay, and which of their MLP channels.

    Attributes:
        keep_layers: indices in the source, ascending.
        mlp_keep: for every kept layer the channels that stay, ascending; None keeps all.
    """

    num_layers: int
    intermediate_size: int
    keep_layers: tuple[int, ...]
    mlp_keep: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        kept = self.keep_layers
        if not kept:
            raise EvlaError(f"The plan keeps none of the {self.num_layers} layers; at least one must stay.")
        if list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= self.num_layers:
            raise EvlaError(f"keep_layers must be ascending indices from 0 to {self.num_layers - 1}, got {list(kept)}.")
        if self.mlp_keep is None:
            return
        if len(self.mlp_keep) != len(kept) or len({len(channels) for channels in self.mlp_keep}) != 1:
            raise EvlaError("mlp_keep must list the same number of channels for every kept layer.")
        for channels in self.mlp_keep:
            if (
                not channels
                or list(channels) != sorted(set(channels))
                or not 0 <= channels[0] <= channels[-1] < self.intermediate_size
            ):
                raise EvlaError(f"mlp_keep must hold ascending channels from 0 to {self.intermediate_size - 1}.")

    @property
    def dropped_layers(self) -> tuple[int, ...]:
        return tuple(sorted(set(range(self.num_layers)) - set(self.keep_layers)))

    @property
    def kept_intermediate_size(self) -> int:
        return self.intermediate_size if self.mlp_keep is None else len(self.mlp_keep[0])

    @property
    def keeps_everything(self) -> bool:
        return not self.dropped_layers and self.kept_intermediate_size == self.intermediate_size

    def sizes_record(self) -> dict[str, Any]:
        return {
            "num_layers": self.num_layers,
            "keep_layers": list(self.keep_layers),
            "dropped_layers": list(self.dropped_layers),
            "intermediate_size": self.intermediate_size,
            "kept_intermediate_size": self.kept_intermediate_size,
        }

    def masks_record(self) -> dict[int, str] | None:
        """Kept layer (source index) -> bit mask over its channels in hexadecimal, channel 0 the highest bit of the
        first digit: 11008 numbers a layer would make a file that nobody opens."""
        if self.mlp_keep is None:
            return None
        kept = zip(self.keep_layers, self.mlp_keep, strict=True)
        return {layer: _to_mask(channels, self.intermediate_size) for layer, channels in kept}


@dataclass(frozen=True)
class PrunePlan(StackPlan):
    """Which decoder layers and MLP channels stay; `prune_plan.yaml`.

    Attributes:
        how: how it was decided, for the reader: the options of `analyze` and `prune` under a recipe's keys, scores.
        vision: tower -> what stays of it; towers that are left alone are left out.
    """

    checkpoint_sha256: str = ""
    how: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, StackPlan] = field(default_factory=dict)

    def of_towers(self) -> "PrunePlan":
        """What it does to the vision towers, and nothing to the decoder."""
        return replace(self, keep_layers=tuple(range(self.num_layers)), mlp_keep=None)

    def to_record(self) -> dict[str, Any]:
        record = {
            "schema_version": SCHEMA_VERSION,
            "evla_version": __version__,
            "libraries": library_versions(),
            "checkpoint_sha256": self.checkpoint_sha256,
            **self.sizes_record(),
            "how": self.how,
            "mlp_keep": self.masks_record(),
        }
        if self.vision:
            towers = self.vision.items()
            record["vision"] = {
                name: tower.sizes_record() | {"mlp_keep": tower.masks_record()} for name, tower in towers
            }
        return record

    @classmethod
    def load(cls, path: Path) -> "PrunePlan":
        record = read_yaml(path)
        if "keep_layers" not in record:
            raise EvlaError(f"{path} has no keep_layers: not a {PLAN}, which evla prune writes into what it prunes.")
        plan = from_mapping(_PlanFile, record, str(path))
        try:
            return plan.plan()
        except EvlaError as error:
            raise EvlaError(f"{path}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class _StackFile:
    """A stack's keys as they stand on the disk: what follows from other keys must fit them."""

    num_layers: int
    keep_layers: tuple[int, ...]
    dropped_layers: tuple[int, ...]
    intermediate_size: int
    kept_intermediate_size: int
    mlp_keep: dict[int, str] | None

    def __post_init__(self) -> None:
        # In this order: a number of layers that nothing lists must not be counted up to.
        if self.num_layers != len(self.keep_layers) + len(self.dropped_layers) or (
            sorted(self.keep_layers + self.dropped_layers) != list(range(self.num_layers))
        ):
            raise EvlaError(f"keep_layers and dropped_layers must name each of the {self.num_layers} layers once.")

    def stack(self) -> StackPlan:
        """Errors: the widths or the masks contradict each other."""
        mlp_keep = None
        if self.mlp_keep is not None:
            if self.mlp_keep.keys() != set(self.keep_layers):
                raise EvlaError("mlp_keep must have one channel mask for each of keep_layers, and no other.")
            mlp_keep = tuple(_from_mask(self.mlp_keep[layer], self.intermediate_size) for layer in self.keep_layers)
        plan = StackPlan(self.num_layers, self.intermediate_size, self.keep_layers, mlp_keep)
        if plan.kept_intermediate_size != self.kept_intermediate_size:
            raise EvlaError(
                f"kept_intermediate_size is {self.kept_intermediate_size}, mlp_keep keeps "
                f"{plan.kept_intermediate_size} channels."
            )
        return plan


@dataclass(frozen=True, kw_only=True)
class _PlanFile(_StackFile):
    """`prune_plan.yaml`."""

    schema_version: int
    checkpoint_sha256: str
    how: dict[str, Any]
    evla_version: str = ""
    libraries: dict[str, str] = field(default_factory=dict)
    vision: dict[str, _StackFile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_schema_version(self.schema_version)
        check_sha256("checkpoint_sha256", self.checkpoint_sha256)
        super().__post_init__()

    def plan(self) -> PrunePlan:
        decoder = self.stack()
        towers = {}
        for name, tower in self.vision.items():
            try:
                towers[name] = tower.stack()
            except EvlaError as error:
                raise EvlaError(f"vision.{name}: {error}") from error
        return PrunePlan(**vars(decoder), checkpoint_sha256=self.checkpoint_sha256, how=self.how, vision=towers)


def _to_mask(channels: tuple[int, ...], width: int) -> str:
    mask = bytearray((width + 7) // 8)
    for channel in channels:
        mask[channel // 8] |= 128 >> channel % 8
    return mask.hex()


def _from_mask(text: str, width: int) -> tuple[int, ...]:
    num_bytes = (width + 7) // 8
    if not re.fullmatch("(?:[0-9a-f]{2})*", text) or len(text) != 2 * num_bytes:
        raise EvlaError(f"mlp_keep: the mask of {width} channels must have {2 * num_bytes} hexadecimal digits.")
    mask = bytes.fromhex(text)
    kept = tuple(channel for channel in range(8 * num_bytes) if mask[channel // 8] & 128 >> channel % 8)
    if kept and kept[-1] >= width:
        raise EvlaError(f"mlp_keep: a mask names channel {kept[-1]} of {width}.")
    return kept
