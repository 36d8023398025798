"""Rows by activation: what `analyze` measures of MLP channels, which rows follow from it, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from decoder_types import make_checkpoint
from safetensors.torch import load_file, save_file
from test_ranks import errors, finish, start
from transformers import AutoModelForCausalLM

from evla_cli import pipeline
from evla_cli.calibration import load_samples
from evla_cli.checkpoint.files import sha256_file
from evla_cli.errors import EvlaError
from evla_cli.evaluation.report import prune_table
from evla_cli.methods.mlp_pruning import activation_scores, channel_energy, top_rows
from evla_cli.models.processing import load_tokenizer
from evla_cli.plan import PrunePlan, activations_file
from evla_cli.running import run_recipe


@pytest.fixture(scope="module")
def importance(decoders, text_samples, tmp_path_factory):
    file = tmp_path_factory.mktemp("activations") / "importance.json"
    pipeline.analyze_to_file(decoders("llama"), text_samples, file, batch_size=3)
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
        options = ("--samples", text_samples, "-o", files[-1], "--batch-size", 2, "--quiet")
        job = start(quick_python, size, "-m", "evla_cli", "analyze", decoders("llama"), *options)
        assert (errors(finish(job)[1]), job.returncode) == ([], 0)
    one, two = (activations_file(file).read_bytes() for file in files)
    assert one == two  # added up batch by batch, whoever computed them


def test_rows_of_the_highest_score_stay(decoders, importance, tmp_path):
    source = decoders("llama")
    pipeline.prune(source, tmp_path / "out", importance=importance, mlp_prune_ratio=0.5, mlp_method="activation")
    plan = PrunePlan.load(tmp_path / "out" / "prune_plan.yaml")
    weights = load_file(source / "model.safetensors")
    lost = []
    assert plan.mlp_keep is not None
    for layer, (rms, keep) in enumerate(zip(measured(importance), plan.mlp_keep, strict=True)):
        scores = rms.double() * weights[f"model.layers.{layer}.mlp.down_proj.weight"].double().norm(dim=0)
        assert list(keep) == sorted(sorted(range(128), key=lambda row: -scores[row])[:64])
        lost.append(1 - float(scores[list(keep)].square().sum() / scores.square().sum()))
    (stack,) = plan.how["removed_output_energy"]
    found = plan.how["removed_output_energy"][stack]
    assert (stack, found["expected_of_random"]) == ("decoder", 0.5)
    assert found["activation"] == {
        "mean": pytest.approx(np.mean(lost), abs=1e-6),
        "worst": pytest.approx(max(lost), abs=1e-6),
        "worst_layer": int(np.argmax(lost)),
    }


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


def of_an_older_version(importance, tmp_path):
    record = json.loads(importance.read_text())
    del record["activations_sha256"]
    (tmp_path / "older.json").write_text(json.dumps(record))
    return tmp_path / "older.json"


class TestWhatGoes:
    def prune(self, source, tmp_path, **options):
        return pipeline.prune(source, tmp_path / "no", mlp_prune_ratio=0.5, dry_run=True, **options)

    def test_rows_by_activation_are_the_default(self, decoders, importance, tmp_path):
        assert self.prune(decoders("llama"), tmp_path, importance=importance).plan.how["mlp_method"] == "activation"

    @pytest.mark.parametrize("method", ["prunenet", "magnitude", "random"])
    def test_it_stands_beside_activation_and_random_rows(self, decoders, importance, tmp_path, method):
        result = self.prune(decoders("llama"), tmp_path, importance=importance, mlp_method=method)
        found = result.plan.how["removed_output_energy"]["decoder"]
        others = {"untrained"} if method == "prunenet" else set()
        assert set(found) == {method, "activation", "expected_of_random"} | others
        assert found["activation"]["mean"] < found[method]["mean"] <= found[method]["worst"] < 1
        table = prune_table(result)
        assert f"{found[method]['mean']:.1%}  (decoder, {method} rows" in table
        assert f"{found['activation']['mean']:.1%}  (decoder, activation rows" in table
        assert "50.0%  (decoder, random rows in the mean)" in table

    def test_rows_of_prunenet_are_nearly_as_good_as_those_by_activation(self, decoders, importance, tmp_path):
        result = self.prune(decoders("llama"), tmp_path, importance=importance, mlp_method="prunenet")
        found = result.plan.how["removed_output_energy"]["decoder"]
        assert found["prunenet"]["mean"] < 1.2 * found["activation"]["mean"] < found["untrained"]["mean"]

    def test_where_channels_were_not_measured_the_table_says_so(self, decoders, importance, tmp_path):
        for given in (None, of_an_older_version(importance, tmp_path)):
            result = self.prune(decoders("llama"), tmp_path, importance=given, mlp_method="magnitude")
            assert "removed_output_energy" not in result.plan.how
            assert "not measured  (decoder" in prune_table(result)

    def test_layers_alone_need_no_measurements(self, decoders, importance, tmp_path):
        older = of_an_older_version(importance, tmp_path)
        result = pipeline.prune(decoders("llama"), tmp_path / "no", importance=older, num_drop=1, dry_run=True)
        assert "output that goes" not in prune_table(result)

    def test_a_warning_where_random_rows_would_be_better(self, decoders, importance, tmp_path, caplog):
        """Magnitude does not know that the rows which it takes are those in use."""
        source, file = decoders("llama"), tmp_path / "importance.json"
        kept = self.prune(source, tmp_path, importance=importance, mlp_method="magnitude").plan.mlp_keep
        rms = {str(layer): torch.ones(128).index_fill(0, torch.tensor(rows), 0.1) for layer, rows in enumerate(kept)}
        save_file(rms, activations_file(file))
        record = json.loads(importance.read_text()) | {"activations_sha256": sha256_file(activations_file(file))}
        file.write_text(json.dumps(record))
        for method, warned in (("magnitude", True), ("activation", False), ("random", False)):
            caplog.clear()
            self.prune(source, tmp_path, importance=file, mlp_method=method)
            assert ("Warning: magnitude rows take" in caplog.text) == warned == bool(caplog.text)


def test_a_decoder_that_cannot_be_narrowed_is_analyzed_all_the_same(tmp_path):
    source, texts = make_checkpoint(tmp_path / "source", "phi"), tmp_path / "texts.txt"
    texts.write_text("a b c\n")
    pipeline.analyze_to_file(source, texts, tmp_path / "i.json")
    assert load_file(activations_file(tmp_path / "i.json")) == {}
    pipeline.prune(source, tmp_path / "no", importance=tmp_path / "i.json", num_drop=1, dry_run=True)
    with pytest.raises(EvlaError, match="only gated MLPs can be narrowed"):
        pipeline.prune(source, tmp_path / "no", importance=tmp_path / "i.json", mlp_prune_ratio=0.5)


class TestRefused:
    def prune(self, source, importance, tmp_path):
        pipeline.prune(source, tmp_path / "no", importance=importance, mlp_prune_ratio=0.5, mlp_method="activation")

    def test_without_measurements(self, decoders, importance, tmp_path):
        with pytest.raises(EvlaError, match="needs --importance from evla analyze"):
            self.prune(decoders("llama"), None, tmp_path)
        with pytest.raises(EvlaError, match=r"holds no activations.* run evla analyze again"):
            self.prune(decoders("llama"), of_an_older_version(importance, tmp_path), tmp_path)

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
