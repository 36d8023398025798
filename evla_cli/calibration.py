"""Calibration samples as a stream: camera images with instructions, or texts.

A folder with `samples.jsonl`, one `{"image": "frames/0001.png", "instruction": "open the drawer"}` a line and the image
files beside it; frames that follow one another in one recording say so by the same `"episode"`. Or for plain decoders a
JSONL file of `{"text": "..."}`, or a text file with one sample a line, read as far as samples are asked for.

Where the order of samples means nothing (analysis, refit, the choice of layers), `sort_samples` comes first: nothing
that is written depends on how the lines of a file were shuffled.
"""

import hashlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evla_cli.checkpoint.files import inside, parse_json, text_lines
from evla_cli.errors import EvlaError

if TYPE_CHECKING:
    from PIL.Image import Image

LOG = logging.getLogger(__name__)
_EXAMPLES = {"image": '{"image": "0001.png", "instruction": "open the drawer"}', "text": '{"text": "..."}'}
_HELD_OUT = 5  # one sample in five judges what the others are fit to
_SEED = 0  # of which samples are taken, and of which are held out
_NAMED = 3  # instructions in a warning; others are counted
_MAX_PIXELS = 34_000_000  # a frame in 8K; more is a decompression bomb
_MAX_SIDE = 65_535  # Pillow needs memory for every row
_MAX_BYTES = 4 * _MAX_PIXELS
_JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
# A file of texts has one sample a line. Of these one would make samples of brackets, columns or compressed bytes.
_PANDAS = "pandas.{reader}('{name}').to_json('samples.jsonl', orient='records', lines=True) makes it of a table"
_CONVERTED = {
    ".json": "jq -c '.[]' {name} > samples.jsonl makes it of a list",
    ".csv": _PANDAS.replace("{reader}", "read_csv"),
    ".tsv": _PANDAS.replace("{reader}", "read_table"),
    ".parquet": _PANDAS.replace("{reader}", "read_parquet"),
    ".feather": _PANDAS.replace("{reader}", "read_feather"),
    ".arrow": "datasets.Dataset.from_file('{name}').to_json('samples.jsonl') makes it of a data set",
    **dict.fromkeys((".yaml", ".yml", ".xml", ".html", ".pdf", ".docx", ".xlsx", ".pkl", ".npz"), "convert it"),
    **dict.fromkeys((".gz", ".zip", ".zst", ".bz2", ".xz", ".tar", ".tgz", ".7z"), "unpack it first"),
}
# Pillow also reads PostScript and the like, by running another program on the file.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB")  # of 8 bits, or less, a channel


@dataclass(frozen=True)
class Sample:
    """One forward pass's input. `image` is loaded when it is asked for."""

    where: str  # file and line, for errors
    text: str = ""
    instruction: str = ""
    image_path: Path | None = None
    episode: str | None = None  # frames of one recorded episode follow one another in the file

    @property
    def image(self) -> "Image":
        assert self.image_path is not None
        return load_image(self.image_path, f"{self.where}: {self.image_path}")

    @cached_property
    def content_sha256(self) -> str:
        """Hash of text, instruction and image file, which is read once for it."""
        digest = hashlib.sha256(json.dumps([self.text, self.instruction], ensure_ascii=False).encode())
        digest.update(self.image_sha256)
        return digest.hexdigest()

    @cached_property
    def image_sha256(self) -> bytes:
        """Hash of the image file; empty where there is none."""
        if self.image_path is None:
            return b""
        return hashlib.sha256(_read_image_file(self.image_path, f"{self.where}: {self.image_path}")).digest()

    @property
    def identity_sha256(self) -> str:
        """Hash of the content and of its episode, if that is known."""
        return self.content_sha256 if self.episode is None else _sha256(self.content_sha256, self.episode)


