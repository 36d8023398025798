"""Pictures: figures 1b and 1c of EfficientVLA (arXiv 2506.10100) for any checkpoint, and where its time goes."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from evla_cli.checkpoint.outputs import check_output_file, new_file
from evla_cli.errors import EvlaError
from evla_cli.plan import LayerImportance

FIGURES = ("layer_importance.png", "layer_similarity.png", "denoise_similarity.png")


def check_figures(directory: Path, overwrite: bool) -> None:
    """Refuse a folder for figures before any work is done for them."""
    _check_matplotlib()
    if not directory.parent.is_dir():
        raise EvlaError(f"{directory.parent} does not exist or is not a directory; create it first.")
    if os.path.lexists(directory) and not directory.is_dir():
        raise EvlaError(f"{directory} is not a directory.")
    for name in FIGURES:
        if directory.is_dir():
            check_output_file(directory / name, overwrite)


def check_figure(path: Path, overwrite: bool) -> None:
    """The same for a single picture."""
    _check_matplotlib()
    check_output_file(path, overwrite)


def _check_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise EvlaError("Drawing needs matplotlib: pip install 'evla[figures]'.")


def draw_importance(result: LayerImportance, directory: Path) -> list[Path]:
    """The first two of `FIGURES`, and the third where there is an action head."""
    import matplotlib

    matplotlib.use("agg")
    directory.mkdir(exist_ok=True)
    paths = [_importance_bars(result, directory), _similarity_curve(result, directory)]
    if result.action_head:
        paths.append(_denoise_heatmaps(result.action_head, directory))
    return paths


def draw_latency(record: dict[str, Any], path: Path) -> None:
    """Stacked bars, one a row of `evla bench`: the median of every stage."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = record["rows"]
    stages = [stage for stage in rows[0]["latency_ms"] if stage in _STAGE_COLOURS]
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.55 * len(rows)), layout="constrained")
    left = [0.0] * len(rows)
    for stage in stages:
        widths = [row["latency_ms"][stage]["median"] for row in rows]
        name = stage.replace("_", " ")
        axes.barh(range(len(rows)), widths, left=left, height=0.6, color=_STAGE_COLOURS[stage], label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for number, row in enumerate(rows):
        whole = row["latency_ms"]["whole"]["median"]
        ratio = row["speedup"].get(record["references"][0], {}).get("whole", {}).get("value")
        text = f" {whole:,.1f} ms" + (f" ({ratio:.2f} x)" if ratio is not None else "")
        axes.text(left[number], number, text, va="center")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(left))
    axes.set_xlabel(
        f"milliseconds a prediction, batch {record['protocol']['batch_size']}; (x): times as fast as the first"
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(stages), frameon=False)
    _save(figure, path)


# Told apart by colour-blind readers (Okabe and Ito).
_BLUE, _ORANGE = "#0072B2", "#D55E00"
_STAGE_COLOURS = {
    "preprocessing": "#999999",
    "vision": "#E69F00",
    "projector": "#56B4E9",
    "language_model": _BLUE,
    "action_head": _ORANGE,
}


def _importance_bars(result: LayerImportance, directory: Path) -> Path:
    figure, axes = _axes(width=max(6.0, 0.28 * len(result.layers)))
    errors = [score.standard_error or 0.0 for score in result.layers]
    values = [score.importance for score in result.layers]
    axes.bar(range(len(values)), values, yerr=errors, color=_BLUE, error_kw={"elinewidth": 1})
    axes.set(xlabel="decoder layer", ylabel="importance (1 - mean cosine)", title="What each decoder layer does")
    return _save_by_layer(figure, axes, directory / "layer_importance.png", len(values))


def _similarity_curve(result: LayerImportance, directory: Path) -> Path:
    figure, axes = _axes(width=max(6.0, 0.28 * len(result.layers)))
    values = [1 - score.importance for score in result.layers]
    axes.plot(range(len(values)), values, marker="o", color=_ORANGE)
    axes.set(xlabel="decoder layer", ylabel="cosine of input and output", title="Similarity across decoder layers")
    axes.grid(axis="y", alpha=0.3)
    return _save_by_layer(figure, axes, directory / "layer_similarity.png", len(values))


def _denoise_heatmaps(facts: dict[str, Any], directory: Path) -> Path:
    import matplotlib.pyplot as plt

    similarity = facts["step_similarity"]
    low = min(min(row) for rows in similarity.values() for row in rows)
    figure, all_axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for axes, (kind, rows) in zip(all_axes, similarity.items(), strict=True):
        image = axes.imshow(rows, aspect="auto", origin="lower", vmin=low, vmax=1.0, cmap="cividis")
        axes.set(title=f"{kind} output", xlabel="denoising step and the next")
        axes.set_xticks(range(len(rows[0])), [f"{step}-{step + 1}" for step in range(len(rows[0]))])
        axes.set_yticks(range(0, len(rows), max(1, len(rows) // 12)))
    all_axes[0].set_ylabel("action-head block")
    figure.colorbar(image, ax=all_axes, label="cosine between consecutive steps")
    return _save(figure, directory / "denoise_similarity.png")


def _axes(width: float) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, 3.6), layout="constrained")


def _save_by_layer(figure: Any, axes: Any, path: Path, num_layers: int) -> Path:
    axes.set_xticks(range(0, num_layers, 1 if num_layers <= 40 else 4))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    with new_file(path, overwrite=True) as staging:
        figure.savefig(staging, dpi=150, format="png")
    plt.close(figure)
    return path
