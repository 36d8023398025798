"""Results as tables for people and as JSON for scripts."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evla_cli.checkpoint.bundle import MANIFEST
from evla_cli.checkpoint.tensors import total_bytes, total_elements
from evla_cli.families import open_checkpoint
from evla_cli.families.base import Checkpoint
from evla_cli.families.quantized import quantization
from evla_cli.methods.mlp_pruning import width_multiple
from evla_cli.plan import PLAN, LayerImportance, LayerScore, PrunePlan, StackPlan, ranked

if TYPE_CHECKING:
    import numpy as np

    from evla_cli.evaluation.held_out import HeldOutError
    from evla_cli.pipeline import PruneResult


ACTION_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")  # CogACT's seven, in order


def print_json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2, allow_nan=False)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *others]).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def importance_table(result: LayerImportance) -> str:
    rank = {layer: place for place, layer in enumerate(result.ranking(), start=1)}
    kinds = sorted({kind for score in result.layers for kind in score.by_modality or ()})
    rows = []
    for score in result.layers:
        of_kind = [f"{score.by_modality[kind]:.5f}" if score.by_modality else "" for kind in kinds]
        rows.append([str(score.index), f"{score.importance:.5f}", _error(score), str(rank[score.index]), *of_kind])
    note = f"{result.num_samples} samples, {result.dtype}; rank 1 does least and is removed first."
    if result.position_weights:
        weights = ", ".join(f"{kind} {weight:g}" for kind, weight in result.position_weights.items())
        note += f" Positions count: {weights}, others 1."
    parts = [table(["layer", "importance", "std. error", "rank", *kinds], rows)]
    for tower, scores in result.vision.items():
        place = {block: rank for rank, block in enumerate(ranked(scores), start=1)}
        parts.append(
            table(
                [f"{tower} block", "importance", "std. error", "rank"],
                [[str(s.index), f"{s.importance:.5f}", _error(s), str(place[s.index])] for s in scores],
            )
        )
    return "\n\n".join(parts) + "\n" + note


def _error(score: LayerScore) -> str:
    return "" if score.standard_error is None else f"{score.standard_error:.5f}"


def prune_table(result: "PruneResult") -> str:
    plan = result.plan
    scores = _scores(plan)
    header = ["layer", "score" if "layer_choice" in plan.how else "importance", "", "new index"]
    stable = plan.how.get("stability")
    rows = []
    for layer in range(plan.num_layers):
        kept = layer in plan.keep_layers
        new = str(plan.keep_layers.index(layer)) if kept else "-"
        share = f"{stable['drop_shares'][layer]:.1%}" if stable and layer in stable["drop_shares"] else ""
        score = f"{scores[layer]:.5f}" if layer in scores else ""
        rows.append([str(layer), score, "keep" if kept else "drop", new, *([share] if stable else [])])
    before, after = result.parameters_before, result.parameters_after
    lines = [
        table([*header, *(["dropped in"] if stable else [])], rows),
        *([] if stable is None else [f"{stability_note(stable)} 'dropped in': the share in which a layer goes."]),
        f"decoder layers   {plan.num_layers} -> {len(plan.keep_layers)}",
        f"MLP width        {_widths(plan, plan.how.get('mlp_prune_ratio'))}"
        + (f"  ({plan.how['mlp_method']})" if plan.mlp_keep else ""),
        *_tower_lines(plan),
        f"parameters       {before / 1e6:,.2f} M -> {after / 1e6:,.2f} M  ({after / before:.1%})",
        f"weights on disk  {result.bytes_after / 1e6:,.1f} MB",
    ]
    lines += _energy_lines(plan)
    refit = plan.how.get("refit_report")
    if refit:
        lines.append(refit_table(refit))
    return "\n".join(lines)


def _tower_lines(plan: PrunePlan) -> list[str]:
    lines = []
    for name, tower in plan.vision.items():
        width = _widths(tower, plan.how.get("vision_mlp_prune_ratio"))
        lines.append(f"{name:16} {_depths(tower, 'blocks')}, MLP width {width}")
    return lines


def _depths(stack: StackPlan, noun: str) -> str:
    """Before and after, and which go."""
    if not stack.dropped_layers:
        return f"{stack.num_layers} {noun}"
    dropped = ", ".join(map(str, stack.dropped_layers))
    return f"{stack.num_layers} -> {len(stack.keep_layers)} {noun} (without {dropped})"


def _widths(stack: StackPlan, asked: float | None) -> str:
    """Before and after; where rounding makes it another share than was asked for, which."""
    before, after = stack.intermediate_size, stack.kept_intermediate_size
    removed, rounding = 1 - after / before, ""
    if asked and abs(removed - asked) >= 0.0005:
        multiple = width_multiple(before)
        rounding = f" ({removed:.1%} go, not {asked:.1%}: widths are multiples of {multiple})"
    return f"{before} -> {after}{rounding}"


def stage_verdicts(stage: str, output: Path) -> list[str]:
    """What a stage of `evla run` found about itself, from what it wrote: one line each."""
    if stage == "analyze":
        found = LayerImportance.load(output)
        least = ", ".join(map(str, found.ranking()[:3]))
        return [f"{found.num_samples} samples; the layers that do least: {least}"]
    return plan_verdicts(PrunePlan.load(output / PLAN)) if stage == "prune" else []


def plan_verdicts(plan: PrunePlan) -> list[str]:
    """What goes, how sure that is, and whether refit helped."""
    width = _widths(plan, plan.how.get("mlp_prune_ratio"))
    lines = [f"{_depths(plan, 'layers')}, MLP width {width}"]
    lines += [" ".join(line.split()) for line in _tower_lines(plan)]
    stable, refit = plan.how.get("stability"), plan.how.get("refit_report")
    lines += [stability_note(stable)] if stable else []
    lines += [" ".join(line.split()) for line in _energy_lines(plan)]
    return lines + (refit_verdicts(refit) if refit else [])


def _energy_lines(plan: PrunePlan) -> list[str]:
    """What share of the output's energy goes with the rows of each stack, beside other ways of choosing them."""
    energies = plan.how.get("removed_output_energy", {})
    lines = []
    for stack in [name for name, each in ({"decoder": plan} | plan.vision).items() if each.mlp_keep]:
        energy = energies.get(stack)
        if energy is None:
            lines.append(f"output that goes not measured  ({stack}; --importance measures it)")
            continue
        for name, share in energy.items():
            if name == "expected_of_random":
                lines.append(f"output that goes {share:.1%}  ({stack}, random rows in the mean)")
            else:
                worst = f"at most {share['worst']:.1%}, in layer {share['worst_layer']}"
                lines.append(f"output that goes {share['mean']:.1%}  ({stack}, {name} rows; {worst})")
    return lines


