"""Refit: the streamed ridge regression against numpy's least squares on whole models, its guard, and its plan."""

import json
import shutil
from pathlib import Path

import numpy as np
import pico
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForCausalLM

from evla_cli import pipeline
from evla_cli.calibration import hold_out, load_samples
from evla_cli.errors import EvlaError
from evla_cli.evaluation.report import prune_table
from evla_cli.families import open_checkpoint
from evla_cli.methods import refit as refit_maths
from evla_cli.methods.refit import RIDGES, Fit, NormalEquations, best_fit, squared_error
from evla_cli.models.processing import load_tokenizer
from evla_cli.models.streaming import DecoderStream
from evla_cli.refitting import RefitOptions, _counts, _position_kinds


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


def solved(found: NormalEquations, ridge: float) -> torch.Tensor:
    change = found.solution(ridge)
    assert change is not None
    return change


class TestSolve:
    @pytest.mark.parametrize("num_rows", [40, 9])  # 9 rows leave 12 inputs open: the ridge alone decides
    @pytest.mark.parametrize("block", [512, 5])  # one block; several, of which the last is narrower
    def test_equals_least_squares_with_further_rows(self, num_rows, block, monkeypatch):
        monkeypatch.setattr(refit_maths, "_BLOCK", block)
        inputs, residual = problem(num_rows)
        found = equations(inputs, residual)
        for ridge in (*RIDGES, RIDGES[0]):  # one does not spoil the next
            expected = ridge_reference(inputs.double().numpy(), residual.double().numpy(), ridge)
            np.testing.assert_allclose(solved(found, ridge).numpy(), expected, rtol=0, atol=1e-9)  # condition below 1e5

    def test_rows_may_come_after_a_solution(self, monkeypatch):
        monkeypatch.setattr(refit_maths, "_BLOCK", 5)
        inputs, residual = problem(40)
        found = equations(inputs[:21], residual[:21])
        solved(found, 0.1)
        found.add(inputs[21:], residual[21:])
        torch.testing.assert_close(solved(found, 0.1), solved(equations(inputs, residual), 0.1), rtol=0, atol=1e-10)

    def test_a_weight_counts_a_row_so_many_times(self):
        inputs, residual = problem(20)
        counts = torch.arange(20) % 3
        weighted = equations(inputs, residual, counts)
        repeated = equations(*(t.repeat_interleave(counts, dim=0) for t in (inputs, residual)))
        for ridge in RIDGES:
            torch.testing.assert_close(solved(weighted, ridge), solved(repeated, ridge), rtol=0, atol=1e-10)
        change = solved(weighted, 0.1)
        left = [squared_error(inputs[n : n + 1], residual[n : n + 1], change) for n in range(20)]
        expected = sum(error * int(count) for error, count in zip(left, counts, strict=True))
        assert squared_error(inputs, residual, change, counts) == pytest.approx(expected, rel=1e-6)

    def test_what_has_no_single_solution_is_left_out(self):
        inputs, residual = problem(9)
        assert equations(inputs, residual).solution(0.0) is None
        assert equations(torch.zeros(9, 4), residual).solution(1.0) is None


