"""Vision towers: measured, pruned and refit, against whole models that are cut by hand and numpy's least squares."""

import json
import re
import shutil
import sys
import textwrap
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pico
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from test_refit import ridge_reference

import evla_cli.vision.refitting as vision_refitting
from evla_cli import pipeline
from evla_cli.calibration import hold_out, load_samples
from evla_cli.cli.main import cli
from evla_cli.errors import EvlaError
from evla_cli.evaluation.compare import compare
from evla_cli.evaluation.report import prune_table
from evla_cli.families import open_checkpoint
from evla_cli.methods.mlp_pruning import activation_scores, select_rows_random, top_rows
from evla_cli.methods.refit import RIDGES
from evla_cli.plan import LayerImportance, PrunePlan, StackPlan, activations_file
from evla_cli.refitting import RefitOptions
from evla_cli.running import run_recipe
from evla_cli.runtime.policy import load_policy, policy_from_checkpoint
from evla_cli.vision.planning import VisionOptions

RUNNING = {"dino": 2, "siglip": 3}  # of 3 and 4 blocks
WIDTHS = {"dino": 192, "siglip": 100}
PREFIX = {"dino": 5, "siglip": 0}  # class and register tokens
PRUNED = VisionOptions(drop_layers=1, mlp_prune_ratio=0.3)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """DINOv2's narrowed MLP will be 128 of 192 channels, no whole multiple of its width of 48."""
    directory = tmp_path_factory.mktemp("vision") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pico.COGACT, "dino_config", pico.COGACT["dino_config"] | {"hidden_size": 48})
        pico.write_cogact(directory)
    return directory


@pytest.fixture(scope="module")
def importance(run, image_samples, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("importance") / "importance.json"
    pipeline.analyze_to_file(run, image_samples, file, batch_size=2)
    return file


@pytest.fixture(scope="module")
def pruned(run, importance, tmp_path_factory) -> Path:
    dest = tmp_path_factory.mktemp("pruned") / "run"
    pipeline.prune(run, dest, importance=importance, vision=PRUNED)
    return dest


@pytest.fixture(scope="module")
def refit(run, importance, image_samples, tmp_path_factory) -> Path:
    dest = tmp_path_factory.mktemp("refit") / "run"
    options = RefitOptions(image_samples, batch_size=3)
    pipeline.prune(run, dest, importance=importance, drop_ids=[3], vision=PRUNED, refit=options)
    return dest


def model64(directory: Path):
    return policy_from_checkpoint(directory, dtype=torch.float64)


def blocks_of(model) -> dict[str, torch.nn.ModuleList]:
    return {"dino": model.dino.encoder.layer, "siglip": model.siglip.encoder.layers}


def inputs_of(policy, image_samples):
    """Sample by sample: nothing is padded. The last of the five is held out."""
    fit_to, judging = hold_out(load_samples(image_samples, "image"), image_samples)
    for sample in fit_to + judging:
        yield policy.processor([sample.image], [sample.instruction]).to(torch.empty(0, dtype=torch.float64))


def through_towers(policy, image_samples) -> dict[str, list[list[tuple]]]:
    """tower -> sample -> running block: its input, fc2's input, its output (T, .), in float64."""
    found = {name: [] for name in RUNNING}
    for inputs in inputs_of(policy, image_samples):
        for name, blocks in blocks_of(policy.model).items():
            rows = []
            handles = [
                hook
                for block in blocks[:-1]
                for seen in [[]]
                for hook in (
                    block.mlp.fc2.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0])),
                    block.register_forward_hook(
                        lambda _, args, out, seen=seen, rows=rows: rows.append((args[0][0], seen[-1], out[0]))
                    ),
                )
            ]
            with torch.inference_mode():
                policy.model.vision_features(inputs.dino_pixels, inputs.siglip_pixels)
            for handle in handles:
                handle.remove()
            found[name].append([tuple(part.numpy() for part in row) for row in rows])
    return found


def cut(model, plan: PrunePlan) -> None:
    """Take blocks and channels out of a whole model, by hand."""
    for name, stack in plan.vision.items():
        blocks = blocks_of(model)[name]
        assert stack.mlp_keep is not None
        for layer, channels in zip(stack.keep_layers, stack.mlp_keep, strict=True):
            rows, mlp = torch.tensor(channels), blocks[layer].mlp
            mlp.fc1.weight = torch.nn.Parameter(mlp.fc1.weight[rows])
            mlp.fc1.bias = torch.nn.Parameter(mlp.fc1.bias[rows])
            mlp.fc2.weight = torch.nn.Parameter(mlp.fc2.weight[:, rows])
        for layer in reversed(stack.dropped_layers):
            del blocks[layer]