def _scores(plan: PrunePlan) -> dict[int, float]:
    """By layer: importance, or what the layer scored when it went, or else last."""
    choice = plan.how.get("layer_choice")
    if choice is None:
        return dict(enumerate(plan.how.get("importance") or ()))
    scores: dict[int, float] = {}
    for step in choice["rounds"]:
        scores |= step["scores"]
    return scores


def stability_note(stable: dict[str, Any]) -> str:
    last, first, share = stable["last_dropped"], stable["first_kept"], stable["exchanged_share"]
    verdict = "is sure" if stable["told_apart"] else "is not sure"
    return (
        f"That layer {last} goes rather than layer {first} {verdict}: {share:.1%} of {stable['num_resamples']} "
        "bootstrap resamples of the samples choose the other of the two."
    )


def refit_table(report: dict[str, Any]) -> str:
    rows = []
    stacks = {f"{tower} ": blocks for tower, blocks in report.get("vision", {}).items()} | {"": report["layers"]}
    for stack, layer, entry in [(stack, *each) for stack, layers in stacks.items() for each in layers.items()]:
        before, after = entry["held_out_rms"]
        ridge = "unchanged" if entry["ridge"] is None else f"{entry['ridge']:g}"
        rows.append([f"{stack}{layer}", f"{before:.5f}", f"{after:.5f}", ridge])
    towers = report.get("vision_final_rms", {})
    ends = {f"{name} features": rms for name, rms in towers.items()}
    ends |= {f"end, {kind}": rms for kind, rms in report["final_rms"].items()}
    for end, (before, after) in ends.items():
        rows.append([end, f"{before:.5f}", f"{after:.5f}", ""])
    note = f"Distance of hidden states from the dense model's on {report['num_held_out']} held-out samples of "
    note += f"{report['num_samples']}, without refit and with it."
    return "\n".join([table(["refit layer", "before", "after", "lambda"], rows), note, *refit_verdicts(report)])


