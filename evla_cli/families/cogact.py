"""CogACT: its native run directories (`config.json`, `dataset_statistics.json`, `checkpoints/*.pt`) and our bundles.

A native file nests `{"model": {part: {name: tensor}}}` and names the towers as timm does. `NativeNames` maps it to and
from the names of `CogACTForActionPrediction`, tensor by tensor and without loss. Sizes are read off the tensors. What
tensors cannot tell is the number of attention heads: known for the published sizes, else read from
`llm_config/config.json` (language model) and from `config.json`
(`{"evla": {"num_attention_heads": {"dino": 3, "siglip": 3, "action_model": 4}}}`).
"""

import math
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short_repr
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evla_cli.checkpoint.files import copy_file, read_json, write_json, write_text
from evla_cli.checkpoint.reader import open_torch_checkpoint
from evla_cli.checkpoint.tensors import LazyTensor, LazyTensors
from evla_cli.checkpoint.torch_format import write_torch
from evla_cli.errors import EvlaError, suggest
from evla_cli.families.base import (
    TOKENIZER_FILES,
    Checkpoint,
    ModelFamily,
    Tower,
    check_names,
    find_tokenizer,
)
from evla_cli.families.huggingface import copy_other_files, open_huggingface, read_config
from evla_cli.plan import PrunePlan
from evla_cli.schema import from_mapping

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from evla_cli.calibration import Sample
    from evla_cli.models.cogact import CogACTConfig
    from evla_cli.models.processing import CogACTInputs

_PARTS = {  # the model's prefix -> the native file's
    "dino": "model.vision_backbone.dino_featurizer",
    "siglip": "model.vision_backbone.siglip_featurizer",
    "projector": "model.projector",
    "language_model": "model.llm_backbone.llm",
    "action_head": "model.action_model.net",
}
# Native weights that no run of the model uses: exponential averages kept by training, and buffers of old versions.
_UNUSED = re.compile(r"model\.ema_diffusion\..*|.*\.rotary_emb\.inv_freq")

# part -> width -> attention heads, of the published models
_NUM_HEADS = {"dino": {1024: 16}, "siglip": {1152: 16}, "action_model": {384: 4, 768: 12, 1024: 16}}
_HEAD_TYPES = {384: "DiT-S", 768: "DiT-B", 1024: "DiT-L"}
_MAX_TRAIN_STEPS = 10_000  # CogACT: 100
_HUGE = 1e30  # no robot's unit
# meta-llama/Llama-2-7b-hf, from where CogACT's own code takes its config
_LLAMA_2_7B = {"num_attention_heads": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096}


def open_checkpoint(path: Path) -> Checkpoint | None:
    if path.is_file() and path.suffix == ".pt":
        if path.parent.name != "checkpoints":
            raise EvlaError(f"{path}: CogACT's layout is <RUN>/checkpoints/<name>.pt with <RUN>/config.json beside it.")
        return _open_native(path.parent.parent, path)
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if "model_type" not in config:
        return _open_run(path, config)
    if config["model_type"] == "cogact":
        return open_huggingface(path, COGACT, _checked_config(read_config(path / "config.json"), path / "config.json"))
    return None


def _open_run(path: Path, config: dict[str, Any]) -> Checkpoint | None:
    """A run directory, perhaps not a whole one. A folder called `checkpoints` alone does not make one."""
    files = sorted((path / "checkpoints").glob("*.pt"))
    marked = "vla" in config or (path / "dataset_statistics.json").is_file()
    if not (path / "checkpoints").is_dir() or not (files or marked):
        return None
    if not files:
        raise EvlaError(f"{path / 'checkpoints'} holds no .pt file.")
    if len(files) > 1:
        raise EvlaError(f"{path / 'checkpoints'} holds {len(files)} .pt files; name the one to use.")
    return _open_native(path, files[0])


