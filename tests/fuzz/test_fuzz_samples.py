"""samples.jsonl, texts and images, right and wrong: an accepted sample is the text and picture that the file holds."""

import io
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pico
import pytest
from damage import TEXTS, damage_bytes, damaged_json
from guard import REFUSED, attempt, run_cases, run_examples
from hypothesis import strategies as st
from PIL import Image
from reference import json_value

from evla_cli import pipeline
from evla_cli.calibration import Sample, load_samples

MAX_PIXELS = 34_000_000


@pytest.mark.parametrize("num_cases", [40, pytest.param(1000, marks=pytest.mark.fuzz)])
def test_image_samples(num_cases: int, image_samples: Path, tmp_path: Path, counted: Any) -> None:
    folder = tmp_path / "samples"
    shutil.copytree(image_samples, folder)
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "link.png").symlink_to("0.png")
    (folder / "directory").mkdir()
    os.mkfifo(folder / "pipe.png")
    names = [
        "0.png",
        "1.png",
        "./0.png",
        "link.png",
        "loop.png",
        "directory",
        "pipe.png",
        "../samples/0.png",
        "nothing.png",
    ]
    names += [
        str(folder / "0.png"),
        "0.png\0",
        "0.png/",
        "x" * 300,
        "x/" * 3000 + "0.png",
        "directory/../0.png",
        "~",
        "-",
    ]

    def case(lines: list[bytes]) -> bool:
        (folder / "samples.jsonl").write_bytes(b"\n".join(lines))
        samples = attempt(lambda: load_samples(folder, "image"))
        if samples is REFUSED:
            return False
        assert_same_samples(samples, folder / "samples.jsonl", ("instruction", "image"))
        for sample in samples:
            image = attempt(lambda sample=sample: sample.image)
            assert image is not REFUSED
            assert np.array_equal(np.asarray(image), np.asarray(Image.open(sample.image_path).convert("RGB")))
        return True

    lines = st.lists(
        st.builds(
            lambda name, text: _line(image=name, instruction=text), st.sampled_from(names), st.sampled_from(TEXTS)
        ),
        max_size=2,
    )
    good = st.sampled_from([_line(image=f"{n}.png", instruction=text) for n, text in enumerate(pico.INSTRUCTIONS)])
    other = damaged_json({"image": "0.png", "instruction": "open the drawer", "episode": 3}).map(_on_one_line)
    files = st.tuples(good, st.one_of(st.just([]), lines, st.lists(other, max_size=2)), good)
    files = files.map(lambda parts: [parts[0], *parts[1], parts[2]])
    counted("samples.jsonl", run_examples("image samples", num_cases, files, case))


def assert_same_samples(samples: list[Sample], file: Path, fields: tuple[str, str]) -> None:
    """Line by line what the standard parser reads in the file."""
    lines = [
        line
        for line in file.read_bytes().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").split(b"\n")
        if line.strip()
    ]
    assert len(samples) == len(lines)
    for sample, line in zip(samples, lines, strict=True):
        said = json_value(line)
        for field in fields:
            assert isinstance(said[field], str)
            if field == "image":
                assert sample.image_path == file.parent / said[field]
                assert file.parent in sample.image_path.resolve().parents
            else:
                assert getattr(sample, field) == said[field]
                said[field].encode()


def _line(**fields: str) -> bytes:
    return json.dumps(fields).encode()


def _on_one_line(text: bytes) -> bytes:
    return text.replace(b"\n", b"")