def load_samples(data: Path, kind: str, num_samples: int | None = None) -> list[Sample]:
    """All samples of `kind` "image" or "text", or `num_samples` of them, in the order of their file.

    Of images those are spread over instructions and episodes, whatever the order of the lines; of texts they are the
    first, and no more of the file is read.

    Errors: nothing there, an empty set, a line that is no JSON or lacks a field (with its number), a missing image.
    """
    if num_samples is not None and num_samples < 1:
        raise EvlaError(f"--num-samples must be at least 1, got {num_samples}.")
    if not data.exists():
        raise EvlaError(f"{data} does not exist.")
    file = data / "samples.jsonl" if data.is_dir() else data
    if not file.is_file():
        raise EvlaError(f"{data} has no samples.jsonl (one {_EXAMPLES[kind]} a line).")
    if kind == "image" and file.suffix.lower() not in _JSON_LINES:
        raise EvlaError(f"{data} must be a folder with samples.jsonl (one {_EXAMPLES[kind]} a line).")
    samples = list(_image_samples(file) if kind == "image" else islice(_text_samples(file), num_samples))
    if not samples:
        raise EvlaError(f"{file} holds no samples.")
    if num_samples is None or num_samples == len(samples):
        return samples
    if len(samples) < num_samples:
        raise EvlaError(f"{file} holds {len(samples)} samples, --num-samples asks for {num_samples}.")
    # By the names of their files: to hash a thousand images in order to take ten would take longer than the ten.
    names = [os.path.relpath(sample.image_path or "", file.parent) for sample in samples]
    return [samples[number] for number in sorted(spread(samples, names)[:num_samples])]


def sort_samples(samples: Sequence[Sample]) -> list[Sample]:
    """By instruction, episode and content: the same for every order of the lines. Samples that are equal in all of
    them stay as often as they are there."""
    return sorted(samples, key=lambda sample: (sample.instruction, sample.episode or "", sample.content_sha256))


def spread(samples: Sequence[Sample], names: Sequence[str] | None = None) -> list[int]:
    """The numbers of all samples in an order of which every beginning is spread over instructions and, within each,
    over episodes: those take turns. Which comes first is drawn by a seed.

    Args:
        names: what tells the samples of an episode apart; by default their content.
    """
    names = names or [sample.content_sha256 for sample in samples]
    nested: dict[str, dict[str, list[int]]] = {}  # instruction -> episode, or a sample of none -> numbers
    for number, sample in enumerate(samples):
        episode = names[number] if sample.episode is None else f"episode {sample.episode}"
        nested.setdefault(sample.instruction, {}).setdefault(episode, []).append(number)
    turns = []
    for instruction in sorted(nested, key=_drawn):
        episodes = nested[instruction]
        turns.append(
            _in_turn([sorted(episodes[e], key=lambda n: _drawn(names[n])) for e in sorted(episodes, key=_drawn)])
        )
    return _in_turn(turns)


def _in_turn(rows: list[list[int]]) -> list[int]:
    """The first of every row, the second of every row, ..."""
    longest = max(map(len, rows))
    return [row[place] for place in range(longest) for row in rows if place < len(row)]


def _drawn(name: str) -> str:
    """Something to sort by: random, but the same for the same name, wherever it stands."""
    return _sha256(str(_SEED), name)


def hold_out(samples: Sequence[Sample], data: Path) -> tuple[list[Sample], list[Sample]]:
    """Samples to fit to, and samples that judge the fit: a fifth of every instruction's, at least one in all. Both are
    sorted by `sort_samples`.

    An episode is on one side with all of its samples, and so is an image or a text that is there more than once. Which
    are held out is drawn by a seed, whatever the order of the samples.

    Errors: fewer than two episodes, images or texts.
    """
    samples = sort_samples(samples)
    groups = _inseparable(samples)
    if len(groups) < 2:
        raise EvlaError(
            f"{data}: at least 2 samples are needed, one of them to judge what the others are fit to, and those may "
            f"not share an episode, an image or a text; of {len(samples)} here no two are apart."
        )
    judges = _judging(samples, groups)
    fit_to = [sample for number, sample in enumerate(samples) if number not in judges]
    judging = [sample for number, sample in enumerate(samples) if number in judges]
    return fit_to, judging


