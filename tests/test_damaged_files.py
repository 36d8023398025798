"""What fuzzing found in the files around the weights, by name. Each was accepted, a traceback, or without bounds."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

from evla_cli import pipeline
from evla_cli.bundling import verify_bundle
from evla_cli.calibration import Sample, load_samples
from evla_cli.cli.main import cli
from evla_cli.errors import EvlaError
from evla_cli.families import open_checkpoint
from evla_cli.plan import PrunePlan
from evla_cli.running import run_recipe
from evla_cli.runtime.policy import policy_from_checkpoint
from evla_cli.settings import InferenceSettings

# YAML: one value in place of an interval

VALUES = {
    "octal number": "017",
    "sexagesimal number": "1:30",
    "number with underscores": "1_0",
    "hexadecimal number": "0x5",
    "binary number": "0b101",
    "hexadecimal number of 5000 digits": "0x" + "f" * 5000,
    "date": "2001-01-01",
    "infinity": ".inf",
    "integer tag without a number": "!!int ''",
    "truth tag without a truth": "!!bool x",
    "date tag without a date": "!!timestamp x",
    "alias of itself": "&a [*a]",
    "merged mapping": "{<<: 5}",
}


@pytest.mark.parametrize("name", VALUES)
def test_value_that_readers_take_differently(name, tmp_path):
    path = tmp_path / "inference.yaml"
    path.write_text(f"schema_version: 1\naction_cache: {{interval: {VALUES[name]}}}\n")
    with pytest.raises(EvlaError, match=r"inference.yaml is not valid YAML: (aliases and tags|write a number)"):
        InferenceSettings.load(path)


def test_alias_bomb_is_refused_before_it_grows(tmp_path):
    laughs = ", ".join(["&a0 [lol]", *(f"&a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" for n in range(12))])
    (tmp_path / "inference.yaml").write_text(f"schema_version: 1\naction_cache: {{modules: [{laughs}]}}\n")
    with pytest.raises(EvlaError, match="aliases and tags are not read"):
        InferenceSettings.load(tmp_path / "inference.yaml")


def test_settings_without_end(tmp_path):
    """As /dev/zero has: it was read until memory ran out."""
    with open(tmp_path / "inference.yaml", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(EvlaError, match="has more than 4,000,000 bytes"):
        InferenceSettings.load(tmp_path / "inference.yaml")


def test_byte_order_mark_is_no_content(tmp_path):
    (tmp_path / "inference.yaml").write_bytes(b"\xef\xbb\xbfschema_version: 1\r\naction_cache:\r\n  interval: 2\r\n")
    assert InferenceSettings.load(tmp_path / "inference.yaml").action_cache.interval == 2


@pytest.mark.parametrize("version", ["true", "1.0"])
def test_version_that_only_equals_one(version, tmp_path, bundle):
    shutil.copytree(bundle, tmp_path / "bundle")
    manifest = tmp_path / "bundle/manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema_version": 1', f'"schema_version": {version}'))
    with pytest.raises(EvlaError, match="schema_version must be a whole number"):
        open_checkpoint(tmp_path / "bundle")


# Messages


def test_name_from_a_file_is_no_command_to_the_terminal_and_fills_no_screen(cogact_run, importance_file, tmp_path):
    record = json.loads(importance_file.read_text()) | {"metric": "\x1b[2J" + "x" * 5000}
    (tmp_path / "i.json").write_text(json.dumps(record))
    command = ["prune", cogact_run, tmp_path / "out", "--importance", tmp_path / "i.json", "--drop-layers", 1]
    result = CliRunner().invoke(cli, [str(part) for part in command])
    assert result.exit_code == 2
    assert "Unknown metric '\\x1b[2Jxxx" in result.stderr
    assert result.stderr.endswith("Known: block_influence.\n")
    assert len(result.stderr) < 1100


def test_path_that_is_no_text(tmp_path):
    """Where it was printed on stdout, that was a traceback."""
    path = f"{tmp_path}/run\udcff"
    os.mkdir(path)
    result = CliRunner().invoke(cli, ["inspect", path])
    assert result.exit_code == 2
    assert "is not a path that can be used" in result.stderr


# Plans


@pytest.fixture(scope="module")
def plan(cogact_run, tmp_path_factory):
    options = {"mlp_prune_ratio": 0.5, "mlp_method": "magnitude"}
    dest = tmp_path_factory.mktemp("plan") / "out"
    return pipeline.prune(cogact_run, dest, drop_ids=(3,), dry_run=True, **options).plan.to_record()


PLANS = {
    "hash left out, so that it fits any checkpoint": ({"checkpoint_sha256": ""}, "must be a SHA-256"),
    "number of layers that nothing lists": ({"num_layers": 10**15}, "must name each of the 1000000000000000 layers"),
    "layer kept and dropped": ({"dropped_layers": [2]}, "must name each of the 6 layers once"),
    "width that the masks do not have": ({"kept_intermediate_size": 32}, "mlp_keep keeps 64 channels"),
    "mask of a dropped layer": ({"mlp_keep": {3: "0" * 32}}, "one channel mask for each of keep_layers"),
    "mask with a space": ({"mlp_keep": dict.fromkeys((0, 1, 2, 4, 5), "f " * 16)}, "32 hexadecimal digits"),
    "true for a layer": ({"keep_layers": [0, True, 2, 4, 5]}, "must be a whole number, found True"),
    "misspelt key": ({"mlp_kep": None}, "Did you mean 'mlp_keep'"),
}


@pytest.mark.parametrize("name", PLANS)
def test_plan(name, plan, tmp_path):
    changes, message = PLANS[name]
    (tmp_path / "prune_plan.yaml").write_text(yaml.safe_dump(plan | changes))
    with pytest.raises(EvlaError, match=message):
        PrunePlan.load(tmp_path / "prune_plan.yaml")


def test_mask_with_a_bit_beyond_the_last_channel(plan, tmp_path):
    record = plan | {"intermediate_size": 127, "mlp_keep": dict.fromkeys((0, 1, 2, 4, 5), "0" * 31 + "1")}
    (tmp_path / "prune_plan.yaml").write_text(yaml.safe_dump(record))
    with pytest.raises(EvlaError, match="names channel 127 of 127"):
        PrunePlan.load(tmp_path / "prune_plan.yaml")


def test_importance_without_a_hash_does_not_fit_every_checkpoint(cogact_run, importance_file, tmp_path):
    record = json.loads(importance_file.read_text()) | {"checkpoint_sha256": ""}
    (tmp_path / "importance.json").write_text(json.dumps(record))
    with pytest.raises(EvlaError, match="checkpoint_sha256 must be a SHA-256"):
        pipeline.prune(cogact_run, tmp_path / "out", importance=tmp_path / "importance.json", num_drop=1, dry_run=True)


# Manifests and configs


def test_weights_that_the_manifest_leaves_out_are_not_taken_as_verified(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["files"]["model.safetensors"]
    (tmp_path / "bundle/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(EvlaError, match=r"does not list model\.safetensors"):
        verify_bundle(tmp_path / "bundle")


def test_listed_path_longer_than_any(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["a/" * 3000] = {"bytes": 1, "sha256": "0" * 64}
    (tmp_path / "bundle/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(EvlaError, match="cannot be used: File name too long"):
        open_checkpoint(tmp_path / "bundle")


def test_bundle_whose_statistics_have_no_mask(bundle, tmp_path):
    """All dimensions are scaled then, as in a native run; it was a traceback at the first prediction."""
    shutil.copytree(bundle, tmp_path / "bundle")
    config = json.loads((bundle / "config.json").read_text())
    del config["norm_stats"]["kitchen"]["action"]["mask"]
    (tmp_path / "bundle/config.json").write_text(json.dumps(config))
    (tmp_path / "bundle/manifest.json").unlink()
    policy = policy_from_checkpoint(tmp_path / "bundle")
    assert policy.action_stats(None)["mask"] == [True] * 7


def test_language_model_of_another_type_is_not_taken_for_a_llama(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "bundle")
    config = json.loads((bundle / "config.json").read_text())
    config["text_config"]["model_type"] = "mistral"
    (tmp_path / "bundle/config.json").write_text(json.dumps(config))
    (tmp_path / "bundle/manifest.json").unlink()
    with pytest.raises(EvlaError, match=r"text_config.model_type must be 'llama', found 'mistral'"):
        open_checkpoint(tmp_path / "bundle")


@pytest.mark.parametrize("number", ["NaN", "1e400", "9223372036854775808"])
def test_config_with_a_number_that_no_model_has(number, decoders, tmp_path):
    shutil.copytree(decoders("llama"), tmp_path / "llama")
    config = tmp_path / "llama/config.json"
    config.write_text(config.read_text().replace("1e-06", number))
    with pytest.raises(EvlaError, match=r"rms_norm_eps is (nan|inf|9223372036854775808); it must be a finite number"):
        open_checkpoint(tmp_path / "llama")


def test_policy_gives_no_action_that_is_not_finite(policy):
    config = policy.model.language_model.model.norm
    before = config.variance_epsilon
    config.variance_epsilon = -1e30
    try:
        with pytest.raises(EvlaError, match="an action that is not finite"):
            policy.predict_action(Image.new("RGB", (80, 60)), "open", seed=0)
    finally:
        config.variance_epsilon = before


# Samples


def samples(tmp_path: Path, data: bytes, name: str = "samples.jsonl") -> Path:
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


def test_field_that_stands_twice(tmp_path):
    with pytest.raises(EvlaError, match="a name appears twice"):
        load_samples(samples(tmp_path, b'{"text": "open", "text": "close"}'), "text")


def test_one_line_is_one_sample_whatever_else_ends_lines(tmp_path):
    text = "open\u2028the\x85red\x0cdrawer\x1c"
    found = load_samples(samples(tmp_path, f"\ufeff{text}\r\nclose\n".encode(), "texts.txt"), "text")
    assert [sample.text for sample in found] == [text, "close"]


def test_image_path_longer_than_any(tmp_path):
    line = json.dumps({"image": "a/" * 3000, "instruction": "open"})
    with pytest.raises(EvlaError, match="cannot be used: File name too long"):
        load_samples(samples(tmp_path, line.encode()).parent, "image")


# Images


def opened(path: Path) -> Image.Image:
    return Sample("samples.jsonl:1", image_path=path).image


@pytest.mark.parametrize(("kind", "dtype"), [("I;16", torch.uint16), ("I", torch.int32), ("F", torch.float32)])
def test_pixels_of_more_than_8_bits_are_not_cut_down(kind, dtype, tmp_path):
    Image.fromarray(torch.arange(0, 60_000, 1000).reshape(6, 10).to(dtype).numpy()).save(tmp_path / "a.tiff")
    with pytest.raises(EvlaError, match=f"Pillow's mode {kind}; convert it to 8 bits a channel"):
        opened(tmp_path / "a.tiff")


def test_postscript_is_not_handed_to_another_program(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", "EPS")
    with pytest.raises(EvlaError, match="is not an image in a format that is read"):
        opened(tmp_path / "a.png")


def test_image_of_a_single_column(tmp_path):
    """A few bytes that took 300 MB, since Pillow keeps a pointer to every row."""
    Image.new("1", (1, 70_000)).save(tmp_path / "a.png")
    with pytest.raises(EvlaError, match="has 1 x 70000 pixels, more than 34000000 in all and 65535 a side"):
        opened(tmp_path / "a.png")


def test_image_file_without_end(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    os.truncate(tmp_path / "a.png", 2**40)
    with pytest.raises(EvlaError, match="has more than 136,000,000 bytes"):
        opened(tmp_path / "a.png")


def test_warning_of_pillow_is_no_second_line(quick_python, bundle, tmp_path):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "a.png")  # DecompressionBombWarning
    options = ("--image", tmp_path / "a.png", "--instruction", "open")
    command = [quick_python, "-m", "evla_cli", "predict", bundle, *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert "has 10000 x 10000 pixels" in result.stderr


# Outputs


def test_readme_of_a_bundle_is_not_that_of_its_pruned_copy(bundle, tmp_path):
    pipeline.prune(bundle, tmp_path / "pruned", drop_ids=(4,))
    assert (bundle / "README.md").is_file()
    assert not (tmp_path / "pruned/README.md").exists()
    assert verify_bundle(tmp_path / "pruned")["tensors"] > 0


def test_recipe_whose_ratio_rounds_to_nothing_is_refused_before_it_runs(cogact_run, tmp_path):
    recipe = {"schema_version": 1, "source": str(cogact_run), "output": "out"}
    recipe["prune"] = {"drop_layer_ids": [4], "mlp_prune_ratio": 0.1, "mlp_method": "magnitude"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(EvlaError, match="removes none of 128 channels"):
        run_recipe(tmp_path / "recipe.yaml")
    assert not (tmp_path / "out").exists()
