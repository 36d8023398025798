"""What evla does, from top to bottom: analyze, prune, export, run. Each stage reads files and writes files."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evla_cli.bundling import check_export, finish_bundle, write_bundle_files
from evla_cli.calibration import load_image, load_samples, samples_sha256, sort_samples
from evla_cli.checking import check_values, fit_packed_layers
from evla_cli.checkpoint.bundle import write_manifest
from evla_cli.checkpoint.files import write_text, write_yaml
from evla_cli.checkpoint.outputs import check_apart, check_space, new_directory, new_file
from evla_cli.checkpoint.reader import CheckpointReader
from evla_cli.checkpoint.safetensors_format import read_safetensors, write_safetensors
from evla_cli.checkpoint.tensors import LazyTensor, LazyTensors, load_finite, total_bytes, total_elements
from evla_cli.checkpoint.writer import parse_size, write_huggingface_weights
from evla_cli.choosing import ChoiceOptions, choose_by_samples
from evla_cli.errors import EvlaError, suggest
from evla_cli.evaluation.candidates import open_candidates
from evla_cli.evaluation.figures import check_figures, draw_importance
from evla_cli.families import open_checkpoint
from evla_cli.families.base import Checkpoint, ModelFamily, check_weights
from evla_cli.methods.layer_importance import (
    importance_and_error,
    position_weights,
    real_positions,
    run_layer,
    sample_similarity,
)
from evla_cli.methods.layer_pruning import choose_layers, prune_weights
from evla_cli.methods.mlp_pruning import channel_energy, prune_width
from evla_cli.methods.row_selection import NEED_ACTIVATIONS, MlpLayers, select_channels, warn_if_worse_than_random
from evla_cli.methods.stability import stability
from evla_cli.models.cogact import cognition_token
from evla_cli.models.skeleton import check_device, check_fits, failures_of_transformers, out_of_memory
from evla_cli.models.streaming import DecoderStream, captured_inputs
from evla_cli.plan import (
    PLAN,
    TOWER_METRIC,
    LayerImportance,
    LayerScore,
    PrunePlan,
    activations_file,
    has_activations,
)
from evla_cli.progress import progress_bar
from evla_cli.ranks import ALONE, Ranks
from evla_cli.refitting import RefitOptions, refit_layers
from evla_cli.runtime.policy import policy_from_weights
from evla_cli.runtime.recording import denoise_similarity
from evla_cli.schema import SCHEMA_VERSION, from_mapping
from evla_cli.settings import InferenceSettings, PruneRecipe
from evla_cli.vision.measuring import TowerMeter, channel_name
from evla_cli.vision.planning import ReadRms, VisionOptions, check_towers, foreseen_towers, plan_towers

OnComplete = Callable[[Path], Any]  # is given the complete output right before the rename that puts it in its place
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ANALYZE_OPTIONS = ("num_samples", "batch_size", "dtype")  # that change the result; all of them stand in its file
_FOR_LESS_MEMORY = (
    "use a smaller batch size, --memory-budget, beyond which hidden states wait in a file for their turn, fewer "
    "samples, or --device cpu"
)


def analyze(
    source: Path,
    data: Path,
    *,
    num_samples: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    dtype: str = "float32",
    memory_budget: str | None = None,
    with_action_head: bool = False,
    channel_rms: LazyTensors | None = None,
    weights: dict[str, float] | None = None,
    ranks: Ranks = ALONE,
) -> LayerImportance:
    """How much every decoder layer does on the samples in `data`. Layers are read one at a time.

    Args:
        memory_budget: of hidden states, such as "2GiB"; what is more goes to a temporary file. None: no bound.
        weights: how often a position of each kind counts ("visual", "text", "cognition"); None: once, as in the paper.
        channel_rms: is given, for every layer whose MLP can be narrowed, the root mean square of each of its channels
            over all real positions; None: they are not measured.
        ranks: of a job whose processes share the samples; each of them returns the result for all samples.
    """
    with ranks.first_goes_first():
        check_device(device)
        checkpoint = open_checkpoint(source)
        _check_position_weights(checkpoint, weights)
        if checkpoint.tokenizer_dir is None:
            raise EvlaError(f"{checkpoint.root} has no tokenizer.json; copy the tokenizer's files there.")
        samples = sort_samples(load_samples(data, checkpoint.family.sample_kind, num_samples))
    # Whole batches, so that every one is padded and computed as it would be by a single process.
    batches = ranks.share(math.ceil(len(samples) / batch_size))
    mine = samples[batches.start * batch_size : batches.stop * batch_size]
    reader = checkpoint.reader
    if ranks.first:  # it alone hashes the checkpoint
        reader.start_reading(in_order=False)
    with_rows = channel_rms is not None and checkpoint.mlp_obstacle is None
    meter = TowerMeter(checkpoint, with_channels=channel_rms is not None)
    with (
        torch.inference_mode(),
        out_of_memory(device, _FOR_LESS_MEMORY),
        failures_of_transformers(checkpoint.root),
    ):
        stream = DecoderStream(
            checkpoint,
            mine,
            batch_size,
            DTYPES[dtype],
            device,
            memory_budget=None if memory_budget is None else parse_size(memory_budget),
            watch=meter.watch,
        )
        vision = meter.scores(ranks)
        if channel_rms is not None:
            channel_rms |= meter.channels(ranks, _root_mean_square)
        if ranks.first:  # what comes before the layers may stand anywhere in the files
            reader.start_reading()
        scores = []
        with progress_bar("layers", len(stream) * len(stream.batches), "batch") as bar:
            for index, layer in enumerate(stream.layers()):
                similarities, energies = [], []
                of_kind: list[dict[str, float]] = []
                for batch in stream.batches:
                    hidden_states, mask = stream.on_device(batch)
                    with captured_inputs(_mlp_output(layer, with_rows)) as seen:
                        similarity, output = run_layer(layer, hidden_states, stream.arguments(batch, index))
                    batch.hidden_states.copy_(output)
                    kinds = _kinds(checkpoint, hidden_states, mask)
                    counted = position_weights(kinds, weights) if weights else mask
                    similarities += sample_similarity(similarity, counted).tolist()
                    of_kind += _by_kind(similarity, kinds)
                    energies += [channel_energy(inputs, mask) for inputs in seen]
                    bar.update()
                scores.append(_layer_score(index, ranks.gather(similarities), ranks.gather(of_kind), len(samples)))
                if channel_rms is not None and with_rows:
                    channel_rms[str(index)] = _root_mean_square(ranks.gather(energies))
        action_head = _denoise_similarity(checkpoint, stream, ranks) if with_action_head else None
    (checkpoint_sha256,) = ranks.gather([reader.sha256] if ranks.first else [])
    reader.check_unchanged()
    return LayerImportance(
        schema_version=SCHEMA_VERSION,
        metric="block_influence",
        num_samples=len(samples),
        checkpoint_sha256=checkpoint_sha256,
        samples_sha256=samples_sha256(samples),
        layers=tuple(scores),
        family=checkpoint.family.name,
        dtype=dtype,
        batch_size=batch_size,
        action_head=action_head,
        vision=vision,
        vision_metric=TOWER_METRIC if vision else None,
        position_weights=weights or None,
    )


def _check_position_weights(checkpoint: Checkpoint, weights: dict[str, float] | None) -> None:
    """Errors: a kind of position that the model does not have; weights that would leave none to count."""
    kinds = _kinds(checkpoint, torch.empty(1, 1, 0), None)
    for kind, weight in (weights or {}).items():
        if kind not in kinds:
            raise EvlaError(f"Position weights: {checkpoint.root} has no kind '{kind}'. {suggest(kind, kinds)}")
        if not 0 <= weight < math.inf:
            raise EvlaError(f"The position weight of {kind} must be a number from 0 on, got {weight}.")
    if not any((weights or {}).get(kind, 1.0) for kind in kinds):
        raise EvlaError("All position weights are 0: nothing would be measured.")


def _kinds(checkpoint: Checkpoint, hidden_states: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """A mask (B, T) of the positions of every kind."""
    real, split = real_positions(hidden_states, mask), checkpoint.family.modalities
    return {"text": real} if split is None else split(checkpoint.config, real)


def _by_kind(similarity: Tensor, kinds: dict[str, Tensor]) -> list[dict[str, float]]:
    """For every sample its mean similarity over the positions of each kind that it has; nothing where all are text."""
    if len(kinds) == 1:
        return []
    means = {kind: sample_similarity(similarity, mask).tolist() for kind, mask in kinds.items()}
    count = len(similarity)
    return [{kind: values[n] for kind, values in means.items() if bool(kinds[kind][n].any())} for n in range(count)]


def _layer_score(
    index: int, similarities: list[float], of_kind: list[dict[str, float]], num_samples: int
) -> LayerScore:
    if len(similarities) != num_samples:
        raise EvlaError(f"Layer {index} was reached by {len(similarities)} of {num_samples} samples; it has no score.")
    found = sorted({kind for kinds in of_kind for kind in kinds})
    values = {kind: [kinds[kind] for kinds in of_kind if kind in kinds] for kind in found}
    return LayerScore(
        index,
        *importance_and_error(similarities),
        per_sample=tuple(round(1.0 - similarity, 9) for similarity in similarities),  # cosines are float32
        by_modality={kind: importance_and_error(values[kind])[0] for kind in found} or None,
    )


def _mlp_output(layer: Any, wanted: bool) -> torch.nn.Module | None:
    return layer.mlp.down_proj if wanted else None


def _root_mean_square(energies: list[tuple[Tensor, int]]) -> LazyTensor:
    """Of every channel, from the sums of all batches. They are added up batch by batch, whoever computed them."""
    total, count = torch.zeros_like(energies[0][0].cpu()), 0
    for squares, rows in energies:
        total += squares.cpu()
        count += rows
    return LazyTensor.of((total / count).sqrt().float())


def _denoise_similarity(checkpoint: Checkpoint, stream: DecoderStream, ranks: Ranks) -> dict[str, Any] | None:
    """How alike the action head's denoising steps are, given the cognition tokens of the samples."""
    if checkpoint.family.action_head is None:
        return None
    norm = stream.load_last_parts()
    batches = map(stream.on_device, stream.batches)
    tokens = [cognition_token(norm(hidden_states), mask) for hidden_states, mask in batches]
    everyones = torch.cat(ranks.gather([token.cpu() for token in tokens])).to(stream.device)
    return denoise_similarity(stream.load_part(checkpoint.family.action_head), everyones)


