"""What the tool must know about a kind of VLA. Everything else is free of family names.

How to add a family
1. Write `families/<name>.py` with an `open_checkpoint(path)` that returns a `Checkpoint` for a directory of that
   family and None for any other. For files in Hugging Face's layout, `open_huggingface` below does most of it.
2. Fill a `ModelFamily`: where the decoder stands (one string is both the module path and the weight-name prefix), how
   the model is built from its config, and how one calibration sample becomes decoder input.
3. Add one line to `FAMILIES` in `families/__init__.py`, and a class with a pico checkpoint to `tests/test_families.py`:
   it inherits the tests that every family must pass.
"""

import copy
import hashlib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evla_cli.checkpoint.bundle import CHECK
from evla_cli.checkpoint.files import sha256_file
from evla_cli.checkpoint.reader import CheckpointReader
from evla_cli.checkpoint.tensors import LazyTensors
from evla_cli.errors import EvlaError
from evla_cli.families.layer_entries import of_kept_layers
from evla_cli.plan import PrunePlan

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from evla_cli.calibration import Sample


@dataclass(frozen=True)
class Tower:
    """A vision tower of pre-norm blocks, each of which adds `scale * fc2(gelu(fc1(...)))` (`mlp.fc1`, `mlp.fc2`) to its
    input as the last thing it does. The features are what the second-to-last block gives; the last block never runs.

    Attributes:
        blocks: module path of the list of blocks and prefix of their weight names.
        native_blocks: the same prefix in the names of the family's native layout.
        idle, native_idle: the same two prefixes of what else has an `mlp` of the blocks' width, and never runs.
        config_path: where the tower's config stands in the model's config.
        scale: the parameter of a block that multiplies fc2's output (LayerScale); None where there is none.
        num_prefix_tokens: given the model's config object, the positions before those of the patches.
        set_intermediate_size: changes the tower's config in JSON form.
        see: runs this tower alone up to its features; arguments as `ModelFamily.embed`.
    """

    blocks: str
    native_blocks: str
    config_path: tuple[str, ...]
    scale: str | None
    num_prefix_tokens: Callable[[Any], int]
    set_intermediate_size: Callable[[dict[str, Any], int], Any]
    see: "Callable[[PreTrainedModel, list[Sample], Path, torch.Tensor], Any]"
    idle: tuple[str, ...] = ()
    native_idle: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelFamily:
    """
    Attributes:
        name: as in `evla inspect`.
        decoder: module path of the decoder (the module that owns `layers` and `norm`) and prefix of its weight names.
        config_path: where the decoder's config stands in the model's config: `("text_config",)`, or `()` for itself.
        parts: part of the model -> prefix of its weight names, for reports.
        build_config: the config object from its JSON form.
        build_model: the model from its config; called where parameters are made on the meta device.
        embed: runs everything before the decoder and then the decoder's own forward, whose layers the caller has
            replaced by recorders; returns the mask (B, T) of real positions, None where none is padding. Given the
            model, samples, the tokenizer's directory, and a tensor on the device and in the dtype to compute with.
        try_out: what the model puts out for a few made-up inputs of a fixed kind, for comparing two models.
        sample_kind: "image" (image and instruction) or "text".
        action_head: module path and weight-name prefix of the action head; None where the model cannot act.
        layers_give_tensors: decoder layers are known to return hidden states alone; else the first one is run once on
            the first batch, to see whether they return a tuple.
        float32_parts: module paths and weight-name prefixes of what does not follow `--dtype`: it is computed in
            float32 where that, or what the checkpoint holds, is less, and exported as it is stored.
        towers: name -> vision tower that can be pruned.
        modalities: what stands at which position: given the model's config in JSON form and the real positions (B, T),
            a mask (B, T) for each kind, which together are all real positions; None where all are text.
    """

    name: str
    decoder: str
    config_path: tuple[str, ...]
    parts: Mapping[str, str]
    build_config: "Callable[[dict[str, Any]], PretrainedConfig]"
    build_model: "Callable[[PretrainedConfig], PreTrainedModel]"
    embed: "Callable[[PreTrainedModel, list[Sample], Path, torch.Tensor], torch.Tensor | None]"
    try_out: "Callable[[Any], tuple[torch.Tensor, ...]]"
    sample_kind: str
    action_head: str | None = None
    layers_give_tensors: bool = False
    float32_parts: tuple[str, ...] = ()
    towers: Mapping[str, Tower] = field(default_factory=dict)
    modalities: "Callable[[dict[str, Any], torch.Tensor], dict[str, torch.Tensor]] | None" = None

    @property
    def has_action_head(self) -> bool:
        return self.action_head is not None

    def follows_dtype(self, name: str) -> bool:
        """Whether the module or weight of this name is computed and exported in the dtype that is asked for."""
        return not any(name == part or name.startswith(f"{part}.") for part in self.float32_parts)

    def compute_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype that the weight `name` is computed in where the model is computed in `dtype`."""
        return dtype if self.follows_dtype(name) else torch.promote_types(dtype, torch.float32)

    @property
    def decoder_layers(self) -> str:
        return f"{self.decoder}.layers"

    @property
    def tower_prefixes(self) -> dict[str, tuple[str, ...]]:
        """Of every tower's blocks, and of what else is as wide, in the model's names."""
        return {name: (tower.blocks, *tower.idle) for name, tower in self.towers.items()}


WritePruned = Callable[
    ["Checkpoint", Path, LazyTensors, PrunePlan, Callable[[int], Any] | None],
    dict[str, str],
]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its own files behind `reader`, and the same weights under the model's names.

    Attributes:
        root: the directory that was opened.
        layout: how it stands on disk: "native", "huggingface" or "bundle".
        config: JSON form of the model's config.
        weights: under the names of the model that `family.build_model` makes.
        layer_prefix: of the decoder layers in the names of `reader.tensors`.
        tokenizer_dir: where tokenizer.json stands, if anywhere.
        written_config: as `config`, but what the file itself says and what must be said once layers are removed, so
            that a pruned checkpoint's is as short as its source's.
        write_pruned: writes weights (under the reader's names) and config to a directory, in this layout; returns the
            SHA-256 of every weight file.
    """

    root: Path
    family: ModelFamily
    layout: str
    reader: CheckpointReader
    config: dict[str, Any]
    weights: LazyTensors
    layer_prefix: str
    tokenizer_dir: Path | None
    written_config: dict[str, Any]
    write_pruned: WritePruned = field(repr=False)

    def __post_init__(self) -> None:
        pattern = re.compile(re.escape(self.layer_prefix) + r"\.(\d+)\.")
        numbers = {int(match[1]) for name in self.reader.tensors if (match := pattern.match(name))}
        said = self.decoder_config.get("num_hidden_layers")
        if not numbers or numbers != set(range(len(numbers))) or said != len(numbers):
            raise EvlaError(
                f"{self.root}: the config says {said} decoder layers, the weights hold {len(numbers)} "
                f"({self.layer_prefix}.*); the two must agree, numbered from 0 without a gap."
            )
        for key in ("hidden_size", "intermediate_size"):
            size = self.decoder_config.get(key)
            if type(size) is not int or size < 1:
                raise EvlaError(f"{self.root}: the decoder's {key} must be a positive whole number, found {size!r}.")

    @property
    def decoder_config(self) -> dict[str, Any]:
        return config_section(self.config, self.family.config_path)

    @property
    def num_layers(self) -> int:
        return self.decoder_config["num_hidden_layers"]

    @property
    def intermediate_size(self) -> int:
        return self.decoder_config["intermediate_size"]

    def pruned_config(self, plan: PrunePlan) -> dict[str, Any]:
        """What config.json says of the model that the plan leaves."""
        return prune_config(self.written_config, self.family, plan)

    @property
    def mlp_obstacle(self) -> str | None:
        """Why the decoder's MLPs cannot be narrowed; None where they are gated ones, all of one width."""
        kinds = {f"mlp.{name}_proj.{kind}" for name in ("gate", "up", "down") for kind in ("weight", "bias")}
        for layer in range(self.num_layers):
            prefix = f"{self.layer_prefix}.{layer}."
            for name in (f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")):
                lazy = self.reader.tensors.get(prefix + name)
                if lazy is None:
                    return f"layer {layer} of the decoder has no {name}"
                width = lazy.shape[1 if name == "mlp.down_proj.weight" else 0]
                if width != self.intermediate_size:
                    return f"layer {layer} of the decoder is {width} wide, not {self.intermediate_size}"
        others = [name for name in self.reader.tensors if name.startswith(f"{self.layer_prefix}.0.mlp.")]
        others = [name for name in others if name.removeprefix(f"{self.layer_prefix}.0.") not in kinds]
        return f"there is more in them ({others[0]})" if others else None

    @property
    def tower_prefixes(self) -> dict[str, tuple[str, ...]]:
        """As the family's, in the names of `reader.tensors`."""
        if self.layout != "native":
            return self.family.tower_prefixes
        return {name: (tower.native_blocks, *tower.native_idle) for name, tower in self.family.towers.items()}

    def tower_sizes(self, name: str) -> tuple[int, int]:
        """A vision tower's number of blocks, the last one included, and the width of their MLPs."""
        config = self.family.build_config(self.config)
        for key in self.family.towers[name].config_path:
            config = getattr(config, key)
        return config.num_hidden_layers, config.intermediate_size

    def small_files_sha256(self) -> str:
        """Of what decides the outputs but the weights: configs, statistics, tokenizer, chat templates, plan."""
        paths = sorted(path for pattern in _SMALL_FILES for path in self.root.glob(pattern) if path.is_file())
        if self.layout == "bundle":  # whose check says what it did on one machine, nothing of what it is
            paths = [path for path in paths if path.name != CHECK]
        lines = [f"{sha256_file(path)}  {path.relative_to(self.root).as_posix()}\n" for path in paths]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


_SMALL_FILES = ("*.json", "*.yaml", "*.model", "*.txt", "*.jinja", "additional_chat_templates/*", "llm_config/*")


def config_section(config: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for key in path:
        config = config[key]
    return config


def prune_config(config: dict[str, Any], family: ModelFamily, plan: PrunePlan) -> dict[str, Any]:
    """The config of the pruned model: number of layers, MLP width, and every entry that is about single layers."""
    config = copy.deepcopy(config)
    decoder = config_section(config, family.config_path)
    decoder["num_hidden_layers"] = len(plan.keep_layers)
    decoder["intermediate_size"] = plan.kept_intermediate_size
    if plan.dropped_layers:
        decoder.update(of_kept_layers(decoder, plan.num_layers, plan.keep_layers))
    for name, stack in plan.vision.items():
        tower = config_section(config, family.towers[name].config_path)
        tower["num_hidden_layers"] = len(stack.keep_layers)
        if stack.mlp_keep is not None:
            family.towers[name].set_intermediate_size(tower, stack.kept_intermediate_size)
    return config


def check_weights(expected: Mapping[str, tuple[int, ...]], weights: LazyTensors, where: Path) -> None:
    """Every expected name with its shape, and no other."""
    check_names(expected, weights, where)
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise EvlaError(f"{where}: {name} has shape {list(weights[name].shape)}, the model needs {list(shape)}.")
        if not weights[name].dtype.is_floating_point:
            raise EvlaError(f"{where}: {name} has dtype {weights[name].dtype}; quantised weights cannot be handled.")


def check_names(expected: Collection[str], found: Collection[str], where: Path) -> None:
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    alone = next((name for name in unknown if re.search(r"\.experts\.\d+\.", name)), None)
    if missing and alone:
        raise EvlaError(
            f"{where} is a mixture of experts whose experts stand one by one on disk ({alone}). Transformers fuses "
            "them when it loads; evla takes tensors as they stand, and cannot analyze or prune this kind of model."
        )
    if missing and unknown:
        raise EvlaError(
            f"{where} lacks {len(missing)} weights (first: {missing[0]}) and holds {len(unknown)} that the model does "
            f"not have (first: {unknown[0]}). If transformers loads it, it renames weights on the way; evla does not."
        )
    if missing:
        raise EvlaError(f"{where} lacks {len(missing)} weights (first: {missing[0]}).")
    if unknown:
        raise EvlaError(f"{where} holds {len(unknown)} weights that the model does not have (first: {unknown[0]}).")


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")


def find_tokenizer(*directories: Path) -> Path | None:
    return next((directory for directory in directories if (directory / "tokenizer.json").is_file()), None)