def _open_native(run: Path, file: Path) -> Checkpoint:
    for name in ("config.json", "dataset_statistics.json"):
        if not (run / name).is_file():
            raise EvlaError(
                f"{run} lacks {name}, which every CogACT run has; copy it from where the model was trained."
            )
    run_config = read_json(run / "config.json")
    if "vla" not in run_config:
        raise EvlaError(f"{run / 'config.json'} has no 'vla' entry: not the config of a CogACT run.")
    reader = open_torch_checkpoint(file)
    config = infer_config(run, reader.tensors, run_config, read_json(run / "dataset_statistics.json"))
    _checked_config(config, run)
    return Checkpoint(
        root=run,
        family=COGACT,
        layout="native",
        reader=reader,
        config=config,
        weights=NativeNames(config).to_model(reader.tensors, file),
        layer_prefix=f"{_PARTS['language_model']}.model.layers",
        tokenizer_dir=find_tokenizer(run, run / "llm_config"),
        written_config=config,
        write_pruned=_write_native,
    )


# Names


@dataclass(frozen=True)
class _Rule:
    """Some tensors of the model are some of the native file, joined or cut along dimension 0, or reshaped."""

    model: tuple[str, ...]
    native: tuple[str, ...]
    kind: str = "same"


class NativeNames:
    """The two sets of names of one CogACT, and how a tensor of one is made from those of the other."""

    def __init__(self, config: dict[str, Any]):
        self.config = config
        self.rules = list(_rules(config))

    def to_model(self, native: LazyTensors, where: Path) -> LazyTensors:
        """Native -> model names. Errors: a missing or an unknown weight."""
        expected = dict.fromkeys(name for rule in self.rules for name in rule.native)
        check_names(expected, {name: None for name in native if not _UNUSED.fullmatch(name)}, where)
        weights: LazyTensors = {}
        for rule in self.rules:
            weights.update(zip(rule.model, _to_model(rule, [native[name] for name in rule.native]), strict=True))
        return weights

    def to_native(self, weights: LazyTensors) -> LazyTensors:
        """Model -> native names, grouped by part as CogACT's own files are."""
        native: LazyTensors = {}
        for rule in self.rules:
            missing = [name for name in rule.model if name not in weights]
            if missing:
                raise EvlaError(f"The model lacks the weight {missing[0]}.")
            native.update(zip(rule.native, _to_native(rule, [weights[name] for name in rule.model]), strict=True))
        return native


def native_paths(names: LazyTensors) -> dict[str, tuple[str, ...]]:
    """Where each name stands in the nested dicts: `model.projector.projector.0.weight` -> (model, projector, ...)."""
    return {name: tuple(name.split(".", 2)) for name in names}