def analyze_to_file(
    source: Path,
    data: Path,
    output: Path,
    *,
    figures: Path | None = None,
    overwrite: bool = False,
    on_complete: OnComplete | None = None,
    ranks: Ranks = ALONE,
    **options: Any,
) -> LayerImportance:
    """`analyze`, its result written to `output`, what it measured of the MLP channels beside it, and its pictures into
    `figures`, all by the first rank."""
    channel_rms: LazyTensors = {}
    options |= {"with_action_head": figures is not None, "channel_rms": channel_rms, "ranks": ranks}
    if not ranks.first:
        return analyze(source, data, **options)
    _check_not_input(output, source, data)
    if figures is not None:
        check_apart(figures, source)
    with ExitStack() as outputs:  # the importance file is the last to take its place: it holds the other's hash
        staging = outputs.enter_context(new_file(output, overwrite))
        companion = outputs.enter_context(new_file(activations_file(output), overwrite))
        if figures is not None:
            check_figures(figures, overwrite)
        result = analyze(source, data, **options)
        result = replace(result, activations_sha256=write_safetensors(companion, channel_rms, {}))
        write_text(staging, result.to_json())
        if on_complete:
            on_complete(staging)
    if figures is not None:
        draw_importance(result, figures)
    return result


def _check_not_input(output: Path, source: Path, data: Path) -> None:
    """Errors: writing `output` would replace a file that is read, which an importance file among them is not."""
    for read in (source, data):
        inside = output.resolve().is_relative_to(read.resolve())
        if inside and output.is_file() and not output.read_bytes()[:200].lstrip().startswith(b'{\n  "schema_version"'):
            raise EvlaError(f"{output} is a file of {read}, which is read; choose another output.")


