"""`evla report`: one page with pictures of what was measured and decided, and what the bundle does to a prediction."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evla_cli import __version__
from evla_cli.calibration import samples_sha256
from evla_cli.checkpoint.bundle import MANIFEST, SETTINGS, library_versions, write_manifest
from evla_cli.checkpoint.files import read_json, read_yaml, sha256_file, write_json, write_text
from evla_cli.checkpoint.outputs import check_apart, new_directory
from evla_cli.checkpoint.tensors import total_elements
from evla_cli.evaluation.candidates import Candidate, neutral
from evla_cli.evaluation.figures import check_matplotlib, save_picture
from evla_cli.evaluation.flops import count_flops
from evla_cli.evaluation.pictures.base import Missing, Picture, Section, Table, number
from evla_cli.evaluation.pictures.denoising import denoising
from evla_cli.evaluation.pictures.inputs import Inputs, Request, open_inputs
from evla_cli.evaluation.pictures.kept_tokens import kept_tokens
from evla_cli.evaluation.pictures.layers import layers
from evla_cli.evaluation.pictures.measured import measure
from evla_cli.evaluation.pictures.page import page
from evla_cli.evaluation.pictures.speed_success import speed_success
from evla_cli.evaluation.pictures.stage_times import stage_times
from evla_cli.evaluation.pictures.token_cost import token_cost
from evla_cli.evaluation.pictures.trajectories import trajectories
from evla_cli.models.skeleton import build_skeleton, out_of_memory

PAGE = "index.html"


@dataclass(frozen=True)
class Report:
    """What was written to `output`."""

    output: Path
    sections: list[Section]
    warnings: tuple[str, ...]

    def table(self) -> str:
        """What was drawn, and what was not and why."""
        lines = [f"{'warning':16} {text}" for text in self.warnings]
        for section in self.sections:
            if isinstance(section, Missing):
                lines.append(f"{section.name:16} not drawn. {section.why} What makes it:")
                lines += [f"{'':17}{command}" for command in section.commands]
            else:
                lines.append(f"{section.name:16} {self.output / section.name}.png")
        return "\n".join([*lines, f"{'page':16} {self.output / PAGE}"])


def write_report(request: Request, output: Path, overwrite: bool = False) -> Report:
    """Draw what can be drawn, say what is missing for the rest, and write both to `output`.

    Errors: no matplotlib, an output that must not be replaced, inputs that are not what they are said to be.
    """
    check_matplotlib()
    with new_directory(output, overwrite) as staging:
        inputs = open_inputs(request)
        for read in inputs.directories():
            check_apart(output, read)
        with out_of_memory(request.device, "use --dtype bfloat16, or --device cpu"):
            measured = measure(inputs)
        sections = [
            layers(inputs),
            denoising(inputs, measured),
            token_cost(inputs, measured),
            kept_tokens(inputs, measured),
            trajectories(inputs, measured),
            stage_times(inputs),
            speed_success(inputs),
        ]
        pngs = {}
        for section in sections:
            if isinstance(section, Picture):
                save_picture(section.draw, staging / f"{section.name}.png")
                write_json(staging / f"{section.name}.json", section.numbers)
                pngs[section.name] = (staging / f"{section.name}.png").read_bytes()
        write_text(staging / PAGE, _page(inputs, sections, pngs))
        write_manifest(staging, {}, {})
    return Report(output, sections, inputs.warnings)


def _page(inputs: Inputs, sections: list[Section], pngs: dict[str, bytes]) -> str:
    drawn = len(pngs)
    missing = [section.title for section in sections if isinstance(section, Missing)]
    intro = [f"{drawn} of {len(sections)} pictures." + (f" Not drawn: {'; '.join(missing)}." if missing else "")]
    title = f"evla report: {inputs.request.directory}"
    return page(
        title, intro, inputs.warnings, _summary(inputs), sections, pngs, _provenance(inputs), inputs.request.command()
    )


def _summary(inputs: Inputs) -> Table | None:
    """The bundle, beside the dense model if it was named."""
    if inputs.bundle is None:
        return None
    shown = [candidate for candidate in (inputs.dense, inputs.bundle) if candidate is not None]
    columns = [_facts(candidate) for candidate in shown]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    caption = "Operations: of one prediction, in the paper's convention (linear layers alone)."
    return Table(caption, ["", *(str(candidate.path) for candidate in shown)], rows)


def _facts(candidate: Candidate) -> dict[str, str]:
    checkpoint, settings = candidate.checkpoint, candidate.settings
    flops = count_flops(build_skeleton(checkpoint.family, checkpoint.config), settings)
    tokens, cache, num_visual = settings.visual_tokens, settings.action_cache, candidate.config.num_visual_tokens
    kept = num_visual if tokens.num_keep is None else tokens.num_keep
    return {
        "parameters": f"{total_elements(checkpoint.weights) / 1e6:,.2f} M",
        "weights on disk": f"{checkpoint.reader.bytes_on_disk / 1e6:,.2f} MB",
        "decoder layers": str(checkpoint.num_layers),
        "MLP width": str(checkpoint.intermediate_size),
        "visual tokens kept": f"{kept} of {num_visual}"
        + (f" ({tokens.method})" if settings != neutral(settings) else ""),
        "denoising steps": str(settings.diffusion.num_denoise_steps),
        "action head computed": "every step" if cache.interval == 1 else f"every {cache.interval} steps",
        "operations": f"{number(flops.total / 1e9)} GFLOPs",
    }


def _provenance(inputs: Inputs) -> list[Table]:
    request = inputs.request
    versions = {"evla": __version__, **library_versions()}
    read: list[list[str]] = []
    if inputs.importance is not None and inputs.importance[1] is not None:
        read.append([str(inputs.importance[1]), sha256_file(inputs.importance[1])])
    if inputs.samples:
        read.append([str(request.samples), samples_sha256(inputs.samples)])
    read += [[str(path), sha256_file(path)] for path in (request.bench, request.results) if path is not None]
    tables = [Table("Versions", ["", ""], [[name, version] for name, version in versions.items()], words=True)]
    if read:
        tables.append(Table("SHA-256 of what was read; of samples, of their contents", ["", ""], read, words=True))
    if inputs.bundle is not None:
        root = inputs.bundle.checkpoint.root
        manifest = {name: value for name, value in read_json(root / MANIFEST).items() if name != "files"}
        rows = [[MANIFEST, sha256_file(root / MANIFEST)], *_flat(manifest)]
        tables.append(Table(f"The bundle's manifest ({root})", ["", ""], rows, words=True))
        tables.append(Table("Its settings (inference.yaml)", ["", ""], _flat(read_yaml(root / SETTINGS)), words=True))
    return tables


def _flat(record: dict[str, Any], prefix: str = "") -> list[list[str]]:
    """Keys joined by dots, and their values."""
    rows = []
    for key, value in record.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append([f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)])
    return rows