def warn_of_one_side(fit_to: Sequence[Sample], judging: Sequence[Sample]) -> None:
    """Name the instructions of which no sample is fit to, or none judges the fit."""
    _warn_of_one_side(*(frozenset(sample.instruction for sample in side) for side in (fit_to, judging)))


@cache  # once, though the choice of layers and refit both hold out samples
def _warn_of_one_side(fit_to: frozenset[str], judging: frozenset[str]) -> None:
    alone = sorted(fit_to ^ judging)
    if alone:
        named = ", ".join(f"'{instruction}'" for instruction in alone[:_NAMED])
        more = f" and {len(alone) - _NAMED} more" if len(alone) > _NAMED else ""
        LOG.warning(
            "Of %d instructions %d are only among the samples that are fit to, or only among those held out to judge "
            "the fit: %s%s. Give each samples of several episodes.",
            len(fit_to | judging),
            len(alone),
            named,
            more,
        )


def _inseparable(samples: Sequence[Sample]) -> list[list[int]]:
    """The numbers of the samples, those together that share an episode, an image or a text, directly or through
    others."""
    group_of = list(range(len(samples)))  # number -> the lowest number that it is known to be together with

    def lowest(number: int) -> int:
        while group_of[number] != number:
            number = group_of[number]
        return number

    first: dict[tuple[str, Any], int] = {}
    for number, sample in enumerate(samples):
        marks = [("content", sample.image_sha256 or sample.text)]
        if sample.episode is not None:
            marks.append(("episode", sample.episode))
        for mark in marks:
            one, other = sorted((lowest(first.setdefault(mark, number)), lowest(number)))
            group_of[other] = one
    groups: dict[int, list[int]] = {}
    for number in range(len(samples)):
        groups.setdefault(lowest(number), []).append(number)
    return list(groups.values())


def _judging(samples: Sequence[Sample], groups: list[list[int]]) -> set[int]:
    """Numbers of the samples that are held out. Instruction by instruction, whole groups of its own are taken for as
    long as that brings nearer to a fifth of all samples so far, but not all of them: what the fifth of one instruction
    leaves over counts for the next."""
    strata: dict[str, list[list[int]]] = {}
    for group in groups:
        strata.setdefault(samples[group[0]].instruction, []).append(group)

    def drawn(group: list[int]) -> str:
        return _drawn("".join(samples[number].identity_sha256 for number in group))

    judges: set[int] = set()
    seen = 0
    for instruction in sorted(strata, key=_drawn):
        own = sorted(strata[instruction], key=drawn)
        seen += sum(map(len, own))
        for group in own[: max(1, len(own) - 1)]:
            wanted = seen / _HELD_OUT
            if abs(len(judges) + len(group) - wanted) < abs(len(judges) - wanted):
                judges.update(group)
    return judges or set(sorted(groups, key=lambda group: (len(group), drawn(group)))[0])


def samples_sha256(samples: Sequence[Sample]) -> str:
    """Hash of the samples that are used, in order: image files as stored, instructions, texts, episodes."""
    return hashlib.sha256("".join(sample.identity_sha256 for sample in samples).encode()).hexdigest()