@dataclass(frozen=True)
class PruneResult:
    """A plan and what it does to the checkpoint's size."""

    plan: PrunePlan
    parameters_before: int
    parameters_after: int
    bytes_after: int

    def to_record(self) -> dict[str, Any]:
        plan = {key: value for key, value in self.plan.to_record().items() if key != "mlp_keep"}
        sizes = {name: getattr(self, name) for name in ("parameters_before", "parameters_after", "bytes_after")}
        return {"plan": plan, **sizes}


def prune(
    source: Path,
    dest: Path,
    *,
    importance: Path | None = None,
    num_drop: int | None = None,
    num_keep: int | None = None,
    drop_ids: Sequence[int] = (),
    choice: ChoiceOptions | None = None,
    protect_first: int | None = None,
    mlp_prune_ratio: float = 0.0,
    mlp_method: str = "activation",
    seed: int = 0,
    vision: VisionOptions | None = None,
    plan_file: Path | None = None,
    refit: RefitOptions | None = None,
    check: bool = True,
    dry_run: bool = False,
    overwrite: bool = False,
    on_complete: OnComplete | None = None,
) -> PruneResult:
    """Remove decoder layers and MLP width, of vision towers, too; write the pruned checkpoint in the source's layout.

    The source is hashed while it is copied, so that it is read once. That `importance` or `plan_file` belong to this
    very checkpoint is therefore checked last, or before row selection where that takes long.

    Args:
        choice: choose the layers by running the model on samples; None: by the ranking in `importance`.
        plan_file: a prune_plan.yaml to follow, instead of all the options before it.
        refit: fit the layers that stay to the dense model on these samples; None: their weights stay as they are.
        check: run the source without what goes and, before refit, the output on a few tokens; see `check_values`.
    """
    checkpoint = open_checkpoint(source)
    reader = checkpoint.reader

    def decide() -> tuple[PrunePlan, LazyTensors]:
        check_fits(checkpoint.family, checkpoint.config, checkpoint.weights, checkpoint.root)
        if plan_file is not None:
            plan = _given_plan(plan_file, checkpoint)
            if plan.how.get("refit") and refit is None:
                raise EvlaError(f"{plan_file} was refit: give --refit with the --samples that it was refit on.")
        else:
            scores = _given_importance(importance, checkpoint) if importance else None
            num_first = _num_protected(checkpoint, protect_first)
            ranking = scores.ranking() if scores else None
            if choice is not None:
                ranking = list(range(checkpoint.num_layers))  # any will do to count and to check
            keep = _layers_to_keep(checkpoint, ranking, num_drop, num_keep, drop_ids, num_first)
            if choice is None:
                chosen = _chosen_by_rank(scores, keep, drop_ids, num_first)
            else:
                weights = scores.position_weights if scores else None
                options = replace(choice, held_out=refit is not None, weights=weights)
                keep, chosen = _chosen_by_samples(checkpoint, options, keep, drop_ids, num_first)
            read_rms = None
            if importance and scores and mlp_prune_ratio and _reads_activations(mlp_method, importance, scores):
                read_rms = _given_activations(importance, scores, checkpoint)
            plan = _new_plan(checkpoint, keep, scores, drop_ids, num_first, mlp_prune_ratio, mlp_method, seed, read_rms)
            plan = replace(plan, how=plan.how | chosen)
            if vision is not None:
                read_towers = None
                if vision.mlp_prune_ratio:
                    if importance and scores and _reads_activations(vision.mlp_method, importance, scores):
                        read_towers = _given_tower_activations(importance, scores, checkpoint)
                    elif vision.mlp_method in NEED_ACTIVATIONS:
                        raise EvlaError(
                            f"--vision-mlp-method {vision.mlp_method} needs --importance from evla analyze of this "
                            "checkpoint."
                        )
                measured = scores.vision if scores else {}
                if vision.drop_layers and scores and measured and scores.vision_metric != TOWER_METRIC:
                    raise EvlaError(
                        f"{importance} ranks the towers' blocks without regard to lengths, as older versions did: run "
                        "evla analyze again."
                    )
                towers, facts = plan_towers(checkpoint, vision, measured, read_towers, seed)
                plan = replace(plan, vision=towers, how=_with_both_energies(plan.how, facts))
            _warn_of_rows(plan.how)
        pruned = prune_weights(reader.tensors, plan, checkpoint.layer_prefix, checkpoint.tower_prefixes)
        return plan, fit_packed_layers(checkpoint, plan, pruned)

    def refitted(plan: PrunePlan, pruned: LazyTensors, options: RefitOptions) -> tuple[PrunePlan, LazyTensors]:
        if plan.checkpoint_sha256 != "":
            _check_source(plan_file or importance, plan.checkpoint_sha256, reader)
        with out_of_memory(options.device, _FOR_LESS_MEMORY), failures_of_transformers(checkpoint.root):
            weights, report = refit_layers(checkpoint, plan, options)
        how = {"refit": True, "refit_last_weight": options.last_weight, "refit_report": report}
        return replace(plan, how=plan.how | how), pruned | weights

    def identified(plan: PrunePlan) -> PrunePlan:
        if plan.checkpoint_sha256 != "":
            _check_source(plan_file or importance, plan.checkpoint_sha256, reader)
        return replace(plan, checkpoint_sha256=reader.sha256)

    if dry_run:
        plan, pruned = decide()
        return _result(identified(plan), reader.tensors, pruned)
    with new_directory(dest, overwrite, checkpoint.root) as staging:
        reader.start_reading()
        plan, pruned = decide()
        check_space(staging.parent, total_bytes(pruned))
        written = pruned
        if refit is not None:
            plan, written = refitted(plan, pruned, refit)
        with _byte_progress("writing", written) as on_bytes:
            hashes = checkpoint.write_pruned(checkpoint, staging, written, plan, on_bytes)
        plan = identified(plan)
        write_yaml(staging / PLAN, plan.to_record(), "What evla prune removed; see docs/files.md.")
        write_manifest(staging, {"checked": check}, hashes)  # where it comes from is what the plan says
        if check:
            before_refit = {name: lazy for name, lazy in pruned.items() if lazy is not written[name]}
            check_values(checkpoint, _reopened(staging, checkpoint, before_refit), plan)
        reader.check_unchanged()
        if on_complete:
            on_complete(staging)
    return _result(plan, reader.tensors, pruned)