def features(policy, image_samples) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat(
            [policy.model.vision_features(x.dino_pixels, x.siglip_pixels) for x in inputs_of(policy, image_samples)]
        )


def through_last_layer(model, run, image_samples) -> list[tuple[np.ndarray, ...]]:
    """Sample by sample: what goes into the decoder's last down_proj, what comes out of its last layer and of the final
    norm (T, .), in float64."""
    decoder, found = model.language_model.model, []
    for inputs in inputs_of(model64(run), image_samples):
        seen = []
        handles = [
            decoder.layers[-1].mlp.down_proj.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])),
            decoder.layers[-1].register_forward_hook(lambda _, __, output, seen=seen: seen.append(output)),
            decoder.norm.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output)),
        ]
        with torch.inference_mode():
            model(*inputs.arguments())
        for handle in handles:
            handle.remove()
        found.append(tuple(part[0].numpy() for part in seen))
    return found


class TestAnalyze:
    def test_equals_a_naive_computation_on_the_whole_model(self, run, image_samples, importance):
        result, channels = LayerImportance.load(importance), load_file(activations_file(importance))
        for name, samples in through_towers(model64(run), image_samples).items():
            assert len(result.vision[name]) == RUNNING[name]
            for number, score in enumerate(result.vision[name]):
                pairs = [tuple(torch.from_numpy(rows[number][i][PREFIX[name] :]) for i in (0, 2)) for rows in samples]
                changes = [
                    float(((x - y).square().sum(dim=1) / (2 * x.norm(dim=1) * y.norm(dim=1))).mean()) for x, y in pairs
                ]
                assert score.importance == pytest.approx(np.mean(changes), rel=1e-4)
                assert score.standard_error == pytest.approx(np.std(changes, ddof=1) / len(changes) ** 0.5, rel=1e-2)
                hidden = np.vstack([rows[number][1][PREFIX[name] :] for rows in samples])
                expected = np.sqrt(np.square(hidden).mean(axis=0))
                np.testing.assert_allclose(channels[f"{name}.{number}"].numpy(), expected, rtol=1e-4)

    def test_the_decoder_is_measured_as_before(self, run, image_samples, importance, monkeypatch):
        from evla_cli.families import cogact

        monkeypatch.setattr(cogact, "COGACT", replace(cogact.COGACT, towers={}))
        alone = pipeline.analyze(run, image_samples, batch_size=2)
        assert alone.vision == {}
        without = {"vision": {}, "vision_metric": None, "activations_sha256": None}
        assert replace(LayerImportance.load(importance), **without) == alone
        assert "vision" not in json.loads(alone.to_json())

    def test_a_file_without_towers_is_read(self, importance, tmp_path):
        record = json.loads(importance.read_text())
        del record["vision"]
        (tmp_path / "old.json").write_text(json.dumps(record))
        assert LayerImportance.load(tmp_path / "old.json").vision == {}

    @pytest.mark.parametrize("factor", [4.0, 2.0**20, 2.0**-20])
    def test_a_block_that_changes_lengths_alone_does_most(self, run, image_samples, factor, tmp_path, monkeypatch):
        """By its cosines it would do least. Features leave a tower as they are, with no norm to make lengths equal."""
        from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

        forward, seen = SiglipEncoderLayer.forward, []

        def scaled(block, hidden_states, *arguments, **options):
            seen.append(block)
            if list(dict.fromkeys(map(id, seen))).index(id(block)) == 1:
                return hidden_states * factor
            return forward(block, hidden_states, *arguments, **options)

        monkeypatch.setattr(SiglipEncoderLayer, "forward", scaled)
        blocks = pipeline.analyze(run, image_samples, batch_size=5).vision["siglip"]
        assert max(blocks, key=lambda score: score.importance).index == 1
        assert blocks[1].importance == pytest.approx((factor + 1 / factor) / 2 - 1, rel=1e-5)

    def test_a_ranking_by_cosines_alone_drops_no_block(self, run, importance, tmp_path):
        record = json.loads(importance.read_text())
        del record["vision_metric"]
        (tmp_path / "importance.json").write_text(json.dumps(record))
        with pytest.raises(EvlaError, match="without regard to lengths, as older versions did: run evla analyze again"):
            pipeline.prune(run, tmp_path / "out", importance=tmp_path / "importance.json", vision=VisionOptions(1))