def refit_verdicts(report: dict[str, Any]) -> list[str]:
    """Whether refit helped, and what became of the weights where it did not."""
    lines = []
    for name, (before, after) in report.get("vision_final_rms", {}).items():
        if after < before:
            lines.append(f"Refit brings the features of {name} nearer: {before:.5f} -> {after:.5f}.")
        else:
            lines.append(
                f"Refit does not bring the features of {name} nearer: all weights of this tower stay as they were."
            )
    judging, (before, after) = list(report["final_rms"].items())[-1]
    if report["helps"]:
        lines.append(f"Refit brings the end nearer ({judging}): {before:.5f} -> {after:.5f}.")
    else:
        which = "all weights of the decoder" if "vision" in report else "all weights"
        lines.append(f"Refit does not bring the end nearer ({judging}): {which} stay as they were.")
    return lines


def held_out_line(found: "HeldOutError | str") -> str:
    """The last line of `evla run`."""
    if isinstance(found, str):
        return f"held-out error: not measured ({found})"
    what = {
        "action": "held-out action error",
        "hidden": "held-out error of the last hidden states, over their length",
    }[found.measure]
    interval = "" if found.low is None else f" [{found.low:.4f}, {found.high:.4f}]"
    of = "" if found.num_samples == found.num_held_out else f" of {found.num_held_out}"
    noise = "from the same noise, " if found.measure == "action" else ""
    samples = f"{found.num_samples}{of} held-out samples"
    return f"{what}: {found.value:.4f}{interval} ({noise}{samples})"


def inspection(source: Path) -> dict[str, Any]:
    """What a checkpoint is, from names, shapes and configs alone."""
    from evla_cli.models.skeleton import check_fits

    checkpoint = open_checkpoint(source)
    quantized = quantization(checkpoint.config, checkpoint.reader.tensors)
    if quantized is None:  # such weights fit no model; that is told as a fact
        check_fits(checkpoint.family, checkpoint.config, checkpoint.weights, checkpoint.root)
    parts = {}
    for part, prefix in checkpoint.family.parts.items():
        tensors = {n: lazy for n, lazy in checkpoint.weights.items() if n == prefix or n.startswith(f"{prefix}.")}
        if tensors:
            parts[part] = {"parameters": total_elements(tensors), "bytes": total_bytes(tensors)}
    dtypes = Counter(str(lazy.dtype).removeprefix("torch.") for lazy in checkpoint.reader.tensors.values())
    facts = {
        "path": str(source),
        "family": checkpoint.family.name,
        "layout": checkpoint.layout,
        "parameters": total_elements(checkpoint.reader.tensors),
        "bytes_on_disk": checkpoint.reader.bytes_on_disk,
        "files": [path.name for path in checkpoint.reader.files],
        "tensors_by_dtype": dict(sorted(dtypes.items())),
        "parts": parts,
        "decoder": {
            "layers": checkpoint.num_layers,
            "hidden_size": checkpoint.decoder_config["hidden_size"],
            "intermediate_size": checkpoint.intermediate_size,
            "mlp_can_be_narrowed": checkpoint.mlp_obstacle is None,
        },
        "tokenizer": checkpoint.tokenizer_dir is not None,
        "quantization": quantized,
        "commands": _commands(checkpoint, quantized is None),
    }
    if checkpoint.family.has_action_head:
        config = checkpoint.family.build_config(checkpoint.config)
        facts["visual_tokens"] = config.num_visual_tokens
        sizes = {name: checkpoint.tower_sizes(name) for name in checkpoint.family.towers}
        facts["towers"] = {name: {"blocks": size[0], "intermediate_size": size[1]} for name, size in sizes.items()}
        facts["action_head"] = {
            "blocks": config.action_config.num_hidden_layers,
            "hidden_size": config.action_config.hidden_size,
            "action_dim": config.action_config.action_dim,
            "action_horizon": config.action_config.action_horizon,
        }
        facts["datasets"] = sorted(config.norm_stats)
    return facts