def _reopened(written: Path, source: Checkpoint, instead: LazyTensors) -> Checkpoint:
    """What was written, as anybody would open it, but with these weights (under the source's names)."""
    checkpoint = open_checkpoint(written)
    prefixes = {source.layer_prefix: source.family.decoder_layers}
    prefixes |= {
        native: ours
        for tower, names in source.tower_prefixes.items()
        for native, ours in zip(names, source.family.tower_prefixes[tower], strict=True)
    }
    weights = dict(checkpoint.weights)
    for name, lazy in instead.items():
        native = next(prefix for prefix in prefixes if name.startswith(f"{prefix}."))
        weights[prefixes[native] + name.removeprefix(native)] = lazy
    return replace(checkpoint, weights=weights)


def foreseen_plan(source: Checkpoint, options: PruneRecipe, ranked: bool) -> PrunePlan:
    """A plan of the size that the options will lead to, for what can be checked before layers are `ranked`."""
    ranking = list(range(source.num_layers)) if ranked else None
    num_first = _num_protected(source, options.protect_first)
    keep = _layers_to_keep(source, ranking, options.drop_layers, None, options.drop_layer_ids, num_first)
    width = _width_to_keep(source, options.mlp_prune_ratio)
    mlp_keep = None
    if width < source.intermediate_size:
        _mlp_names(source)
        mlp_keep = (tuple(range(width)),) * len(keep)
    towers = foreseen_towers(source, vision_options(options))
    return PrunePlan(source.num_layers, source.intermediate_size, keep, mlp_keep, vision=towers)


