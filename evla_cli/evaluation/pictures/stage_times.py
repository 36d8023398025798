"""Where a prediction's time goes, row by row of `evla bench`."""

from evla_cli.evaluation.figures import latency_bars
from evla_cli.evaluation.latency import STAGES, WHOLE
from evla_cli.evaluation.pictures.base import Missing, Picture, Section, Table, where
from evla_cli.evaluation.pictures.inputs import Inputs

NAME, TITLE = "stage_times", "Time per stage"


def stage_times(inputs: Inputs) -> Section:
    record = inputs.bench
    if record is None:
        return Missing(NAME, TITLE, "No report of evla bench was named.", [inputs.run_bench()])
    rows, environment, protocol = record["rows"], record["environment"], record["protocol"]
    medians = [{stage: row["latency_ms"][stage]["median"] for stage in (*STAGES, WHOLE)} for row in rows]
    fastest = min(range(len(rows)), key=lambda index: medians[index][WHOLE])
    caption = [
        f"Medians of {protocol['runs']} interleaved runs, batch {protocol['batch_size']}, "
        f"dtype {protocol['dtype'] or 'as stored'}, {where(environment)}.",
        f"From {inputs.request.bench}.",
    ]
    if any(row["settings"]["visual_tokens"]["method"] == "vla_cache" for row in rows):
        caption.append("VLA-Cache is timed before a camera where nothing moves, its best case.")
    return Picture(
        NAME,
        TITLE,
        caption,
        f"Stacked bars for {len(rows)} rows; {rows[fastest]['name']} is fastest with {medians[fastest][WHOLE]:.1f} ms.",
        {"rows": [{"name": row["name"], "median_ms": each} for row, each in zip(rows, medians, strict=True)]},
        [
            Table(
                "Milliseconds a prediction, medians",
                ["", *(stage.replace("_", " ") for stage in (*STAGES, WHOLE))],
                [
                    [row["name"], *(f"{ms:.2f}" for ms in each.values())]
                    for row, each in zip(rows, medians, strict=True)
                ],
            )
        ],
        lambda: latency_bars(record),
    )
