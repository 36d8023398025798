"""`evla compare`: figures against computations written out, each measure against a checkpoint with it alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pico
import pytest
import torch
from PIL import Image
from test_cli import evla, evla_error, evla_json

from evla_cli import pipeline
from evla_cli.calibration import load_samples
from evla_cli.evaluation.candidates import open_candidates
from evla_cli.evaluation.compare import make_variants, shared_plan
from evla_cli.evaluation.feature_reuse import feature_reuse
from evla_cli.evaluation.fidelity import Predictions, cognition_tokens, fidelity, predict_samples
from evla_cli.evaluation.pictures.inputs import Request, open_inputs
from evla_cli.evaluation.pictures.measured import measure
from evla_cli.methods.action_cache import cache_schedule
from evla_cli.models.diffusion import ddim_timesteps, sample_ddim
from evla_cli.runtime.policy import load_policy, policy_from_checkpoint, policy_from_weights
from evla_cli.settings import ActionCacheSettings, InferenceSettings, VisualTokenSettings

SETTINGS = {"visual_tokens": {"num_keep": 7, "num_key": 2, "prune_layer": 3}, "action_cache": {"interval": 4}}


@pytest.fixture(scope="module")
def compressed(cogact_run, tmp_path_factory):
    """All four measures: layer 2 and 4 of 6 and half of the MLP gone, 7 of 16 tokens, interval 4."""
    root = tmp_path_factory.mktemp("compressed")
    pipeline.prune(cogact_run, root / "pruned", drop_ids=(2, 4), mlp_prune_ratio=0.5, mlp_method="random")
    pipeline.export(root / "pruned", root / "compressed", pipeline.settings_with(None, **SETTINGS))
    return root / "compressed"


@pytest.fixture(scope="module")
def report(cogact_run, compressed, image_samples):
    return evla_json("compare", cogact_run, compressed, "--samples", image_samples, "--batch-size", 2, "--seed", 3)


def test_every_measure_is_switched_on_alone_and_all_together(report):
    assert list(report["measures"]) == ["noise", "tokens", "cache", "layers", "mlp", "weights", "all"]
    errors = {name: found["action_error"]["value"] for name, found in report["measures"].items()}
    assert all(error > 1e-4 for error in errors.values())
    assert len(set(errors.values())) == len(errors)
    cosines = {name: found["cognition_cosine"]["value"] for name, found in report["measures"].items()}
    assert cosines["noise"] == cosines["cache"] == pytest.approx(1, abs=1e-12)  # neither comes before the token
    assert report["notes"] == []


def test_figures_are_those_of_loops_over_single_predictions(report, cogact_run, compressed, image_samples):
    """Each sample predicted alone; every number by hand. float32, whose rounding depends on the batch."""
    samples = load_samples(image_samples, "image")
    policies = policy_from_checkpoint(cogact_run), load_policy(compressed)
    noise = torch.randn(len(samples), 16, 7, generator=torch.Generator().manual_seed(3))
    cosines, normalized, physical, flips, paths = [], [], [], [], []
    for number, sample in enumerate(samples):
        ours, theirs = (
            policy.predict([sample.image], [sample.instruction], noise=noise[number : number + 1])
            for policy in policies
        )
        x, y = (each.cognition[0, 0].double().numpy() for each in (ours, theirs))
        cosines.append(x @ y / np.sqrt((x @ x) * (y @ y)))
        normalized.append(np.abs(ours.normalized_actions - theirs.normalized_actions)[0])
        physical.append(np.abs(ours.actions - theirs.actions)[0])
        flips.append(np.mean([ours.actions[0, step, 6] != theirs.actions[0, step, 6] for step in range(16)]))
        here, there, path = np.zeros(3), np.zeros(3), []
        for step in range(16):
            here, there = here + ours.actions[0, step, :3], there + theirs.actions[0, step, :3]
            path.append(np.sqrt(((here - there) ** 2).sum()))
        paths.append(path)
    found = report["measures"]["all"]
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(found["cognition_cosine"]["value"], np.mean(cosines), **close)
    np.testing.assert_allclose(found["normalized_error"]["value"], np.mean(normalized, axis=(0, 1)), **close)
    np.testing.assert_allclose(found["physical_error"]["value"], np.mean(physical, axis=(0, 1)), **close)
    np.testing.assert_allclose(found["action_error"]["value"], np.mean(np.array(normalized)[..., :6]), **close)
    np.testing.assert_allclose(found["largest_action_error"], np.max(np.array(normalized)[..., :6]), **close)
    np.testing.assert_allclose(found["gripper_flips"]["value"], np.mean(flips), **close)
    np.testing.assert_allclose(found["position_deviation"]["value"], np.mean(paths, axis=0), **close)
    for name in ("cognition_cosine", "action_error", "gripper_flips"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
    values = [np.mean(each[:, :6]) for each in normalized]
    assert min(values) <= found["action_error"]["low"] < found["action_error"]["high"] <= max(values)


def test_predictions_far_apart_in_known_ways():
    """Two samples, chunks of 3: x off by 0.1 a step in the first, the gripper at one step of the second."""
    reference = Predictions(np.eye(2, 4), np.zeros((2, 3, 7)), np.zeros((2, 3, 7)))
    normalized, actions = np.zeros((2, 3, 7)), np.zeros((2, 3, 7))
    normalized[0, :, 0], actions[0, :, 0] = 0.5, 0.1
    normalized[1, 2, 6] = actions[1, 2, 6] = 1.0
    cognition = np.array([[2.0, 0, 0, 0], [1, 1, 0, 0]])
    found = fidelity(reference, Predictions(cognition, normalized, actions))
    np.testing.assert_allclose(found.cognition_cosine, [1, 0.5**0.5])
    np.testing.assert_allclose(found.gripper_flips, [0, 1 / 3])
    np.testing.assert_allclose(found.position_deviation, [[0.1, 0.2, 0.3], [0, 0, 0]])
    np.testing.assert_allclose(found.action_error, [0.5 / 6, 0])
    np.testing.assert_allclose(found.largest_error, [0.5, 0])
    np.testing.assert_allclose(found.physical_error[:, [0, 6]], [[0.1, 0], [0, 1 / 3]])
    without_gripper = fidelity(
        Predictions(cognition, normalized[..., :6], actions[..., :6]),
        Predictions(cognition, actions[..., :6], actions[..., :6]),
    )
    assert without_gripper.gripper_flips is None
    assert without_gripper.to_record()["gripper_flips"] is None


@pytest.mark.slow
def test_the_same_seed_gives_the_same_report(cogact_run, compressed, image_samples, report):
    options = ("compare", cogact_run, compressed, "--samples", image_samples, "--batch-size", 2)
    assert evla_json(*options, "--seed", 3) == report
    other = evla_json(*options, "--seed", 4)
    assert other["measures"]["all"]["action_error"] != report["measures"]["all"]["action_error"]
    # Other noise leaves the cognition token alone, but the interval's resampling follows the seed.
    assert (
        other["measures"]["all"]["cognition_cosine"]["value"] == report["measures"]["all"]["cognition_cosine"]["value"]
    )
    text = evla(*options, "--seed", 3)
    assert text == evla(*options, "--seed", 3)
    for said in ("layers", "MLP", "tokens", "cache", "all: compressed", "run, other noise", "step", "block"):
        assert said in text


def test_a_checkpoint_against_itself(cogact_run, image_samples):
    found = evla_json("compare", cogact_run, cogact_run, "--samples", image_samples)
    assert list(found["measures"]) == ["noise", "weights", "all"]
    same = found["measures"]["all"]
    assert same == found["measures"]["weights"]
    assert same["cognition_cosine"] == pytest.approx({"value": 1, "low": 1, "high": 1}, abs=1e-12)
    assert same["physical_error"] == {key: [0.0] * 7 for key in ("value", "low", "high")}
    assert same["position_deviation"]["value"] == [0.0] * 16
    assert found["measures"]["noise"]["action_error"]["value"] > 0.01
    assert found["cache"] is None


@pytest.mark.parametrize("source", ["run", "pruned"])
def test_a_bundle_exported_without_settings_acts_as_its_source_does(
    source, cogact_run, compressed, image_samples, tmp_path
):
    source = cogact_run if source == "run" else compressed.parent / "pruned"
    evla("export", source, tmp_path / "b", "--no-act")
    found = evla_json("compare", source, tmp_path / "b", "--samples", image_samples)
    assert found["second"]["settings"] == InferenceSettings().to_record()
    assert list(found["measures"]) == ["noise", "weights", "all"]
    assert found["measures"]["all"]["action_error"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["measures"]["all"]["largest_action_error"] == 0.0


@pytest.mark.slow
def test_a_single_sample_has_no_interval(cogact_run, compressed, image_samples):
    options = ("compare", cogact_run, compressed, "--samples", image_samples, "--num-samples", 1)
    found = evla_json(*options)["measures"]["all"]
    assert (found["action_error"]["low"], found["action_error"]["high"]) == (None, None)
    assert found["position_deviation"]["low"] == [None] * 16
    assert " [" not in evla(*options).replace(" [95 % interval]", "").replace(" [-1, 1]", "")


# Each measure against a checkpoint that has it alone


def variants(first, second):
    a, b = open_candidates([first, second])
    plan, note = shared_plan(a, b)
    assert note is None
    return {variant.name: variant for variant in make_variants(a, b, plan)}


def predicted(policy, image_samples):
    return predict_samples(policy, load_samples(image_samples, "image"), unnorm_key="kitchen")


def assert_same(found, expected, atol):
    for name in ("cognition", "normalized", "actions"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=0, atol=atol)


def test_layers_alone_are_a_checkpoint_pruned_of_layers_alone(cogact_run, compressed, image_samples, tmp_path):
    pipeline.prune(cogact_run, tmp_path / "layers", drop_ids=(2, 4))
    variant = variants(cogact_run, compressed)["layers"]
    found = predicted(policy_from_weights(variant.checkpoint, variant.settings), image_samples)
    assert_same(found, predicted(policy_from_checkpoint(tmp_path / "layers"), image_samples), atol=0)


def test_mlp_alone_is_a_checkpoint_pruned_of_channels_alone(cogact_run, image_samples, tmp_path):
    pipeline.prune(cogact_run, tmp_path / "mlp", mlp_prune_ratio=0.5, mlp_method="random")
    found = variants(cogact_run, tmp_path / "mlp")
    assert "layers" not in found
    ours = predicted(policy_from_weights(found["mlp"].checkpoint, dtype=torch.float64), image_samples)
    expected = predicted(policy_from_checkpoint(tmp_path / "mlp", dtype=torch.float64), image_samples)
    assert_same(ours, expected, atol=1e-5)  # norms are float32; removed channels are added as zeros


def test_layers_that_go_keep_their_width_where_the_mlp_is_narrowed_alone(cogact_run, compressed):
    found = variants(cogact_run, compressed)["mlp"].checkpoint.weights
    for layer in range(6):
        weight = found[f"language_model.model.layers.{layer}.mlp.down_proj.weight"].load()
        assert int((weight == 0).all(dim=0).sum()) == (0 if layer in (2, 4) else 64)


def test_weights_and_all_are_b(cogact_run, compressed, image_samples):
    found = variants(cogact_run, compressed)
    for name, policy in (
        ("weights", policy_from_checkpoint(compressed)),
        ("all", load_policy(compressed)),
    ):
        ours = predicted(policy_from_weights(found[name].checkpoint, found[name].settings), image_samples)
        assert_same(ours, predicted(policy, image_samples), atol=0)


def test_tokens_leave_the_source_after_the_same_layer(cogact_run, compressed):
    """B keeps layers 0, 1, 3, 5: its tokens leave before its layer 3, after the source's layer 3."""
    tokens = variants(cogact_run, compressed)["tokens"].settings
    assert (tokens.visual_tokens.num_keep, tokens.visual_tokens.prune_layer) == (7, 4)
    assert tokens.action_cache == ActionCacheSettings()
    cache = variants(cogact_run, compressed)["cache"].settings
    assert (cache.action_cache.interval, cache.visual_tokens.num_keep) == (4, None)


