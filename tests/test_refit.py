"""Refit: the streamed ridge regression against numpy's least squares on whole models, its guard, and its plan."""

import json
from pathlib import Path

import numpy as np
import pico
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from evla_cli import pipeline
from evla_cli.calibration import load_samples
from evla_cli.errors import EvlaError
from evla_cli.families import open_checkpoint
from evla_cli.methods.refit import RIDGES, NormalEquations, best_candidate, squared_error
from evla_cli.models.processing import load_tokenizer
from evla_cli.refitting import RefitOptions


def ridge_reference(inputs: np.ndarray, residual: np.ndarray, ridge: float) -> np.ndarray:
    """numpy's least squares with the ridge as further rows: (N, K), (N, D) -> (D, K)."""
    scale = np.sqrt(ridge * np.square(inputs).sum(axis=0).mean())
    rows = np.vstack([inputs, scale * np.eye(inputs.shape[1])])
    targets = np.vstack([residual, np.zeros((inputs.shape[1], residual.shape[1]))])
    return np.linalg.lstsq(rows, targets, rcond=None)[0].T


def equations(inputs: torch.Tensor, residual: torch.Tensor, weights: torch.Tensor | None = None) -> NormalEquations:
    found = NormalEquations(inputs.shape[1], residual.shape[1])
    for start in range(0, len(inputs), 7):  # the last piece is shorter
        piece = slice(start, start + 7)
        found.add(inputs[piece], residual[piece], None if weights is None else weights[piece])
    return found


