"""`evla compare`: how far B's predictions lie from A's, and which of the four measures puts them there."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evla_cli import __version__
from evla_cli.calibration import Sample, load_samples, samples_sha256
from evla_cli.checkpoint.bundle import library_versions, open_manifest
from evla_cli.checkpoint.tensors import LazyTensor, LazyTensors
from evla_cli.errors import EvlaError, suggest
from evla_cli.evaluation.candidates import Candidate, open_candidates
from evla_cli.evaluation.feature_reuse import feature_reuse
from evla_cli.evaluation.fidelity import Predictions, check_episodes, cognition_tokens, fidelity, predict_from
from evla_cli.evaluation.memory import release
from evla_cli.families.base import Checkpoint, prune_config
from evla_cli.methods.layer_pruning import prune_weights
from evla_cli.models.skeleton import check_device, out_of_memory
from evla_cli.plan import PLAN, PrunePlan
from evla_cli.progress import progress_bar
from evla_cli.runtime.policy import Policy, policy_from_weights
from evla_cli.schema import SCHEMA_VERSION
from evla_cli.settings import InferenceSettings, VisualTokenSettings


@dataclass(frozen=True)
class Variant:
    """A policy on the way from A to B.

    Attributes:
        name: "reference" is A, "noise" A with other noise, "all" B; of A with one thing taken from B: "layers", "mlp",
            "vision", "tokens", "cache", "sampling"; "weights" is B's weights under A's settings.
    """

    name: str
    checkpoint: Checkpoint
    settings: InferenceSettings
    other_noise: bool = False


def compare(
    first: Path,
    second: Path,
    data: Path,
    *,
    num_samples: int | None = None,
    batch_size: int = 8,
    unnorm_key: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The report that `--json` prints. One model is loaded at a time.

    Errors: the two cannot be compared (other action chunks, widths or statistics), or one of them cannot act.
    """
    check_device(device)
    candidates = open_candidates([first, second])
    if len(candidates) != 2:
        raise EvlaError(f"{first} and {second} name {len(candidates)} candidates; evla compare takes two.")
    a, b = candidates
    key = common_unnorm_key(a, b, unnorm_key)
    check_comparable(a, b, key)
    samples, frames_note = load_frames(data, num_samples, candidates)
    plan, plan_note = shared_plan(a, b)
    found: dict[str, Predictions] = {}
    tokens: dict[InferenceSettings, Tensor] = {}  # of the model that is loaded
    cache = None
    policy: Policy | None = None
    variants = make_variants(a, b, plan)
    advice = "use a smaller --batch-size, --dtype bfloat16, or --device cpu"
    with out_of_memory(device, advice), progress_bar("comparing", len(variants), "policy") as bar:
        for number, variant in enumerate(variants):
            if number == 0 or variant.checkpoint is not variants[number - 1].checkpoint:
                policy = None  # gone before the next one comes
                tokens.clear()
                release(device)
                torch_dtype = getattr(torch, dtype) if dtype else None
                policy = policy_from_weights(variant.checkpoint, device=device, dtype=torch_dtype)
            assert policy is not None
            policy = policy.with_settings(variant.settings)
            # What the head's settings are makes no difference to the token that it is given.
            default = InferenceSettings()
            before_head = replace(variant.settings, action_cache=default.action_cache, diffusion=default.diffusion)
            if before_head not in tokens:
                tokens[before_head] = cognition_tokens(policy, samples, batch_size)
            found[variant.name] = predict_from(
                policy,
                tokens[before_head],
                unnorm_key=key,
                batch_size=batch_size,
                seed=seed + 1 if variant.other_noise else seed,
            )
            bar.update()
        assert policy is not None  # B's, which came last
        if policy.settings.action_cache.interval > 1:
            cognition = tokens[before_head]
            noise = policy.draw_noise(len(samples), torch.Generator().manual_seed(seed))
            cache = feature_reuse(policy, cognition, noise, batch_size).to_record(seed)
    reference = found.pop("reference")
    return {
        "schema_version": SCHEMA_VERSION,
        "first": {"name": a.label, "path": str(first), "settings": a.settings.to_record()},
        "second": {"name": b.label, "path": str(second), "settings": b.settings.to_record()},
        "samples": {"path": str(data), "num_samples": len(samples), "sha256": samples_sha256(samples)},
        "protocol": {"batch_size": batch_size, "seed": seed, "device": device, "dtype": dtype, "unnorm_key": key},
        "versions": {"evla": __version__, **library_versions()},
        "measures": {name: fidelity(reference, each).to_record(seed) for name, each in found.items()},
        "notes": [note for note in (plan_note, frames_note) if note],
        "cache": cache,
    }