def vision_options(options: PruneRecipe) -> VisionOptions:
    return VisionOptions(options.vision_drop_layers, options.vision_mlp_prune_ratio, options.vision_mlp_method)


def _new_plan(
    checkpoint: Checkpoint,
    keep: tuple[int, ...],
    scores: LayerImportance | None,
    drop_ids: Sequence[int],
    protect_first: int,
    mlp_prune_ratio: float,
    mlp_method: str,
    seed: int,
    read_rms: Callable[[int], Tensor] | None,
) -> PrunePlan:
    """Its `checkpoint_sha256` is what `scores` were measured on; empty without scores."""
    mlp_keep, facts = _channels_to_keep(checkpoint, keep, mlp_prune_ratio, mlp_method, seed, read_rms)
    return PrunePlan(
        num_layers=checkpoint.num_layers,
        intermediate_size=checkpoint.intermediate_size,
        keep_layers=keep,
        mlp_keep=mlp_keep,
        checkpoint_sha256=scores.checkpoint_sha256 if scores else "",
        how={
            "importance": [score.importance for score in scores.layers] if scores else None,
            "samples_sha256": scores.samples_sha256 if scores else None,
            "analyze": _analyze_options(scores) if scores else None,
            "drop_layers": checkpoint.num_layers - len(keep),
            "drop_layer_ids": sorted(set(drop_ids)),
            "protect_first": protect_first if len(keep) < checkpoint.num_layers else None,  # or does nothing
            "mlp_prune_ratio": mlp_prune_ratio,
            "mlp_method": mlp_method if mlp_keep else None,
            "seed": seed,
            **facts,
        },
    )