def problem(num_rows: int, num_inputs: int = 12, noise: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    inputs = torch.randn(num_rows, num_inputs, generator=generator)
    law = torch.randn(5, num_inputs, generator=torch.Generator().manual_seed(1))
    return inputs, inputs @ law.T + noise * torch.randn(num_rows, 5, generator=generator)


class TestSolve:
    @pytest.mark.parametrize("num_rows", [40, 9])  # 9 rows leave 12 inputs open: the ridge alone decides
    def test_equals_least_squares_with_further_rows(self, num_rows):
        inputs, residual = problem(num_rows)
        solutions = dict(equations(inputs, residual).solutions())
        assert tuple(solutions) == RIDGES
        for ridge, change in solutions.items():
            expected = ridge_reference(inputs.double().numpy(), residual.double().numpy(), ridge)
            np.testing.assert_allclose(change.numpy(), expected, rtol=0, atol=1e-9)  # float64, condition below 1e5

    def test_a_weight_counts_a_row_so_many_times(self):
        inputs, residual = problem(20)
        counts = torch.arange(20) % 3
        weighted = dict(equations(inputs, residual, counts).solutions())
        repeated = dict(equations(*(t.repeat_interleave(counts, dim=0) for t in (inputs, residual))).solutions())
        for ridge, change in weighted.items():
            torch.testing.assert_close(change, repeated[ridge], rtol=0, atol=1e-10)
        change = weighted[0.1]
        left = [squared_error(inputs[n : n + 1], residual[n : n + 1], change) for n in range(20)]
        expected = sum(error * int(count) for error, count in zip(left, counts, strict=True))
        assert squared_error(inputs, residual, change, counts) == pytest.approx(expected, rel=1e-6)

    def test_what_has_no_single_solution_is_left_out(self):
        inputs, residual = problem(9)
        assert [ridge for ridge, _ in equations(inputs, residual).solutions((1e-3, 0.0))] == [1e-3]
        assert list(equations(torch.zeros(9, 4), residual).solutions()) == []


class TestGuard:
    """Few rows and a residual that is mostly noise: least squares fits the noise."""

    def held_out(self, num_rows: int, noise: float) -> tuple[list[float], int]:
        changes = [None, *(change for _, change in equations(*problem(num_rows, 100, noise)).solutions())]
        errors = [squared_error(*problem(400, 100, noise), change) for change in changes]
        return errors, best_candidate(errors)

    def test_overfitting_is_not_chosen(self):
        errors, best = self.held_out(110, noise=30.0)
        assert errors[-1] > 3 * errors[0]  # what least squares alone would do to samples that it has not seen
        assert errors[best] <= errors[0]
        assert best <= 1  # no change, or hardly any

    def test_where_there_is_enough_data_it_does_not_hold_back(self):
        errors, best = self.held_out(5000, noise=0.1)
        assert errors[best] < 0.01 * errors[0]
        assert best > 2

    def test_equal_errors_mean_no_change(self):
        assert best_candidate([0.0, 0.0, 0.0]) == 0


PRUNED = {"drop_ids": [2, 3], "mlp_prune_ratio": 0.5, "mlp_method": "random"}


@pytest.fixture(scope="module")
def refit(decoders, text_samples, tmp_path_factory) -> Path:
    dest = tmp_path_factory.mktemp("refit") / "llama"
    pipeline.prune(decoders("llama"), dest, refit=RefitOptions(text_samples, batch_size=2), **PRUNED)
    return dest


def report(directory: Path) -> dict:
    return yaml.safe_load((directory / "prune_plan.yaml").read_text())["how"]["refit_report"]


def down_projections(directory: Path) -> list[torch.Tensor]:
    checkpoint = open_checkpoint(directory)
    names = [f"{checkpoint.layer_prefix}.{layer}.mlp.down_proj.weight" for layer in range(checkpoint.num_layers)]
    return [checkpoint.reader.tensors[name].load().clone() for name in names]


def through(model, tokens: list[torch.Tensor]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Sample by sample and layer by layer: down_proj's input and the layer's output."""
    found = []
    for sample in tokens:
        inputs, outputs = [], []
        for layer in model.model.layers:
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, seen=inputs: seen.append(args[0][0].numpy()))
            layer.register_forward_hook(lambda _, __, output, seen=outputs: seen.append(output[0].numpy()))
        with torch.inference_mode():
            model(input_ids=sample[None], use_cache=False)
        for layer in model.model.layers:
            layer.mlp.down_proj._forward_pre_hooks.clear()
            layer._forward_hooks.clear()
        found.append(list(zip(inputs, outputs, strict=True)))
    return found


def test_equals_a_naive_computation_on_whole_models(decoders, text_samples, refit, tmp_path):
    """Float64, one unpadded sample at a time, everything computed anew for every layer; llama has biases here."""
    plain = tmp_path / "plain"
    pipeline.prune(decoders("llama"), plain, **PRUNED)
    tokenizer = load_tokenizer(plain)
    tokens = [torch.tensor(tokenizer.encode(sample.text).ids) for sample in load_samples(text_samples, "text")]
    load = {"dtype": torch.float64, "attn_implementation": "eager"}
    dense = through(AutoModelForCausalLM.from_pretrained(decoders("llama"), **load).eval(), tokens)
    student = AutoModelForCausalLM.from_pretrained(plain, **load).eval()
    kept, found = [0, 1, 4, 5], report(refit)["layers"]
    for position, layer in enumerate(kept):
        target = ([*kept, 6])[position + 1] - 1  # the layer whose output the next kept layer reads
        states = through(student, tokens)
        rows = [
            (inputs, dense[number][target][1] - output)
            for number, (inputs, output) in enumerate(states[position] for states in states)
        ]
        fit, held_out = (tuple(map(np.vstack, zip(*part, strict=True))) for part in (rows[:4], rows[4:]))
        candidates = {None: np.zeros((32, 64))} | {ridge: ridge_reference(*fit, ridge) for ridge in RIDGES}
        left = {ridge: held_out[1] - held_out[0] @ change.T for ridge, change in candidates.items()}
        errors = {ridge: np.square(values).mean() ** 0.5 for ridge, values in left.items()}
        best = min(errors, key=lambda ridge: errors[ridge])
        assert found[layer]["ridge"] == best
        np.testing.assert_allclose(found[layer]["held_out_rms"], [errors[None], errors[best]], rtol=1e-4)
        weight = student.model.layers[position].mlp.down_proj.weight
        weight.data += torch.from_numpy(candidates[best])
        # Hidden states are float32 on one side; weights are of order 0.1, the least ridge magnifies rounding 1e4 times.
        np.testing.assert_allclose(
            down_projections(refit)[position].numpy(), weight.detach().numpy(), rtol=0, atol=2e-4
        )
    assert {entry["ridge"] for entry in found.values()} != {None}


def test_the_pruned_model_is_nearer_to_the_dense_one(decoders, text_samples, refit):
    """By the last layer's own account, on samples it was not fit to; and nothing but down_proj changed."""
    for entry in report(refit)["layers"].values():
        before, after = entry["held_out_rms"]
        assert after <= before
    checkpoint = open_checkpoint(refit)
    dense = open_checkpoint(decoders("llama"))
    kept = torch.equal(
        checkpoint.weights["model.layers.2.self_attn.o_proj.weight"].load(),
        dense.weights["model.layers.4.self_attn.o_proj.weight"].load(),
    )
    assert kept


def test_padding_and_batches_do_not_matter(decoders, text_samples, refit, tmp_path):
    for size, budget in ((1, None), (5, "0.001KB")):
        options = RefitOptions(text_samples, batch_size=size, memory_budget=budget)
        pipeline.prune(decoders("llama"), tmp_path / "other", refit=options, overwrite=True, **PRUNED)
        for ours, theirs in zip(down_projections(tmp_path / "other"), down_projections(refit), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)  # as above


def test_a_plan_that_removes_nothing_changes_nothing(decoders, text_samples, tmp_path):
    pipeline.prune(decoders("llama"), tmp_path / "same", refit=RefitOptions(text_samples))
    for ours, theirs in zip(down_projections(tmp_path / "same"), down_projections(decoders("llama")), strict=True):
        assert torch.equal(ours, theirs)
    entries = report(tmp_path / "same")["layers"].values()
    assert all(entry == {"ridge": None, "held_out_rms": [0.0, 0.0]} for entry in entries)


def test_a_vla_in_its_own_layout_and_dtype(cogact_run, image_samples, importance_file, tmp_path):
    """The native `.pt` is written with refit weights; what acts on it loads."""
    from evla_cli.runtime.policy import policy_from_checkpoint

    pipeline.prune(
        cogact_run, tmp_path / "run", importance=importance_file, num_drop=2, refit=RefitOptions(image_samples)
    )
    found = report(tmp_path / "run")
    assert (found["num_samples"], found["num_held_out"]) == (5, 1)
    assert any(entry["ridge"] is not None for entry in found["layers"].values())
    image = load_samples(image_samples, "image")[0].image
    assert np.isfinite(policy_from_checkpoint(tmp_path / "run").predict_action(image, "open drawer")).all()


def test_bytes_do_not_depend_on_threads(decoders, tmp_path):
    """Texts of 16 tokens: torch's own attention rounds differently by the number of threads for some other lengths."""
    words = np.random.default_rng(2).choice(pico.WORDS[5:], size=(10, 16))
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps({"text": " ".join(row)}) + "\n" for row in words))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            pipeline.prune(decoders("llama"), tmp_path / str(threads), refit=RefitOptions(samples), **PRUNED)
    finally:
        torch.set_num_threads(before)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("1", "2"))
    assert one == two