class TestGuard:
    """Few rows and a residual that is mostly noise: least squares fits the noise."""

    def fit(self, num_rows: int, noise: float) -> tuple[Fit, list[float]]:
        found, held_out = equations(*problem(num_rows, 100, noise)), problem(400, 100, noise)

        def error(change: torch.Tensor | None) -> float:
            return squared_error(*held_out, change)

        return best_fit(found.solution, error), [error(found.solution(ridge)) for ridge in RIDGES]

    def test_overfitting_is_not_chosen(self):
        best, errors = self.fit(110, noise=30.0)
        assert errors[-1] > 3 * best.errors[0]  # what least squares alone would do to samples that it has not seen
        assert best.errors[1] <= best.errors[0]
        assert best.ridge in (None, 1.0)  # no change, or hardly any

    def test_where_there_is_enough_data_it_does_not_hold_back(self):
        best, errors = self.fit(5000, noise=0.1)
        assert best.errors[1] == min(errors) < 0.01 * best.errors[0]
        assert best.ridge < 0.1

    def test_equal_errors_mean_no_change(self):
        assert best_fit(lambda ridge: torch.tensor(ridge), lambda change: 0.0).weight is None

    @pytest.mark.parametrize(
        ("start", "best", "expected"),
        [
            (None, 0.1, [None, 1.0, 0.3, 0.1, 0.03]),  # from no change on until more makes it worse
            (0.3, 0.1, [None, 0.1, 0.3, 0.03]),
            (0.1, 0.1, [None, 0.03, 0.1, 0.3]),
            (0.03, 0.01, [None, 0.01, 0.03, 0.003]),  # from where the layer before was
            (0.003, 0.01, [None, 1e-3, 0.003, 0.01, 0.03]),  # to less change, where more is no better
            (1e-4, None, [None, 3e-4, 1e-4]),  # worse than no change, and no way out
        ],
    )
    def test_it_walks_while_that_makes_it_better(self, start, best, expected):
        errors = {
            None: 9.0,
            1.0: 9.0,
            0.3: 5.0,
            0.1: 4.0,
            0.03: 6.0,
            0.01: 1.0,
            3e-3: 2.0,
            1e-3: 30.0,
            3e-4: 40.0,
            1e-4: 20.0,
        }
        asked = []

        def error(change: torch.Tensor | None) -> float:
            asked.append(None if change is None else change.item())
            return errors[asked[-1]]

        found = best_fit(lambda ridge: torch.tensor(ridge, dtype=torch.float64), error, start=start)
        assert (found.ridge, found.errors, asked) == (best, (9.0, errors[best]), expected)

    def test_too_small_a_ridge_is_left_again(self):
        weights = {ridge: torch.tensor(ridge) if ridge > 0.05 else None for ridge in RIDGES}
        assert best_fit(weights.get, lambda change: 1.0 if change is None else float(change), start=0.01).ridge == 0.1


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
    """Float64, one unpadded sample at a time, everything computed anew for every layer; llama has biases here. The
    student is fit to four samples and judged by the fifth, and is what is written."""
    plain = tmp_path / "plain"
    pipeline.prune(decoders("llama"), plain, **PRUNED)
    tokenizer = load_tokenizer(plain)
    fit_to, judging = hold_out(load_samples(text_samples, "text"), text_samples)
    assert (len(fit_to), len(judging)) == (4, 1)
    tokens = [torch.tensor(tokenizer.encode(sample.text).ids) for sample in fit_to + judging]
    load = {"dtype": torch.float64, "attn_implementation": "eager"}
    dense = through(AutoModelForCausalLM.from_pretrained(decoders("llama"), **load).eval(), tokens)
    student = AutoModelForCausalLM.from_pretrained(plain, **load).eval()
    kept, found = [0, 1, 4, 5], report(refit)["layers"]
    for position, layer in enumerate(kept):
        target = ([*kept, 6])[position + 1] - 1  # the layer whose output the next kept layer reads

        states = [sample[position] for sample in through(student, tokens)]
        rows = [(inputs, dense[n][target][1] - output) for n, (inputs, output) in enumerate(states)]
        fit, held_out = stacked(rows[:4]), stacked(rows[4:])
        candidates = {None: np.zeros((32, 64))} | {ridge: ridge_reference(*fit, ridge) for ridge in RIDGES}
        left = {ridge: held_out[1] - held_out[0] @ change.T for ridge, change in candidates.items()}
        errors = {ridge: np.square(values).mean() ** 0.5 for ridge, values in left.items()}
        best = min(errors, key=lambda ridge: errors[ridge])
        assert found[layer]["ridge"] == best
        np.testing.assert_allclose(found[layer]["held_out_rms"], [errors[None], errors[best]], rtol=1e-4)
        weight = student.model.layers[position].mlp.down_proj.weight
        weight.data += torch.as_tensor(candidates[best])
        # Hidden states are float32 on one side; weights are of order 0.1, the least ridge magnifies rounding 1e4 times.
        np.testing.assert_allclose(
            down_projections(refit)[position].numpy(), weight.detach().numpy(), rtol=0, atol=2e-4
        )
    assert {entry["ridge"] for entry in found.values()} != {None}
    ends = [
        model.model.norm(torch.from_numpy(states[4][-1][1])).detach().numpy()
        for model, states in (
            (student, dense),  # the norm is the same in all
            (student, through(AutoModelForCausalLM.from_pretrained(plain, **load).eval(), tokens)),
            (student, through(student, tokens)),
        )
    ]
    expected = [np.square(end - ends[0]).mean() ** 0.5 for end in ends[1:]]
    np.testing.assert_allclose(report(refit)["final_rms"]["all"], expected, rtol=1e-4)
    assert report(refit)["helps"] == (expected[1] < expected[0])


def stacked(rows: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, ...]:
    return tuple(map(np.vstack, zip(*rows, strict=True)))


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