def _commands(checkpoint: Checkpoint, is_plain: bool) -> list[str]:
    """What can be done with it as it is."""
    with_tokenizer, acts = checkpoint.tokenizer_dir is not None, checkpoint.family.has_action_head
    possible = {
        "analyze": with_tokenizer,
        "prune": True,
        "export": with_tokenizer and acts,
        "verify": (checkpoint.root / MANIFEST).is_file(),
        **dict.fromkeys(("predict", "bench", "compare", "eval"), with_tokenizer and acts),
        "report": checkpoint.layout == "bundle" and with_tokenizer,
    }
    return [name for name, can in possible.items() if can and is_plain]


def inspect_table(facts: dict[str, Any]) -> str:
    decoder = facts["decoder"]
    rows = [
        [part, f"{entry['parameters'] / 1e6:,.2f} M", f"{entry['bytes'] / 1e6:,.1f} MB"]
        for part, entry in facts["parts"].items()
    ]
    rows.append(["all", f"{facts['parameters'] / 1e6:,.2f} M", f"{facts['bytes_on_disk'] / 1e6:,.1f} MB"])
    lines = [
        f"{facts['path']}: {facts['family']}, {facts['layout']} layout, {len(facts['files'])} weight file(s)",
        table(["part", "parameters", "size"], rows),
        f"decoder     {decoder['layers']} layers, {decoder['hidden_size']} wide, MLP {decoder['intermediate_size']}"
        + ("" if decoder["mlp_can_be_narrowed"] or facts["quantization"] else " (of a kind that cannot be narrowed)"),
        f"dtypes      {', '.join(f'{name} ({count} tensors)' for name, count in facts['tensors_by_dtype'].items())}",
    ]
    if "action_head" in facts:
        head = facts["action_head"]
        lines += [
            f"action head {head['blocks']} blocks, {head['hidden_size']} wide, chunks of {head['action_horizon']} x "
            f"{head['action_dim']}",
            f"vision      {facts['visual_tokens']} visual tokens; "
            + ", ".join(f"{n} {t['blocks']} blocks, MLP {t['intermediate_size']}" for n, t in facts["towers"].items()),
            f"datasets    {', '.join(facts['datasets'])}",
        ]
    lines.append(f"tokenizer   {'found' if facts['tokenizer'] else 'missing: copy tokenizer.json here'}")
    if facts["quantization"] is not None:
        lines.append(f"quantised   {facts['quantization']}: evla needs the model as it was before")
    lines.append(f"commands    {', '.join(facts['commands']) or 'none'}")
    return "\n".join(lines)


def action_table(actions: "np.ndarray") -> str:
    """One row a time step."""
    header = ["step", *action_names(actions.shape[1])]
    return table(header, [[str(step), *(f"{value:+.4f}" for value in row)] for step, row in enumerate(actions)])


def action_names(count: int) -> Sequence[str]:
    """Of the action's dimensions; numbers where they are not CogACT's seven."""
    return ACTION_NAMES if count == len(ACTION_NAMES) else [f"a{number}" for number in range(count)]


