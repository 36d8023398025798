"""Results as tables for people and as JSON for scripts."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evla_cli.checkpoint.tensors import total_bytes, total_elements
from evla_cli.families import open_checkpoint
from evla_cli.plan import LayerImportance

if TYPE_CHECKING:
    import numpy as np

    from evla_cli.pipeline import PruneResult


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
    rows = []
    for score in result.layers:
        error = "" if score.standard_error is None else f"{score.standard_error:.5f}"
        rows.append([str(score.index), f"{score.importance:.5f}", error, str(rank[score.index])])
    note = f"{result.num_samples} samples, {result.dtype}; rank 1 does least and is removed first."
    return table(["layer", "importance", "std. error", "rank"], rows) + "\n" + note


def prune_table(result: "PruneResult") -> str:
    plan = result.plan
    scores = plan.how.get("importance")
    rows = []
    for layer in range(plan.num_layers):
        kept = layer in plan.keep_layers
        new = str(plan.keep_layers.index(layer)) if kept else "-"
        rows.append([str(layer), f"{scores[layer]:.5f}" if scores else "", "keep" if kept else "drop", new])
    before, after = result.parameters_before, result.parameters_after
    lines = [
        table(["layer", "importance", "", "new index"], rows),
        f"decoder layers   {plan.num_layers} -> {len(plan.keep_layers)}",
        f"MLP width        {plan.intermediate_size} -> {plan.kept_intermediate_size}"
        + (f"  ({plan.how['mlp_method']})" if plan.mlp_keep else ""),
        f"parameters       {before / 1e6:,.2f} M -> {after / 1e6:,.2f} M  ({after / before:.1%})",
        f"weights on disk  {result.bytes_after / 1e6:,.1f} MB",
    ]
    for name, distance in plan.how.get("mean_ks_distance", {}).items():
        lines.append(f"KS distance      {distance:.4f}  ({name} rows)")
    for name, share in plan.how.get("removed_score_share", {}).items():
        lines.append(f"score removed    {share:.1%}  ({name} rows)")
    refit = plan.how.get("refit_report")
    if refit:
        lines.append(refit_table(refit))
    return "\n".join(lines)


def refit_table(report: dict[str, Any]) -> str:
    rows = []
    for layer, entry in report["layers"].items():
        before, after = entry["held_out_rms"]
        ridge = "unchanged" if entry["ridge"] is None else f"{entry['ridge']:g}"
        rows.append([str(layer), f"{before:.5f}", f"{after:.5f}", ridge])
    note = f"Distance of hidden states from the dense model's on {report['num_held_out']} held-out samples of "
    return table(["refit layer", "before", "after", "lambda"], rows) + f"\n{note}{report['num_samples']}."


def inspection(source: Path) -> dict[str, Any]:
    """What a checkpoint is, from names, shapes and configs alone."""
    checkpoint = open_checkpoint(source)
    parts = {}
    for part, prefix in checkpoint.family.parts.items():
        tensors = {n: lazy for n, lazy in checkpoint.weights.items() if n == prefix or n.startswith(f"{prefix}.")}
        if tensors:
            parts[part] = {"parameters": total_elements(tensors), "bytes": total_bytes(tensors)}
    dtypes = Counter(str(lazy.dtype).removeprefix("torch.") for lazy in checkpoint.reader.tensors.values())
    can = ["analyze", "prune"] + (["export"] if checkpoint.family.has_action_head else [])
    can += ["verify", "predict"] if checkpoint.layout == "bundle" else []
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
        },
        "tokenizer": checkpoint.tokenizer_dir is not None,
        "commands": can,
    }
    if checkpoint.family.has_action_head:
        config = checkpoint.family.build_config(checkpoint.config)
        facts["visual_tokens"] = config.num_visual_tokens
        facts["action_head"] = {
            "blocks": config.action_config.num_hidden_layers,
            "hidden_size": config.action_config.hidden_size,
            "action_dim": config.action_config.action_dim,
            "action_horizon": config.action_config.action_horizon,
        }
        facts["datasets"] = sorted(config.norm_stats)
    return facts


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
        f"decoder     {decoder['layers']} layers, {decoder['hidden_size']} wide, MLP {decoder['intermediate_size']}",
        f"dtypes      {', '.join(f'{name} ({count} tensors)' for name, count in facts['tensors_by_dtype'].items())}",
    ]
    if "action_head" in facts:
        head = facts["action_head"]
        lines += [
            f"action head {head['blocks']} blocks, {head['hidden_size']} wide, chunks of {head['action_horizon']} x "
            f"{head['action_dim']}",
            f"vision      {facts['visual_tokens']} visual tokens",
            f"datasets    {', '.join(facts['datasets'])}",
        ]
    lines.append(f"tokenizer   {'found' if facts['tokenizer'] else 'missing: copy tokenizer.json here'}")
    lines.append(f"commands    {', '.join(facts['commands'])}")
    return "\n".join(lines)


def action_table(actions: "np.ndarray") -> str:
    """One row a time step."""
    header = ["step", *(f"a{i}" for i in range(actions.shape[1]))]
    return table(header, [[str(step), *(f"{value:+.4f}" for value in row)] for step, row in enumerate(actions)])