def _sha256(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


def load_image(path: Path, where: str) -> "Image":
    """RGB, 8 bits a channel. Errors: no file, no image, or one that would have to be cut down to that."""
    from PIL import Image, UnidentifiedImageError

    data = _read_image_file(path, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata; what is wrong with the picture itself is an exception
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                width, height = image.size
                if width * height > _MAX_PIXELS or max(width, height) > _MAX_SIDE:
                    limit = f"{_MAX_PIXELS} in all and {_MAX_SIDE} a side"
                    raise EvlaError(f"{where} has {width} x {height} pixels, more than {limit}.")
                if image.mode not in _MODES:
                    raise EvlaError(
                        f"{where} has pixels of Pillow's mode {image.mode}; convert it to 8 bits a channel."
                    )
                return upright(image).convert("RGB")
    except EvlaError:
        raise
    except UnidentifiedImageError as error:
        raise EvlaError(f"{where} is not an image in a format that is read: {', '.join(_FORMATS)}.") from error
    except Exception as error:  # PIL raises many kinds for damaged files
        raise EvlaError(f"{where} is not an image that can be read ({type(error).__name__}: {error}).") from error


_ORIENTATION = 0x0112  # in EXIF: how the picture is to be turned to be seen as the camera saw it


def upright(image: "Image") -> "Image":
    """Image turned as its EXIF data say; as it is where they say nothing that can be read."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    image.load()  # before the metadata are looked for: what is wrong with the picture itself is an error
    # Not PIL.ImageOps.exif_transpose, which also writes the EXIF data anew and stumbles over damaged ones.
    try:
        turn = turns.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow raises many kinds for damaged metadata; the picture is none the worse for them
        turn = None
    return image if turn is None else image.transpose(turn)


def _image_samples(file: Path) -> Iterator[Sample]:
    for where, record in _json_lines(file):
        path = inside(file.parent, _field(record, "image", where), where)
        _check_image_file(path, f"{where}: image {path}")
        yield Sample(where, "", _field(record, "instruction", where), path, _episode(record, where))


def _text_samples(file: Path) -> Iterator[Sample]:
    if file.suffix.lower() in _JSON_LINES:
        for where, record in _json_lines(file):
            yield Sample(where, text=_field(record, "text", where))
        return
    how = _CONVERTED.get(file.suffix.lower())
    if how is not None:
        raise _no_texts(file, how.replace("{name}", file.name))
    first = True
    for number, line in text_lines(file):
        if line.strip():
            if first and _looks_like_json(line):
                raise _no_texts(file, "it holds JSON; if that has one object a line, name the file .jsonl")
            first = False
            yield Sample(f"{file}:{number}", text=line)


def _no_texts(file: Path, how: str) -> EvlaError:
    return EvlaError(
        f"{file} is not read as texts: expected JSON lines (.jsonl, one {_EXAMPLES['text']} a line) or plain text with "
        f"one sample a line (.txt); {how}."
    )


def _looks_like_json(line: str) -> bool:
    """Whether a file's first line is JSON: a list or an object begins, or a whole one like those of samples.jsonl."""
    if line.strip() in ("[", "{", "[{"):
        return True
    try:
        value = parse_json(line)
    except ValueError:
        return False
    samples = value if isinstance(value, list) else [value]
    return any(isinstance(sample, dict) and sample.keys() & {"text", "image", "instruction"} for sample in samples)


def _json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in text_lines(file):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            record = parse_json(line)
        except ValueError as error:
            raise EvlaError(f"{where} is not valid JSON: {error}.") from error
        if not isinstance(record, dict):
            raise EvlaError(f"{where} must hold a JSON object.")
        yield where, record


def _field(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise EvlaError(f"{where}: missing field '{key}' (a text that is not empty).")
    return value


def _episode(record: dict[str, Any], where: str) -> str | None:
    value = record.get("episode")
    if value is None or (isinstance(value, str) and value.strip()):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise EvlaError(f"{where}: 'episode' must be a number or a text that is not empty, got {json.dumps(value)[:40]}.")


def _read_image_file(path: Path, where: str) -> bytes:
    _check_image_file(path, where)
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise EvlaError(f"{where} cannot be read: {error.strerror}.") from error
    if len(data) > _MAX_BYTES:
        raise EvlaError(f"{where} has more than {_MAX_BYTES:,} bytes; that is no camera image.")
    return data


def _check_image_file(path: Path, where: str) -> None:
    if not os.path.isfile(path):
        raise EvlaError(f"{where} {'is not a file' if os.path.lexists(path) else 'does not exist'}.")
