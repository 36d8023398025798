"""What two checkpoints differ in: tensors, config, settings, plan, versions, files. Both are read piece by piece."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evla_cli.checkpoint.bundle import CHECK, MANIFEST, SETTINGS
from evla_cli.checkpoint.files import read_json, read_yaml, same_bytes, sha256_file
from evla_cli.checkpoint.tensors import LazyTensor, LazyTensors
from evla_cli.families import open_checkpoint
from evla_cli.families.base import Checkpoint
from evla_cli.families.huggingface import other_files
from evla_cli.plan import PLAN, PrunePlan, StackPlan
from evla_cli.progress import progress_bar

_CHUNK = 2**22  # values of a tensor that are compared at a time
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ABSENT = object()


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same in both.

    Attributes:
        kind: "tensor", "config", "setting", "plan", "manifest" (source and recipe), "version" or "file".
        name: of a tensor or a file; of a value, its keys joined by dots.
        this, other: what the one and the other have there, ABSENT for nothing. Of a tensor, dtype and shape; of a file,
            its SHA-256; of a layer's channels in a plan, how many stay.
        num_differing: how many values of a tensor differ, or how many channels stay in only one of two plans.
        max_abs_difference: between a tensor's values; not finite where theirs are not.
    """

    kind: str
    name: str
    this: Any
    other: Any
    num_differing: int | None = None
    max_abs_difference: float | None = None

    def to_record(self) -> dict[str, Any]:
        record: dict[str, Any] = {"kind": self.kind, "name": self.name}
        record |= {side: getattr(self, side) for side in ("this", "other") if getattr(self, side) is not ABSENT}
        if self.num_differing is not None:
            record["num_differing"] = self.num_differing
        if self.max_abs_difference is not None:  # JSON has no infinity
            record["max_abs_difference"] = self.max_abs_difference if math.isfinite(self.max_abs_difference) else None
        return record

    def __str__(self) -> str:
        """One line; of two lists, the first entry that differs."""
        this, other, entry = self.this, self.other, ""
        if isinstance(this, list) and isinstance(other, list) and len(this) == len(other):
            index = next(i for i in range(len(this)) if this[i] != other[i])
            this, other, entry = this[index], other[index], f"[{index}]"
        texts = [_text(this), _text(other)]
        text = f"{self.kind:8} {self.name}{entry}: {texts[0] if this == other else ' | '.join(texts)}"
        if self.num_differing == 0:
            return f"{text}, the same values"
        if self.max_abs_difference is not None:
            return f"{text}, {self.num_differing:,} values differ by up to {self.max_abs_difference:g}"
        if self.num_differing is not None:
            return f"{text} channels, {self.num_differing:,} of them not in both"
        return text


def _text(value: Any) -> str:
    if value is ABSENT:
        return "absent"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 70 else f"{text[:67]}..."


@dataclass(frozen=True)
class Comparison:
    """
    Attributes:
        layouts: of the two. Where they differ, so must the files: then only tensors and config are compared.
        num_tensors: that either has.
        differences: tensors last, since what else differs tends to be their reason.
    """

    layouts: tuple[str, str]
    num_tensors: int
    differences: tuple[Difference, ...]

    @property
    def scope(self) -> str:
        if self.layouts[0] == self.layouts[1]:
            return "every file"
        return f"the model's config (their layouts differ: {' and '.join(self.layouts)})"


def compare_checkpoints(this: Path, other: Path) -> Comparison:
    """Compare bundles, pruned checkpoints or native runs. Errors: one of the two cannot be opened as a checkpoint."""
    pair = open_checkpoint(this, check_manifest=False), open_checkpoint(other, check_manifest=False)
    layouts = pair[0].layout, pair[1].layout
    config = list(_compare_values("config", pair[0].config, pair[1].config))
    if layouts[0] == layouts[1]:
        tensors = pair[0].reader.tensors, pair[1].reader.tensors
        found = _compare_files(*pair, config)
    else:
        tensors = pair[0].weights, pair[1].weights  # the model's names, which do not depend on the layout
        found = [*config, *_compare_tensors(*tensors)]
    return Comparison(layouts, len(tensors[0] | tensors[1]), tuple(found))


def _compare_files(this: Checkpoint, other: Checkpoint, config: list[Difference]) -> list[Difference]:
    """What the files say differently, and the files that differ although they say the same."""
    mine, theirs = _files(this), _files(other)
    changed = [name for name in sorted(mine | theirs) if not _same_file(mine.get(name), theirs.get(name))]
    if not changed:
        return []
    weight_files = {name for name in changed if name.endswith(".index.json")}
    for checkpoint in (this, other):
        weight_files |= {path.relative_to(checkpoint.root).as_posix() for path in checkpoint.reader.files}
    tensors = []
    if weight_files.intersection(changed):
        tensors = list(_compare_tensors(this.reader.tensors, other.reader.tensors))
    reasons = dict.fromkeys(weight_files, tensors) | {"config.json": config}
    for name, compare in ((SETTINGS, _compare_settings), (PLAN, _compare_plans), (MANIFEST, _compare_manifests)):
        if name in changed and name in mine and name in theirs:
            reasons[name] = list(compare(mine[name], theirs[name]))
    found = [difference for name, some in reasons.items() if name not in weight_files for difference in some]
    for name in changed:
        # The manifest repeats the hash of every other file: nothing new if one of those differs.
        if not reasons.get(name) and (name != MANIFEST or changed == [MANIFEST]):
            this_hash, other_hash = (sha256_file(side[name]) if name in side else ABSENT for side in (mine, theirs))
            found.append(Difference("file", name, this_hash, other_hash))
    return found + tensors