class TestPrune:
    def test_equals_a_whole_model_that_is_cut_by_hand(self, run, image_samples, pruned):
        plan = PrunePlan.load(pruned / "prune_plan.yaml")
        by_hand = model64(run)
        cut(by_hand.model, plan)
        ours = model64(pruned)
        torch.testing.assert_close(features(ours, image_samples), features(by_hand, image_samples), rtol=0, atol=0)
        sample = load_samples(image_samples, "image")[0]
        actions = [policy.predict_action(sample.image, sample.instruction, seed=0) for policy in (ours, by_hand)]
        np.testing.assert_array_equal(*actions)

    def test_the_least_important_blocks_and_the_weakest_rows_go(self, run, importance, pruned):
        plan, scores = PrunePlan.load(pruned / "prune_plan.yaml"), LayerImportance.load(importance)
        channels, weights = load_file(activations_file(importance)), open_checkpoint(run).weights
        assert plan.dropped_layers == ()
        assert plan.mlp_keep is None
        for name, num_kept in (("dino", 128), ("siglip", 64)):
            stack = plan.vision[name]
            least = min(scores.vision[name], key=lambda score: score.importance).index
            assert stack.dropped_layers == (least,)
            assert (stack.num_layers, stack.intermediate_size) == (RUNNING[name] + 1, WIDTHS[name])
            for layer, rows in zip(stack.keep_layers[:-1], stack.mlp_keep, strict=False):
                fc2 = weights[f"{open_checkpoint(run).family.towers[name].blocks}.{layer}.mlp.fc2.weight"].load()
                expected = top_rows(activation_scores(channels[f"{name}.{layer}"], fc2), num_kept)
                assert list(rows) == expected.tolist()
            assert stack.mlp_keep[-1] == tuple(range(num_kept))  # of the block that never runs
        energies = plan.how["removed_output_energy"]
        assert set(energies) == {"dino", "siglip"}
        assert all(each["activation"]["mean"] < each["expected_of_random"] for each in energies.values())

    @pytest.mark.parametrize("method", ["magnitude", "random"])
    def test_rows_without_measurements(self, run, tmp_path, method):
        options = VisionOptions(mlp_prune_ratio=0.3, mlp_method=method)
        plan = pipeline.prune(run, tmp_path / "no", vision=options, seed=3, dry_run=True).plan
        weights = open_checkpoint(run).weights
        rows = plan.vision["siglip"].mlp_keep[1]
        mlp = "siglip.encoder.layers.1.mlp"
        fc1, fc2 = (weights[f"{mlp}.{name}.weight"].load() for name in ("fc1", "fc2"))
        scores = fc1.abs().amax(dim=1).double() + fc2.abs().amax(dim=0).double()
        expected = top_rows(scores, 64) if method == "magnitude" else select_rows_random(100, 64, 3, 1)
        assert list(rows) == expected.tolist()

    def test_native_names(self, run, pruned):
        """Blocks are numbered anew, the last one is the source's last; everything else is the source's, bit by bit."""
        plan = PrunePlan.load(pruned / "prune_plan.yaml")
        source, ours = open_checkpoint(run).reader.tensors, open_checkpoint(pruned).reader.tensors
        for name in RUNNING:
            prefix, keep = f"model.vision_backbone.{name}_featurizer.blocks", plan.vision[name].keep_layers
            assert {key.split(".")[4] for key in ours if key.startswith(prefix)} == {str(i) for i in range(len(keep))}
            for position, layer in enumerate(keep):
                for part in ("attn.qkv.weight", "attn.proj.bias", "norm2.weight", "mlp.fc2.bias"):
                    theirs = source[f"{prefix}.{layer}.{part}"].load()
                    assert torch.equal(ours[f"{prefix}.{position}.{part}"].load(), theirs)
        narrowed = "model.vision_backbone.siglip_featurizer.attn_pool.mlp.fc"  # timm gives both the same ratio
        assert torch.equal(ours[f"{narrowed}1.weight"].load(), source[f"{narrowed}1.weight"].load()[:64])
        others = [key for key in source if not key.startswith(narrowed) and "featurizer.blocks." not in key]
        assert all(torch.equal(ours[key].load(), source[key].load()) for key in others)
        saved = torch.load(pruned / "checkpoints/pico.pt", weights_only=True)["model"]["vision_backbone"]
        assert saved["dino_featurizer.blocks.0.mlp.fc1.weight"].shape == (128, 48)
        assert saved["siglip_featurizer.blocks.2.mlp.fc2.weight"].shape == (48, 64)

    def test_loading_tells_what_timm_must_build(self, run, pruned, tmp_path, monkeypatch):
        """All its blocks, one after the other, with CogACT's loader and timm replaced: what the former asks of the
        latter when it is called."""
        pipeline.prune(run, tmp_path / "llm", drop_ids=[3])
        calls = []
        timm = types.ModuleType("timm")
        timm.create_model = lambda name, **given: calls.append((name, given))
        llama2 = types.ModuleType("llama2")
        llama2.LLAMA2_MODELS = {"llama2-7b-pure": {"hf_hub_path": "meta-llama/Llama-2-7b-hf"}}
        llm = types.ModuleType("prismatic.models.backbones.llm")
        llm.llama2 = llama2
        for name in ("prismatic", "prismatic.models", "prismatic.models.backbones"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "prismatic.models.backbones.llm", llm)
        monkeypatch.setitem(sys.modules, "timm", timm)

        def load_vla(path, **_options):
            calls.append((path, llama2.LLAMA2_MODELS["llama2-7b-pure"]["hf_hub_path"]))
            for name in ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224", "other"):
                timm.create_model(name, pretrained=True, num_classes=0)

        def run_blocks(directory):
            text = (directory / "LOADING.md").read_text()
            blocks = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
            names = {"load_vla": load_vla}
            for block in blocks:
                exec(textwrap.dedent(block), names)
            return len(blocks)

        assert run_blocks(pruned) == 2
        assert calls[0] == ("checkpoints/pico.pt", "llm_config")
        assert [(given.get("depth"), given["pretrained"]) for _, given in calls[1:]] == [
            (2, False),
            (3, False),
            (None, True),
        ]
        assert [int(48 * given["mlp_ratio"]) for _, given in calls[1:3]] == [128, 64]
        assert "timm" not in (tmp_path / "llm/LOADING.md").read_text()
        assert run_blocks(tmp_path / "llm") == 1

    def test_export_and_bundles(self, run, image_samples, importance, pruned, tmp_path):
        """Pruned then exported is exported then pruned; both verify, load and act as the pruned checkpoint does."""
        from evla_cli.bundling import verify_bundle

        settings = pipeline.settings_with(None)
        pipeline.export(pruned, tmp_path / "bundle", settings)
        pipeline.export(run, tmp_path / "dense", settings)
        pipeline.analyze_to_file(tmp_path / "dense", image_samples, tmp_path / "i.json", batch_size=2)
        pipeline.prune(tmp_path / "dense", tmp_path / "again", importance=tmp_path / "i.json", vision=PRUNED)
        pipeline.export(tmp_path / "again", tmp_path / "other", settings)
        verify_bundle(tmp_path / "bundle")
        weights, configs = (
            [read(tmp_path / directory / name) for directory in ("bundle", "other")]
            for name, read in (
                ("model.safetensors", Path.read_bytes),
                ("config.json", lambda p: json.loads(p.read_text())),
            )
        )
        assert weights[0] == weights[1]
        assert configs[0] == configs[1]
        sample = load_samples(image_samples, "image")[0]
        expected = policy_from_checkpoint(pruned, settings).predict_action(sample.image, sample.instruction, seed=1)
        found = load_policy(tmp_path / "bundle").predict_action(sample.image, sample.instruction, seed=1)
        np.testing.assert_array_equal(found, expected)
        manifest = json.loads((tmp_path / "bundle/manifest.json").read_text())
        assert manifest["recipe"]["prune"]["vision_drop_layers"] == 1
        assert manifest["plan"]["vision"]["siglip"]["kept_intermediate_size"] == 64

    def test_nothing_removed_is_exactly_the_same(self, run, importance, tmp_path):
        for name, vision in (("none", None), ("neutral", VisionOptions())):
            pipeline.prune(run, tmp_path / name, importance=importance, num_drop=1, vision=vision)
        for name in ("checkpoints/pico.pt", "prune_plan.yaml", "manifest.json", "LOADING.md"):
            assert (tmp_path / "none" / name).read_bytes() == (tmp_path / "neutral" / name).read_bytes()