def _analyze_options(scores: LayerImportance) -> dict[str, Any]:
    options = {name: getattr(scores, name) for name in _ANALYZE_OPTIONS}
    return options | ({"position_weights": scores.position_weights} if scores.position_weights else {})


def _given_plan(path: Path, checkpoint: Checkpoint) -> PrunePlan:
    plan = PrunePlan.load(path)
    for name in ("num_layers", "intermediate_size"):
        if getattr(plan, name) != getattr(checkpoint, name):
            raise EvlaError(
                f"{path} is for a checkpoint whose {name} is {getattr(plan, name)}, that of {checkpoint.root} is "
                f"{getattr(checkpoint, name)}."
            )
    check_towers(plan.vision, checkpoint)
    return plan


def _given_importance(path: Path, checkpoint: Checkpoint) -> LayerImportance:
    scores = LayerImportance.load(path)
    if len(scores.layers) != checkpoint.num_layers:
        raise EvlaError(
            f"{path} ranks {len(scores.layers)} layers, {checkpoint.root} has {checkpoint.num_layers}: "
            "run evla analyze on this checkpoint."
        )
    return scores


def _given_activations(importance: Path, scores: LayerImportance, checkpoint: Checkpoint) -> Callable[[int], Tensor]:
    """Root mean square of every MLP channel (F) by decoder layer, from the file beside `importance`."""
    _mlp_names(checkpoint)
    path, tensors = _activations(importance, scores)
    check_weights(
        {str(layer): (checkpoint.intermediate_size,) for layer in range(checkpoint.num_layers)},
        {name: lazy for name, lazy in tensors.items() if name.isdecimal() or not checkpoint.family.towers},
        path,
    )
    return lambda layer: load_finite(f"{path}: layer {layer}", tensors[str(layer)])


def _reads_activations(method: str, importance: Path, scores: LayerImportance) -> bool:
    """Whether rows by `method` need what `analyze` measured of the channels, or it is there to judge them by."""
    measured = scores.activations_sha256 is not None and activations_file(importance).exists()
    return method in NEED_ACTIVATIONS or measured


