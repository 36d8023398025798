"""`evla verify --against`: two checkpoints are the same, or it is said what differs and by how much."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor

from evla_cli import pipeline
from evla_cli.cli.main import cli

UP = "language_model.model.layers.3.mlp.up_proj.weight"


def verify(this: Path, other: Path, *options: str) -> Result:
    arguments = ["verify", str(this), "--against", str(other), *options]
    return CliRunner().invoke(cli, arguments, catch_exceptions=False)


def differences(this: Path, other: Path) -> list[dict[str, Any]]:
    result = verify(this, other, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == (0 if report["same"] else 1), result.output
    assert report["same"] == (not report["differences"])
    assert (report["bundle"], report["against"]) == (str(this), str(other))
    return report["differences"]


@pytest.fixture
def copy(bundle, tmp_path) -> Path:
    return shutil.copytree(bundle, tmp_path / "copy")


@pytest.fixture(scope="module")
def pruned(cogact_run, tmp_path_factory) -> Path:
    dest = tmp_path_factory.mktemp("pruned") / "pruned"
    pipeline.prune(cogact_run, dest, drop_ids=[3], mlp_prune_ratio=0.5, mlp_method="random")
    return dest


def change_weights(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def change_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def change_yaml(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = yaml.safe_load(file.read_text())
    change(record)
    file.write_text(yaml.safe_dump(record, sort_keys=False))


# The same


def test_a_bundle_made_again_is_the_same(bundle, cogact_run, tmp_path):
    settings = pipeline.settings_with(None, visual_tokens={"num_keep": 8}, action_cache={"interval": 5})
    pipeline.export(cogact_run, tmp_path / "again", settings)
    assert differences(bundle, tmp_path / "again") == []
    result = verify(bundle, tmp_path / "again")
    assert result.stdout == f"{bundle} and {tmp_path / 'again'} are the same: 243 tensors, every file.\n"
    assert result.stderr == ""


def test_pruned_runs_and_native_runs(cogact_run, pruned, tmp_path):
    assert differences(pruned, shutil.copytree(pruned, tmp_path / "copy")) == []
    assert differences(cogact_run, cogact_run / "checkpoints/pico.pt") == []


def test_a_bundle_holds_the_model_of_the_run_it_was_made_from(bundle, cogact_run, pruned):
    result = verify(bundle, cogact_run)
    assert result.exit_code == 0
    assert "the model's config (their layouts differ: bundle and native)" in result.stdout
    found = differences(bundle, pruned)
    assert {d["name"]: (d["this"], d["other"]) for d in found if d["kind"] == "config"} == {
        "text_config.intermediate_size": (128, 64),
        "text_config.num_hidden_layers": (6, 5),
    }
    assert {d["kind"] for d in found} == {"config", "tensor"}


# Tensors


def test_changed_values_are_counted_and_measured(bundle, copy):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[UP][5, 7] += 0.5
        tensors[UP][9, 0] -= 0.25

    change_weights(copy, change)
    (found,) = differences(bundle, copy)
    assert found == {
        "kind": "tensor",
        "name": UP,
        "this": "float32 [128, 64]",
        "other": "float32 [128, 64]",
        "num_differing": 2,
        "max_abs_difference": pytest.approx(0.5, rel=1e-6),
    }
    result = verify(bundle, copy)
    assert result.stdout == f"tensor   {UP}: float32 [128, 64], 2 values differ by up to 0.5\n"
    assert result.stderr == f"Error: {bundle} and {copy} differ: tensor (1).\n"


def test_bits_count_where_values_are_equal(bundle, copy, tmp_path):
    shutil.copytree(copy, tmp_path / "zero")
    change_weights(tmp_path / "zero", lambda tensors: tensors[UP][0].fill_(0.0))
    change_weights(copy, lambda tensors: tensors[UP][0].fill_(-0.0))
    (found,) = differences(tmp_path / "zero", copy)
    assert (found["num_differing"], found["max_abs_difference"]) == (64, 0.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_damaged_value_has_no_distance(bundle, copy, value):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[UP][0, 0] = value
        tensors[UP][1, 0] += 1

    change_weights(copy, change)
    (found,) = differences(bundle, copy)
    assert (found["num_differing"], found["max_abs_difference"]) == (2, None)
    assert f"2 values differ by up to {value}" in verify(bundle, copy).stdout


def test_shapes_and_missing_tensors(bundle, copy):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[UP] = tensors[UP][:100].clone()
        del tensors["language_model.lm_head.weight"]
        tensors["language_model.extra"] = torch.zeros(3, dtype=torch.int64)

    change_weights(copy, change)
    found = {difference["name"]: difference for difference in differences(bundle, copy)}
    assert (found[UP]["this"], found[UP]["other"]) == ("float32 [128, 64]", "float32 [100, 64]")
    assert "num_differing" not in found[UP]
    assert "other" not in found["language_model.lm_head.weight"]
    assert found["language_model.extra"] == {
        "kind": "tensor",
        "name": "language_model.extra",
        "other": "int64 [3]",
    }
    assert "tensor   language_model.extra: absent | int64 [3]" in verify(bundle, copy).stdout


def test_another_dtype_is_compared_by_value(bundle, copy):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[UP] = tensors[UP].bfloat16()
        tensors["language_model.lm_head.weight"] = tensors["language_model.lm_head.weight"].double()

    change_weights(copy, change)
    found = {difference["name"]: difference for difference in differences(bundle, copy)}
    weight = load_file(bundle / "model.safetensors")[UP]
    rounded = (weight - weight.bfloat16().float()).abs()
    assert found[UP]["other"] == "bfloat16 [128, 64]"
    assert found[UP]["num_differing"] == int((rounded > 0).sum())
    assert found[UP]["max_abs_difference"] == pytest.approx(float(rounded.max()), rel=1e-6)
    assert found["language_model.lm_head.weight"]["num_differing"] == 0
    assert "float32 [64, 64] | float64 [64, 64], the same values" in verify(bundle, copy).stdout


def test_other_shards_of_the_same_tensors_are_other_files(bundle, cogact_run, tmp_path):
    settings = pipeline.settings_with(None, visual_tokens={"num_keep": 8}, action_cache={"interval": 5})
    pipeline.export(cogact_run, tmp_path / "shards", settings, max_shard_size="500KB")
    found = differences(bundle, tmp_path / "shards")
    assert {d["kind"] for d in found} == {"manifest", "file"}
    assert {"model.safetensors", "model.safetensors.index.json"} < {d["name"] for d in found}
    assert [d for d in found if d["kind"] == "manifest"] == [
        {"kind": "manifest", "name": "recipe.export.max_shard_size", "this": "5000000000", "other": "500000"}
    ]


# Everything else


def test_settings(bundle, copy):
    def change(record: dict[str, Any]) -> None:
        record["visual_tokens"]["num_keep"] = None
        record["action_cache"]["modules"] = ["mlp", "attention"]
        record["action_cache"]["interval"] = 2

    change_yaml(copy / "inference.yaml", change)
    assert differences(bundle, copy) == [
        {"kind": "setting", "name": "visual_tokens.num_keep", "this": 8, "other": None},
        {"kind": "setting", "name": "action_cache.interval", "this": 5, "other": 2},
        {
            "kind": "setting",
            "name": "action_cache.modules",
            "this": ["attention", "mlp"],
            "other": ["mlp", "attention"],
        },
    ]
    assert verify(bundle, copy).stdout == (
        "setting  visual_tokens.num_keep: 8 | null\n"
        "setting  action_cache.interval: 5 | 2\n"
        "setting  action_cache.modules[0]: attention | mlp\n"
    )


def test_plans(pruned, cogact_run, tmp_path):
    """Another seed: the plan says so, and how many channels it moved; so do the tensors, and nothing else."""
    pipeline.prune(cogact_run, tmp_path / "other", drop_ids=[3], mlp_prune_ratio=0.5, mlp_method="random", seed=1)
    found = differences(pruned, tmp_path / "other")
    assert found[0] == {"kind": "plan", "name": "how.seed", "this": 0, "other": 1}
    masks = [
        yaml.safe_load((path / "prune_plan.yaml").read_text())["mlp_keep"] for path in (pruned, tmp_path / "other")
    ]
    channels = {d["name"]: d for d in found if d["name"].startswith("mlp_keep")}
    assert set(channels) == {f"mlp_keep.{layer}" for layer in (0, 1, 2, 4, 5)}
    for name, difference in channels.items():
        mine, theirs = (int(mask[int(name.split(".")[1])], 16) for mask in masks)
        assert (difference["this"], difference["other"]) == (64, 64)
        assert difference["num_differing"] == (mine ^ theirs).bit_count()
    assert {d["kind"] for d in found} == {"plan", "tensor"}
    assert sum(d["kind"] == "tensor" for d in found) == 3 * 5


def test_other_layers(pruned, cogact_run, tmp_path):
    pipeline.prune(cogact_run, tmp_path / "other", drop_ids=[4], mlp_prune_ratio=0.5, mlp_method="random")
    names = {d["name"]: (d["this"], d["other"]) for d in differences(pruned, tmp_path / "other") if d["kind"] == "plan"}
    assert names == {
        "keep_layers": ([0, 1, 2, 4, 5], [0, 1, 2, 3, 5]),
        "dropped_layers": ([3], [4]),
        "how.drop_layer_ids": ([3], [4]),
    }
    assert "plan     keep_layers[3]: 4 | 3\n" in verify(pruned, tmp_path / "other").stdout


def test_versions(bundle, copy):
    def change(record: dict[str, Any]) -> None:
        record["libraries"]["torch"] = "9.0.0"
        record["evla_version"] = "9.0"

    change_json(copy / "manifest.json", change)
    found = differences(bundle, copy)
    assert [(d["kind"], d["name"], d["other"]) for d in found] == [
        ("version", "manifest.evla_version", "9.0"),
        ("version", "manifest.libraries.torch", "9.0.0"),
    ]


def test_the_source(bundle, copy):
    change_json(copy / "manifest.json", lambda record: record["source"].update(checkpoint_sha256="0" * 64))
    (found,) = differences(bundle, copy)
    assert (found["kind"], found["name"], found["other"]) == ("manifest", "source.checkpoint_sha256", "0" * 64)


def test_config(bundle, copy):
    change_json(copy / "config.json", lambda record: record["text_config"].update(rms_norm_eps=1e-6))
    (found,) = differences(bundle, copy)
    assert (found["kind"], found["name"]) == ("config", "text_config.rms_norm_eps")
    assert (found["this"], found["other"]) == (1e-5, 1e-6)


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md", "inference.yaml", "manifest.json"])
def test_a_file_that_says_the_same_in_other_bytes(bundle, copy, name):
    with open(copy / name, "a") as file:
        file.write("\n")
    (found,) = differences(bundle, copy)
    assert (found["kind"], found["name"]) == ("file", name)
    assert len(found["this"]) == len(found["other"]) == 64
    assert found["this"] != found["other"]


def test_files_that_only_one_has(bundle, copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "tokenizer.json").rename(copy / "tokenizer_config.json")
    found = {d["name"]: d for d in differences(bundle, copy)}
    assert set(found) == {"notes.txt", "tokenizer.json", "tokenizer_config.json"}
    assert "this" not in found["notes.txt"]
    assert "other" not in found["tokenizer.json"]


def test_many_differences_are_cut_on_the_terminal_alone(bundle, cogact_run, tmp_path):
    pipeline.export(cogact_run, tmp_path / "half", pipeline.settings_with(None), dtype="bfloat16")
    found = differences(bundle, tmp_path / "half")
    lines = verify(bundle, tmp_path / "half").stdout.splitlines()
    assert len(found) > 200
    assert len(lines) == 41
    assert lines[-1] == f"... and {len(found) - 40} more; --json lists them all."
    assert lines[0].startswith("setting  visual_tokens.num_keep")  # not lost behind tensors


def test_decoders(decoders, tmp_path):
    for name, layer in (("a", 1), ("b", 2)):
        pipeline.prune(decoders("qwen2"), tmp_path / name, drop_ids=[layer])
    assert differences(tmp_path / "a", shutil.copytree(tmp_path / "a", tmp_path / "c")) == []
    assert {d["kind"] for d in differences(tmp_path / "a", tmp_path / "b")} == {"plan", "tensor"}


def test_what_is_no_checkpoint_is_no_difference(bundle, tmp_path):
    for pair in ((bundle, tmp_path), (tmp_path, bundle), (bundle, tmp_path / "nowhere")):
        result = verify(*pair)
        assert (result.exit_code, result.stdout) == (2, "")
        assert len(result.stderr.splitlines()) == 1