def bench_table(record: dict[str, Any]) -> str:
    """`evla bench`: sizes, time per stage, speed-ups, the head by cache interval."""
    rows, references = record["rows"], record["references"]
    parts = [
        table(
            ["", "dtype", "parameters", "on disk", "own memory", "resident", "load", "GFLOPs", "executed"],
            [_size_cells(row) for row in rows],
        ),
        "own memory (RssAnon) and resident (with mapped files): peaks of a process that loads the model and predicts "
        "once.\nGFLOPs: of one sample, in the paper's convention; executed: what runs, attention included.",
        "milliseconds, median / 95th percentile",
        table(
            ["", *(stage.replace("_", " ") for stage in (*_LATENCY_STAGES, "whole"))],
            [
                [row["name"], *(_median_p95(row["latency_ms"][stage]) for stage in (*_LATENCY_STAGES, "whole"))]
                for row in rows
            ],
        ),
    ]
    faster = [row for row in rows if row["speedup"]]
    if faster:
        columns = [name for name in references if any(name in row["speedup"] for row in faster)]
        parts += [
            "times as fast per prediction, median of the ratios within each round [95 % interval]",
            table(
                ["", *(f"than {name}" for name in columns)],
                [
                    [row["name"], *(_interval(row["speedup"].get(name, {}).get("whole"), 2) for name in columns)]
                    for row in faster
                ],
            ),
        ]
    heads = [row for row in rows if row["head_ms_by_interval"]]
    intervals = list(dict.fromkeys(interval for row in heads for interval in row["head_ms_by_interval"]))
    parts += [
        "action head alone by cache interval: milliseconds (times as fast as interval 1)",
        table(
            ["", *intervals], [[row["name"], *(_head_cell(row, interval) for interval in intervals)] for row in heads]
        ),
    ]
    for row in rows:
        if row["settings"]["visual_tokens"].get("num_keep") is not None:
            share = row["token_selection_share"]
            parts.append(
                f"{row['name']}: selecting tokens takes {share['median']:.2%} of the language model's time "
                f"(95th percentile {share['p95']:.2%})."
            )
    return "\n\n".join([*parts, _bench_notes(record)])


_LATENCY_STAGES = ("preprocessing", "vision", "projector", "language_model", "action_head")


def _size_cells(row: dict[str, Any]) -> list[str]:
    memory = row["memory"]
    own = memory["peak_rss_anon_bytes"] if memory["peak_device_bytes"] is None else memory["peak_device_bytes"]
    return [
        row["name"],
        row["dtype"] if row["head_dtype"] == row["dtype"] else f"{row['dtype']}, head {row['head_dtype']}",
        f"{row['parameters'] / 1e6:,.2f} M",
        f"{row['bytes_on_disk'] / 1e6:,.1f} MB",
        "" if own is None else f"{own / 1e6:,.0f} MB",
        f"{memory['peak_rss_bytes'] / 1e6:,.0f} MB",
        f"{row['load_seconds']:.2f} s",
        f"{row['flops']['paper']['total'] / 1e9:,.2f}",
        f"{row['flops']['full']['total'] / 1e9:,.2f}",
    ]


def _median_p95(times: dict[str, Any]) -> str:
    return f"{times['median']:.1f} / {times['p95']:.1f}"


def _interval(estimate: dict[str, Any] | None, digits: int) -> str:
    if estimate is None:
        return ""
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    return f"{value:.{digits}f}" + ("" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]")


def _head_cell(row: dict[str, Any], interval: str) -> str:
    found = row["head_ms_by_interval"].get(interval)
    return f"{found['median']:.1f} ({found['speedup']['value']:.2f})" if found else ""


