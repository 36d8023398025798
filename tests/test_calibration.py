"""Calibration samples: their order means nothing to what is written, and what judges is spread and never fit to."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from evla_cli.calibration import (
    Sample,
    hold_out,
    load_samples,
    samples_sha256,
    sort_samples,
    spread,
    warn_of_one_side,
)
from evla_cli.checkpoint.files import sha256_file
from evla_cli.cli.main import cli
from evla_cli.errors import EvlaError
from evla_cli.running import run_recipe


def sample(text: str, instruction: str = "open", episode: str | None = None) -> Sample:
    """Its text stands for the image."""
    return Sample(f"{instruction} {episode} {text}", text, instruction, None, episode)


def shuffled(samples: list, seed: int) -> list:
    return random.Random(seed).sample(samples, len(samples))


def in_turn(num_tasks: int, num_each: int, frames: int = 1) -> list[Sample]:
    """As evla's recorder writes them: tasks take turns."""
    return [
        sample(f"{task} {number} {frame}", f"task {task}", f"{task}-{number}" if frames > 1 else None)
        for number in range(num_each)
        for task in range(num_tasks)
        for frame in range(frames)
    ]


class TestHoldOut:
    @pytest.mark.parametrize("num_tasks", [1, 5, 8, 10])
    def test_every_instruction_judges_and_is_fit_to(self, num_tasks):
        """Also five tasks in turn, of which every fifth line is one."""
        samples = in_turn(num_tasks, 20)
        fit_to, judging = hold_out(samples, Path())
        assert Counter(each.instruction for each in judging) == {f"task {task}": 4 for task in range(num_tasks)}
        assert sorted(each.text for each in fit_to + judging) == sorted(each.text for each in samples)

    @pytest.mark.parametrize("num_each", [1, 2, 3, 4, 7])
    def test_a_fifth_of_all_where_instructions_have_few(self, num_each):
        samples = in_turn(12, num_each)
        _, judging = hold_out(samples, Path())
        assert abs(len(judging) - len(samples) / 5) <= 0.5
        several = Counter(each.instruction for each in judging)
        assert max(several.values()) - min(several.get(f"task {n}", 0) for n in range(12)) <= 1

    @pytest.mark.parametrize("num_samples", [2, 3, 4, 5, 9])
    def test_at_least_one(self, num_samples):
        assert len(hold_out(in_turn(1, num_samples), Path())[1]) == max(1, round(num_samples / 5))

    def test_an_episode_is_on_one_side(self):
        samples = in_turn(3, 10, frames=7)
        fit_to, judging = hold_out(samples, Path())
        assert not {each.episode for each in fit_to} & {each.episode for each in judging}
        assert Counter(each.instruction for each in judging) == {f"task {task}": 14 for task in range(3)}

    def test_the_same_text_is_on_one_side(self):
        """With another instruction, and in an episode that it holds together with another."""
        samples = [sample(str(number), episode=f"e{number}") for number in range(20)]
        samples += [sample("3", "close"), sample("4", episode="e3"), sample("3", "close")]
        for seed in range(5):
            sides = hold_out(shuffled(samples, seed), Path())
            texts = [{each.text for each in side} for side in sides]
            assert not texts[0] & texts[1]
            assert {"3", "4"} <= texts[0] or {"3", "4"} <= texts[1]
            assert sum(map(len, sides)) == 23

    def test_the_order_of_lines_means_nothing(self):
        samples = [*in_turn(4, 6, frames=2), sample("0 0 0", "task 0", "0-0")]  # one is there twice
        found = [hold_out(shuffled(samples, seed), Path()) for seed in range(4)]
        assert all(sides == found[0] for sides in found)
        assert sort_samples(samples) == sort_samples(shuffled(samples, 7))
        assert len(sort_samples(samples)) == 49

    @pytest.mark.parametrize(
        "samples", [[sample("a")], [sample("a"), sample("a")], [sample("a", episode="1"), sample("b", episode="1")]]
    )
    def test_nothing_to_judge_with(self, samples):
        with pytest.raises(EvlaError, match=r"at least 2 samples are needed.*may not share an episode"):
            hold_out(samples, Path("calibration"))

    def test_one_line_names_what_stands_on_one_side(self, caplog):
        sides = [sample("a", f"task {number}") for number in range(6)], [sample("b", "task 5"), sample("c", "task 9")]
        warn_of_one_side(*sides)
        assert [record.getMessage() for record in caplog.records] == [
            "Of 7 instructions 6 are only among the samples that are fit to, or only among those held out to judge the "
            "fit: 'task 0', 'task 1', 'task 2' and 3 more. Give each samples of several episodes."
        ]
        warn_of_one_side([sample("a")], [sample("b")])
        assert len(caplog.records) == 1