class TestRefit:
    def test_equals_a_naive_computation_on_whole_models(self, run, image_samples, refit):
        """Float64, everything computed anew for every block; DINOv2 has LayerScale, fc2 a bias."""
        plan = PrunePlan.load(refit / "prune_plan.yaml")
        dense = through_towers(model64(run), image_samples)
        student, ours = model64(run), model64(refit)
        cut(student.model, plan)
        ridges = set()
        for name, stack in plan.vision.items():
            report = plan.how["refit_report"]["vision"][name]
            running = stack.keep_layers[:-1]
            assert list(report) == list(running)
            for position, layer in enumerate(running):
                last = position + 1 == len(running)
                target = RUNNING[name] - 1 if last else running[position + 1] - 1  # whose output the next block reads
                begin = PREFIX[name] if last else 0
                states = through_towers(student, image_samples)[name]
                block = blocks_of(student.model)[name][position]
                scale = block.layer_scale2.lambda1.detach().numpy() if name == "dino" else np.ones(48)
                rows = [
                    (np.hstack([h, np.ones((len(h), 1))])[begin:], (teacher[target][2] - output)[begin:])
                    for teacher, (_, h, output) in zip(dense[name], (s[position] for s in states), strict=True)
                ]
                fit, held_out = (tuple(map(np.vstack, zip(*part, strict=True))) for part in (rows[:4], rows[4:]))
                changes = {ridge: ridge_reference(*fit, ridge) / scale[:, None] for ridge in RIDGES}
                candidates = {None: np.zeros_like(changes[RIDGES[0]])} | changes
                errors = {
                    ridge: np.square(held_out[1] - held_out[0] @ (scale[:, None] * change).T).mean() ** 0.5
                    for ridge, change in candidates.items()
                }
                best = min(errors, key=lambda ridge: errors[ridge])
                assert report[layer]["ridge"] == best
                np.testing.assert_allclose(report[layer]["held_out_rms"], [errors[None], errors[best]], rtol=1e-4)
                change = torch.from_numpy(candidates[best])
                block.mlp.fc2.weight.data += change[:, :-1]
                block.mlp.fc2.bias.data += change[:, -1]
                found = blocks_of(ours.model)[name][position].mlp.fc2
                # Hidden states are float32 on one side; the least ridge magnifies rounding 1e4 times.
                torch.testing.assert_close(found.weight, block.mlp.fc2.weight, rtol=0, atol=2e-3)
                torch.testing.assert_close(found.bias, block.mlp.fc2.bias, rtol=0, atol=2e-3)
                ridges.add(best)
        assert ridges != {None}

    def test_features_come_nearer_to_the_dense_ones(self, run, image_samples, refit, pruned):
        """On the held-out sample, by the report's account and by the written checkpoint's."""
        plan = PrunePlan.load(refit / "prune_plan.yaml")
        dense, ours, plain = (features(model64(directory), image_samples)[4] for directory in (run, refit, pruned))
        at = 0
        for name, width in (("dino", 48), ("siglip", 48)):
            report = plan.how["refit_report"]
            entry = report["vision"][name][plan.vision[name].keep_layers[-2]]
            rms = [float((each - dense)[:, at : at + width].square().mean().sqrt()) for each in (plain, ours)]
            assert rms[1] == pytest.approx(entry["held_out_rms"][1], rel=1e-4)
            assert rms == pytest.approx(report["vision_final_rms"][name], rel=1e-4)
            assert rms[1] < rms[0]
            at += width

    @pytest.mark.slow
    def test_a_tower_that_refit_moves_away_stays_as_it_was(self, run, importance, image_samples, tmp_path, monkeypatch):
        """Blocks that each come nearer can still end farther off; here the last one is made to."""
        final_rms = vision_refitting._Student.final_rms

        def farther(student):
            return final_rms(student)[::-1] if student._scale is None else final_rms(student)

        monkeypatch.setattr(vision_refitting._Student, "final_rms", farther)
        options = RefitOptions(image_samples, batch_size=3)
        result = pipeline.prune(run, tmp_path / "refit", importance=importance, vision=PRUNED, refit=options)
        pipeline.prune(run, tmp_path / "plain", importance=importance, vision=PRUNED)
        ours, plain = (open_checkpoint(tmp_path / name).weights for name in ("refit", "plain"))
        changed = {key.partition(".")[0] for key in ours if not torch.equal(ours[key].load(), plain[key].load())}
        assert "dino" in changed
        assert "siglip" not in changed
        assert "does not bring the features of siglip nearer" in prune_table(result)

    def test_the_decoder_makes_up_for_the_towers(self, run, importance, image_samples, refit, tmp_path):
        """The written last layer is numpy's least squares behind everything before it, from pixels on, on the samples
        that are not held out; what refit is held against is the model with refit towers and its decoder as it was."""
        pipeline.prune(run, tmp_path / "plain", importance=importance, drop_ids=[3], vision=PRUNED)
        report = PrunePlan.load(refit / "prune_plan.yaml").how["refit_report"]
        dense, ours, plain = (model64(directory).model for directory in (run, refit, tmp_path / "plain"))
        written = ours.language_model.model.layers[-1].mlp.down_proj.weight.data
        before = plain.language_model.model.layers[-1].mlp.down_proj.weight.data
        assert report["helps"]
        assert report["layers"][5]["ridge"] is not None

        ours.language_model.model.layers[-1].mlp.down_proj.weight.data = before
        rows = []
        for (_, teacher, _), (inputs, output, _) in zip(
            through_last_layer(dense, run, image_samples), through_last_layer(ours, run, image_samples), strict=True
        ):
            counts = np.ones(len(output))
            counts[-1] = len(output)  # the cognition token, as often as all positions of its sample
            rows.append([np.sqrt(counts)[:, None] * part for part in (inputs, teacher - output)])
        change = ridge_reference(*map(np.vstack, zip(*rows[:4], strict=True)), report["layers"][5]["ridge"])
        # Hidden states are float32 on one side; the least ridge magnifies rounding 1e4 times.
        np.testing.assert_allclose((written - before).numpy(), change, rtol=0, atol=2e-3)
        assert np.abs(change).max() > 0.02

        ours.language_model.model.load_state_dict(plain.language_model.model.state_dict())
        ends = [through_last_layer(model, run, image_samples)[4][2] for model in (dense, ours)]
        off = np.square(ends[1][-1] - ends[0][-1]).mean() ** 0.5
        assert off == pytest.approx(report["final_rms"]["cognition"][0], rel=1e-3)

    def test_only_fc2_changes_and_only_where_it_helps(self, run, importance, refit, tmp_path):
        plan_file = refit / "prune_plan.yaml"
        report = PrunePlan.load(plan_file).how["refit_report"]["vision"]
        pipeline.prune(run, tmp_path / "plain", importance=importance, drop_ids=[3], vision=PRUNED)
        plain, ours = (open_checkpoint(path).weights for path in (tmp_path / "plain", refit))
        changed = {key for key in ours if not torch.equal(ours[key].load(), plain[key].load())}
        towers = {key for key in changed if key.startswith(("dino", "siglip"))}
        expected = set()
        for name, prefix in (("dino", "dino.encoder.layer"), ("siglip", "siglip.encoder.layers")):
            for position, entry in enumerate(report[name].values()):
                before, after = entry["held_out_rms"]
                assert after <= before
                if entry["ridge"] is not None:
                    expected |= {f"{prefix}.{position}.mlp.fc2.{kind}" for kind in ("weight", "bias")}
        assert towers == expected

    def test_a_guard_against_overfitting(self, run, importance, image_samples, tmp_path):
        """One image to fit to, another one to judge: blocks that would follow the first one's noise stay."""
        options = RefitOptions(image_samples, num_samples=2)
        pipeline.prune(run, tmp_path / "two", importance=importance, vision=PRUNED, refit=options)
        report = PrunePlan.load(tmp_path / "two/prune_plan.yaml").how["refit_report"]["vision"]
        entries = [entry for blocks in report.values() for entry in blocks.values()]
        assert all(entry["held_out_rms"][1] <= entry["held_out_rms"][0] for entry in entries)

    @pytest.mark.slow
    def test_where_refit_of_the_decoder_does_not_help_that_of_the_towers_stays(
        self, cogact_run, image_samples, tmp_path
    ):
        """One image to fit to: single layers come nearer on the other one, its cognition token goes away."""
        vision = VisionOptions(mlp_prune_ratio=0.3, mlp_method="magnitude")
        lines = (image_samples / "samples.jsonl").read_text().splitlines()
        samples = shutil.copytree(image_samples, tmp_path / "samples")
        (samples / "samples.jsonl").write_text(f"{lines[1]}\n{lines[3]}\n")
        options = RefitOptions(samples, last_weight=1.0)
        result = pipeline.prune(cogact_run, tmp_path / "refit", vision=vision, refit=options)
        pipeline.prune(cogact_run, tmp_path / "plain", vision=vision)
        report = result.plan.how["refit_report"]
        assert any(entry["ridge"] is not None for entry in report["layers"].values())
        assert report["final_rms"]["cognition"][1] > report["final_rms"]["cognition"][0]
        assert not report["helps"]
        assert "all weights of the decoder stay as they were" in prune_table(result)
        ours, plain = (open_checkpoint(tmp_path / name).weights for name in ("refit", "plain"))
        changed = {key for key in ours if not torch.equal(ours[key].load(), plain[key].load())}
        assert {key.partition(".")[0] for key in changed} == {"dino", "siglip"}

    @pytest.mark.slow
    def test_dimensions_that_layer_scale_cuts_off_stay(self, run, image_samples, tmp_path):
        source = shutil.copytree(run, tmp_path / "run")
        file = source / "checkpoints/pico.pt"
        saved = torch.load(file, weights_only=True)
        for block in range(3):
            saved["model"]["vision_backbone"][f"dino_featurizer.blocks.{block}.ls2.gamma"][7] = 0.0
        torch.save(saved, file)
        options = VisionOptions(mlp_prune_ratio=0.3, mlp_method="random")
        pipeline.prune(source, tmp_path / "out", vision=options, refit=RefitOptions(image_samples))
        pipeline.prune(source, tmp_path / "plain", vision=options)
        ours, plain = (open_checkpoint(tmp_path / name).weights for name in ("out", "plain"))
        name = "dino.encoder.layer.1.mlp.fc2.weight"
        same = (ours[name].load() == plain[name].load()).all(dim=1)
        assert same.nonzero().flatten().tolist() == [7]

    def test_its_replay_gives_the_same_bytes(self, run, image_samples, refit, tmp_path):
        options = RefitOptions(image_samples, batch_size=3, memory_budget="0.001KB")
        pipeline.prune(run, tmp_path / "again", plan_file=refit / "prune_plan.yaml", refit=options)
        for name in ("checkpoints/pico.pt", "prune_plan.yaml", "manifest.json"):
            assert (tmp_path / "again" / name).read_bytes() == (refit / name).read_bytes()