def _bench_notes(record: dict[str, Any]) -> str:
    environment, protocol = record["environment"], record["protocol"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    order = "interleaved, who comes first going round"
    if protocol["loaded"] == "in turn":
        order = f"the models do not fit into memory together: each loaded {protocol['visits']} times, one after another"
    bfloat16 = "multiplies" if environment["native_bfloat16"] else "does not multiply"
    still = ""
    if any(row["settings"]["visual_tokens"]["method"] == "vla_cache" for row in record["rows"]):
        still = "\nVLA-Cache is timed before a camera where nothing moves, its best case."
    return (
        f"{environment['device']}: {environment['device_name']}; the processor has {environment['instructions']} and "
        f"{bfloat16} bfloat16; {environment['threads']} threads; {versions}.\n"
        f"Batch {protocol['batch_size']}, {protocol['runs']} runs after {protocol['warmup']} to warm up; {order}."
        f"{still}"
    )


def compare_table(record: dict[str, Any]) -> str:
    """`evla compare`: what each measure costs, and for B the errors by dimension, by step, and of reused features."""
    a, b, samples = (record[key] for key in ("first", "second", "samples"))
    names = _MEASURES | {"all": f"all: {b['name']}", "noise": f"{a['name']}, other noise"}
    measures = record["measures"]
    both = measures["all"]
    parts = [
        f"{b['name']} against {a['name']}: {samples['num_samples']} samples, the same noise; mean [95 % interval].",
        table(
            ["on", "cosine of cognition", "action error", "gripper flips", "position deviation"],
            [[text, *_measure_cells(measures[name])] for name, text in names.items() if name in measures],
        ),
        "action error: mean absolute difference of normalised actions, without the gripper; their range is [-1, 1].\n"
        "position deviation: of the positions that the chunk's actions add up to, at its end, in the robot's units.",
        f"{b['name']}: absolute error by action dimension",
        table(
            ["dimension", "normalised", "robot's units"],
            [
                list(cells)
                for cells in zip(
                    action_names(len(both["normalized_error"]["value"])),
                    _intervals(both["normalized_error"]),
                    _intervals(both["physical_error"]),
                    strict=True,
                )
            ],
        ),
        f"{b['name']}: position deviation after each step, in the robot's units",
        table(
            ["step", "deviation"],
            [[str(step), cell] for step, cell in enumerate(_intervals(both["position_deviation"]), start=1)],
        ),
    ]
    if record["cache"]:
        parts += _reuse_tables(b["name"], record["cache"])
    off = [text for name, text in _MEASURES.items() if name not in measures]
    notes = [f"the same in both, or not known: {', '.join(off)}."] if off else []
    return "\n\n".join([*parts, *record["notes"], *notes])


_MEASURES = {
    "layers": "layers",
    "mlp": "MLP",
    "vision": "vision",
    "tokens": "tokens",
    "cache": "cache",
    "sampling": "sampling",
    "weights": "weights (layers, MLP, vision)",
}


def _measure_cells(measure: dict[str, Any]) -> list[str]:
    flips = measure["gripper_flips"]
    return [
        _interval(measure["cognition_cosine"], 4),
        _interval(measure["action_error"], 4),
        "" if flips is None else _interval({key: _percent(value) for key, value in flips.items()}, 2) + " %",
        _intervals(measure["position_deviation"])[-1],
    ]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _intervals(estimate: dict[str, Any], digits: int = 4) -> list[str]:
    """Of a list of values, in as many digits as the largest of them needs."""
    largest = max(estimate["value"])
    if 0 < largest < 1:
        digits += math.floor(-math.log10(largest))
    columns = zip(estimate["value"], estimate["low"], estimate["high"], strict=True)
    return [_interval({"value": value, "low": low, "high": high}, digits) for value, low, high in columns]


def _reuse_tables(name: str, cache: dict[str, Any]) -> list[str]:
    kinds = list(cache["modules"])
    header = [f"{kind}: {what}" for kind in kinds for what in ("cosine", "relative error")]
    parts = [f"{name}: what the action head reuses against what it would have computed from the same input"]
    for by, places in (("step", cache["steps"]), ("block", cache["blocks"])):
        columns = [
            _intervals(cache["modules"][kind][what][f"by_{by}"])
            for kind in kinds
            for what in ("cosine", "relative_error")
        ]
        parts.append(
            table([by, *header], [[str(place), *cells] for place, *cells in zip(places, *columns, strict=True)])
        )
    return parts