def _files(checkpoint: Checkpoint) -> dict[str, Path]:
    """The files that a checkpoint consists of, by their path inside it. A bundle's check is of another machine."""
    root = checkpoint.root
    paths = [*checkpoint.reader.files, *other_files(root), *sorted((root / "llm_config").glob("*"))]
    ignored = {CHECK} if checkpoint.layout == "bundle" else set()
    return {path.relative_to(root).as_posix(): path for path in paths if path.is_file() and path.name not in ignored}


def _same_file(this: Path | None, other: Path | None) -> bool:
    return this is not None and other is not None and same_bytes(this, other)


def _compare_tensors(this: LazyTensors, other: LazyTensors) -> Iterator[Difference]:
    names = list(this | other)
    with progress_bar("comparing", len(names), "tensor") as bar:
        for name in names:
            if name not in this or name not in other:
                mine, theirs = (_described(side[name]) if name in side else ABSENT for side in (this, other))
                yield Difference("tensor", name, mine, theirs)
            else:
                yield from _compare_tensor(name, this[name], other[name])
            bar.update()


def _compare_tensor(name: str, this: LazyTensor, other: LazyTensor) -> Iterator[Difference]:
    """Bit by bit; by value where the dtypes differ, and not at all where the shapes do."""
    sides = _described(this), _described(other)
    if this.shape != other.shape:
        yield Difference("tensor", name, *sides)
        return
    num_differing, largest = 0, torch.zeros((), dtype=torch.float64)
    for mine, theirs in zip(this.load().flatten().split(_CHUNK), other.load().flatten().split(_CHUNK), strict=True):
        if this.dtype == other.dtype:
            bits = _BITS[this.dtype.itemsize]
            differs = mine.view(bits) != theirs.view(bits)
        else:
            differs = mine.double() != theirs.double()
        if bool(differs.any()):
            num_differing += int(differs.sum())
            distance = (mine[differs].double() - theirs[differs].double()).abs().max()
            largest = torch.maximum(largest, distance)  # keeps a NaN
    if num_differing or this.dtype != other.dtype:
        yield Difference("tensor", name, *sides, num_differing, float(largest))


def _described(lazy: LazyTensor) -> str:
    return f"{str(lazy.dtype).removeprefix('torch.')} {list(lazy.shape)}"


def _compare_settings(this: Path, other: Path) -> Iterator[Difference]:
    return _compare_values("setting", read_yaml(this), read_yaml(other))


def _compare_plans(this: Path, other: Path) -> Iterator[Difference]:
    records = read_yaml(this), read_yaml(other)
    for record in records:
        for stack in (record, *record.get("vision", {}).values()):
            stack.pop("mlp_keep", None)
    yield from _compare_values("plan", *records)
    plans = PrunePlan.load(this), PrunePlan.load(other)
    for tower in ("", *plans[0].vision):
        stacks = [plan.vision.get(tower) if tower else plan for plan in plans]
        mine, theirs = (_kept_channels(stack) if stack else {} for stack in stacks)
        prefix = f"vision.{tower}." if tower else ""
        for layer in sorted(mine.keys() & theirs.keys()):
            differing = mine[layer] ^ theirs[layer]
            if differing:
                name, counts = f"{prefix}mlp_keep.{layer}", (len(mine[layer]), len(theirs[layer]))
                yield Difference("plan", name, *counts, len(differing))


def _kept_channels(plan: StackPlan) -> dict[int, set[int]]:
    every = range(plan.intermediate_size)
    return dict(zip(plan.keep_layers, map(set, plan.mlp_keep or [every] * len(plan.keep_layers)), strict=True))


def _compare_manifests(this: Path, other: Path) -> Iterator[Difference]:
    records = read_json(this), read_json(other)
    for record in records:
        for repeated in ("files", "plan"):  # said by the files themselves and by prune_plan.yaml
            record.pop(repeated, None)
    return _compare_values("manifest", *records)


def _compare_values(kind: str, this: dict[str, Any], other: dict[str, Any]) -> Iterator[Difference]:
    mine, theirs = _flat(this), _flat(other)
    for name in mine | theirs:
        sides = mine.get(name, ABSENT), theirs.get(name, ABSENT)
        if sides[0] != sides[1]:
            if name.startswith(("evla_version", "libraries.")):
                yield Difference("version", f"{kind}.{name}", *sides)
            else:
                yield Difference(kind, name, *sides)


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
