"""`evla bench`: the stock baseline against the runtime, how runs are ordered and timed, and the report's figures."""

import os
import signal
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pico
import pytest
import torch
import yaml
from PIL import Image
from test_cli import evla, evla_error, evla_json
from torch import nn

from evla_cli import pipeline
from evla_cli.errors import EvlaError
from evla_cli.evaluation import latency, memory, rollout
from evla_cli.evaluation.bench import bench, make_rows, plan_sessions, weight_bytes
from evla_cli.evaluation.candidates import neutral, open_candidates
from evla_cli.evaluation.flops import count_flops
from evla_cli.evaluation.intervals import mean_estimate, median_estimate
from evla_cli.evaluation.latency import (
    STAGES,
    TOKEN_SELECTION,
    WHOLE,
    Batch,
    Clock,
    head_intervals,
    measure_head,
    measure_latency,
    time_stages,
)
from evla_cli.evaluation.memory import peak_memory
from evla_cli.evaluation.stock import StockPolicy, load_stock_policy
from evla_cli.runtime.policy import Policy, load_policy, policy_from_checkpoint
from evla_cli.settings import ActionCacheSettings, DiffusionSettings, InferenceSettings, VisualTokenSettings

PRUNED = InferenceSettings(visual_tokens=VisualTokenSettings(num_keep=7, num_key=2))
ONE = Batch(pico.images(1), ["open drawer"])


# The stock baseline


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        (torch.bfloat16, 0.1),  # 8 bits; rounded at other places
    ],
)
def test_stock_gives_the_runtimes_cognition_token(cogact_run, dtype, tolerance):
    """A batch with padding: instructions of five lengths."""
    stock, ours = load_stock_policy(cogact_run, dtype=dtype), policy_from_checkpoint(cogact_run, dtype=dtype)
    scenes = pico.images(5), pico.INSTRUCTIONS
    noise = torch.randn(5, 16, 7, generator=torch.Generator().manual_seed(1))
    theirs, expected = stock.predict(*scenes, noise=noise), ours.predict(*scenes, noise=noise)
    torch.testing.assert_close(theirs.cognition, expected.cognition, rtol=0, atol=tolerance)
    if dtype != torch.bfloat16:
        np.testing.assert_allclose(theirs.actions, expected.actions, rtol=0, atol=1e-4)


@pytest.mark.parametrize("diffusion", [DiffusionSettings("ddpm"), DiffusionSettings(cfg_scale=1.0)])
def test_stock_samples_as_the_settings_say(cogact_run, policy64, diffusion):
    stock = load_stock_policy(cogact_run, diffusion, dtype=torch.float64)
    ours = policy64.with_settings(InferenceSettings(diffusion=diffusion))
    found = stock.predict_action(ONE.images[0], "open drawer", seed=4)
    np.testing.assert_allclose(found, ours.predict_action(ONE.images[0], "open drawer", seed=4), rtol=0, atol=1e-6)


def test_stock_runs_everything_with_plain_linear_layers(cogact_run):
    stock = load_stock_policy(cogact_run, dtype=torch.bfloat16)
    model, calls = stock.model, []
    watched = [model.language_model.lm_head, model.dino.encoder.layer[-1], model.siglip.encoder.layers[-1]]
    for module in watched:
        module.register_forward_hook(lambda module, _, output: calls.append((module, output)))
    stock.predict(ONE.images, ONE.instructions)
    assert [module for module, _ in calls] == [*watched[1:], watched[0]]
    length = len(stock.processor.prompt("open drawer")[0]) + pico.NUM_VISUAL
    assert calls[-1][1].shape == (1, length, 64)
    assert not [m for m in model.modules() if isinstance(m, nn.Linear) and type(m).__name__ == "TiledLinear"]


# Order and time


class Noted(Policy):
    """Writes its name down at each prediction."""

    def prepare(self, images, instructions):
        self.log.append(self.name)
        return super().prepare(images, instructions)