def load_frames(
    data: Path, num_samples: int | None, candidates: Sequence[Candidate]
) -> tuple[list[Sample], str | None]:
    """The samples; where a candidate remembers frames, the file's first ones, since what it remembers is the frame
    before, and what there is to remember. Errors: it remembers frames, and the samples are not told by episode."""
    samples = load_samples(data, "image", num_samples)
    if not any(candidate.settings.visual_tokens.remembers_frames for candidate in candidates):
        return samples, None
    samples = load_samples(data, "image")[: len(samples)]
    episodes = check_episodes(samples)
    follow = len(samples) - len(episodes)
    return samples, f"vla_cache remembers frames: {follow} of {len(samples)} samples follow one of their episode."


def make_variants(a: Candidate, b: Candidate, plan: PrunePlan | None) -> list[Variant]:
    """The reference first, B last, those on the same weights next to each other; measures that B does not take are
    left out."""
    variants = [
        Variant("reference", a.checkpoint, a.settings),
        Variant("noise", a.checkpoint, a.settings, other_noise=True),
    ]
    if plan is not None and plan.dropped_layers:
        variants.append(
            Variant("layers", without_layers(a.checkpoint, plan), _fitting(a.settings, len(plan.keep_layers)))
        )
    if plan is not None and plan.kept_intermediate_size < plan.intermediate_size:
        variants.append(Variant("mlp", without_channels(a.checkpoint, plan), a.settings))
    if plan is not None and plan.vision:
        variants.append(Variant("vision", with_pruned_towers(a.checkpoint, plan), a.settings))
    tokens = replace(
        b.settings,
        visual_tokens=_tokens_in_source(a, b, plan),
        action_cache=a.settings.action_cache,
        diffusion=a.settings.diffusion,
    )
    on_a = [
        Variant("tokens", a.checkpoint, tokens),
        Variant("cache", a.checkpoint, replace(a.settings, action_cache=b.settings.action_cache)),
        Variant("sampling", a.checkpoint, replace(a.settings, diffusion=b.settings.diffusion)),
    ]
    variants[2:2] = [variant for variant in on_a if variant.settings != a.settings]
    variants.append(Variant("weights", b.checkpoint, _fitting(a.settings, b.checkpoint.num_layers)))
    return [*variants, Variant("all", b.checkpoint, b.settings)]


def without_layers(checkpoint: Checkpoint, plan: PrunePlan) -> Checkpoint:
    """`checkpoint` without the layers that the plan drops, at full MLP width; nothing is read yet."""
    return _pruned(checkpoint, replace(plan, mlp_keep=None, vision={}))


def with_pruned_towers(checkpoint: Checkpoint, plan: PrunePlan) -> Checkpoint:
    """`checkpoint` with its vision towers as the plan prunes them, not refit, and its whole decoder."""
    return _pruned(checkpoint, plan.of_towers())


def _pruned(checkpoint: Checkpoint, plan: PrunePlan) -> Checkpoint:
    tensors = prune_weights(checkpoint.reader.tensors, plan, checkpoint.layer_prefix, checkpoint.tower_prefixes)
    return replace(
        checkpoint,
        reader=replace(checkpoint.reader, tensors=tensors),
        config=prune_config(checkpoint.config, checkpoint.family, plan),
        weights=prune_weights(
            checkpoint.weights, plan, checkpoint.family.decoder_layers, checkpoint.family.tower_prefixes
        ),
    )


def without_channels(checkpoint: Checkpoint, plan: PrunePlan) -> Checkpoint:
    """`checkpoint` with all its layers, in which the channels that the plan removes have no effect.

    Layers that the plan drops keep their width, so no config describes the narrower model: a channel goes by a zero in
    its column of the down projection.
    """
    weights: LazyTensors = dict(checkpoint.weights)
    for layer, channels in zip(plan.keep_layers, plan.mlp_keep or (), strict=True):
        name = f"{checkpoint.family.decoder_layers}.{layer}.mlp.down_proj.weight"
        weights[name] = _only_columns(weights[name], torch.tensor(channels))
    return replace(checkpoint, weights=weights)


