"""A few of an episode's pictures as a GIF, or as an MP4 where imageio-ffmpeg is installed."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from evla_cli.checkpoint.outputs import new_file
from evla_cli.errors import EvlaError

FORMATS = ("gif", "mp4")
FRAMES_PER_SECOND = 20


def check_video(directory: Path, kind: str) -> None:
    """Refuse before any episode is run."""
    if kind == "mp4" and find_spec("imageio_ffmpeg") is None:
        raise EvlaError("MP4 needs imageio-ffmpeg: pip install imageio-ffmpeg, or take --video-format gif.")
    if not directory.is_dir() and (directory.exists() or not directory.parent.is_dir()):
        raise EvlaError(f"{directory} is not a directory and cannot be made; create the folder above it first.")


def write_video(path: Path, frames: Sequence[np.ndarray]) -> None:
    """Frames (height, width, 3), uint8."""
    path.parent.mkdir(exist_ok=True)
    with new_file(path, overwrite=True) as staging:
        if path.suffix == ".mp4":
            _write_mp4(staging, frames)
        else:
            first, *others = [Image.fromarray(frame) for frame in frames]
            milliseconds = 1000 // FRAMES_PER_SECOND
            first.save(staging, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)


def _write_mp4(path: Path, frames: Sequence[np.ndarray]) -> None:
    import imageio_ffmpeg

    height, width, _ = frames[0].shape
    writer = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=FRAMES_PER_SECOND, macro_block_size=2, output_params=["-f", "mp4"]
    )
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