def test_candidates_are_interleaved_and_the_order_goes_round(policy):
    log = []
    policies = {}
    for name in "abc":
        policies[name] = Noted(policy.model, policy.processor, InferenceSettings())
        policies[name].name, policies[name].log = name, log
    latencies = measure_latency(policies, ONE, runs=3, warmup=1)
    assert "".join(log) == "abc" + "bca" + "cab" + "abc"
    assert [len(latency.runs) for latency in latencies.values()] == [3, 3, 3]


@pytest.mark.parametrize("settings", [InferenceSettings(), PRUNED], ids=["neutral", "pruned"])
def test_stages_fill_the_whole(policy, settings):
    hooks = [dict(module._forward_hooks) for module in policy.model.modules()]
    times = time_stages(policy.with_settings(settings), ONE)
    assert sum(times[stage] for stage in STAGES) == pytest.approx(times[WHOLE], rel=1e-9)
    assert all(times[stage] > 0 for stage in STAGES)
    assert [dict(module._forward_hooks) for module in policy.model.modules()] == hooks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "stage"),
    [("projector", "vision"), ("language_model.model.layers.3", TOKEN_SELECTION), ("action_head", "action_head")],
)
def test_time_is_put_down_to_the_stage_that_took_it(policy, place, stage):
    """A sleep before a module: before the projector is still vision, before a decoder layer is selection."""
    module = policy.model.get_submodule(f"{place}.x_embedder" if place == "action_head" else place)
    handle = module.register_forward_pre_hook(lambda *_: time.sleep(0.2))
    try:
        times = time_stages(policy, ONE)
    finally:
        handle.remove()
    assert times[stage] >= 200
    if stage == TOKEN_SELECTION:
        assert times["language_model"] >= 200


def test_head_intervals_are_the_smallest_for_their_number_of_computed_steps():
    assert head_intervals(10) == [1, 2, 3, 4, 5, 10]
    assert head_intervals(4) == [1, 2, 4]
    assert head_intervals(1) == [1]


def test_the_head_is_timed_at_every_interval(policy):
    calls = []
    handle = policy.model.action_head.blocks[0].register_forward_hook(
        lambda _, inputs, __: calls.append(len(inputs[0]))
    )
    try:
        times = measure_head(policy, batch_size=3, runs=2, warmup=0)
    finally:
        handle.remove()
    assert {interval: len(found) for interval, found in times.items()} == dict.fromkeys([1, 2, 3, 4, 5, 10], 2)
    assert calls == [6] * 2 * (10 + 5 + 4 + 3 + 2 + 1)  # both halves of guidance


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_clock_waits_for_the_queue(cogact_run):
    clock = Clock(torch.device("cuda"))
    large = torch.randn(4096, 4096, device="cuda")
    start = clock.mark()
    for _ in range(50):
        large = large @ large
    end = clock.mark()
    clock.synchronize()
    assert clock.milliseconds(start, end) > 1
    report = bench([cogact_run], runs=2, warmup=1, device="cuda")
    assert all(row["memory"]["peak_device_bytes"] > 0 for row in report["rows"])


def with_ballast(path):
    ballast = torch.ones(100 * 2**20)  # 400 MiB
    policy = policy_from_checkpoint(path)
    del ballast
    return policy


