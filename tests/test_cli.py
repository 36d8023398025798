"""The commands through the real entry point: results, JSON, reproducible bytes, help without heavy imports."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import evla_cli
from evla_cli.checkpoint import output_file
from evla_cli.cli import prune
from evla_cli.cli.main import cli
from evla_cli.errors import EvlaError
from evla_cli.evaluation.report import action_table, stability_note
from evla_cli.schema import from_mapping
from evla_cli.settings import Recipe

COMMANDS = ("inspect", "analyze", "prune", "export", "run", "verify", "predict", "bench", "compare", "eval", "report")


def evla(*arguments: Any) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""  # progress bars show on a terminal only
    return result.stdout


def evla_error(*arguments: Any, code: int = 2) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stderr


def evla_json(*arguments: Any) -> dict[str, Any]:
    return json.loads(evla(*arguments, "--json"))


def contents(path: Path) -> dict[str, str]:
    paths = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in paths}


def process(*arguments: str, python: Path | str = sys.executable) -> subprocess.CompletedProcess:
    return subprocess.run([str(python), *arguments], capture_output=True, text=True, check=False)


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    text = evla(command, "--help")
    assert "Example" in text
    assert f"  evla {command} " in text


def test_help_names_every_command():
    text = evla("--help")
    assert all(f"  {command} " in text for command in COMMANDS)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from click.testing import CliRunner; from evla_cli.cli.main import cli\n"
        f"for command in {COMMANDS}: assert CliRunner().invoke(cli, [command, '--help']).exit_code == 0\n"
        "print(*sys.modules)"
    )
    modules = process("-c", code).stdout.split()
    assert "evla_cli.cli.prune" in modules
    assert not {"torch", "transformers", "numpy", "PIL", "matplotlib", "evla_cli.pipeline"} & set(modules)


def test_module_runs_as_a_program():
    result = process("-m", "evla_cli", "--version")
    assert (result.returncode, result.stdout) == (0, f"evla, version {evla_cli.__version__}\n")


def test_errors_of_a_process(tmp_path, quick_python):
    result = process("-m", "evla_cli", "inspect", str(tmp_path / "nowhere"), python=quick_python)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"Error: {tmp_path / 'nowhere'} does not exist.\n"


# inspect


def test_inspect_cogact(cogact_run):
    facts = evla_json("inspect", cogact_run)
    assert (facts["family"], facts["layout"]) == ("cogact", "native")
    decoder = {"layers": 6, "hidden_size": 64, "intermediate_size": 128, "mlp_can_be_narrowed": True}
    assert facts["decoder"] == decoder
    assert facts["commands"] == ["analyze", "prune", "export", "predict", "bench", "compare", "eval"]
    assert facts["visual_tokens"] == 16
    assert sum(part["parameters"] for part in facts["parts"].values()) >= facts["parameters"]
    assert facts["bytes_on_disk"] == (cogact_run / "checkpoints/pico.pt").stat().st_size
    assert "float32" in evla("inspect", cogact_run)


def test_inspect_accepts_the_file_itself(cogact_run):
    assert evla_json("inspect", cogact_run / "checkpoints/pico.pt")["family"] == "cogact"


def test_inspect_decoder(decoders):
    facts = evla_json("inspect", decoders("qwen2"))
    assert (facts["family"], facts["commands"]) == ("decoder", ["analyze", "prune"])


def test_inspect_bundle(bundle):
    facts = evla_json("inspect", bundle)
    assert (facts["layout"], facts["datasets"]) == ("bundle", ["kitchen"])
    acting = ["predict", "bench", "compare", "eval", "report"]
    assert facts["commands"] == ["analyze", "prune", "export", "verify", *acting]


# analyze


@pytest.fixture(scope="module")
def importance(importance_file) -> dict[str, Any]:
    return json.loads(importance_file.read_text())


def test_importance_holds_what_is_documented(importance):
    assert importance["schema_version"] == 1
    assert importance["metric"] == "block_influence"
    assert importance["num_samples"] == 5
    keys = {"index", "importance", "standard_error", "per_sample", "by_modality"}
    assert [set(layer) for layer in importance["layers"]] == [keys] * 6
    assert [layer["index"] for layer in importance["layers"]] == list(range(6))
    assert sorted(importance["ranking"]) == list(range(6))


def test_checkpoint_hash_is_what_sha256sum_prints(importance, cogact_run):
    expected = hashlib.sha256((cogact_run / "checkpoints/pico.pt").read_bytes()).hexdigest()
    assert importance["checkpoint_sha256"] == expected


def test_analyze_prints_the_file_with_json(cogact_run, image_samples, tmp_path):
    printed = evla_json("analyze", cogact_run, "--samples", image_samples, "-o", tmp_path / "a.json")
    assert printed == json.loads((tmp_path / "a.json").read_text())


def test_analyze_twice_gives_the_same_bytes(cogact_run, image_samples, importance_file, tmp_path):
    evla("analyze", cogact_run, "--samples", image_samples, "-o", tmp_path / "again.json")
    assert contents(tmp_path / "again.json") == contents(importance_file)


def test_fewer_samples_are_the_first(cogact_run, image_samples, importance, tmp_path):
    out = tmp_path / "two.json"
    two = evla_json("analyze", cogact_run, "--samples", image_samples, "-o", out, "--num-samples", 2)
    assert two["num_samples"] == 2
    assert two["samples_sha256"] != importance["samples_sha256"]
    assert two["checkpoint_sha256"] == importance["checkpoint_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cogact", "decoder"])
def test_figures(name, cogact_run, image_samples, decoders, text_samples, tmp_path):
    pytest.importorskip("matplotlib")
    source, data = (cogact_run, image_samples) if name == "cogact" else (decoders("llama"), text_samples)
    arguments = ("--samples", data, "-o", tmp_path / "a.json", "--figures", tmp_path / "figures")
    result = evla_json("analyze", source, *arguments)
    pictures = {"layer_importance.png", "layer_similarity.png"}
    if name == "cogact":
        pictures |= {"denoise_similarity.png"}
        similarity = result["action_head"]["step_similarity"]
        assert {kind: (len(rows), len(rows[0])) for kind, rows in similarity.items()} == {
            "attention": (3, 9),  # blocks, pairs of consecutive steps
            "mlp": (3, 9),
        }
    assert {path.name for path in (tmp_path / "figures").iterdir()} == pictures


# prune


@pytest.fixture(scope="module")
def pruned(cogact_run, importance_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "pruned"
    options = ("--importance", importance_file, "--drop-layers", 2, "--mlp-prune-ratio", 0.5)
    evla("prune", cogact_run, out, *options)
    return out


def test_the_least_important_layers_go(pruned, importance):
    plan = yaml.safe_load((pruned / "prune_plan.yaml").read_text())
    unprotected = [layer for layer in importance["ranking"] if layer >= 2]
    assert plan["dropped_layers"] == sorted(unprotected[:2])
    assert plan["kept_intermediate_size"] == 64
    assert set(plan["mlp_keep"]) == set(plan["keep_layers"])


def test_pruned_run_is_a_run(pruned, cogact_run):
    facts = evla_json("inspect", pruned)
    assert (facts["family"], facts["layout"]) == ("cogact", "native")
    sizes = {"layers": 4, "hidden_size": 64, "intermediate_size": 64}
    assert facts["decoder"] == sizes | {"mlp_can_be_narrowed": True}
    for name in ("config.json", "dataset_statistics.json", "tokenizer.json"):
        assert (pruned / name).read_bytes() == (cogact_run / name).read_bytes()


def test_pruned_run_says_how_cogacts_own_code_loads_it(pruned):
    config = json.loads((pruned / "llm_config/config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (4, 64)
    assert (pruned / "llm_config/tokenizer.json").is_file()
    lines = [line for line in (pruned / "LOADING.md").read_text().splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    assert 'load_vla("checkpoints/pico.pt"' in lines[2]


def test_prune_twice_gives_the_same_bytes(pruned, cogact_run, importance_file, tmp_path):
    options = ("--importance", importance_file, "--drop-layers", 2, "--mlp-prune-ratio", 0.5)
    evla("prune", cogact_run, tmp_path / "again", *options)
    assert contents(tmp_path / "again") == contents(pruned)


def test_a_plan_can_be_followed_again(pruned, cogact_run, tmp_path):
    evla("prune", cogact_run, tmp_path / "again", "--plan", pruned / "prune_plan.yaml")
    assert contents(tmp_path / "again") == contents(pruned)


def test_a_plan_of_another_checkpoint_is_refused(pruned, cogact_run, tmp_path):
    text = (pruned / "prune_plan.yaml").read_text()
    sha256 = yaml.safe_load(text)["checkpoint_sha256"]
    (tmp_path / "plan.yaml").write_text(text.replace(sha256, "f" * 64))
    assert "another checkpoint" in evla_error("prune", cogact_run, tmp_path / "a", "--plan", tmp_path / "plan.yaml")
    assert "num_layers is 6" in evla_error("prune", pruned, tmp_path / "a", "--plan", pruned / "prune_plan.yaml")
    options = ("--plan", pruned / "prune_plan.yaml", "--drop-layers", 1)
    assert "--plan says what goes" in evla_error("prune", cogact_run, tmp_path / "a", *options)
    assert {path.name for path in tmp_path.iterdir()} == {"plan.yaml"}


def test_verify_a_pruned_checkpoint(pruned, tmp_path):
    files = json.loads((pruned / "manifest.json").read_text())["files"]
    assert {name: entry["sha256"] for name, entry in files.items()} == {
        name: sha256 for name, sha256 in contents(pruned).items() if name != "manifest.json"
    }
    assert evla_json("verify", pruned)["files"] == len(files)
    shutil.copytree(pruned, tmp_path / "copy")
    weights = tmp_path / "copy/checkpoints/pico.pt"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "1 files differ from the manifest (first: checkpoints/pico.pt)" in evla_error(
        "verify", tmp_path / "copy", code=1
    )


@pytest.mark.parametrize("file", ["checkpoints/pico.pt", "dataset_statistics.json", "llm_config/tokenizer.json"])
@pytest.mark.parametrize("share", [None, 0.5])
def test_half_of_a_pruned_checkpoint_is_refused(pruned, tmp_path, file, share):
    """A copy that broke off: told at every load, whatever file it was."""
    shutil.copytree(pruned, tmp_path / "copy")
    data = (pruned / file).read_bytes()
    (tmp_path / "copy" / file).unlink()
    if share is not None:
        (tmp_path / "copy" / file).write_bytes(data[: int(len(data) * share)])
    assert evla_error("inspect", tmp_path / "copy").count("\n") == 1


def test_keep_layers_says_the_same_the_other_way(cogact_run, importance_file, tmp_path):
    arguments = ("prune", cogact_run, tmp_path / "x", "--importance", importance_file, "--dry-run")
    dropped = evla_json(*arguments, "--drop-layers", 2)["plan"]["dropped_layers"]
    assert evla_json(*arguments, "--keep-layers", 4)["plan"]["dropped_layers"] == dropped


def test_documented_help_is_what_a_process_prints(quick_python):
    """Not what the script that writes the document makes of the same commands."""
    text = (Path(__file__).parent.parent / "docs/cli.md").read_text()
    documented = dict(re.findall(r"^## (evla[^\n]*)\n\n```\n(.*?)```$", text, re.MULTILINE | re.DOTALL))
    assert list(documented) == ["evla", *(f"evla {name}" for name in sorted(COMMANDS))]
    for title, expected in documented.items():
        command = [str(quick_python), "-m", "evla_cli", *title.split()[1:], "--help"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"})
        assert (done.stdout.rstrip(), done.stderr) == (expected.rstrip(), "")
    assert all("-h, --help" in each for each in documented.values())


# Options of prune that matter only beside others: what to give them, and beside what they do nothing.
IDLE = {
    "--protect-first": (1, "--mlp-prune-ratio 0.5", "where no layer goes (--drop-layers)"),
    "--layer-method": ("cosine", "--drop-layer-ids 4", "where no layer goes by rank (--drop-layers)"),
    "--objective": ("hidden", "--drop-layer-ids 4,5 --drop-layers 2", "where no layer goes by rank (--drop-layers)"),
    "--mlp-method": ("random", "--drop-layers 1", "without --mlp-prune-ratio"),
    "--vision-mlp-method": ("random", "--vision-drop-layers 1", "without --vision-mlp-prune-ratio"),
    "--seed": (0, "--mlp-prune-ratio 0.5 --mlp-method magnitude", "where no rows are drawn (--mlp-method prunenet"),
    "--refit-last-weight": (5, "--drop-layer-ids 4", "without --refit"),
    "--num-samples": (5, "--drop-layers 1", "where the model is not run on --samples"),
    "--batch-size": (5, "--drop-layers 1", "where the model is not run on --samples"),
    "--memory-budget": ("1GB", "--drop-layers 1", "where the model is not run on --samples"),
    "--device": ("cuda:7", "--drop-layers 1", "where the model is not run on --samples"),
}
AMOUNTS = {"--importance", "--drop-layers", "--keep-layers", "--drop-layer-ids", "--mlp-prune-ratio"}
AMOUNTS |= {"--vision-drop-layers", "--vision-mlp-prune-ratio"}
ALWAYS = AMOUNTS | {"--plan", "--refit", "--samples", "--no-check", "--dry-run", "--json", "--quiet", "--overwrite"}


def test_prune_refuses_options_that_do_nothing():
    """Every option is known to matter always, or when; before anything is read."""
    options = {max(parameter.opts, key=len) for parameter in prune.command.params if parameter.opts[0].startswith("-")}
    assert options == IDLE.keys() | ALWAYS
    for option, (value, beside, reason) in IDLE.items():
        said = evla_error("prune", "nowhere", "out", option, value, *beside.split())
        assert f"Error: {option} does nothing {reason}" in said
    for option in (AMOUNTS | IDLE.keys()) - {"--refit-last-weight", "--num-samples", "--batch-size", "--memory-budget"}:
        value = IDLE[option][0] if option in IDLE else 0
        said = evla_error("prune", "nowhere", "out", "--plan", "p.yaml", option, value)
        expected = "where the model is not run" if option == "--device" else "--plan says what goes; leave out"
        assert expected in said
        assert option in said


def test_recipes_refuse_keys_that_do_nothing():
    for prune_recipe, reason in (
        ({"mlp_prune_ratio": 0.5, "protect_first": 2}, "protect_first does nothing where no layer goes (drop_layers)"),
        ({"drop_layer_ids": [4], "layer_method": "iterative"}, "layer_method does nothing where no layer goes by rank"),
        ({"drop_layers": 1, "mlp_method": "random"}, "mlp_method does nothing without mlp_prune_ratio"),
        ({"drop_layers": 1, "vision_mlp_method": "random"}, "does nothing without vision_mlp_prune_ratio"),
        ({"drop_layers": 1, "seed": 5}, "seed does nothing where no rows are drawn (mlp_method prunenet or random)"),
        ({"drop_layers": 1, "refit_last_weight": 5.0}, "refit_last_weight does nothing without refit"),
    ):
        record = {"source": "run", "output": "out", "analyze": {"samples": "samples"}, "prune": prune_recipe}
        with pytest.raises(EvlaError, match=re.escape(reason)):
            from_mapping(Recipe, record, "recipe.yaml")


def test_the_table_says_how_sure_the_last_choice_is():
    found = {"last_dropped": 5, "first_kept": 7, "exchanged_share": 0.312, "num_resamples": 1000, "told_apart": False}
    said = "That layer 5 goes rather than layer 7 is not sure: 31.2% of 1000 bootstrap resamples of the samples choose"
    assert stability_note(found).startswith(said)
    assert "rather than layer 7 is sure: 1.0%" in stability_note(found | {"exchanged_share": 0.01, "told_apart": True})


def test_dry_run_prints_the_plan_and_writes_nothing(cogact_run, tmp_path):
    before = contents(cogact_run)
    text = evla("prune", cogact_run, tmp_path / "out", "--drop-layer-ids", "3,4", "--dry-run")
    assert text.count("drop") == 2
    assert "decoder layers   6 -> 4" in text
    assert "parameters" in text
    assert (size := re.search(r"out would take ([0-9,]+) bytes; nothing was written\.$", text))
    assert list(tmp_path.iterdir()) == []
    assert contents(cogact_run) == before
    evla("prune", cogact_run, tmp_path / "out", "--drop-layer-ids", "3,4")
    written = (tmp_path / "out/checkpoints/pico.pt").stat().st_size
    assert int(size[1].replace(",", "")) == pytest.approx(written, rel=0.05)


def test_overwrite_replaces_what_evla_wrote(cogact_run, tmp_path):
    evla("prune", cogact_run, tmp_path / "out", "--drop-layer-ids", "3")
    evla("prune", cogact_run, tmp_path / "out", "--drop-layer-ids", "4", "--overwrite")
    assert yaml.safe_load((tmp_path / "out/prune_plan.yaml").read_text())["dropped_layers"] == [4]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# export, verify, predict


def test_bundle_has_the_documented_files(bundle):
    files = {path.name for path in bundle.iterdir()}
    required = {"config.json", "inference.yaml", "tokenizer.json", "dataset_statistics.json", "README.md"}
    assert files == required | {"manifest.json", "model.safetensors", "check.json"}
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert set(manifest["files"]) == files - {"manifest.json", "check.json"}


def test_export_twice_gives_the_same_bytes(bundle, cogact_run, tmp_path):
    evla("export", cogact_run, tmp_path / "again", "--num-visual-tokens", 8, "--cache-interval", 5)
    assert contents(tmp_path / "again") == contents(bundle)


def test_export_reads_again_what_it_wrote(cogact_run, tmp_path, monkeypatch):
    """A disk that does not keep what it is given."""
    write = os.write

    def forgetful(descriptor: int, data: memoryview) -> int:
        kept = bytearray(data)
        kept[-1] ^= 1
        return write(descriptor, kept)

    monkeypatch.setattr(output_file, "os", SimpleNamespace(**(vars(os) | {"write": forgetful})))
    error = evla_error("export", cogact_run, tmp_path / "b", code=1)
    assert "1 files differ from the manifest (first: model.safetensors)" in error
    assert not any(tmp_path.iterdir())


def test_options_win_over_the_settings_file(cogact_run, tmp_path):
    (tmp_path / "s.yaml").write_text("schema_version: 1\nvisual_tokens: {num_keep: 8}\naction_cache: {interval: 2}\n")
    options = ("--settings", tmp_path / "s.yaml", "--cache-interval", 3, "--dtype", "bfloat16", "--cfg-scale", 2)
    facts = evla_json("export", cogact_run, tmp_path / "b", *options)
    settings = yaml.safe_load((tmp_path / "b/inference.yaml").read_text())
    assert settings["visual_tokens"]["num_keep"] == 8
    assert settings["action_cache"]["interval"] == 3
    assert settings["diffusion"]["cfg_scale"] == 2.0
    assert facts["bytes"] < (cogact_run / "checkpoints/pico.pt").stat().st_size


def test_export_refuses_options_that_do_nothing(cogact_run, tmp_path):
    for option in ("--num-key-tokens", "--task-ratio", "--prune-layer"):
        said = evla_error("export", cogact_run, tmp_path / "b", option, 1)
        assert f"{option} does nothing while all visual tokens are kept" in said
    (tmp_path / "s.yaml").write_text("schema_version: 1\ndiffusion: {sampler: ddpm}\n")
    options = ("--settings", tmp_path / "s.yaml", "--num-denoise-steps", 5)
    assert "does nothing under sampler ddpm" in evla_error("export", cogact_run, tmp_path / "b", *options)


@pytest.fixture(scope="module")
def plain(cogact_run, tmp_path_factory) -> Path:
    """All visual tokens, every denoising step."""
    directory = tmp_path_factory.mktemp("plain") / "bundle"
    evla("export", cogact_run, directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "neutral"),
    [
        ("{method: evla, num_keep: 8}", False),
        ("{method: fastv, num_keep: 8}", False),
        ("{method: random, num_keep: 8, seed: 3}", False),
        ("{method: vla_cache}", True),  # the first frame of an episode
        ("{method: none}", True),
    ],
)
def test_every_method_is_exported_verified_and_run(tokens, neutral, plain, cogact_run, image_samples, tmp_path):
    (tmp_path / "s.yaml").write_text(f"schema_version: 1\nvisual_tokens: {tokens}\naction_cache: {{method: none}}\n")
    evla("export", cogact_run, tmp_path / "b", "--settings", tmp_path / "s.yaml")
    assert evla_json("verify", tmp_path / "b")["ok"]
    told = yaml.safe_load((tmp_path / "b/inference.yaml").read_text())
    assert yaml.safe_load(tokens).items() <= told["visual_tokens"].items()
    assert told["action_cache"] == {"method": "none"}
    arguments = ("--image", image_samples / "0.png", "--instruction", "open drawer", "--seed", 3)
    actions, expected = (evla_json("predict", path, *arguments)["actions"] for path in (tmp_path / "b", plain))
    assert (actions == expected) is neutral


def test_shards_are_as_small_as_asked(cogact_run, tmp_path):
    evla("export", cogact_run, tmp_path / "b", "--max-shard-size", "500KB")
    shards = sorted((tmp_path / "b").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert all(shard.stat().st_size < 520_000 for shard in shards)
    assert evla_json("verify", tmp_path / "b")["ok"]


def test_verify(bundle):
    assert evla_json("verify", bundle)["ok"] is True
    assert "as the manifest and the model say" in evla("verify", bundle)


def test_predict_is_reproducible_and_in_the_robots_units(bundle, image_samples):
    arguments = ("predict", bundle, "--image", image_samples / "0.png", "--instruction", "open drawer")
    actions = np.array(evla_json(*arguments, "--seed", 3)["actions"])
    assert actions.shape == (16, 7)
    assert evla_json(*arguments, "--seed", 3) == evla_json(*arguments, "--seed", 3)
    assert evla_json(*arguments, "--seed", 4)["actions"] != actions.tolist()
    assert np.abs(actions[:, 2] - 0.01).max() <= 0.03 + 1e-9  # between its q01 and q99
    lines = evla(*arguments).splitlines()
    assert lines[0].split() == ["step", "x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    assert len(lines) == 16 + 2
    assert action_table(actions[:, :2]).split()[:3] == ["step", "a0", "a1"]


def test_the_whole_way_of_a_compressed_policy(pruned, image_samples, tmp_path):
    evla("export", pruned, tmp_path / "bundle", "--num-visual-tokens", 6, "--quiet")
    assert (tmp_path / "bundle/prune_plan.yaml").read_bytes() == (pruned / "prune_plan.yaml").read_bytes()
    evla("verify", tmp_path / "bundle")
    actions = evla_json("predict", tmp_path / "bundle", "--image", image_samples / "1.png", "--instruction", "open")
    assert len(actions["actions"]) == 16


def test_the_whole_way_of_a_plain_decoder(decoders, text_samples, tmp_path):
    source = decoders("qwen3")
    evla("analyze", source, "--samples", text_samples, "-o", tmp_path / "i.json", "--batch-size", 2)
    options = ("--importance", tmp_path / "i.json", "--drop-layers", 3, "--mlp-prune-ratio", 0.5)
    evla("prune", source, tmp_path / "pruned", *options, "--mlp-method", "magnitude")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (3, 64)