def _only_columns(lazy: LazyTensor, columns: Tensor) -> LazyTensor:
    def zero_others(tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor).index_copy_(1, columns, tensor[:, columns])

    return lazy.map(lazy.shape, zero_others)


def shared_plan(a: Candidate, b: Candidate) -> tuple[PrunePlan | None, str | None]:
    """The plan that made B's weights from A's; or None and, where their sizes differ, why it is not known."""
    path = b.checkpoint.root / PLAN
    unknown = f"what layers and MLP cost each cannot be told; 'weights' is all together ({b.label}'s, A's settings)."
    sizes = [_sizes(each.checkpoint) for each in (a, b)]
    if not path.is_file():
        return None, None if sizes[0] == sizes[1] else f"{b.label} has no {PLAN}: {unknown}"
    plan = PrunePlan.load(path)
    if (a.checkpoint.root / PLAN).is_file() and PrunePlan.load(a.checkpoint.root / PLAN) == plan:
        return None, None
    if sizes[0][:2] != (plan.num_layers, plan.intermediate_size):
        return None, f"{path} is not of {a.label}, whose size is another: {unknown}"
    if plan.checkpoint_sha256 not in source_hashes(a.checkpoint):
        return None, f"{path} is of another checkpoint than {a.label} (its hash differs): {unknown}"
    return plan, None


def _sizes(checkpoint: Checkpoint) -> tuple[Any, ...]:
    towers = map(checkpoint.tower_sizes, checkpoint.family.towers)
    return checkpoint.num_layers, checkpoint.intermediate_size, *towers


def source_hashes(checkpoint: Checkpoint) -> list[str]:
    """Of its weights, and of those that an unpruned bundle was exported from."""
    if checkpoint.layout == "bundle":
        unpruned_sha256 = open_manifest(checkpoint.root).unpruned_sha256
        if unpruned_sha256 is not None:
            return [unpruned_sha256]
    return [checkpoint.reader.sha256]


def _tokens_in_source(a: Candidate, b: Candidate, plan: PrunePlan | None) -> VisualTokenSettings:
    """B's, with tokens that leave A after the same layer, which the plan may have renumbered."""
    tokens = b.settings.visual_tokens
    if tokens.num_keep is None:
        return tokens
    layer = tokens.prune_layer if plan is None else plan.keep_layers[tokens.prune_layer - 1] + 1
    return replace(tokens, prune_layer=min(layer, a.checkpoint.num_layers - 1))


def _fitting(settings: InferenceSettings, num_layers: int) -> InferenceSettings:
    """A's settings where fewer layers are left than it prunes tokens after."""
    tokens = settings.visual_tokens
    if tokens.num_keep is None or tokens.prune_layer < num_layers:
        return settings
    return replace(settings, visual_tokens=replace(tokens, prune_layer=max(1, num_layers - 1)))


def common_unnorm_key(a: Candidate, b: Candidate, key: str | None) -> str:
    ours, theirs = (each.config.norm_stats for each in (a, b))
    shared = [name for name in ours if name in theirs]
    if not shared:
        raise EvlaError(
            f"{a.label} knows the datasets {', '.join(sorted(ours))}, {b.label} {', '.join(sorted(theirs))}: none in "
            "common, so their actions cannot be compared."
        )
    if key is None and len(shared) > 1:
        raise EvlaError(f"The models share {len(shared)} datasets; name one with --unnorm-key: {', '.join(shared)}.")
    if key is not None and key not in shared:
        raise EvlaError(f"Unknown --unnorm-key '{key}'. {suggest(key, shared)}")
    return shared[0] if key is None else key


def check_comparable(a: Candidate, b: Candidate, key: str) -> None:
    ours, theirs = a.config, b.config
    for what, x, y in (
        ("action dimensions", ours.action_config.action_dim, theirs.action_config.action_dim),
        ("actions in a chunk", ours.action_config.action_horizon, theirs.action_config.action_horizon),
        ("numbers in a cognition token", ours.text_config.hidden_size, theirs.text_config.hidden_size),
    ):
        if x != y:
            raise EvlaError(f"{a.label} has {x} {what}, {b.label} {y}: they cannot be compared.")
    for name in ("q01", "q99", "mask"):
        if ours.norm_stats[key]["action"][name] != theirs.norm_stats[key]["action"][name]:
            raise EvlaError(
                f"{a.label} and {b.label} have different statistics ({name}) for the dataset '{key}': their normalised "
                "actions mean different things."
            )