@pytest.mark.parametrize("num_cases", [60, pytest.param(1000, marks=pytest.mark.fuzz)])
def test_text_samples(num_cases: int, tmp_path: Path, counted: Any) -> None:
    letters = [
        "open",
        "größe",
        " ",
        "\t",
        "\n",
        "\r\n",
        "\r",
        "\0",
        "\f",
        "\v",
        "\x1c",
        "\x85",
        "\u2028",
        "\ufeff",
        "🤖",
    ]

    def case(example: tuple[str, bytes]) -> bool:
        suffix, data = example
        file = tmp_path / f"texts.{suffix}"
        file.write_bytes(data)
        samples = attempt(lambda: load_samples(file, "text"))
        if samples is REFUSED:
            return False
        if suffix == "jsonl":
            assert_same_samples(samples, file, ("text", "text"))
        else:
            lines = data.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
            assert [sample.text for sample in samples] == [line for line in lines if line.strip()]
        return True

    texts = st.lists(st.sampled_from(letters), max_size=12).map("".join)
    plain = st.tuples(st.just("txt"), st.one_of(texts.map(str.encode), st.binary(max_size=20)))
    objects = st.lists(
        st.one_of(texts.map(lambda text: _line(text=text)), damaged_json({"text": "open"}).map(_on_one_line))
    )
    jsonl = st.tuples(st.just("jsonl"), objects.map(b"\n".join))
    counted("texts", run_examples("text samples", num_cases, st.one_of(plain, jsonl), case))


@pytest.mark.parametrize("num_cases", [80, pytest.param(2500, marks=pytest.mark.fuzz)])
def test_images(num_cases: int, tmp_path: Path, counted: Any) -> None:
    """Also that a picture is refused rather than changed: 16 bits cut to 8, more pixels than there is memory for."""

    def case(random: Random) -> bool:
        data, intact = _image_file(random)
        path = tmp_path / "image"
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # on stderr it would be a second line
            image = attempt(lambda: Sample("samples.jsonl:1", image_path=path).image)
        if image is REFUSED:
            assert not intact, "a valid image was refused"
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference = Image.open(io.BytesIO(data))
            assert reference.mode in _EIGHT_BITS, f"accepted {reference.mode}"
            assert reference.width * reference.height <= MAX_PIXELS
            assert np.array_equal(np.asarray(image), np.asarray(reference.convert("RGB")))
        assert image.mode == "RGB"
        return True

    counted("images", run_cases("images", num_cases, case))


_EIGHT_BITS = ("1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", "RGBa", "La")
_FORMATS = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "JPEG": ["L", "RGB", "CMYK"],
    "BMP": ["1", "L", "P", "RGB"],
    "GIF": ["P", "L"],
    "WEBP": ["RGB", "RGBA"],
    "TIFF": ["1", "L", "RGB", "RGBA", "CMYK", "I;16", "I", "F"],
    "PPM": ["1", "L", "RGB", "I"],
}
_INTACT = ("L", "RGB")  # of which nobody may say that they are no camera images
_OTHER = [
    "TGA",
    "ICO",
    "PCX",
    "SGI",
    "IM",
    "DIB",
    "MSP",
    "SPIDER",
    "XBM",
    "PDF",
    "EPS",
    "ICNS",
    "JPEG2000",
    "MPO",
    "DDS",
    "QOI",
]


def _image_file(random: Random) -> tuple[bytes, bool]:
    kind = random.randrange(12)
    if kind == 0:
        return random.choice(_bombs(random)), False
    if kind == 1:
        return _saved(random, random.choice(_OTHER), random.choice(["RGB", "L", "1", "F"])), False
    if kind == 2:
        return random.choice(
            [b"", b"\x89PNG", b"\xff\xd8\xff", b"GIF89a", b"hello", random.randbytes(100), b"%!PS-Adobe"]
        ), False
    image_format = random.choice([*_FORMATS, "PNG", "JPEG"])
    mode = random.choice(_FORMATS[image_format])
    data = _saved(random, image_format, mode)
    if kind < 5:
        return data, mode in _INTACT and data != b""
    if kind == 5:
        return data[: random.randrange(len(data) + 1)], False
    return damage_bytes(random, data, 0, random.choice([len(data), min(100, len(data))])), False