@pytest.mark.parametrize("method", ["forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_peak_memory_is_that_of_a_process_of_its_own(cogact_run, monkeypatch, method):
    """A spawned one, as users have it, takes seconds to import what it needs."""
    monkeypatch.setattr("evla_cli.evaluation.memory.START_METHOD", method)
    memory = peak_memory(partial(with_ballast, cogact_run), ONE, "cpu", threads=1)
    assert memory["peak_rss_anon_bytes"] - memory["imported_rss_anon_bytes"] >= 400 * 2**20
    assert memory["peak_rss_bytes"] >= memory["peak_rss_anon_bytes"]
    assert memory["peak_device_bytes"] is None


def killed(path):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_measuring_process_that_fails_or_is_killed_is_an_error(cogact_run, decoders):
    with pytest.raises(EvlaError, match="ended with -9"):
        peak_memory(partial(killed, cogact_run), ONE, "cpu", threads=1)
    with pytest.raises(EvlaError, match="has no action head"):
        peak_memory(partial(policy_from_checkpoint, decoders("llama")), ONE, "cpu", threads=1)


# Intervals


@pytest.mark.slow
def test_intervals_cover_as_often_as_they_say():
    """Of 400 draws of 40 values, about 95 % of the intervals must hold the truth (99.9 % limits of 400 tosses)."""
    random = np.random.default_rng(3)
    for estimate, values in (
        (mean_estimate, random.exponential(2.0, size=(400, 40))),
        (median_estimate, random.normal(2.0, 1.0, size=(400, 40))),
    ):
        held = [found.low <= 2.0 <= found.high for found in map(estimate, values)]
        assert 0.885 <= np.mean(held) <= 0.985


def test_estimates_are_those_of_numpy_whatever_the_shape():
    values = np.random.default_rng(0).normal(size=(30, 2, 3))
    found = mean_estimate(values, seed=5)
    np.testing.assert_allclose(found.value, values.mean(axis=0), rtol=1e-12)
    for place in np.ndindex(2, 3):
        alone = mean_estimate(values[:, *place], seed=5)  # the same samples are drawn for every entry
        assert (found.low[place], found.high[place]) == pytest.approx((alone.low, alone.high), rel=1e-12)
    assert (mean_estimate(values, seed=5).low == found.low).all()
    assert (mean_estimate(values, seed=6).low != found.low).any()


def test_a_single_sample_has_no_interval():
    for estimate in (mean_estimate, median_estimate):
        assert estimate(np.array([3.0])).to_record() == {"value": 3.0, "low": None, "high": None}


# The report


@pytest.fixture(scope="module")
def half_bundle(cogact_run, tmp_path_factory):
    """4 of 6 layers, 8 of 16 tokens, interval 5."""
    root = tmp_path_factory.mktemp("half")
    pipeline.prune(cogact_run, root / "pruned", drop_ids=(3, 4), mlp_prune_ratio=0.5, mlp_method="magnitude")
    settings = pipeline.settings_with(None, visual_tokens={"num_keep": 8}, action_cache={"interval": 5})
    pipeline.export(root / "pruned", root / "half", settings)
    return root / "half"


@pytest.fixture(scope="module")
def report(cogact_run, half_bundle, tmp_path_factory):
    figure = tmp_path_factory.mktemp("figure") / "bench.png"
    options = ("--runs", 4, "--warmup", 1, "--batch-size", 2, "--denoise-steps", 5, "--threads", 1, "--seed", 3)
    record = evla_json("bench", half_bundle, cogact_run, *options, "--figure", figure)
    with Image.open(figure) as image:
        assert image.width > 500
    return record


def test_baselines_of_the_first_candidate_are_told_apart(report, half_bundle, cogact_run):
    names = [(row["name"], row["kind"], row["path"]) for row in report["rows"]]
    assert names == [
        ("half, stock", "stock", str(half_bundle)),
        ("half, neutral", "neutral", str(half_bundle)),
        ("half", "own", str(half_bundle)),
        ("run", "neutral", str(cogact_run)),
    ]
    assert report["references"] == ["half, stock", "half, neutral", "half"]
    assert [list(row["speedup"]) for row in report["rows"]] == [
        [],
        ["half, stock"],
        ["half, stock", "half, neutral"],
        ["half, stock", "half, neutral", "half"],
    ]
    stock, neutral_row, own, dense = (row["settings"] for row in report["rows"])
    assert stock == neutral_row == dense
    assert (own["visual_tokens"]["num_keep"], own["action_cache"]["interval"]) == (8, 5)
    assert {row["settings"]["diffusion"]["num_denoise_steps"] for row in report["rows"]} == {5}


def test_figures_of_the_report_follow_from_its_runs(report):
    runs = {
        (row["name"], stage): np.array(found["runs"])
        for row in report["rows"]
        for stage, found in row["latency_ms"].items()
    }
    for row in report["rows"]:
        for stage, found in row["latency_ms"].items():
            values = np.sort(runs[row["name"], stage])
            assert len(values) == 4
            assert found["median"] == pytest.approx((values[1] + values[2]) / 2)
            assert found["p95"] == pytest.approx(values[2] + 0.85 * (values[3] - values[2]))
        for reference, stages in row["speedup"].items():
            for stage, found in stages.items():
                ratios = np.sort(runs[reference, stage] / runs[row["name"], stage])  # within each round
                assert found["value"] == pytest.approx((ratios[1] + ratios[2]) / 2)
                assert ratios[0] <= found["low"] <= found["value"] <= found["high"] <= ratios[3]
        if row["kind"] != "stock":
            shares = runs[row["name"], TOKEN_SELECTION] / runs[row["name"], "language_model"]
            assert row["token_selection_share"]["median"] == pytest.approx(np.median(shares))
    heads = [row["head_ms_by_interval"] for row in report["rows"]]
    assert [list(head) for head in heads] == [[], [], ["1", "2", "3", "5"], ["1", "2", "3", "5"]]


def test_sizes_and_operations_of_the_report(report, half_bundle, cogact_run):
    for row, path in zip(report["rows"], [half_bundle] * 3 + [cogact_run], strict=True):
        loaded = load_policy(path) if row["kind"] == "own" else policy_from_checkpoint(path)
        prompt = len(loaded.processor.prompt("pick up the red block and put it on the plate")[0])
        assert row["parameters"] == sum(p.numel() for p in loaded.model.parameters())
        assert (row["dtype"], row["head_dtype"]) == ("float32", "float32")
        assert row["prompt_tokens"] == prompt
        executed = "stock" if row["kind"] == "stock" else "full"
        chosen = open_candidates([path], 5)[0].settings
        chosen = chosen if row["kind"] == "own" else neutral(chosen)
        assert row["flops"]["full"] == count_flops(loaded.model, chosen, prompt, executed).to_record()
        assert row["flops"]["paper"]["total"] == count_flops(loaded.model, chosen).total
        files = [*path.glob("*.safetensors"), *path.glob("checkpoints/*.pt")]
        assert row["bytes_on_disk"] == sum(file.stat().st_size for file in files)
        assert row["memory"]["peak_rss_bytes"] > row["memory"]["peak_rss_anon_bytes"] > row["parameters"]
        assert row["load_seconds"] > 0


def test_the_report_says_where_and_how(report):
    environment, protocol = report["environment"], report["protocol"]
    assert (environment["device"], environment["threads"]) == ("cpu", 1)
    assert environment["versions"]["torch"] == version("torch")
    assert set(environment["versions"]) == {"evla", "python", "numpy", "torch", "transformers", "cuda"}
    said = (protocol["batch_size"], protocol["runs"], protocol["warmup"], protocol["seed"], protocol["loaded"])
    assert said == (2, 4, 1, 3, "together")


@pytest.mark.slow
def test_models_that_do_not_fit_together_are_loaded_in_turn(cogact_run, bundle, image_samples):
    options = ("--baseline", "none", "--runs", 4, "--warmup", 0, "--memory-budget", "1KB", "--samples", image_samples)
    text = evla("bench", bundle, cogact_run, *options, "--dtype", "bfloat16")
    assert "do not fit into memory together: each loaded 3 times" in text
    assert "bundle: selecting tokens takes" in text
    assert "stock" not in text
    assert "bfloat16, head float32" in text


@dataclass(frozen=True)
class Ran:
    """What one timed prediction called: of a model, by hooks; of the head, how often its first block's MLP ran.

    `lm_head` and the towers' last blocks are stock's alone; `positions` are those that reach the last decoder layer.
    """

    lm_head: int
    last_tower_blocks: int
    decoder_layers: int
    positions: int
    head_steps: int


def watched(monkeypatch, owner) -> list[Ran]:
    """Of every prediction that is timed from now on, in order."""
    ran: list[Ran] = []

    def watch(policy, batch):
        model, calls = policy.model, defaultdict(int)
        layers = model.language_model.model.layers

        def count(module, name, number=lambda _: 1):
            return module.register_forward_hook(
                lambda _, inputs, __: calls.update({name: calls[name] + number(inputs)})
            )

        handles = [
            count(model.language_model.lm_head, "lm_head"),
            count(model.dino.encoder.layer[-1], "towers"),
            count(model.siglip.encoder.layers[-1], "towers"),
            count(layers[-1].mlp, "positions", lambda inputs: inputs[0].shape[-2]),
            count(model.action_head.blocks[0].mlp.fc1, "head"),
        ]
        try:
            return time_stages(policy, batch)
        finally:
            for handle in handles:
                handle.remove()
            names = ("lm_head", "towers")
            ran.append(Ran(*(calls[n] for n in names), len(layers), calls["positions"], calls["head"]))

    monkeypatch.setattr(owner, "time_stages", watch)
    return ran


def test_every_row_runs_its_own_code_weights_and_settings(cogact_run, half_bundle, tmp_path, monkeypatch):
    """Where it is timed, and in the process that measures memory, which here is this one."""
    (tmp_path / "five.yaml").write_text(
        "schema_version: 1\nvisual_tokens: {num_keep: 5}\naction_cache: {interval: 3}\n"
    )
    timed, remembered = watched(monkeypatch, latency), watched(monkeypatch, memory)
    monkeypatch.setattr("evla_cli.evaluation.bench.peak_memory", memory._load_and_predict)
    found = bench([half_bundle, cogact_run, Path(f"{cogact_run}@{tmp_path / 'five.yaml'}")], runs=1, warmup=0)
    prompt = found["rows"][0]["prompt_tokens"]
    expected = {
        "half, stock": Ran(1, 2, 4, prompt + 16, 10),
        "half, neutral": Ran(0, 0, 4, prompt + 16, 10),
        "half": Ran(0, 0, 4, prompt + 8, 2),
        "run": Ran(0, 0, 6, prompt + 16, 10),
        "run@five": Ran(0, 0, 6, prompt + 5, 4),
    }
    assert [row["name"] for row in found["rows"]] == list(expected)
    assert timed == remembered == list(expected.values())


def test_a_stock_policy_stays_one_and_refuses_what_it_would_not_obey(cogact_run):
    stock = load_stock_policy(cogact_run)
    fewer = stock.with_settings(InferenceSettings(diffusion=DiffusionSettings(num_denoise_steps=5)))
    assert type(fewer) is type(stock.with_settings(InferenceSettings())) is StockPolicy
    for settings in (PRUNED, InferenceSettings(action_cache=ActionCacheSettings(2))):
        with pytest.raises(EvlaError, match="keeps all visual tokens and caches nothing"):
            stock.with_settings(settings)


def test_threads_are_left_as_they_were(cogact_run):
    before = torch.get_num_threads()
    report = bench([cogact_run], baselines=(), threads=before + 1, runs=1, warmup=0)
    assert report["environment"]["threads"] == before + 1
    assert [row["name"] for row in report["rows"]] == ["run"]
    assert torch.get_num_threads() == before


def test_sessions_share_out_the_runs(cogact_run, bundle):
    rows = make_rows(open_candidates([bundle, cogact_run]), ("stock", "neutral"))
    assert plan_sessions(rows, 7, together=True) == [(rows, 7)]
    in_turn = [([row.name for row in members], runs) for members, runs in plan_sessions(rows, 7, together=False)]
    stock, ours, other = ["bundle, stock"], ["bundle, neutral", "bundle"], ["run"]
    assert in_turn == [
        (stock, 3), (ours, 3), (other, 3),
        (ours, 2), (other, 2), (stock, 2),
        (other, 2), (stock, 2), (ours, 2),
    ]  # fmt: skip
    assert [runs for _, runs in plan_sessions(rows, 1, together=False)] == [1, 1, 1]


def test_mapped_weights_are_counted_once_and_copies_each(cogact_run, bundle):
    rows = make_rows(open_candidates([cogact_run, bundle]), ("stock",))
    stored = [sum(t.num_bytes for t in row.candidate.checkpoint.weights.values()) for row in rows]
    assert weight_bytes(rows, "cpu", None) == weight_bytes(rows, "cpu", "float32") == stored[0] + stored[2]
    weights = rows[0].candidate.checkpoint.weights  # the same in all three; the head stays mapped, as it is stored
    head = sum(lazy.num_bytes for name, lazy in weights.items() if name.startswith("action_head."))
    assert weight_bytes(rows, "cpu", "bfloat16") == sum(size - head for size in stored) // 2 + 2 * head
    assert weight_bytes(rows, "cuda", "bfloat16") == sum(size - head for size in stored) // 2 + 3 * head
    assert weight_bytes(rows, "cuda", None) == sum(stored)


def test_labels_tell_candidates_apart(cogact_run, bundle, tmp_path):
    labels = [candidate.label for candidate in open_candidates([cogact_run, bundle, cogact_run])]
    assert labels == [str(cogact_run), str(bundle), f"{cogact_run} (2)"]


@pytest.mark.slow
def test_a_list_of_candidates_is_run_under_the_names_and_settings_in_it(cogact_run, bundle, tmp_path):
    """The same file as `evla eval` takes, so that both call a row the same; paths are relative to the list."""
    file, fastv = tmp_path / "list.yaml", tmp_path / "fastv.yaml"
    entries = [
        {"name": "dense", "checkpoint": os.path.relpath(cogact_run, tmp_path)},
        {"name": "half", "checkpoint": str(bundle)},
        {"name": "half, all tokens", "checkpoint": str(bundle), "settings": {"action_cache": {"interval": 2}}},
    ]
    file.write_text(yaml.safe_dump({"schema_version": 1, "candidates": entries}))
    fastv.write_text("schema_version: 1\nvisual_tokens: {method: fastv, num_keep: 5}\n")
    report = evla_json("bench", file, f"{cogact_run}@{fastv}", "--baseline", "none", "--runs", 1, "--warmup", 0)
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["dense", "half", "half, all tokens", "run@fastv"]
    assert list(rows) == [c.name for c in rollout.open_candidates([file, Path(f"{cogact_run}@{fastv}")])]
    tokens = [row["settings"]["visual_tokens"]["num_keep"] for row in rows.values()]
    assert tokens == [None, 8, None, 5]
    assert [row["settings"]["action_cache"]["interval"] for row in rows.values()] == [1, 5, 2, 1]
    assert rows["half"]["flops"]["paper"]["total"] < rows["half, all tokens"]["flops"]["paper"]["total"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--baseline", "stok"), "unknown baseline 'stok'. Did you mean 'stock'?"),
        (("--denoise-steps", "11"), "diffusion.num_denoise_steps 11 is not a whole stride"),
        (("--denoise-steps", "4"), "action_cache.interval is 5, more than the 4 denoising steps"),
        (("--samples", "nowhere"), "nowhere does not exist."),
        (("--device", "cuda:9"), "cannot be used"),
        (("--runs", "0"), "0 is not in the range"),
        (("--memory-budget", "much"), "much"),
        (("--figure", "nowhere/bench.png"), "nowhere"),
    ],
)
def test_bench_refuses(bundle, options, message):
    text = evla_error("bench", bundle, *options)
    assert message in text
    assert text.startswith("Error: ")
    assert len(text.splitlines()) == 1


def test_bench_refuses_what_cannot_act(bundle, decoders, tmp_path):
    assert "has no action head" in evla_error("bench", bundle, decoders("llama"))
    assert "does not exist" in evla_error("bench", bundle, tmp_path / "nowhere")
    assert "Missing argument" in evla_error("bench")
    figure = tmp_path / "bench.png"
    figure.write_text("mine")
    assert "--overwrite" in evla_error("bench", bundle, "--figure", figure)
    assert figure.read_text() == "mine"