class TestPlan:
    def test_round_trip(self, pruned):
        plan = PrunePlan.load(pruned / "prune_plan.yaml")
        assert set(plan.vision) == {"dino", "siglip"}
        assert yaml.safe_load((pruned / "prune_plan.yaml").read_text()) == plan.to_record()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"keep_layers": [0, 2], "dropped_layers": [1, 3], "mlp_keep": None}, "must keep the last block"),
            ({"keep_layers": [3], "dropped_layers": [0, 1, 2], "mlp_keep": None}, "must keep the last block"),
            ({"num_layers": 5, "keep_layers": [0, 1, 2, 4], "dropped_layers": [3], "mlp_keep": None}, "of 5 blocks"),
            ({"keep_layers": [0, 1]}, "name each of the 4 layers"),
            ({"kept_intermediate_size": 60}, "vision.siglip: kept_intermediate_size is 60"),
        ],
    )
    def test_what_contradicts_itself_or_the_checkpoint_is_refused(self, run, pruned, tmp_path, change, message):
        record = yaml.safe_load((pruned / "prune_plan.yaml").read_text())
        change = {"kept_intermediate_size": 100} | change if change.get("mlp_keep", "") is None else change
        record["vision"]["siglip"] |= change
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(record))
        with pytest.raises(EvlaError, match=message):
            pipeline.prune(run, tmp_path / "no", plan_file=tmp_path / "plan.yaml")

    def test_a_tower_that_is_not_there(self, run, pruned, decoders, tmp_path):
        record = yaml.safe_load((pruned / "prune_plan.yaml").read_text())
        record["vision"]["sigelip"] = record["vision"].pop("siglip")
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(record))
        with pytest.raises(EvlaError, match="tower 'sigelip'"):
            pipeline.prune(run, tmp_path / "no", plan_file=tmp_path / "plan.yaml")
        with pytest.raises(EvlaError, match="no vision towers"):
            pipeline.prune(decoders("llama"), tmp_path / "no", vision=VisionOptions(1))


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (VisionOptions(2), "Cannot drop 2 blocks of the dino tower: of its 3, 2 run"),
            (VisionOptions(0, 0.01), "removes none of 192 channels of the dino tower"),
        ],
    )
    def test_too_much_or_nothing(self, run, importance, tmp_path, options, message):
        with pytest.raises(EvlaError, match=message):
            pipeline.prune(run, tmp_path / "no", importance=importance, vision=options)

    def test_without_measurements(self, run, importance, tmp_path):
        with pytest.raises(EvlaError, match="needs --importance"):
            pipeline.prune(run, tmp_path / "no", vision=VisionOptions(1))
        with pytest.raises(EvlaError, match="needs --importance"):
            pipeline.prune(run, tmp_path / "no", vision=VisionOptions(0, 0.3))
        record = json.loads(importance.read_text())
        del record["activations_sha256"]
        (tmp_path / "older.json").write_text(json.dumps(record))
        with pytest.raises(EvlaError, match="run evla analyze again"):
            pipeline.prune(run, tmp_path / "no", importance=tmp_path / "older.json", vision=VisionOptions(0, 0.3))

    @pytest.mark.parametrize(
        ("arguments", "message"), [((-1,), "must not be negative"), ((0, 1.0), r"in \[0, 1\), got 1")]
    )
    def test_options(self, arguments, message):
        with pytest.raises(EvlaError, match=message):
            VisionOptions(*arguments)


