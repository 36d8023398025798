"""What a prediction costs for every number of visual tokens: operations and time (figure 1a of EfficientVLA)."""

from typing import Any

import numpy as np

from evla_cli.evaluation.figures import BLACK, BLUE, VERMILLION, new_figure, without_frame
from evla_cli.evaluation.flops import PAPER_PROMPT_TOKENS, count_flops
from evla_cli.evaluation.latency import STAGES, WHOLE, Latency
from evla_cli.evaluation.pictures.base import Missing, Picture, Section, Table, number, where
from evla_cli.evaluation.pictures.inputs import Inputs
from evla_cli.evaluation.pictures.measured import WARMUP, Measured, sweep_settings
from evla_cli.models.skeleton import build_skeleton

NAME, TITLE = "token_cost", "Operations and time against visual tokens kept"
_SHOWN = ("language_model", WHOLE)


def token_cost(inputs: Inputs, measured: Measured) -> Section:
    bundle = inputs.bundle
    if bundle is None:
        return Missing(NAME, TITLE, f"{inputs.request.directory} has no bundle.", [inputs.make_bundle()])
    settings = sweep_settings(bundle)
    own = bundle.settings.visual_tokens
    if not settings:
        why = (
            f"Tokens would leave before layer {own.prune_layer}, the decoder has {bundle.checkpoint.num_layers} layers."
        )
        return Missing(NAME, TITLE, why, ["evla export CHECKPOINT BUNDLE --prune-layer 1"])
    tokens = next(iter(settings.values())).visual_tokens
    model = build_skeleton(bundle.checkpoint.family, bundle.checkpoint.config)
    rows = []
    for count, each in settings.items():
        row: dict[str, Any] = {"num_keep": count, "flops": count_flops(model, each).to_record()}
        if count in measured.latencies:
            row["latency_ms"] = {stage: _quartiles(measured.latencies[count], stage) for stage in (*STAGES, WHOLE)}
        rows.append(row)
    num_visual, kept = bundle.config.num_visual_tokens, own.num_keep or bundle.config.num_visual_tokens
    numbers = {
        "method": tokens.method,
        "prune_layer": tokens.prune_layer,
        "num_visual": num_visual,
        "num_keep": kept,
        "prompt_tokens": PAPER_PROMPT_TOKENS,
        "rows": rows,
        "protocol": None,
    }
    caption = [
        f"Tokens leave before layer {tokens.prune_layer} of {bundle.checkpoint.num_layers}, chosen by {tokens.method}; "
        f"everything else as in the bundle. It keeps {kept} of {num_visual}"
        + (f", by {own.method}." if own.method != tokens.method else "."),
        f"Operations: of one prediction in the paper's convention (linear layers alone, {PAPER_PROMPT_TOKENS} prompt "
        "tokens), computed from the config.",
    ]
    environment = measured.environment
    if environment is None:
        caption.append("Time was not measured (--runs 0).")
    else:
        numbers["protocol"] = {"runs": inputs.request.runs, "warmup": WARMUP, "batch_size": 1} | environment
        caption.append(
            f"Time: median of {inputs.request.runs} interleaved runs, lines: quartiles; batch 1, "
            f"{environment['dtype']}, {where(environment)}."
        )
    return Picture(NAME, TITLE, caption, _alt(rows), numbers, [_table(rows)], lambda: _draw(numbers))


def _quartiles(latency: Latency, stage: str) -> dict[str, float]:
    low, median, high = np.quantile(latency.values(stage), (0.25, 0.5, 0.75))
    return {"median": float(median), "low": float(low), "high": float(high)}


def _alt(rows: list[dict[str, Any]]) -> str:
    few, most = rows[0], rows[-1]
    text = f"Lines over {len(rows)} numbers of kept tokens: from {most['num_keep']} to {few['num_keep']} tokens, "
    text += f"operations fall to {few['flops']['total'] / most['flops']['total']:.0%}"
    if "latency_ms" in few:
        text += f", time to {few['latency_ms'][WHOLE]['median'] / most['latency_ms'][WHOLE]['median']:.0%}"
    return text + "."


def _table(rows: list[dict[str, Any]]) -> Table:
    unit, name = _unit(rows)
    most = rows[-1]["flops"]["total"]
    header = ["tokens", f"{name}, language model", f"{name}, total", "against all"]
    timed = "latency_ms" in rows[0]
    if timed:
        header += ["ms, language model", "ms, whole [quartiles]"]
    cells = []
    for row in rows:
        flops = row["flops"]
        line = [str(row["num_keep"]), number(flops["language_model"] / unit), number(flops["total"] / unit)]
        line.append(f"{flops['total'] / most:.1%}")
        if timed:
            whole = row["latency_ms"][WHOLE]
            line.append(f"{row['latency_ms']['language_model']['median']:.2f}")
            line.append(f"{whole['median']:.2f} [{whole['low']:.2f}, {whole['high']:.2f}]")
        cells.append(line)
    return Table("One prediction", header, cells)


def _unit(rows: list[dict[str, Any]]) -> tuple[float, str]:
    most = max(row["flops"]["total"] for row in rows)
    return (1e9, "GFLOPs") if most >= 1e9 else (1e6, "MFLOPs")


def _draw(numbers: dict[str, Any]) -> Any:
    rows = numbers["rows"]
    timed = "latency_ms" in rows[0]
    figure, all_axes = new_figure(9.5 if timed else 6, 3.8, ncols=2 if timed else 1, squeeze=False)
    counts = [row["num_keep"] for row in rows]
    unit, name = _unit(rows)
    flops, *times = all_axes[0]
    for stage, key, look in ((WHOLE, "total", _WHOLE), ("language_model", "language_model", _PART)):
        flops.plot(counts, [row["flops"][key] / unit for row in rows], label=stage.replace("_", " "), **look)
        for axes in times:
            each = [row["latency_ms"][stage] for row in rows]
            medians = [entry["median"] for entry in each]
            spread = [
                [entry["median"] - entry["low"] for entry in each],
                [entry["high"] - entry["median"] for entry in each],
            ]
            axes.errorbar(counts, medians, yerr=spread, capsize=3, label=stage.replace("_", " "), **look)
    flops.set(title="operations", ylabel=f"{name} a prediction")
    for axes in times:
        axes.set(title="time", ylabel="milliseconds a prediction")
    for axes in all_axes[0]:
        axes.axvline(numbers["num_keep"], color=BLACK, linestyle=":", label=f"this bundle: {numbers['num_keep']}")
        axes.set_xlabel(f"visual tokens kept, of {numbers['num_visual']}")
        axes.set_xlim(0, 1.03 * numbers["num_visual"])
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.grid(axis="y", alpha=0.3)
        without_frame(axes)
    handles, labels = flops.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


_WHOLE = {"color": BLUE, "marker": "o"}
_PART = {"color": VERMILLION, "marker": "^", "linestyle": "--"}