class TestSpread:
    def test_every_beginning_is_spread(self):
        samples = sorted(in_turn(3, 4, frames=5), key=lambda each: (each.instruction, each.episode))
        order = spread(samples)
        assert sorted(order) == list(range(60))
        for count in (1, 3, 7, 12, 30):
            chosen = [samples[number] for number in order[:count]]
            for what in ("instruction", "episode"):
                counts = Counter(getattr(each, what) for each in chosen).values()
                assert max(counts) - min(counts) <= 1 or len(counts) < count
            assert len({each.episode for each in chosen}) == min(count, 12)

    def test_so_many_images_of_a_file_in_its_order(self, tmp_path):
        """Sorted by task in the file, as many recorders leave them; another order of the lines, the same images."""
        (tmp_path / "frames").mkdir()
        lines = []
        for task in range(3):
            for number in range(8):
                Image.new("RGB", (2, 2), (task, number, 0)).save(tmp_path / f"frames/{task}-{number}.png")
                image = f"frames/{task}-{number}.png"
                lines.append(json.dumps({"image": image, "instruction": f"task {task}", "episode": number // 2}))
        taken = []
        for seed in (None, 1, 2):
            order = lines if seed is None else shuffled(lines, seed)
            (tmp_path / "samples.jsonl").write_text("\n".join(order))
            samples = load_samples(tmp_path, "image", 6)
            places = [int(each.where.rpartition(":")[2]) for each in samples]
            assert places == sorted(places)
            taken.append({each.image_path.name for each in samples})
        assert Counter(name[0] for name in taken[0]) == {"0": 2, "1": 2, "2": 2}
        assert len({(each.instruction, each.episode) for each in samples}) == 6
        assert taken[0] == taken[1] == taken[2]

    def test_of_texts_the_first(self, tmp_path):
        (tmp_path / "a.txt").write_text("d\nc\nb\na\n")
        assert [each.text for each in load_samples(tmp_path / "a.txt", "text", 2)] == ["d", "c"]


def test_an_episode_belongs_to_what_was_used():
    """It decides what is held out."""
    assert samples_sha256([sample("a")]) != samples_sha256([sample("a", episode="1")])
    assert sample("a").content_sha256 == sample("a", episode="1").content_sha256


def test_an_image_file_is_read_once_for_its_hash(image_samples, monkeypatch):
    from evla_cli import calibration

    read, reads = calibration._read_image_file, []
    monkeypatch.setattr(calibration, "_read_image_file", lambda path, where: reads.append(path) or read(path, where))
    samples = sort_samples(load_samples(image_samples, "image"))
    hold_out(samples, image_samples)
    spread(samples)
    samples_sha256(samples)
    assert sorted(reads) == sorted(each.image_path for each in samples)


@pytest.fixture(scope="module")
def project(cogact_run, image_samples, tmp_path_factory) -> Path:
    """A recipe that analyzes, chooses layers, prunes and refits, towers, too; of ten samples one is there twice."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(image_samples, root / "samples")
    lines = (root / "samples/samples.jsonl").read_text().splitlines()
    lines += [json.dumps(json.loads(line) | {"instruction": "open"}) for line in lines[:4]] + lines[:1]
    (root / "samples/samples.jsonl").write_text("\n".join(lines) + "\n")
    recipe = {
        "schema_version": 1,
        "source": str(cogact_run),
        "output": "out",
        "analyze": {"samples": "samples", "batch_size": 3},
        "prune": {
            "drop_layers": 2,
            "layer_method": "iterative",
            "mlp_prune_ratio": 0.3,
            "mlp_method": "activation",
            "vision_mlp_prune_ratio": 0.3,
            "refit": True,
        },
        "export": {},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


@pytest.fixture(scope="module")
def printed(project) -> str:
    result = CliRunner().invoke(cli, ["run", str(project / "recipe.yaml"), "--quiet"])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_shuffled_samples_give_the_same_bytes(project, printed, tmp_path):
    """The measured importances, the plan and the weights; and a recipe whose lines were shuffled is done already."""
    other = shutil.copytree(project, tmp_path / "other", ignore=shutil.ignore_patterns("out"))
    file = other / "samples/samples.jsonl"
    before = file.read_text().splitlines()
    file.write_text("\n".join(shuffled(before, 3)))
    assert file.read_text().splitlines() != before
    assert [done for _, _, done in run_recipe(other / "recipe.yaml")] == [True, True, True]
    names = [path.relative_to(project) for path in (project / "out").rglob("*") if path.is_file()]
    names = [name for name in names if name.name not in ("run.json", "check.json")]
    assert len(names) > 10
    assert [name for name in names if sha256_file(project / name) != sha256_file(other / name)] == []
    file.write_text("\n".join(shuffled(before, 4)))
    assert [done for _, _, done in run_recipe(other / "recipe.yaml")] == [False, False, False]


class TestRun:
    def test_every_stage_says_what_it_found(self, project, printed):
        lines = printed.splitlines()
        plan = yaml.safe_load((project / "out/pruned/prune_plan.yaml").read_text())
        report = plan["how"]["refit_report"]
        assert lines[0].startswith("analyze  ")
        assert lines[1].strip().startswith("10 samples; the layers that do least: ")
        dropped = ", ".join(map(str, plan["dropped_layers"]))
        assert f"6 -> 4 layers (without {dropped}), MLP width 128 -> 64 (50.0% go, not 30.0%: widths are" in printed
        assert "dino 3 blocks, MLP width 128 -> 64 (50.0% go, not 30.0%" in printed
        assert "bootstrap resamples of the samples choose the other of the two.\n" in printed
        assert "output that goes" in printed
        for name, (before, after) in report["vision_final_rms"].items():
            verb = "brings" if after < before else "does not bring"
            assert f"Refit {verb} the features of {name} nearer" in printed
        assert f"Refit {'brings' if report['helps'] else 'does not bring'} the end nearer (cognition)" in printed

    def test_the_last_line_is_what_compare_says_of_the_held_out(self, project, printed, cogact_run, tmp_path):
        from evla_cli.evaluation.compare import compare

        _, held_out = hold_out(load_samples(project / "samples", "image"), project)
        assert len(held_out) == 2
        (tmp_path / "held").mkdir()
        lines = []
        for each in held_out:
            shutil.copy(each.image_path, tmp_path / "held")
            lines.append(json.dumps({"image": each.image_path.name, "instruction": each.instruction}))
        (tmp_path / "held/samples.jsonl").write_text("\n".join(lines))
        found = compare(cogact_run, project / "out/bundle", tmp_path / "held")["measures"]["all"]["action_error"]
        expected = f"{found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"
        assert printed.splitlines()[-1] == (
            f"held-out action error: {expected} (from the same noise, 2 held-out samples)"
        )

    def test_it_is_not_measured_twice(self, project, printed, monkeypatch):
        from evla_cli import running

        monkeypatch.setattr(running, "judge", None)
        result = CliRunner().invoke(cli, ["run", str(project / "recipe.yaml"), "--quiet", "--json"])
        record = json.loads(result.stdout)
        assert [stage["done"] for stage in record["stages"]] == [False, False, False]
        assert record["held_out"]["measure"] == "action"
        assert f"{record['held_out']['value']:.4f}" in printed.splitlines()[-1]
        assert record["stages"][1]["verdicts"][-1] in printed

    def test_a_plain_decoder_and_too_few_samples(self, decoders, text_samples, tmp_path):
        recipe = {
            "schema_version": 1,
            "source": str(decoders("llama")),
            "output": str(tmp_path / "out"),
            "analyze": {"samples": str(text_samples)},
            "prune": {"drop_layers": 1},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        run = ["run", str(tmp_path / "recipe.yaml"), "--quiet", "--json"]
        found = json.loads(CliRunner().invoke(cli, run).stdout)["held_out"]
        assert (found["measure"], found["num_samples"], found["low"]) == ("hidden", 1, None)
        assert found["value"] == pytest.approx(hidden_error(decoders("llama"), tmp_path / "out/pruned", text_samples))
        recipe["analyze"]["num_samples"] = 1
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        found = json.loads(CliRunner().invoke(cli, run).stdout)["held_out"]
        assert found["not_measured"].endswith("of 1 here no two are apart")


def hidden_error(source: Path, pruned: Path, data: Path) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    from evla_cli.models.processing import load_tokenizer

    ((text,),) = ([each.text for each in side] for side in [hold_out(load_samples(data, "text"), data)[1]])
    ids = torch.tensor([load_tokenizer(source).encode(text).ids])
    with torch.inference_mode():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().model(input_ids=ids)[0]
            for path in (source, pruned)
        )
    return float((theirs - ours).norm() / ours.norm())