class TestPlan:
    def test_its_replay_gives_the_same_bytes(self, decoders, text_samples, refit, tmp_path):
        options = RefitOptions(text_samples, batch_size=2)
        pipeline.prune(decoders("llama"), tmp_path / "again", plan_file=refit / "prune_plan.yaml", refit=options)
        for name in ("model.safetensors", "prune_plan.yaml", "manifest.json"):
            assert (tmp_path / "again" / name).read_bytes() == (refit / name).read_bytes()

    def test_it_is_not_replayed_without_its_samples(self, decoders, text_samples, refit, tmp_path):
        other = tmp_path / "other.jsonl"
        other.write_text(text_samples.read_text() + json.dumps({"text": "open drawer"}) + "\n")
        for options, message in (
            (None, "was refit"),
            (RefitOptions(other, batch_size=2), "refit with samples_sha256"),
            (RefitOptions(text_samples), "refit with batch_size 2, not 8"),
        ):
            with pytest.raises(EvlaError, match=message):
                pipeline.prune(decoders("llama"), tmp_path / "no", plan_file=refit / "prune_plan.yaml", refit=options)
        assert not (tmp_path / "no").exists()


class TestRefused:
    def test_a_norm_after_the_mlp(self, decoders, text_samples, tmp_path):
        with pytest.raises(EvlaError, match="no closed form"):
            pipeline.prune(decoders("gemma2"), tmp_path / "no", drop_ids=[1], refit=RefitOptions(text_samples))

    def test_a_single_sample(self, decoders, text_samples, tmp_path):
        with pytest.raises(EvlaError, match="at least 2 samples"):
            pipeline.prune(decoders("llama"), tmp_path / "no", drop_ids=[1], refit=RefitOptions(text_samples, 1))