def _saved(random: Random, image_format: str, mode: str) -> bytes:
    height, width = random.choice([(1, 1), (3, 5), (60, 80), (17, 1)])
    pixels = np.frombuffer(random.randbytes(3 * height * width), np.uint8).reshape(height, width, 3)
    if mode in ("I;16", "I", "F"):
        deep = (pixels[..., 0].astype(np.uint16) * 257).astype(
            {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        )
        image = Image.fromarray(deep)
    else:
        image = Image.fromarray(pixels).convert(mode)
    buffer = io.BytesIO()
    options = {"save_all": True, "append_images": [image.rotate(90)]} if random.random() < 0.1 else {}
    if random.random() < 0.2:
        options["exif"] = b"Exif\0\0" + random.randbytes(random.randrange(30))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.save(buffer, image_format, **options)
    except Exception:  # Pillow cannot write this mode in this format, or not with these options
        return b""
    return buffer.getvalue()


def _bombs(random: Random) -> list[bytes]:
    """A few bytes that claim to be huge."""
    side = random.choice([5832, 9000, 12_000, 13_500, 20_000, 65_535])
    packed = zlib.compress(bytes(1000))
    png = b"\x89PNG\r\n\x1a\n" + _chunk(
        b"IHDR", side.to_bytes(4, "big") * 2 + bytes([random.choice([1, 8, 16]), 2, 0, 0, 0])
    )
    size = side.to_bytes(4, "little")
    bmp = (
        b"BM"
        + bytes(8)
        + (54).to_bytes(4, "little")
        + (40).to_bytes(4, "little")
        + size * 2
        + b"\1\0\x18\0"
        + bytes(24)
    )
    gif = b"GIF89a" + (side & 0xFFFF).to_bytes(2, "little") * 2 + b"\x80\0\0" + bytes(6)
    gif += b"," + bytes(4) + (side & 0xFFFF).to_bytes(2, "little") * 2 + b"\0\x02\x02L\x01\0;"
    return [
        png + _chunk(b"IDAT", packed) + _chunk(b"IEND", b""),
        png[:8]
        + _chunk(b"IHDR", (1).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0")
        + _LONG_TEXT
        + _chunk(b"IDAT", packed),
        png[:8] + _chunk(b"IHDR", bytes(8) + b"\x08\x02\0\0\0") + _chunk(b"IDAT", packed),
        bmp,
        bmp[:18] + size + (2**32 - side).to_bytes(4, "little") + bmp[26:],
        gif,
        f"P6 {side} {side} 255\n".encode(),
        f"P3 {side} {side} 255\n1 2 3".encode(),
    ]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


_LONG_TEXT = _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000)))


@pytest.mark.parametrize("num_cases", [12, pytest.param(200, marks=pytest.mark.fuzz)])
def test_image_paths(num_cases: int, bundle: Path, tmp_path: Path, counted: Any) -> None:
    """`evla predict --image`: whatever stands at the path."""
    makers: list[Callable[[Path], Any]] = [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.symlink_to(path.name),
        lambda path: path.symlink_to("nothing"),
        lambda path: os.mkfifo(path),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(tmp_path / "good.png"),
        lambda path: shutil.copy(tmp_path / "good.png", path),
        lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 2**33),
    ]
    pico.images(1)[0].save(tmp_path / "good.png")
    expected = pipeline.predict(bundle, tmp_path / "good.png", "open")

    def case(random: Random) -> bool:
        path = tmp_path / random.choice(["a.png", "größe.png", " ", "a\nb.png", "\udcff.png"])
        maker = random.choice(makers)
        maker(path)
        actions = attempt(lambda: pipeline.predict(bundle, path, "open"))
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        assert (actions is REFUSED) == (maker not in makers[6:8])
        assert actions is REFUSED or np.array_equal(actions, expected)
        return actions is not REFUSED

    counted("image paths", run_cases("image paths", num_cases, case))