class TestCommands:
    def invoke(self, *arguments: object) -> str:
        result = CliRunner().invoke(cli, [*map(str, arguments), "--quiet"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    def test_prune_inspect_compare_verify(self, run, image_samples, importance, pruned, tmp_path):
        out = self.invoke(
            "prune", run, tmp_path / "out", "--importance", importance,
            "--vision-drop-layers", 1, "--vision-mlp-prune-ratio", 0.3,
        )  # fmt: skip
        assert "3 -> 2 blocks (without" in out
        assert (tmp_path / "out/checkpoints/pico.pt").read_bytes() == (pruned / "checkpoints/pico.pt").read_bytes()
        assert "dino 2 blocks, MLP 128, siglip 3 blocks, MLP 64" in self.invoke("inspect", tmp_path / "out").replace(
            "; ", ", "
        )
        self.invoke("verify", tmp_path / "out", "--against", pruned)
        assert "vision" in self.invoke("compare", run, pruned, "--samples", image_samples)
        self.invoke("bench", pruned, "--runs", 1, "--warmup", 0)

    @pytest.mark.slow
    def test_what_each_measure_costs(self, run, image_samples, refit, pruned):
        """Towers alone, without refit, are the checkpoint that is pruned that way."""
        measures = compare(run, refit, image_samples)["measures"]
        alone = compare(run, pruned, image_samples)["measures"]
        assert measures["vision"] == alone["vision"] == alone["weights"]
        assert measures["layers"] != measures["vision"]

    def test_differing_plans(self, run, importance, pruned, tmp_path):
        from evla_cli.comparison import compare_checkpoints

        options = replace(PRUNED, mlp_method="random")
        pipeline.prune(run, tmp_path / "other", importance=importance, vision=options)
        differences = compare_checkpoints(pruned, tmp_path / "other").differences
        found = {each.name: each for each in differences if each.kind == "plan"}
        assert found["how.vision_mlp_method"].other == "random"
        entries = [each for name, each in found.items() if name.startswith("vision.siglip.mlp_keep.")]
        assert entries
        assert all((each.this, each.other) == (64, 64) and each.num_differing for each in entries)

    @pytest.mark.slow
    def test_a_recipe(self, run, image_samples, tmp_path):
        recipe = {
            "schema_version": 1,
            "source": str(run),
            "output": "out",
            "analyze": {"samples": str(image_samples), "batch_size": 3},
            "prune": {"drop_layer_ids": [3], "vision_drop_layers": 1, "vision_mlp_prune_ratio": 0.3, "refit": True},
            "export": {},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert [done for _, _, done in run_recipe(tmp_path / "recipe.yaml")] == [True, True, True]
        assert [done for _, _, done in run_recipe(tmp_path / "recipe.yaml")] == [False, False, False]
        assert PrunePlan.load(tmp_path / "out/bundle/prune_plan.yaml").vision["dino"].kept_intermediate_size == 128
        del recipe["analyze"], recipe["prune"]["refit"]
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        with pytest.raises(EvlaError, match=r"prune\.vision_drop_layers needs calibration samples"):
            run_recipe(tmp_path / "recipe.yaml")


def test_what_leaves_a_tower_alone_is_no_plan_of_it():
    assert PrunePlan(2, 8, (0, 1)).to_record().get("vision") is None
    assert StackPlan(2, 8, (0, 1)).keeps_everything