def _rules(config: dict[str, Any]) -> Iterator[_Rule]:
    def same(part: str, pairs: dict[str, str], kinds: tuple[str, ...] = ("weight", "bias")) -> Iterator[_Rule]:
        for ours, theirs in pairs.items():
            for kind in kinds:
                yield _Rule((f"{part}.{ours}.{kind}",), (f"{_PARTS[part]}.{theirs}.{kind}",))

    def split(part: str, ours: tuple[str, ...], theirs: str) -> Iterator[_Rule]:
        for kind in ("weight", "bias"):
            names = tuple(f"{part}.{name}.{kind}" for name in ours)
            yield _Rule(names, (f"{_PARTS[part]}.{theirs}.{kind}",), "split")

    def bare(part: str, ours: str, theirs: str, kind: str = "same") -> _Rule:
        return _Rule((f"{part}.{ours}",), (f"{_PARTS[part]}.{theirs}",), kind)

    yield from same("projector", {f"projector.{i}": f"projector.{i}" for i in (0, 2, 4)})

    text = config["text_config"]
    yield from same("language_model", {"model.embed_tokens": "model.embed_tokens"}, ("weight",))
    for i in range(text["num_hidden_layers"]):
        names = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
        names += ["input_layernorm", "post_attention_layernorm"]
        layer = f"model.layers.{i}"
        yield from same("language_model", {f"{layer}.{name}": f"{layer}.{name}" for name in names}, ("weight",))
    yield from same("language_model", {"model.norm": "model.norm", "lm_head": "lm_head"}, ("weight",))

    yield bare("dino", "embeddings.cls_token", "cls_token")
    yield bare("dino", "embeddings.register_tokens", "reg_token")
    # timm gives the class token no position and has no mask token; Hugging Face's model has both: zeros that no run
    # of the model can tell apart from their absence.
    yield _Rule(
        ("dino.embeddings.position_embeddings", "dino.embeddings.mask_token"),
        (f"{_PARTS['dino']}.pos_embed",),
        "dino positions",
    )
    yield from same("dino", {"embeddings.patch_embeddings.projection": "patch_embed.proj"})
    for i in range(config["dino_config"]["num_hidden_layers"]):
        ours, theirs = f"encoder.layer.{i}", f"blocks.{i}"
        yield from split("dino", tuple(f"{ours}.attention.{name}_proj" for name in "qkv"), f"{theirs}.attn.qkv")
        yield from same("dino", {f"{ours}.attention.o_proj": f"{theirs}.attn.proj"})
        yield from same(
            "dino", {f"{ours}.{name}": f"{theirs}.{name}" for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}
        )
        yield bare("dino", f"{ours}.layer_scale1.lambda1", f"{theirs}.ls1.gamma")
        yield bare("dino", f"{ours}.layer_scale2.lambda1", f"{theirs}.ls2.gamma")
    yield from same("dino", {"layernorm": "norm"})

    yield bare("siglip", "embeddings.position_embedding.weight", "pos_embed", "siglip positions")
    yield from same("siglip", {"embeddings.patch_embedding": "patch_embed.proj"})
    for i in range(config["siglip_config"]["num_hidden_layers"]):
        ours, theirs = f"encoder.layers.{i}", f"blocks.{i}"
        yield from split("siglip", tuple(f"{ours}.self_attn.{name}_proj" for name in "qkv"), f"{theirs}.attn.qkv")
        pairs = {"self_attn.out_proj": "attn.proj", "layer_norm1": "norm1", "layer_norm2": "norm2"}
        pairs |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        yield from same("siglip", {f"{ours}.{a}": f"{theirs}.{b}" for a, b in pairs.items()})
    yield from same("siglip", {"post_layernorm": "norm"})
    if config["siglip_config"]["vision_use_head"]:
        yield bare("siglip", "head.probe", "attn_pool.latent")
        for kind in ("weight", "bias"):
            query, key_value = (f"{_PARTS['siglip']}.attn_pool.{name}.{kind}" for name in ("q", "kv"))
            yield _Rule((f"siglip.head.attention.in_proj_{kind}",), (query, key_value), "join")
        pairs = {"head.attention.out_proj": "attn_pool.proj", "head.layernorm": "attn_pool.norm"}
        pairs |= {"head.mlp.fc1": "attn_pool.mlp.fc1", "head.mlp.fc2": "attn_pool.mlp.fc2"}
        yield from same("siglip", pairs)

    yield bare("action_head", "positional_embedding", "positional_embedding")
    yield bare("action_head", "z_embedder.uncondition", "z_embedder.uncondition")
    names = ["history_embedder.linear", "x_embedder.linear", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    names += ["z_embedder.linear", "final_layer.linear"]
    for i in range(config["action_config"]["num_hidden_layers"]):
        names += [f"blocks.{i}.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    yield from same("action_head", {name: name for name in names})


def _to_model(rule: _Rule, native: list[LazyTensor]) -> list[LazyTensor]:
    first = native[0]
    if rule.kind == "split":
        return _split(first, len(rule.model))
    if rule.kind == "join":
        return [_join(native)]
    if rule.kind == "siglip positions":  # (1, V, D) -> (V, D)
        return [first.map(first.shape[1:], lambda tensor: tensor[0])]
    if rule.kind == "dino positions":  # (1, V, D) -> (1, 1 + V, D) with zeros for the class token
        width = first.shape[2]
        zeros = torch.zeros(1, 1, width, dtype=first.dtype)
        padded = first.map((1, first.shape[1] + 1, width), lambda tensor: torch.cat((zeros, tensor), dim=1))
        return [padded, LazyTensor(first.dtype, (1, width), lambda: zeros[0])]
    return native


def _to_native(rule: _Rule, model: list[LazyTensor]) -> list[LazyTensor]:
    first = model[0]
    if rule.kind == "split":
        return [_join(model)]
    if rule.kind == "join":
        width = first.shape[0] // 3
        return [_rows(first, 0, width), _rows(first, width, 3 * width)]
    if rule.kind == "siglip positions":
        return [first.map((1, *first.shape), lambda tensor: tensor[None])]
    if rule.kind == "dino positions":
        return [first.map((1, first.shape[1] - 1, first.shape[2]), lambda tensor: tensor[:, 1:])]
    return model


def _split(tensor: LazyTensor, parts: int) -> list[LazyTensor]:
    length = tensor.shape[0] // parts
    return [_rows(tensor, part * length, (part + 1) * length) for part in range(parts)]


def _rows(tensor: LazyTensor, begin: int, end: int) -> LazyTensor:
    return tensor.map((end - begin, *tensor.shape[1:]), lambda whole: whole[begin:end])


def _join(tensors: list[LazyTensor]) -> LazyTensor:
    shape = (sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:])
    return LazyTensor(tensors[0].dtype, shape, lambda: torch.cat([tensor.load() for tensor in tensors]))


# Config


@dataclass(frozen=True)
class GivenByHand:
    """The `evla` entry of a native config.json: what tensors cannot tell."""

    num_attention_heads: dict[str, int] = field(default_factory=dict)
    prompt_suffix_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for part in self.num_attention_heads:
            if part not in _NUM_HEADS:
                raise EvlaError(f"num_attention_heads: unknown part '{part}'. {suggest(part, _NUM_HEADS)}")


def infer_config(
    run: Path, native: LazyTensors, run_config: dict[str, Any], norm_stats: dict[str, Any]
) -> dict[str, Any]:
    """The model's config from the shapes of a native checkpoint and the files beside it."""
    given = from_mapping(GivenByHand, run_config.get("evla", {}), f"{run / 'config.json'}: evla")
    heads = given.num_attention_heads
    shape = _ShapeReader(native, run)
    dino, siglip, action = _PARTS["dino"], _PARTS["siglip"], _PARTS["action_head"]
    action_width, action_dim = shape(f"{action}.x_embedder.linear.weight", 2)
    text = _text_config(run, shape)
    return {
        "model_type": "cogact",
        "architectures": ["CogACTForActionPrediction"],
        "dino_config": _tower(run, "dino", shape, heads)
        | _dino_width(*shape(f"{dino}.blocks.0.mlp.fc1.weight", 2))
        | {
            "num_register_tokens": shape(f"{dino}.reg_token", 3)[1],
        },
        "siglip_config": _tower(run, "siglip", shape, heads)
        | {
            "intermediate_size": shape(f"{siglip}.blocks.0.mlp.fc1.weight", 2)[0],
            "vision_use_head": f"{siglip}.attn_pool.latent" in native,
        },
        "text_config": text,
        "prompt_suffix_ids": None if given.prompt_suffix_ids is None else list(given.prompt_suffix_ids),
        "projector_hidden_size": shape(f"{_PARTS['projector']}.projector.0.weight", 2)[0],
        "action_config": {
            "hidden_size": action_width,
            "num_hidden_layers": shape.count_blocks(f"{action}.blocks"),
            "num_attention_heads": _num_heads(run, "action_model", action_width, heads),
            "intermediate_size": shape(f"{action}.blocks.0.mlp.fc1.weight", 2)[0],
            "condition_size": text["hidden_size"],
            "action_dim": action_dim,
            "action_horizon": shape(f"{action}.positional_embedding", 2)[0] - 1,
        },
        "norm_stats": check_norm_stats(norm_stats, action_dim, run / "dataset_statistics.json"),
    }


_SECTIONS = ("dino_config", "siglip_config", "text_config", "action_config", "norm_stats")
_SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size"),
    *("condition_size", "action_dim", "action_horizon", "num_train_steps"),
)