@pytest.mark.slow
def test_settings_of_a_fit_the_fewer_layers_of_b(cogact_run, compressed, image_samples, tmp_path):
    """A's tokens leave before layer 5 of 6; B has four layers."""
    late = pipeline.settings_with(None, visual_tokens={"num_keep": 7, "prune_layer": 5}, action_cache={"interval": 1})
    pipeline.export(cogact_run, tmp_path / "late", late)
    found = variants(tmp_path / "late", compressed)
    assert (
        found["weights"].settings.visual_tokens.prune_layer == found["layers"].settings.visual_tokens.prune_layer == 3
    )
    assert found["mlp"].settings.visual_tokens.prune_layer == 5
    report = evla_json("compare", tmp_path / "late", compressed, "--samples", image_samples, "--num-samples", 2)
    assert list(report["measures"]) == ["noise", "tokens", "cache", "layers", "mlp", "weights", "all"]


def test_sampling_is_told_apart_from_caching(cogact_run, image_samples, tmp_path):
    settings = pipeline.settings_with(None, action_cache={"interval": 2}, diffusion={"num_denoise_steps": 5})
    pipeline.export(cogact_run, tmp_path / "fast", settings)
    found = evla_json("compare", cogact_run, tmp_path / "fast", "--samples", image_samples)
    assert list(found["measures"]) == ["noise", "cache", "sampling", "weights", "all"]
    assert found["measures"]["weights"]["action_error"]["value"] == 0


