"""More calibration samples for the demo model than the 64 that ship: camera frames of noisy experts in Meta-World.

    python scripts/record_demo_samples.py out/demo-samples --frames 800

Every frame is of an episode of its own, at a random step of it, and the tasks take turns. Seeds begin at 21000: none
is one of training, of the shipped samples or of the evaluation. The same command writes the same files. Needs
`pip install -e .[demo]` and the system library libosmesa6.
"""

import argparse
import json
from pathlib import Path

from demo_env import FIRST_SEED, DemoEnv, noisy_episode
from PIL import Image

from evla_cli.checkpoint.files import write_text
from evla_cli.checkpoint.outputs import new_directory
from evla_cli.evaluation.suites.metaworld import TASKS

FIRST = FIRST_SEED["samples"] + 1000
LATEST_STEP = 70  # an undisturbed expert is done after 66 to 89


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a folder for samples.jsonl and the frames")
    parser.add_argument("--frames", type=int, default=800)
    parser.add_argument("--first-seed", type=int, default=FIRST, help="of each task's episodes")
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with new_directory(arguments.output, arguments.overwrite) as staging:
        record(staging, arguments.frames, arguments.first_seed)


def record(directory: Path, num_frames: int, first_seed: int) -> None:
    (directory / "frames").mkdir()
    lines: dict[tuple[int, int], str] = {}  # (number within the task, task) -> line
    for turn, (task, description) in enumerate(TASKS.items()):
        env = DemoEnv(task)
        seed = first_seed
        for number in range(len(range(turn, num_frames, len(TASKS)))):
            # An episode that ends before its step is passed over.
            while next(noisy_episode(env, seed, stride=LATEST_STEP), None) is None:
                seed += 1
            episode = f"{task}-{seed}"
            name = f"frames/{episode}.png"
            Image.fromarray(env.render()).save(directory / name)
            instruction = description.phrasings[number % len(description.phrasings)]
            lines[number, turn] = json.dumps({"image": name, "instruction": instruction, "episode": episode})
            seed += 1
        env.close()  # two open OSMesa renderers in one process spoil each other's pictures
    write_text(directory / "samples.jsonl", "".join(f"{lines[key]}\n" for key in sorted(lines)))


if __name__ == "__main__":
    main()