def _with_both_energies(how: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    key = "removed_output_energy"
    both = {key: how[key] | facts[key]} if key in how and key in facts else {}
    return how | facts | both


def _warn_of_rows(how: dict[str, Any]) -> None:
    for stack, energy in how.get("removed_output_energy", {}).items():
        method = how["mlp_method" if stack == "decoder" else "vision_mlp_method"]
        warn_if_worse_than_random(method, stack if stack == "decoder" else f"{stack} tower", energy)


def _given_tower_activations(importance: Path, scores: LayerImportance, checkpoint: Checkpoint) -> ReadRms:
    """The same by vision tower and block."""
    path, tensors = _activations(importance, scores)

    def read(tower: str, block: int) -> Tensor:
        name = channel_name(tower, block)
        check_weights(
            {name: (checkpoint.tower_sizes(tower)[1],)}, {key: tensors[key] for key in tensors if key == name}, path
        )
        return load_finite(f"{path}: {name}", tensors[name])

    return read


def _activations(importance: Path, scores: LayerImportance) -> tuple[Path, LazyTensors]:
    path = activations_file(importance)
    if scores.activations_sha256 is None:
        raise EvlaError(f"{importance} holds no activations, as older versions made it: run evla analyze again.")
    if not has_activations(importance):
        raise EvlaError(f"{path} is missing or not the one made with {importance}: run evla analyze again.")
    return path, read_safetensors(path)


def _check_source(path: Path | None, sha256: str, reader: CheckpointReader) -> None:
    """Errors: the importance or the plan in the file `path` is that of a checkpoint with another hash."""
    if sha256 != reader.sha256:
        raise EvlaError(
            f"{path} was measured on another checkpoint (its hash differs): run evla analyze on this one, and prune it "
            "without --plan."
        )


def _result(plan: PrunePlan, before: LazyTensors, after: LazyTensors) -> PruneResult:
    return PruneResult(plan, total_elements(before), total_elements(after), total_bytes(after))


@contextmanager
def _byte_progress(description: str, tensors: LazyTensors) -> Iterator[Callable[[int], Any]]:
    """A progress bar over the bytes of `tensors`."""
    with progress_bar(description, total_bytes(tensors), "B") as bar:
        yield bar.update


def _num_protected(checkpoint: Checkpoint, protect_first: int | None) -> int:
    """By default the layers before which tokens are pruned: they see the whole image."""
    if protect_first is None:
        return 2 if checkpoint.family.sample_kind == "image" else 0
    return protect_first


def _layers_to_keep(
    checkpoint: Checkpoint,
    ranking: list[int] | None,
    num_drop: int | None,
    num_keep: int | None,
    drop_ids: Sequence[int],
    protect_first: int,
) -> tuple[int, ...]:
    num_layers = checkpoint.num_layers
    if num_keep is not None:
        if num_drop is not None and num_drop != num_layers - num_keep:
            raise EvlaError(f"--drop-layers {num_drop} and --keep-layers {num_keep} disagree on {num_layers} layers.")
        if not 1 <= num_keep <= num_layers:
            raise EvlaError(f"--keep-layers must be between 1 and {num_layers}, got {num_keep}.")
        num_drop = num_layers - num_keep
    if num_drop is None:
        num_drop = len(set(drop_ids))
    if num_drop < 0:
        raise EvlaError(f"--drop-layers must not be negative, got {num_drop}.")
    if num_drop < len(set(drop_ids)):
        raise EvlaError(f"--drop-layer-ids names {len(set(drop_ids))} layers, but only {num_drop} are to go in all.")
    if ranking is None and num_drop > len(set(drop_ids)):
        raise EvlaError("Dropping layers by rank needs --importance; make it with evla analyze.")
    if not 0 <= protect_first <= num_layers:
        raise EvlaError(f"--protect-first must be between 0 and {num_layers}, got {protect_first}.")
    return choose_layers(ranking or list(range(num_layers)), num_drop, drop_ids, range(protect_first))


def _chosen_by_rank(
    scores: LayerImportance | None, keep: tuple[int, ...], drop_ids: Sequence[int], protect_first: int
) -> dict[str, Any]:
    """For the plan: how sure the samples are of it. Nothing without a choice, or in files of older versions."""
    if scores is None or any(score.per_sample is None for score in scores.layers):
        return {}
    values = np.array([score.per_sample for score in scores.layers]).T  # (samples, layers)
    candidates = sorted(set(range(protect_first, len(scores.layers))) - set(drop_ids))
    found = stability(values, [layer for layer in candidates if layer not in keep], candidates)
    return {} if found is None else {"stability": found}


def _chosen_by_samples(
    checkpoint: Checkpoint, options: ChoiceOptions, like: tuple[int, ...], drop_ids: Sequence[int], protect_first: int
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """As many layers as `like` has, and what the plan says about them."""
    num_drop = checkpoint.num_layers - len(like)
    with out_of_memory(options.device, _FOR_LESS_MEMORY), failures_of_transformers(checkpoint.root):
        dropped, report = choose_by_samples(checkpoint, options, num_drop, set(drop_ids), range(protect_first))
    facts = {"layer_method": options.method, "objective": options.objective, "layer_choice": report}
    stable = report["rounds"][-1].pop("stability") if report["rounds"] else None
    keep = tuple(layer for layer in range(checkpoint.num_layers) if layer not in dropped)
    return keep, facts | ({} if stable is None else {"stability": stable})


def _channels_to_keep(
    checkpoint: Checkpoint,
    layers: Sequence[int],
    mlp_prune_ratio: float,
    method: str,
    seed: int,
    read_rms: Callable[[int], Tensor] | None,
) -> tuple[tuple[tuple[int, ...], ...] | None, dict[str, Any]]:
    width = _width_to_keep(checkpoint, mlp_prune_ratio)
    if width == checkpoint.intermediate_size:
        return None, {}
    names = _mlp_names(checkpoint)

    def read_mlp(layer: int) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = (checkpoint.reader.tensors[f"{checkpoint.layer_prefix}.{layer}.{name}"] for name in names)
        return gate.load(), up.load(), down.load()

    with progress_bar(method, 0, "matrix") as bar:

        def on_step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        mlps = MlpLayers(layers, read_mlp, checkpoint.intermediate_size, width, read_rms)
        choice = select_channels(method, mlps, seed, on_step)
    energy = choice.removed_energy
    return choice.rows, {} if energy is None else {"removed_output_energy": {"decoder": energy}}


def _width_to_keep(checkpoint: Checkpoint, mlp_prune_ratio: float) -> int:
    before = checkpoint.intermediate_size
    width = prune_width(before, mlp_prune_ratio)
    if mlp_prune_ratio and width == before:
        raise EvlaError(
            f"--mlp-prune-ratio {mlp_prune_ratio} removes none of {before} channels, since what stays is rounded to a "
            "multiple of 64 (narrow MLPs: less); give a larger ratio, or 0."
        )
    return width


def _mlp_names(checkpoint: Checkpoint) -> list[str]:
    if checkpoint.mlp_obstacle is not None:
        raise EvlaError(
            f"{checkpoint.root}: {checkpoint.mlp_obstacle}; only gated MLPs can be narrowed. Use --mlp-prune-ratio 0."
        )
    return [f"mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")]


def export(
    source: Path,
    dest: Path,
    settings: InferenceSettings,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    act: bool = True,
    on_complete: OnComplete | None = None,
) -> dict[str, Any]:
    """Write a self-contained bundle from a checkpoint that acts; then read it again, for all that `verify` does.

    Args:
        act: let the bundle act once and write down what it did, as `check.json`.
    """
    checkpoint = open_checkpoint(source)
    shard_bytes = parse_size(max_shard_size)
    with new_directory(dest, overwrite, checkpoint.root) as staging:
        checkpoint.reader.start_reading()
        check_export(checkpoint, settings)
        weights = cast(checkpoint.weights, dtype, checkpoint.family)
        check_space(staging.parent, total_bytes(weights))
        with _byte_progress("exporting", weights) as on_bytes:
            hashes = write_huggingface_weights(staging, weights, shard_bytes, on_bytes)
        write_bundle_files(checkpoint, staging, settings, dtype, shard_bytes, hashes)
        facts = finish_bundle(staging, act)
        checkpoint.reader.check_unchanged()
        if on_complete:
            on_complete(staging)
    return facts


def cast(weights: LazyTensors, dtype: str | None, family: ModelFamily) -> LazyTensors:
    """The weights in `dtype` (None: as stored); those of parts that do not follow it stay as they are."""
    if dtype is None:
        return weights
    return {name: lazy.to(DTYPES[dtype]) if family.follows_dtype(name) else lazy for name, lazy in weights.items()}


def predict(
    source: Path,
    image: Path,
    instruction: str,
    *,
    unnorm_key: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str | None = None,
) -> np.ndarray:
    """One action chunk for an image file: (H, A), in the robot's units. `source`: as of `bench`, one candidate."""
    check_device(device)
    picture = load_image(image, str(image))
    candidates = open_candidates([source])
    if len(candidates) > 1:
        raise EvlaError(f"{source} lists {len(candidates)} candidates; name the one that is to predict.")
    checkpoint, settings = candidates[0].checkpoint, candidates[0].settings
    with out_of_memory(device, "use --dtype bfloat16, a smaller model, or --device cpu"):
        policy = policy_from_weights(checkpoint, settings, device=device, dtype=DTYPES[dtype] if dtype else None)
        return policy.predict_action(picture, instruction, unnorm_key=unnorm_key, seed=seed)


def settings_with(path: Path | None, **sections: dict[str, Any]) -> InferenceSettings:
    """Settings from a file, with the given values (those that are not None) on top; without a file, neutral ones."""
    record: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
    if path is not None:
        record = InferenceSettings.load(path).to_record()
    for section, values in sections.items():
        given = {key: value for key, value in values.items() if value is not None}
        record[section] = {**record.get(section, {}), **given}
    return from_mapping(InferenceSettings, record, "settings")