def test_kinds_of_positions_in_a_vla(cogact_run, image_samples):
    """[BOS] [visual] [prompt, the cognition token last] [padding]; the cognition token counts like all together."""
    checkpoint, samples = open_checkpoint(cogact_run), load_samples(image_samples, "image")
    (batch,) = (stream := DecoderStream(checkpoint, samples, len(samples), torch.float32)).batches
    assert batch.mask is not None
    kinds, counts = _position_kinds(stream, batch), _counts(stream, batch, None)
    visual = stream.config.num_visual_tokens
    for row, length in enumerate(batch.mask.sum(dim=1).tolist()):
        kind_of = ["text"] + visual * ["visual"] + (length - visual - 2) * ["text"] + ["cognition"]
        for kind, positions in kinds.items():
            assert positions[row].nonzero()[:, 0].tolist() == [at for at, name in enumerate(kind_of) if name == kind]
        padding = len(counts[row]) - length
        assert counts[row].tolist() == [1.0] * (length - 1) + [length] + [0.0] * padding
    assert torch.equal(_counts(stream, batch, 1.0), batch.mask.double())


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


ROOT = Path(__file__).parent.parent
DEMO, FRAMES = ROOT / "demo/cogact-metaworld", ROOT / "demo/samples"


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> tuple[Path, Path]:
    """The demo model's shipped frames: 40 to fit to, and 24 that are not seen, spread over every task's episodes."""
    root = tmp_path_factory.mktemp("demo-frames")
    lines = (FRAMES / "samples.jsonl").read_text().splitlines()
    for name, chosen in (("fit", (0, 2, 3, 5, 7)), ("unseen", (1, 4, 6))):
        shutil.copytree(FRAMES / "frames", root / name / "frames")
        kept = [line for number, line in enumerate(lines) if number % 8 in chosen]
        (root / name / "samples.jsonl").write_text("\n".join(kept) + "\n")
    return root / "fit", root / "unseen"


@pytest.mark.slow
def test_few_frames_do_not_make_the_demos_actions_worse(frames, tmp_path):
    """The shipped model at the size of configs/demo.yaml."""
    from evla_cli.evaluation.fidelity import fidelity, predict_samples
    from evla_cli.runtime.policy import policy_from_checkpoint

    fit, unseen = frames
    pipeline.analyze_to_file(DEMO, fit, tmp_path / "importance.json")
    recipe = {"importance": tmp_path / "importance.json", "num_drop": 3, "mlp_prune_ratio": 0.25}
    samples, errors = load_samples(unseen, "image"), {}
    reference = predict_samples(policy_from_checkpoint(DEMO, dtype=torch.float32), samples)
    for name, options in (("plain", None), ("refit", RefitOptions(fit))):
        pipeline.prune(DEMO, tmp_path / name, mlp_method="activation", refit=options, **recipe)
        predicted = predict_samples(policy_from_checkpoint(tmp_path / name, dtype=torch.float32), samples)
        errors[name] = fidelity(reference, predicted).action_error.mean()
    found = report(tmp_path / "refit")
    assert set(found["final_rms"]) == {"visual", "text", "cognition"}
    assert found["helps"]
    assert errors["refit"] < errors["plain"], errors


@pytest.mark.slow
def test_frames_that_say_nothing_change_nothing(tmp_path):
    """Four pictures of noise, and a camera frame that judges: where refit does not bring its cognition token nearer,
    every weight stays, though each layer's own fit brought all its positions nearer."""
    folder, lines = tmp_path / "frames", (FRAMES / "samples.jsonl").read_text().splitlines()
    (folder / "frames").mkdir(parents=True)
    samples = [json.loads(line) for line in lines[5::12]]
    for sample in samples:
        shutil.copy(FRAMES / sample["image"], folder / sample["image"])
    (folder / "samples.jsonl").write_text("".join(f"{json.dumps(sample)}\n" for sample in samples))
    fit_to, judging = hold_out(load_samples(folder, "image"), folder)
    assert (len(fit_to), len(judging)) == (4, 1)  # of five instructions, which decide, and not the pictures
    generator = np.random.default_rng(0)
    for sample in fit_to:
        noise = generator.integers(0, 256, (112, 112, 3), dtype=np.uint8)
        Image.fromarray(noise).save(sample.image_path)
    recipe = {"drop_ids": [6, 7, 8]}
    pipeline.prune(DEMO, tmp_path / "plain", **recipe)
    result = pipeline.prune(DEMO, tmp_path / "refit", refit=RefitOptions(folder), **recipe)
    found = report(tmp_path / "refit")
    assert any(entry["ridge"] is not None for entry in found["layers"].values())
    assert not found["helps"]
    assert found["final_rms"]["cognition"][1] >= found["final_rms"]["cognition"][0]
    assert "all weights stay as they were" in prune_table(result)
    for ours, theirs in zip(down_projections(tmp_path / "refit"), down_projections(tmp_path / "plain"), strict=True):
        assert torch.equal(ours, theirs)


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