# Methods that depend on the calls before


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    """Two episodes of three frames and two, one line of each in turn: a patch moves before a still scene."""
    root = tmp_path_factory.mktemp("episodes")
    lines = []
    for number, (step, episode) in enumerate([(0, "a"), (0, 7), (1, "a"), (1, 7), (2, "a")]):
        scene = np.array(pico.images(1, seed=1 if episode == "a" else 2)[0])
        scene[:20, 20 * step : 20 * step + 20] = 255
        Image.fromarray(scene).save(root / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "instruction": "open drawer", "episode": episode}))
    (root / "samples.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def remembering(cogact_run, tmp_path_factory):
    settings = tmp_path_factory.mktemp("settings") / "vla_cache.yaml"
    settings.write_text(
        "schema_version: 1\n"
        "visual_tokens: {method: vla_cache, similarity_threshold: 0.9, num_task: 2, entropy_scale: 40}\n"
    )
    return f"{cogact_run}@{settings}"


@pytest.fixture(scope="module")
def remembering_bundle(cogact_run, remembering, tmp_path_factory):
    directory = tmp_path_factory.mktemp("remembering") / "bundle"
    pipeline.export(cogact_run, directory, InferenceSettings.load(Path(remembering.partition("@")[2])), act=False)
    return directory


def test_frames_are_remembered_along_each_episode_whatever_the_batch(cogact_run, remembering, episodes):
    found = [
        evla_json("compare", cogact_run, remembering, "--samples", episodes, "--batch-size", size) for size in (1, 2, 5)
    ]
    errors = [
        [each["measures"]["all"][name]["value"] for name in ("action_error", "cognition_cosine")] for each in found
    ]
    np.testing.assert_allclose(errors[1:], [errors[0]] * 2, rtol=0, atol=1e-6)  # float32, which A is batched in
    assert found[0]["notes"] == ["vla_cache remembers frames: 3 of 5 samples follow one of their episode."]

    samples = load_samples(episodes, "image")
    dense = policy_from_checkpoint(cogact_run)
    ours = dense.with_settings(InferenceSettings.load(Path(remembering.partition("@")[2])))
    cosines, reused = [], []
    for members in ((0, 2, 4), (1, 3)):
        ours.reset()
        for number in members:
            tokens = [each.predict([samples[number].image], ["open drawer"]) for each in (dense, ours)]
            cosines.append(torch.cosine_similarity(*(each.cognition[0, 0].double() for each in tokens), dim=0).item())
            reused.append(bool((tokens[1].selection.exit_layers < 6).any()))
    assert reused == [False, True, True, False, True]
    assert errors[0][1] == pytest.approx(np.mean(cosines), abs=1e-9)
    assert errors[0][1] < 1 - 1e-6


def test_random_tokens_do_not_depend_on_the_batch(policy, image_samples):
    samples = load_samples(image_samples, "image")
    random = policy.with_settings(InferenceSettings(visual_tokens=VisualTokenSettings(5, method="random")))
    one, two = (cognition_tokens(random, samples, size) for size in (1, 2))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_samples_without_episodes_or_successors_are_refused(
    cogact_run, remembering, remembering_bundle, episodes, image_samples, tmp_path
):
    said = evla_error("compare", cogact_run, remembering, "--samples", image_samples)
    assert "samples.jsonl:1: no 'episode': visual_tokens.method vla_cache remembers the frame before" in said
    said = evla_error("compare", remembering, cogact_run, "--samples", episodes, "--num-samples", 2)
    assert "none of these samples follows another one" in said
    said = evla_error("report", remembering_bundle, "--samples", image_samples, "-o", tmp_path / "report")
    assert "no 'episode'" in said


def test_a_report_shows_what_follows_the_frames_before(cogact_run, remembering_bundle, episodes):
    found = measure(open_inputs(Request(remembering_bundle, dense=cogact_run, samples=episodes, chosen=(0, 4), runs=0)))
    expected = cognition_tokens(load_policy(remembering_bundle), load_samples(episodes, "image"))[4, 0].double().numpy()
    np.testing.assert_array_equal(found.compressed[4].cognition[0], expected)
    np.testing.assert_array_equal(found.compressed[0].cognition, found.dense[0].cognition)
    assert not np.array_equal(found.compressed[4].cognition, found.dense[4].cognition)


# Where B's plan is, or is not, of A


def test_the_plan_is_known_from_an_unpruned_bundle_too(cogact_run, compressed, tmp_path):
    pipeline.export(cogact_run, tmp_path / "dense", InferenceSettings())
    assert {"layers", "mlp"} <= set(variants(tmp_path / "dense", compressed))


@pytest.mark.slow
def test_without_a_plan_the_weights_are_compared_as_they_are(cogact_run, compressed, image_samples, tmp_path):
    other = tmp_path / "other"
    pico.write_cogact(other)
    changed = torch.load(other / "checkpoints/pico.pt")
    next(iter(changed["model"]["llm_backbone"].values())).add_(0.01)
    torch.save(changed, other / "checkpoints/pico.pt")
    found = evla_json("compare", other, compressed, "--samples", image_samples)
    assert list(found["measures"]) == ["noise", "tokens", "cache", "weights", "all"]
    assert "is of another checkpoint than other (its hash differs)" in found["notes"][0]
    assert found["notes"][0] in evla("compare", other, compressed, "--samples", image_samples)

    shutil.copytree(compressed, tmp_path / "unplanned")
    manifest = json.loads((tmp_path / "unplanned/manifest.json").read_text())
    del manifest["files"]["prune_plan.yaml"]
    (tmp_path / "unplanned/manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "unplanned/prune_plan.yaml").unlink()
    found = evla_json("compare", cogact_run, tmp_path / "unplanned", "--samples", image_samples)
    assert "has no prune_plan.yaml" in found["notes"][0]


@pytest.mark.slow
def test_two_bundles_of_one_plan(compressed, image_samples, tmp_path):
    pipeline.export(compressed, tmp_path / "neutral", InferenceSettings())
    found = evla_json("compare", tmp_path / "neutral", compressed, "--samples", image_samples)
    assert list(found["measures"]) == ["noise", "tokens", "cache", "weights", "all"]
    assert found["notes"] == []
    back = evla_json("compare", compressed, tmp_path / "neutral", "--samples", image_samples)
    assert back["measures"]["all"]["action_error"] == found["measures"]["all"]["action_error"]
    assert back["cache"] is None


# Reused features


@pytest.mark.parametrize(
    ("modules", "blocks"), [(("attention", "mlp"), None), (("mlp",), (0, 2))], ids=["whole stack", "some"]
)
def test_reused_features_against_a_literal_loop(policy64, modules, blocks):
    """Ten steps, interval 4, guidance: memory in a dict, cosine and error of every place by hand."""
    policy = policy64.with_settings(InferenceSettings(action_cache=ActionCacheSettings(4, modules, blocks)))
    generator = torch.Generator().manual_seed(6)
    cognition, noise = (torch.randn(3, *size, generator=generator).double() for size in ((1, 64), (16, 7)))
    with torch.inference_mode():
        found = feature_reuse(policy, cognition, noise, batch_size=2)
        head, memory, measured = policy.model.action_head, {}, {}
        condition = torch.cat((cognition, head.null_condition(3)))

        def predict_noise(noisy, timestep, step):
            time = head.t_embedder(torch.full((6,), timestep)).unsqueeze(1)
            tokens = head.embed(torch.cat((noisy, noisy)), time + head.z_embedder(condition))
            for number, block in enumerate(head.blocks):
                for kind, norm, module in (("attention", block.norm1, block.attn), ("mlp", block.norm2, block.mlp)):
                    fresh, place = module(norm(tokens)), (kind, number)
                    if kind not in modules or number not in (blocks or range(3)) or step % 4 == 0:
                        memory[place] = fresh
                    else:
                        measured[kind, number, step] = memory[place].numpy(), fresh.numpy()
                    tokens = tokens + memory[place]
            predicted = head.final_layer(tokens)[:, 1:]
            return predicted[3:] + 1.5 * (predicted[:3] - predicted[3:])

        sample_ddim(predict_noise, noise, 10)
    assert found.steps == [1, 2, 3, 5, 6, 7, 9]
    assert found.blocks == list(blocks or range(3))
    assert set(found.cosine) == set(modules)
    for (kind, block, step), (reused, fresh) in measured.items():
        place = (slice(None), found.blocks.index(block), found.steps.index(step))
        cosine = (reused * fresh).sum(-1) / (
            np.linalg.norm(reused, axis=-1) * np.linalg.norm(fresh, axis=-1)
        )  # (6, 17)
        error = np.sqrt(((reused - fresh) ** 2).sum((1, 2)) / (fresh**2).sum((1, 2)))  # (6,)
        np.testing.assert_allclose(found.cosine[kind][place], cosine.mean(1).reshape(2, 3).mean(0), atol=1e-5)
        np.testing.assert_allclose(found.relative_error[kind][place], error.reshape(2, 3).mean(0), atol=1e-5)
    assert len(measured) == len(modules) * len(found.blocks) * 7


def test_the_report_tells_reuse_by_step_and_block(report):
    cache = report["cache"]
    schedule = cache_schedule(10, 4)
    assert len(ddim_timesteps(10)) == len(schedule)
    assert cache["steps"] == [step for step in range(10) if not schedule[step]]
    assert cache["blocks"] == [0, 1, 2]
    for module in ("attention", "mlp"):
        for values in cache["modules"][module].values():
            each = np.array(values["each"]["value"])
            assert each.shape == (3, 7)
            np.testing.assert_allclose(values["by_step"]["value"], each.mean(axis=0), rtol=1e-9)
            np.testing.assert_allclose(values["by_block"]["value"], each.mean(axis=1), rtol=1e-9)
            assert (np.array(values["each"]["low"]) <= each).all()


# What cannot be compared


def with_statistics(cogact_run, directory, change):
    shutil.copytree(cogact_run, directory)
    stats = json.loads((directory / "dataset_statistics.json").read_text())
    (directory / "dataset_statistics.json").write_text(json.dumps(change(stats)))
    return directory


def test_datasets_must_be_shared_and_alike(cogact_run, image_samples, tmp_path):
    lab = with_statistics(cogact_run, tmp_path / "lab", lambda stats: {"lab": stats["kitchen"]})
    both = with_statistics(cogact_run, tmp_path / "both", lambda stats: stats | {"lab": stats["kitchen"]})
    scaled = {"kitchen": {"action": pico.STATS["kitchen"]["action"] | {"q99": [2.0] * 7}}}
    other = with_statistics(cogact_run, tmp_path / "other", lambda stats: scaled)
    samples = ("--samples", image_samples)
    assert "none in common" in evla_error("compare", cogact_run, lab, *samples)
    assert "different statistics (q99)" in evla_error("compare", cogact_run, other, *samples)
    assert "name one with --unnorm-key: kitchen, lab" in evla_error("compare", both, both, *samples)
    said = evla_error("compare", cogact_run, both, *samples, "--unnorm-key", "kichen")
    assert "Unknown --unnorm-key 'kichen'. Did you mean 'kitchen'?" in said
    found = evla_json("compare", both, both, *samples, "--unnorm-key", "lab", "--num-samples", 1)
    assert found["protocol"]["unnorm_key"] == "lab"
    assert evla_json("compare", cogact_run, both, *samples, "--num-samples", 1)["protocol"]["unnorm_key"] == "kitchen"


@pytest.mark.parametrize(
    ("action_config", "text_config", "message"),
    [
        ({"action_horizon": 8}, {}, "has 16 actions in a chunk, odd 8"),
        ({"condition_size": 32}, {"hidden_size": 32}, "has 64 numbers in a cognition token, odd 32"),
        ({"action_dim": 5}, {}, "has 7 action dimensions, odd 5"),
    ],
)
def test_chunks_and_tokens_must_be_of_one_size(
    cogact_run, image_samples, tmp_path, monkeypatch, action_config, text_config, message
):
    monkeypatch.setitem(pico.COGACT, "action_config", pico.COGACT["action_config"] | action_config)
    dims = action_config.get("action_dim", 7)
    stats = {name: values[:dims] for name, values in pico.STATS["kitchen"]["action"].items()}
    monkeypatch.setattr(pico, "STATS", {"kitchen": {"action": stats}})
    pico.write_cogact(tmp_path / "odd", **text_config)
    assert message in evla_error("compare", cogact_run, tmp_path / "odd", "--samples", image_samples)


def test_compare_refuses(cogact_run, compressed, decoders, image_samples, text_samples, tmp_path):
    samples = ("--samples", image_samples)
    two = tmp_path / "two.yaml"
    listed = "".join(f"\n- {{name: {name}, checkpoint: '{cogact_run}'}}" for name in "ab")
    two.write_text(f"schema_version: 1\ncandidates: {listed}\n")
    for arguments, message in (
        ((cogact_run, two, *samples), "name 3 candidates; evla compare takes two."),
        ((cogact_run, decoders("llama"), *samples), "has no action head"),
        ((cogact_run, tmp_path / "nowhere", *samples), "does not exist"),
        ((cogact_run, compressed, "--samples", text_samples), "missing field 'image'"),
        ((cogact_run, compressed, *samples, "--num-samples", 9), "holds 5 samples"),
        ((cogact_run, compressed, *samples, "--device", "cuda:9"), "cannot be used"),
        ((cogact_run, compressed), "Missing option"),
        ((cogact_run, *samples), "Missing argument"),
    ):
        text = evla_error("compare", *arguments)
        assert message in text
        assert len(text.splitlines()) == 1
