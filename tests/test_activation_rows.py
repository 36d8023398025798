"""Rows by activation: what `analyze --activations` measures, which rows follow from it, and what is refused."""

import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_ranks import errors, finish, start
from transformers import AutoModelForCausalLM

from evla_cli import pipeline
from evla_cli.calibration import load_samples
from evla_cli.errors import EvlaError
from evla_cli.methods.mlp_pruning import activation_scores, channel_energy, select_rows_random, top_rows
from evla_cli.models.processing import load_tokenizer
from evla_cli.plan import PrunePlan, activations_file
from evla_cli.running import run_recipe


@pytest.fixture(scope="module")
def importance(decoders, text_samples, tmp_path_factory):
    file = tmp_path_factory.mktemp("activations") / "importance.json"
    pipeline.analyze_to_file(decoders("llama"), text_samples, file, batch_size=3, with_activations=True)
    return file


def measured(importance) -> list[torch.Tensor]:
    tensors = load_file(activations_file(importance))
    return [tensors[str(layer)] for layer in range(len(tensors))]


def naive(directory, text_samples) -> list[np.ndarray]:
    """Root mean squares in float64 from the whole model, one unpadded sample at a time."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    tokenizer = load_tokenizer(directory)
    seen = [[] for _ in model.model.layers]
    for layer, rows in zip(model.model.layers, seen, strict=True):
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0][0].numpy()))
    with torch.inference_mode():
        for sample in load_samples(text_samples, "text"):
            model(input_ids=torch.tensor([tokenizer.encode(sample.text).ids]), use_cache=False)
    return [np.sqrt(np.square(np.vstack(rows)).mean(axis=0)) for rows in seen]


def test_equals_a_naive_computation_on_the_whole_model(decoders, text_samples, importance):
    """Batches hold samples of different lengths, so padding would show."""
    expected = naive(decoders("llama"), text_samples)
    for ours, theirs in zip(measured(importance), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=2e-5)  # hidden states are float32 here


def test_padding_is_left_out_of_the_sums():
    inputs = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [100.0, 100.0]]])
    squares, count = channel_energy(inputs, torch.tensor([[1, 1], [1, 0]]))
    assert (squares.tolist(), count) == ([35.0, 56.0], 3)
    assert channel_energy(inputs[:1], None)[0].tolist() == [10.0, 20.0]


def test_it_changes_nothing_else(decoders, text_samples, importance):
    plain = pipeline.analyze(decoders("llama"), text_samples, batch_size=3)
    assert plain.layers == pipeline.LayerImportance.load(importance).layers


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(quick_python, decoders, text_samples, tmp_path):
    files = []
    for size in (1, 2):
        files.append(tmp_path / f"{size}.json")
        options = ("--samples", text_samples, "-o", files[-1], "--batch-size", 2, "--activations", "--quiet")
        job = start(quick_python, size, "-m", "evla_cli", "analyze", decoders("llama"), *options)
        assert (errors(finish(job)[1]), job.returncode) == ([], 0)
    one, two = (activations_file(file).read_bytes() for file in files)
    assert one == two  # added up batch by batch, whoever computed them


def test_rows_of_the_highest_score_stay(decoders, importance, tmp_path):
    source = decoders("llama")
    pipeline.prune(source, tmp_path / "out", importance=importance, mlp_prune_ratio=0.5, mlp_method="activation")
    plan = PrunePlan.load(tmp_path / "out" / "prune_plan.yaml")
    weights = load_file(source / "model.safetensors")
    lost = {"activation": [], "random": []}
    assert plan.mlp_keep is not None
    for layer, (rms, keep) in enumerate(zip(measured(importance), plan.mlp_keep, strict=True)):
        scores = rms.double() * weights[f"model.layers.{layer}.mlp.down_proj.weight"].double().norm(dim=0)
        assert list(keep) == sorted(sorted(range(128), key=lambda row: -scores[row])[:64])
        control = select_rows_random(128, 64, 0, layer)
        for name, rows in (("activation", list(keep)), ("random", control)):
            lost[name].append(1 - float(scores[rows].square().sum() / scores.square().sum()))
    for name, share in plan.how["removed_score_share"].items():
        assert share == pytest.approx(np.mean(lost[name]), abs=1e-6)
    assert plan.how["removed_score_share"]["activation"] < plan.how["removed_score_share"]["random"]


def test_another_ratio_needs_no_new_pass(decoders, importance, tmp_path):
    plans = [
        pipeline.prune(
            decoders("llama"), tmp_path / "no", importance=importance, num_drop=1, mlp_prune_ratio=ratio,
            mlp_method="activation", dry_run=True,
        ).plan
        for ratio in (0.5, 0.0)
    ]  # fmt: skip
    assert [plan.kept_intermediate_size for plan in plans] == [64, 128]


def test_both_factors_count():
    down = torch.tensor([[3.0, 1.0, 1.0], [4.0, 0.0, 0.0]], dtype=torch.bfloat16)
    scores = activation_scores(torch.tensor([1.0, 6.0, 2.0]), down)
    assert scores.tolist() == [5.0, 6.0, 2.0]
    assert top_rows(scores, 2).tolist() == [0, 1]


class TestRefused:
    def prune(self, source, importance, tmp_path):
        pipeline.prune(source, tmp_path / "no", importance=importance, mlp_prune_ratio=0.5, mlp_method="activation")

    def test_without_measurements(self, decoders, text_samples, tmp_path):
        file = tmp_path / "importance.json"
        pipeline.analyze_to_file(decoders("llama"), text_samples, file)
        for given in (file, None):
            with pytest.raises(EvlaError, match="--activations"):
                self.prune(decoders("llama"), given, tmp_path)

    def test_a_file_that_is_missing_or_of_another_run(self, decoders, importance, tmp_path):
        file = shutil.copy(importance, tmp_path / "importance.json")
        with pytest.raises(EvlaError, match="missing or not the one"):
            self.prune(decoders("llama"), file, tmp_path)
        changed = bytearray(activations_file(importance).read_bytes())
        changed[-1] ^= 1
        activations_file(file).write_bytes(changed)
        with pytest.raises(EvlaError, match="missing or not the one"):
            self.prune(decoders("llama"), file, tmp_path)

    def test_another_checkpoint(self, decoders, importance, tmp_path):
        source = shutil.copytree(decoders("llama"), tmp_path / "other")
        weights = bytearray((source / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (source / "model.safetensors").write_bytes(weights)
        with pytest.raises(EvlaError, match="another checkpoint"):
            self.prune(source, importance, tmp_path)
        assert not (tmp_path / "no").exists()


def test_a_recipe_measures_and_refits(decoders, text_samples, tmp_path):
    recipe = {
        "schema_version": 1,
        "source": str(decoders("llama")),
        "output": "out",
        "analyze": {"samples": str(text_samples), "batch_size": 2},
        "prune": {"drop_layers": 1, "mlp_prune_ratio": 0.5, "mlp_method": "activation", "refit": True},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert [done for _, _, done in run_recipe(tmp_path / "recipe.yaml")] == [True, True]
    assert [done for _, _, done in run_recipe(tmp_path / "recipe.yaml")] == [False, False]
    activations_file(tmp_path / "out/importance.json").unlink()
    assert [done for _, _, done in run_recipe(tmp_path / "recipe.yaml")] == [True, False]
    how = PrunePlan.load(tmp_path / "out/pruned/prune_plan.yaml").how
    assert (how["mlp_method"], how["refit"], how["refit_report"]["batch_size"]) == ("activation", True, 2)
    del recipe["analyze"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(EvlaError, match="analyze section"):
        run_recipe(tmp_path / "recipe.yaml")
