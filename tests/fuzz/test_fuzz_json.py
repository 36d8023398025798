"""Every JSON that evla reads but the weights' own, right and wrong, through the functions that the commands call."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pico
import pytest
import torch
from damage import damaged_json
from guard import REFUSED, attempt, run_examples
from hypothesis import strategies as st
from reference import assert_holds, json_value
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from evla_cli import load_policy, pipeline
from evla_cli.bundling import verify_bundle
from evla_cli.checkpoint.writer import write_huggingface_weights
from evla_cli.families import open_checkpoint
from evla_cli.models.skeleton import load_model
from evla_cli.running import run_recipe
from evla_cli.runtime.action_check import ActionCheck
from evla_cli.schema import to_mapping

INDEX = "model.safetensors.index.json"
RECIPE = """\
schema_version: 1
source: run
output: out
analyze: {samples: samples, num_samples: 2}
prune: {drop_layers: 2, mlp_prune_ratio: 0.5, mlp_method: magnitude}
export: {settings: {visual_tokens: {num_keep: 8}}}
"""


@pytest.mark.parametrize("num_cases", [12, pytest.param(1000, marks=pytest.mark.fuzz)])
def test_index(num_cases: int, decoders: Callable[[str], Path], tmp_path: Path, counted: Any) -> None:
    whole = decoders("llama")
    original = load_file(whole / "model.safetensors")
    shards = tmp_path / "shards"
    shards.mkdir()
    write_huggingface_weights(shards, pico.lazy_tensors(original), 100_000)
    index = json.loads((shards / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 2
    directory = tmp_path / "llama"
    paths = ["../shards/" + names[0], str(shards / names[0]), "./" + names[1], "sub/" + names[0], "sub/../" + names[0]]
    paths += [names[0] + "/", names[0] + "/x", "config.json", "loop/x", "x" * 300, "x/" * 3000, "pipe", INDEX, ".", "~"]

    def case(example: tuple[bytes, str, str, str]) -> bool:
        text, name, kind, path = example
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        shutil.copy(whole / "config.json", directory)
        for shard in names:
            os.link(shards / shard, directory / shard)
        _spoil(directory, name, kind)
        if kind == "named":
            text = text.replace(json.dumps(name).encode(), json.dumps(path).encode(), 1)
        (directory / INDEX).write_bytes(text)
        found = attempt(lambda: _opened(directory))
        if found is REFUSED:
            return False
        weight_map = json_value(text)["weight_map"]
        assert set(found) == set(original) >= set(weight_map)
        for tensor, shard in weight_map.items():
            resolved = (directory / shard).resolve()
            assert directory in (directory / shard).absolute().parents
            assert ".." not in Path(shard).parts
            assert torch.equal(load_file(resolved)[tensor], original[tensor])
            assert torch.equal(found[tensor], original[tensor])
        return True

    example = st.tuples(
        st.one_of(st.just(json.dumps(index).encode()), damaged_json(index)),
        st.sampled_from(names),
        st.sampled_from(["", "", "", "named", "named", *_SPOILERS]),
        st.sampled_from(paths),
    )
    counted("index JSON", run_examples("index", num_cases, example, case))


def _opened(directory: Path) -> dict[str, torch.Tensor]:
    pipeline.prune(directory, directory.parent / "out", drop_ids=(4,), dry_run=True)
    return {name: lazy.load() for name, lazy in open_checkpoint(directory).weights.items()}


_SPOILERS = ["gone", "directory", "pipe", "loop", "circle", "dangling", "link", "other", "cut", "empty"]


def _spoil(directory: Path, name: str, kind: str) -> None:
    path = directory / name
    if kind in _SPOILERS:
        path.rename(directory / "aside")
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(name)
    elif kind == "circle":
        path.symlink_to("next")
        (directory / "next").symlink_to(name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "link":  # as the cache of Hugging Face's hub has them
        path.symlink_to(directory / "aside")
    elif kind == "other":
        others = [other for other in directory.glob("model-*") if other != path]
        path.symlink_to(others[0])
    elif kind == "cut":
        path.write_bytes((directory / "aside").read_bytes()[:-4])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "named":
        (directory / "loop").symlink_to("loop")
        os.mkfifo(directory / "pipe")


@pytest.mark.parametrize("num_cases", [6, pytest.param(300, marks=pytest.mark.fuzz)])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2"])
def test_decoder_config(
    model_type: str, num_cases: int, decoders: Callable[[str], Path], text_samples: Path, tmp_path: Path, counted: Any
) -> None:
    directory = tmp_path / model_type
    shutil.copytree(decoders(model_type), directory)
    valid = json.loads((directory / "config.json").read_text())
    tokens = torch.arange(5, 25)[None]

    def case(text: bytes) -> bool:
        (directory / "config.json").write_bytes(text)
        result = attempt(lambda: pipeline.prune(directory, tmp_path / "out", drop_ids=(4,), dry_run=True))
        if result is REFUSED:
            return False
        said = json_value(text)
        assert type(said["intermediate_size"]) is type(said["num_hidden_layers"]) is int
        checkpoint = open_checkpoint(directory)
        model = attempt(lambda: load_model(checkpoint.family, checkpoint.config, checkpoint.weights, directory))
        if model is REFUSED:
            return False
        reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        for key in said.keys() & valid.keys() - _NOT_KEPT:
            assert_holds(getattr(model.config, key), said[key], key)
        with torch.inference_mode():
            try:
                theirs = reference(tokens, use_cache=False).logits
            except ValueError:  # layer_types with a sliding window beside a config without one
                assert attempt(lambda: pipeline.analyze(directory, text_samples, num_samples=1)) is REFUSED
                return False
            ours = model(tokens, use_cache=False).logits
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        scores = attempt(lambda: pipeline.analyze(directory, text_samples, num_samples=1))
        assert ours.isfinite().all() or scores is REFUSED
        return scores is not REFUSED

    counted("config.json, decoder", run_examples(f"{model_type} config", num_cases, damaged_json(valid), case))


# Of the library that saved it; and qwen2 drops its sliding window where it is said not to be used.
_NOT_KEPT = {"transformers_version", "dtype", "torch_dtype", "architectures", "sliding_window"}


@pytest.mark.parametrize("num_cases", [12, pytest.param(700, marks=pytest.mark.fuzz)])
def test_bundle_config(num_cases: int, bundle: Path, tmp_path: Path, counted: Any) -> None:
    directory = tmp_path / "bundle"
    shutil.copytree(bundle, directory)
    valid = json.loads((directory / "config.json").read_text())
    manifest = json.loads((directory / "manifest.json").read_text())
    (image,) = pico.images(1)

    def case(text: bytes) -> bool:
        (directory / "config.json").write_bytes(text)
        manifest["files"]["config.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        (directory / "manifest.json").write_text(json.dumps(manifest))
        facts = attempt(lambda: verify_bundle(directory, act=False))
        policy = attempt(lambda: load_policy(directory))
        assert (facts is REFUSED) == (policy is REFUSED), "verify and load_policy disagree"
        if policy is REFUSED:
            return False
        said = json_value(text)
        for section in ("dino_config", "siglip_config", "text_config", "action_config"):
            known = {key: said[section][key] for key in said[section].keys() & valid[section].keys()}
            assert_holds(getattr(policy.model.config, section).to_dict(), known, section)
        for key in set(said["norm_stats"]):
            prediction = attempt(lambda key=key: policy.predict([image], ["open"], unnorm_key=key))
            if prediction is REFUSED:
                return False
            _assert_units(prediction, said["norm_stats"][key]["action"])
        return True

    counted("config.json, bundle", run_examples("bundle config", num_cases, damaged_json(valid), case))


def _assert_units(prediction: Any, stats: dict[str, Any]) -> None:
    """The actions are finite, and q01, q99 and mask were applied as the file has them."""
    normalized = prediction.normalized_actions
    for axis, (low, high) in enumerate(zip(stats["q01"], stats["q99"], strict=True)):
        expected = normalized[..., axis]
        if stats.get("mask", [True] * 7)[axis]:
            expected = (expected + 1) / 2 * (high - low) + low
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(prediction.actions[..., axis], expected, rtol=1e-12, atol=1e-12 * abs(high - low))


@pytest.mark.parametrize("num_cases", [12, pytest.param(700, marks=pytest.mark.fuzz)])
def test_native_config(num_cases: int, cogact_run: Path, tmp_path: Path, counted: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(cogact_run, run)
    names = ["config.json", "llm_config/config.json"]
    valid = {name: json.loads((run / name).read_text()) for name in names}
    valid["config.json"]["evla"]["prompt_suffix_ids"] = [4, 2]
    valid["llm_config/config.json"] |= {"rope_theta": 10000.0, "max_position_embeddings": 4096, "head_dim": 16}

    def case(example: tuple[str, bytes]) -> bool:
        name, text = example
        for other in names:
            (run / other).write_bytes(text if other == name else json.dumps(valid[other]).encode())
        result = attempt(lambda: pipeline.prune(run, tmp_path / "out", drop_ids=(4,), dry_run=True))
        if result is REFUSED:
            return False
        said = json_value(text)
        config = open_checkpoint(run).config
        if name == "config.json":
            given = said.get("evla", {})
            heads = given.get("num_attention_heads", {})
            for part, section in (
                ("dino", "dino_config"),
                ("siglip", "siglip_config"),
                ("action_model", "action_config"),
            ):
                assert_holds(config[section], {"num_attention_heads": heads[part]})
            assert_holds(config["prompt_suffix_ids"], given.get("prompt_suffix_ids"))
        else:
            known = said.keys() & valid[name].keys()
            assert_holds(config["text_config"], {key: said[key] for key in known if said[key] is not None})
        return True

    texts = [st.tuples(st.just(name), damaged_json(valid[name])) for name in names]
    counted("config.json, native", run_examples("native config", num_cases, st.one_of(texts), case))


def test_a_head_that_is_too_large_takes_no_memory(cogact_run: Path, decoders: Callable[[str], Path], tmp_path: Path):
    """Rotary frequencies are as many as it says, and belong to no weight."""
    run, llama = (shutil.copytree(source, tmp_path / source.name) for source in (cogact_run, decoders("llama")))
    files = {run: run / "llm_config/config.json", llama: llama / "config.json"}
    for file in files.values():
        file.write_text(json.dumps(json.loads(file.read_text()) | {"head_dim": 2**31}))

    def case(checkpoint: Path) -> bool:
        return attempt(lambda: pipeline.prune(checkpoint, tmp_path / "out", drop_ids=(4,), dry_run=True)) is not REFUSED

    assert run_examples("head", 2, st.sampled_from(sorted(files)), case)["refused"] == 2


@pytest.mark.parametrize("num_cases", [12, pytest.param(1000, marks=pytest.mark.fuzz)])
def test_statistics(num_cases: int, cogact_run: Path, tmp_path: Path, counted: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(cogact_run, run)
    valid = {**pico.STATS, "lab": {"action": {"q01": [-1] * 7, "q99": [1] * 7}, "proprio": {}, "num_trajectories": 3}}

    def case(text: bytes) -> bool:
        (run / "dataset_statistics.json").write_bytes(text)
        checkpoint = attempt(lambda: open_checkpoint(run))
        if checkpoint is REFUSED:
            return False
        said = json_value(text)
        found = checkpoint.config["norm_stats"]
        assert found.keys() == said.keys()
        for dataset, entry in said.items():
            for name in ("q01", "q99", "mask"):
                default = [True] * 7 if name == "mask" else None
                assert_holds(found[dataset]["action"][name], entry["action"].get(name, default), name)
                assert len(found[dataset]["action"][name]) == 7
            low, high = (np.array(found[dataset]["action"][name], dtype=float) for name in ("q01", "q99"))
            assert np.isfinite([low, high]).all()
            assert (low <= high).all()
        return True

    counted("statistics", run_examples("statistics", num_cases, damaged_json(valid), case))


@pytest.mark.parametrize("num_cases", [12, pytest.param(1000, marks=pytest.mark.fuzz)])
def test_importance(num_cases: int, cogact_run: Path, importance_file: Path, tmp_path: Path, counted: Any) -> None:
    path = tmp_path / "importance.json"
    valid = json.loads(importance_file.read_text())

    def case(text: bytes) -> bool:
        path.write_bytes(text)
        result = attempt(
            lambda: pipeline.prune(cogact_run, tmp_path / "out", importance=path, num_drop=2, dry_run=True)
        )
        if result is REFUSED:
            return False
        said = json_value(text)
        scores = [float(layer["importance"]) for layer in said["layers"]]
        assert said["checkpoint_sha256"] == valid["checkpoint_sha256"]
        assert [layer["index"] for layer in said["layers"]] == list(range(6))
        assert np.isfinite(scores).all()
        least = sorted(range(2, 6), key=scores.__getitem__)[:2]  # the first two are protected
        assert result.plan.dropped_layers == tuple(sorted(least))
        how = result.plan.how
        assert_holds(how["importance"], scores)
        assert_holds(how["samples_sha256"], said["samples_sha256"])
        assert_holds(how["analyze"], {key: said[key] for key in how["analyze"] if key in said})
        return True

    counted("importance.json", run_examples("importance", num_cases, damaged_json(valid), case))


@pytest.mark.parametrize("num_cases", [12, pytest.param(1000, marks=pytest.mark.fuzz)])
def test_manifest(num_cases: int, bundle: Path, tmp_path: Path, counted: Any) -> None:
    directory = tmp_path / "bundle"
    shutil.copytree(bundle, directory)
    valid = json.loads((directory / "manifest.json").read_text())

    def case(text: bytes) -> bool:
        (directory / "manifest.json").write_bytes(text)
        facts = attempt(lambda: verify_bundle(directory, act=False))
        if facts is REFUSED:
            return False
        said = json_value(text)
        assert type(said["schema_version"]) is int
        assert facts["files"] == len(said["files"])
        for name, entry in said["files"].items():
            data = (directory / name).read_bytes()
            assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert {"config.json", "model.safetensors", "inference.yaml", "tokenizer.json"} <= said["files"].keys()
        return True

    counted("manifest.json", run_examples("manifest", num_cases, damaged_json(valid), case))


@pytest.mark.parametrize("num_cases", [3, pytest.param(100, marks=pytest.mark.fuzz)])
def test_run_state(num_cases: int, cogact_run: Path, image_samples: Path, tmp_path: Path, counted: Any) -> None:
    """Whatever run.json says, what comes out of the next run is what came out of the first, or it is refused."""
    shutil.copytree(cogact_run, tmp_path / "run")
    shutil.copytree(image_samples, tmp_path / "samples")
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(RECIPE)
    run_recipe(recipe)
    state = out / "run.json"
    valid = json.loads(state.read_text())
    expected = _contents(out)
    random = Random(0)

    def case(text: bytes) -> bool:
        state.write_bytes(text)
        for stage in ("pruned", "bundle"):  # lose one, so that there is something to do
            if random.random() < 0.3:
                shutil.rmtree(out / stage)
        stages = attempt(lambda: run_recipe(recipe))
        if stages is REFUSED:
            state.write_text(json.dumps(valid))
            run_recipe(recipe)
        assert _contents(out) == expected
        return stages is not REFUSED

    counted("run.json", run_examples("run state", num_cases, damaged_json(valid), case))


def _contents(directory: Path) -> dict[str, str]:
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name != "run.json"]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.parametrize("num_cases", [20, pytest.param(1000, marks=pytest.mark.fuzz)])
def test_check(num_cases: int, bundle: Path, tmp_path: Path, counted: Any) -> None:
    valid = json.loads((bundle / "check.json").read_text())

    def case(text: bytes) -> bool:
        (tmp_path / "check.json").write_bytes(text)
        check = attempt(lambda: ActionCheck.load(tmp_path))
        if check is REFUSED:
            return False
        assert_holds(to_mapping(check), json_value(text))
        assert np.isfinite(check.denoised_action).all()
        return True

    counted("check.json", run_examples("check", num_cases, damaged_json(valid), case))