def _checked_config(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """The config with its `norm_stats` in full, if it is one of a CogACT that can be built."""
    absent = [name for name in _SECTIONS if not isinstance(config.get(name), dict)]
    if absent:
        raise EvlaError(f"{where} has no section '{absent[0]}', which the config of a CogACT needs.")
    try:
        built = _build_config(config)
    except Exception as error:  # transformers raises many kinds, all of them about the config
        raise EvlaError(f"{where}: not a valid config: {' '.join(str(error).split())[:250]}") from error
    for name in _SECTIONS[:4]:
        section = getattr(built, name)
        model_type = config[name].get("model_type", section.model_type)
        if model_type != section.model_type:
            raise EvlaError(
                f"{where}: {name}.model_type must be '{section.model_type}', found {short_repr(model_type)}."
            )
        for key in _SIZES:
            size = getattr(section, key, 1)
            if type(size) is not int or size < 1:
                raise EvlaError(f"{where}: {name}.{key} must be a positive whole number, found {size!r}.")
        if name != "text_config" and section.hidden_size % section.num_attention_heads:
            raise EvlaError(
                f"{where}: {name}: {section.num_attention_heads} heads do not divide {section.hidden_size}."
            )
    norm_stats = check_norm_stats(config["norm_stats"], built.action_config.action_dim, where)
    dino, siglip = (tower.image_size // tower.patch_size for tower in (built.dino_config, built.siglip_config))
    if dino != siglip:
        raise EvlaError(f"{where}: the towers see {dino**2} and {siglip**2} patches of an image; they must agree.")
    steps, ids, vocab_size = built.action_config.num_train_steps, built.prompt_suffix_ids, built.text_config.vocab_size
    if steps > _MAX_TRAIN_STEPS:
        raise EvlaError(f"{where}: num_train_steps must be at most {_MAX_TRAIN_STEPS}, got {steps}.")
    if ids is not None and (
        not isinstance(ids, list) or len(ids) != 2 or not all(type(i) is int and 0 <= i < vocab_size for i in ids)
    ):
        raise EvlaError(f"{where}: prompt_suffix_ids must be two token ids below {vocab_size}, got {ids}.")
    return config | {"norm_stats": norm_stats}


def check_norm_stats(norm_stats: dict[str, Any], action_dim: int, where: Path) -> dict[str, Any]:
    """Only the statistics that un-normalise actions, checked: a finite q01 and q99 for every action dimension."""
    checked = {}
    for dataset, entry in norm_stats.items():
        action = entry.get("action") if isinstance(entry, dict) else None
        if not isinstance(action, dict) or "q01" not in action or "q99" not in action:
            raise EvlaError(f"{where}: dataset '{dataset}' has no action statistics q01 and q99.")
        low, high = action["q01"], action["q99"]
        mask = action.get("mask", [True] * action_dim)  # CogACT's default
        if not all(isinstance(values, list) and len(values) == action_dim for values in (low, high, mask)):
            raise EvlaError(
                f"{where}: dataset '{dataset}': q01, q99 and mask must be lists of {action_dim}, the model's action "
                "dimensions."
            )
        finite = all(type(x) in (int, float) and abs(x) < _HUGE for x in [*low, *high])
        if not finite or not all(type(m) is bool for m in mask):
            raise EvlaError(f"{where}: dataset '{dataset}': q01 and q99 must be finite numbers, mask true or false.")
        if any(a > b for a, b in zip(low, high, strict=True)):
            raise EvlaError(f"{where}: dataset '{dataset}': q01 is above q99 somewhere; the two may be swapped.")
        checked[dataset] = {"action": {"q01": low, "q99": high, "mask": mask}}
    if not checked:
        raise EvlaError(f"{where} holds no dataset.")
    return checked


class _ShapeReader:
    def __init__(self, tensors: LazyTensors, where: Path):
        self._tensors, self._where = tensors, where

    def __call__(self, name: str, num_dims: int) -> tuple[int, ...]:
        if name not in self._tensors:
            raise EvlaError(f"{self._where} lacks the weight {name}: not a whole CogACT checkpoint.")
        shape = self._tensors[name].shape
        if len(shape) != num_dims or 0 in shape:
            raise EvlaError(f"{self._where}: {name} has shape {list(shape)}, expected {num_dims} dimensions.")
        return shape

    def count_blocks(self, prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        numbers = {int(match[1]) for name in self._tensors if (match := pattern.match(name))}
        if numbers != set(range(len(numbers))) or not numbers:
            raise EvlaError(f"{self._where}: the blocks of {prefix} are not numbered 0, 1, 2, ... without a gap.")
        return len(numbers)


def _tower(run: Path, part: str, shape: _ShapeReader, heads: dict[str, int]) -> dict[str, Any]:
    prefix = _PARTS[part]
    hidden_size, _, patch_size, _ = shape(f"{prefix}.patch_embed.proj.weight", 4)
    side = round(shape(f"{prefix}.pos_embed", 3)[1] ** 0.5)
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": shape.count_blocks(f"{prefix}.blocks"),
        "num_attention_heads": _num_heads(run, part, hidden_size, heads),
        "patch_size": patch_size,
        "image_size": patch_size * side,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }


def _text_config(run: Path, shape: _ShapeReader) -> dict[str, Any]:
    llm = f"{_PARTS['language_model']}.model"
    vocab_size, hidden_size = shape(f"{llm}.embed_tokens.weight", 2)
    path = run / "llm_config" / "config.json"
    if path.is_file():
        given = read_json(path)
    elif hidden_size == 4096:
        given = dict(_LLAMA_2_7B)
    else:
        raise EvlaError(f"{run}: the language model is {hidden_size} wide, not Llama-2-7B; add {path} with its config.")
    known = ("num_attention_heads", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "head_dim")
    config = {key: given[key] for key in (*known, "max_position_embeddings") if given.get(key) is not None}
    if type(config.get("num_attention_heads")) is not int or config["num_attention_heads"] < 1:
        raise EvlaError(f"{path}: num_attention_heads must be a positive whole number.")
    head_dim = config.get("head_dim", hidden_size // config["num_attention_heads"])
    if type(head_dim) is not int or head_dim < 1:
        raise EvlaError(f"{path}: {config['num_attention_heads']} attention heads do not fit a width of {hidden_size}.")
    return config | {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": shape(f"{llm}.layers.0.mlp.gate_proj.weight", 2)[0],
        "num_hidden_layers": shape.count_blocks(f"{llm}.layers"),
        "num_key_value_heads": max(1, shape(f"{llm}.layers.0.self_attn.k_proj.weight", 2)[0] // head_dim),
        "tie_word_embeddings": False,
    }


def _num_heads(run: Path, part: str, width: int, given: dict[str, int]) -> int:
    heads = given.get(part, _NUM_HEADS[part].get(width))
    if type(heads) is not int or heads < 1 or width % heads:
        raise EvlaError(
            f"{run}: the number of attention heads of {part} ({width} wide) cannot be read off its weights. Add "
            f'{{"evla": {{"num_attention_heads": {{"{part}": <number>}}}}}} to {run / "config.json"}.'
        )
    return heads


def _dino_width(intermediate_size: int, hidden_size: int) -> dict[str, int]:
    """As transformers says it where that is a whole ratio, as in every published model; else as it is."""
    if intermediate_size % hidden_size == 0:
        return {"mlp_ratio": intermediate_size // hidden_size}
    return {"intermediate_size": intermediate_size}


# Writing


def _write_native(
    source: Checkpoint, dest: Path, tensors: LazyTensors, plan: PrunePlan, on_bytes: Callable[[int], Any] | None = None
) -> dict[str, str]:
    file = source.reader.files[0].name
    (dest / "checkpoints").mkdir()
    others = source.reader.others
    paths = native_paths(tensors) | {name: source.reader.paths[name] for name in others}
    sha256 = write_torch(dest / "checkpoints" / file, tensors, paths, others, on_bytes)
    config = source.pruned_config(plan)
    write_llm_config(dest / "llm_config", config["text_config"])
    if source.tokenizer_dir is not None:
        for name in TOKENIZER_FILES:
            if (source.tokenizer_dir / name).is_file():
                copy_file(source.tokenizer_dir / name, dest / "llm_config" / name)
    width = source.config["action_config"]["hidden_size"]
    loading = _LOADING.format(file=file, head=_HEAD_TYPES.get(width, "<its type>"))
    write_text(dest / "LOADING.md", (_loading_towers(config) if plan.vision else "") + loading)
    copy_other_files(source.root, dest, read={"checkpoints", "llm_config"})
    return {f"checkpoints/{file}": sha256}


def write_llm_config(directory: Path, text_config: dict[str, Any]) -> None:
    """The language model's config in the form that transformers 4 (CogACT pins 4.40) and 5 both read."""
    directory.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "torch_dtype": "bfloat16"} | text_config
    write_json(directory / "config.json", config)


_LOADING = """\
CogACT's own code takes the language model's config from `meta-llama/Llama-2-7b-hf`, whatever the checkpoint holds.
These lines make it take the pruned one (run them with this directory as the working directory):

    from prismatic.models.backbones.llm import llama2
    llama2.LLAMA2_MODELS["llama2-7b-pure"]["hf_hub_path"] = "llm_config"
    vla = load_vla("checkpoints/{file}", load_for_training=False, action_model_type="{head}")

`llm_config/` must also hold the tokenizer (tokenizer.json, tokenizer_config.json and the rest of the Llama-2
tokenizer's files); copy them there if the original checkpoint came without.
"""

_TIMM = {"dino": "vit_large_patch14_reg4_dinov2.lvd142m", "siglip": "vit_so400m_patch14_siglip_224"}  # CogACT's towers
_LOADING_TOWERS = """\
The vision towers were pruned. CogACT's own code makes them by their names in timm, at full size; these lines, which
come first, make it build them as they are here (it takes the features of the second-to-last block, as before):

    import timm
    create, sizes = timm.create_model, {sizes}
    timm.create_model = lambda name, **given: create(name, **(given | sizes.get(name, {{}})))

"""


def _loading_towers(config: dict[str, Any]) -> str:
    """What LOADING.md says where a tower has another size than timm's model; timm computes int(width * mlp_ratio)."""
    built: Any = _build_config(config)
    sizes = {}
    for name, tower in (("dino", built.dino_config), ("siglip", built.siglip_config)):
        ratio = tower.intermediate_size / tower.hidden_size
        if int(tower.hidden_size * ratio) != tower.intermediate_size:
            ratio = math.nextafter(ratio, math.inf)
        sizes[_TIMM[name]] = {"pretrained": False, "depth": tower.num_hidden_layers, "mlp_ratio": ratio}
    return _LOADING_TOWERS.format(sizes=sizes)


# Model


def _build_config(config: dict[str, Any]) -> "CogACTConfig":
    from evla_cli.models.cogact import CogACTConfig

    return CogACTConfig(**config)


def _build_model(config: Any) -> "PreTrainedModel":
    from evla_cli.models.cogact import CogACTForActionPrediction

    return CogACTForActionPrediction(config)


def _inputs(model: Any, samples: "list[Sample]", tokenizer_dir: Path, like: Tensor) -> "CogACTInputs":
    from evla_cli.models.processing import CogACTProcessor

    processor = CogACTProcessor(model.config, tokenizer_dir)
    return processor([sample.image for sample in samples], [sample.instruction for sample in samples]).to(like)


def _embed(model: Any, samples: "list[Sample]", tokenizer_dir: Path, like: Tensor) -> Tensor:
    inputs = _inputs(model, samples, tokenizer_dir, like)
    mask = model.expand_mask(inputs.attention_mask, inputs.input_ids)
    model.language_model.model(
        inputs_embeds=model.embed_inputs(*inputs.arguments()), attention_mask=mask, use_cache=False
    )
    return mask


def _try_out(model: Any) -> tuple[Tensor, ...]:
    """The decoder's output for four patches of a patterned picture and four tokens."""
    config = model.config
    pixels = [
        torch.linspace(0, 40, 3 * size * size).sin().view(1, 3, size, size)
        for size in (config.dino_config.image_size, config.siglip_config.image_size)
    ]
    ids = (3 + 5 * torch.arange(4)) % config.text_config.vocab_size
    inputs_embeds = model.embed_inputs(ids[None], *pixels)  # (1, V + 4, D)
    few = torch.cat((inputs_embeds[:, :5], inputs_embeds[:, -3:]), dim=1)
    return (model.language_model.model(inputs_embeds=few, use_cache=False).last_hidden_state,)


def _see_dino(model: Any, samples: "list[Sample]", tokenizer_dir: Path, like: Tensor) -> None:
    model.dino_features(_inputs(model, samples, tokenizer_dir, like).dino_pixels)


def _see_siglip(model: Any, samples: "list[Sample]", tokenizer_dir: Path, like: Tensor) -> None:
    model.siglip_features(_inputs(model, samples, tokenizer_dir, like).siglip_pixels)


def _set_dino_width(config: dict[str, Any], intermediate_size: int) -> None:
    config.pop("mlp_ratio", None)
    config.pop("intermediate_size", None)
    config |= _dino_width(intermediate_size, config["hidden_size"])


def _modalities(config: dict[str, Any], real: Tensor) -> dict[str, Tensor]:
    """The sequence is [BOS] [V visual tokens] [rest of the prompt], whose last token is the cognition token."""
    positions = torch.arange(real.shape[1], device=real.device)
    visual = (positions >= 1) & (positions <= _build_config(config).num_visual_tokens)
    cognition = positions == real.long().cumsum(dim=1).argmax(dim=1, keepdim=True)  # (B, T)
    return {"visual": real & visual, "text": real & ~visual & ~cognition, "cognition": real & cognition}


COGACT = ModelFamily(
    name="cogact",
    decoder="language_model.model",
    config_path=("text_config",),
    parts={
        "DINOv2 tower": "dino",
        "SigLIP tower": "siglip",
        "projector": "projector",
        "language model": "language_model",
        "action head": "action_head",
    },
    build_config=_build_config,
    build_model=_build_model,
    embed=_embed,
    try_out=_try_out,
    sample_kind="image",
    action_head="action_head",
    layers_give_tensors=True,
    # CogACT's own code has the VLM in bfloat16 (autocast, or `vla.vlm.to(torch.bfloat16)` when it serves a robot) and
    # casts the cognition token to the action model's dtype, which stays float32.
    float32_parts=("action_head",),
    towers={
        "dino": Tower(
            blocks="dino.encoder.layer",
            native_blocks=f"{_PARTS['dino']}.blocks",
            config_path=("dino_config",),
            scale="layer_scale2.lambda1",
            num_prefix_tokens=lambda config: config.num_dino_prefix_tokens,
            set_intermediate_size=_set_dino_width,
            see=_see_dino,
        ),
        "siglip": Tower(
            blocks="siglip.encoder.layers",
            native_blocks=f"{_PARTS['siglip']}.blocks",
            config_path=("siglip_config",),
            scale=None,
            num_prefix_tokens=lambda _config: 0,
            set_intermediate_size=lambda config, width: operator.setitem(config, "intermediate_size", width),
            see=_see_siglip,
            idle=("siglip.head",),  # as in timm, the pooling head's MLP has the blocks' ratio
            native_idle=(f"{_PARTS['siglip']}.attn_pool",),
        ),
    },
    modalities=_modalities,
)
