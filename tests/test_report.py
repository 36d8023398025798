"""`evla report` through the real entry point: what it draws, from what, and what it says about the rest."""

import base64
import json
import os
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import torch
import yaml
from PIL import Image
from test_bench import Ran, watched
from test_cli import contents, evla, evla_error
from test_policy import literal_pruned_run
from test_visual_tokens import literal_selection

from evla_cli import pipeline
from evla_cli.calibration import load_samples, spread
from evla_cli.evaluation import figures, latency
from evla_cli.evaluation.episode_log import LoggedEpisodes
from evla_cli.evaluation.flops import count_flops
from evla_cli.evaluation.pictures import inputs, measured
from evla_cli.evaluation.pictures.speed_success import matched
from evla_cli.evaluation.success import against, is_real
from evla_cli.runtime.policy import load_policy, policy_from_checkpoint

pytest.importorskip("matplotlib")

PICTURES = ["layers", "denoising_steps", "token_cost", "kept_tokens", "trajectories", "stage_times", "speed_success"]
MEASURES = {"visual_tokens": {"num_keep": 7, "num_key": 2, "prune_layer": 2}, "action_cache": {"interval": 5}}


@pytest.fixture(scope="module")
def made(cogact_run, importance_file, tmp_path_factory) -> Path:
    """As `evla run` leaves it: importance.json, and a bundle without two of six layers, with 7 of 16 tokens."""
    root = tmp_path_factory.mktemp("made") / "out"
    root.mkdir()
    shutil.copy(importance_file, root)
    options = {"importance": importance_file, "num_drop": 2, "mlp_prune_ratio": 0.5, "mlp_method": "magnitude"}
    pipeline.prune(cogact_run, root / "pruned", **options)
    pipeline.export(root / "pruned", root / "bundle", pipeline.settings_with(None, **MEASURES))
    return root


@pytest.fixture(scope="module")
def timed(made, cogact_run, tmp_path_factory) -> tuple[Path, Path]:
    """What `evla bench` and `evla eval` say of the same list."""
    root = tmp_path_factory.mktemp("timed")
    candidates = [
        {"name": "dense", "checkpoint": str(cogact_run)},
        {"name": "compressed", "checkpoint": str(made / "bundle")},
        {"name": "random, 5 tokens", "checkpoint": str(cogact_run), "settings": RANDOM},
    ]
    (root / "list.yaml").write_text(yaml.safe_dump({"schema_version": 1, "candidates": candidates}))
    bench = evla("bench", root / "list.yaml", "--baseline", "none", "--runs", 2, "--warmup", 0, "--json")
    (root / "bench.json").write_text(bench)
    evla("eval", root / "list.yaml", "--suite", "pico_suite:PicoSuite", "-o", root / "log.jsonl")
    return root / "bench.json", root / "log.jsonl"


RANDOM = {"visual_tokens": {"method": "random", "num_keep": 5}}


@pytest.fixture(scope="module")
def whole(made, cogact_run, image_samples, timed, tmp_path_factory) -> tuple[Path, str]:
    """A report with every picture, and what the command printed."""
    output = tmp_path_factory.mktemp("whole") / "report"
    bench, log = timed
    named = ("--dense", cogact_run, "--samples", image_samples, "--bench", bench, "--results", log)
    return output, evla("report", made, *named, "--sample", 4, "--sample", 1, "--runs", 2, "-o", output)


class Page(HTMLParser):
    """What a browser would see: text, pictures, and everything that it would fetch."""

    def __init__(self, file: Path):
        super().__init__()
        self.texts: list[str] = []
        self.images: dict[str, bytes] = {}
        self.alts: dict[str, str] = {}
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.section = ""
        self.feed(file.read_text())
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.section = found.get("id", self.section) if tag == "section" else self.section
        self.fetched += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag == "img":
            self.images[self.section] = base64.b64decode(found["src"].removeprefix("data:image/png;base64,"))
            self.alts[self.section] = found["alt"]

    def handle_data(self, data):
        self.texts.append(data)


def numbers(report: Path, name: str) -> dict:
    return json.loads((report / f"{name}.json").read_text())


# The page


def test_the_page_has_every_picture_and_needs_nothing_else(whole):
    output, printed = whole
    page = Page(output / "index.html")
    assert list(page.images) == PICTURES
    assert all(value.startswith("data:") for value in page.fetched)
    assert not {"script", "iframe", "object", "embed", "form"} & set(page.tags)
    text = (output / "index.html").read_text()
    assert "default-src 'none'" in text
    assert "url(" not in text
    assert "@import" not in text
    for name, png in page.images.items():
        assert png == (output / f"{name}.png").read_bytes()
        assert f"{name}.png" in printed
        assert len(page.alts[name].split()) > 5
    assert "not drawn" not in printed
    assert "7 of 7 pictures." in page.text
    names = {f"{name}.{kind}" for name in PICTURES for kind in ("png", "json")}
    assert set(contents(output)) == {*names, "index.html", "manifest.json"}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_no_empty_frame(name, whole):
    with Image.open(whole[0] / f"{name}.png") as image:
        assert not {"Software", "Creation Time"} & set(image.info)
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int) // 16
    assert min(image.size) > 400
    counts = np.bincount(pixels @ [256, 16, 1])  # by colour
    assert np.count_nonzero(counts) > 10
    assert 1 - counts.max() / len(pixels) > 0.02


def test_the_page_says_where_it_comes_from(whole, made, cogact_run):
    page = Page(whole[0] / "index.html")
    manifest = json.loads((made / "bundle" / "manifest.json").read_text())
    for expected in (
        manifest["plan"]["checkpoint_sha256"],
        manifest["libraries"]["torch"],
        str(manifest["plan"]["keep_layers"]),
        "recipe.prune.mlp_method magnitude",
        "visual_tokens.num_keep 7",
        "action_cache.interval 5",
        f"evla report {made} --dense {cogact_run}",
        "--sample 4 --sample 1 --runs 2 -o REPORT",
    ):
        assert expected in page.text
    assert "is not what the bundle was made from" not in page.text


@pytest.mark.slow
def test_the_same_command_gives_the_same_bytes_wherever_it_writes(made, cogact_run, image_samples, tmp_path):
    named = ("--dense", cogact_run, "--samples", image_samples, "--sample", 0, "--runs", 0)
    for name in ("a", "b"):
        evla("report", made, *named, "-o", tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert "Time was not measured (--runs 0)." in Page(tmp_path / "a" / "index.html").text


# Its numbers


def test_layers_are_those_of_the_analysis_and_the_plan(whole, importance_file, made):
    found, importance = numbers(whole[0], "layers"), json.loads(importance_file.read_text())
    assert found["importance"] == [layer["importance"] for layer in importance["layers"]]
    plan = yaml.safe_load((made / "bundle" / "prune_plan.yaml").read_text())
    assert found["removed"] == plan["dropped_layers"]
    assert len(found["removed"]) == 2
    text = Page(whole[0] / "index.html").text
    assert all(f"{value:.5f}" in text for value in found["importance"])


def test_operations_are_those_of_the_bundles_settings(whole, made):
    policy, found = load_policy(made / "bundle"), numbers(whole[0], "token_cost")
    assert [row["num_keep"] for row in found["rows"]] == [2, 4, 6, 7, 8, 10, 12, 14, 16]
    for row in found["rows"]:
        measures = MEASURES | {"visual_tokens": MEASURES["visual_tokens"] | {"num_keep": row["num_keep"]}}
        settings = pipeline.settings_with(None, **measures)
        assert row["flops"] == count_flops(policy.model, settings).to_record()
        assert 0 < row["latency_ms"]["language_model"]["median"] < row["latency_ms"]["whole"]["median"]
    assert found["protocol"]["runs"] == 2


def test_each_number_of_tokens_is_timed_with_its_own_settings(made, cogact_run, image_samples, monkeypatch):
    """Positions that reach the last layer, and how often the head was computed, in every timed run."""
    ran = watched(monkeypatch, latency)
    request = inputs.Request(made, dense=cogact_run, samples=image_samples, chosen=(4,), runs=1)
    monkeypatch.setattr(measured, "WARMUP", 0)
    found = measured.measure(inputs.open_inputs(request))
    prompt = ran[-1].positions - 16
    assert list(found.latencies) == [2, 4, 6, 7, 8, 10, 12, 14, 16]
    assert ran == [Ran(0, 0, 4, prompt + count, 2) for count in found.latencies]


@torch.inference_mode()
def test_kept_tokens_are_those_of_the_equations_written_as_loops(whole, made, image_samples):
    """Scores from a literal decoder, the choice from the paper's sets: nothing of evla's runtime."""
    policy, found = load_policy(made / "bundle"), numbers(whole[0], "kept_tokens")
    samples = load_samples(image_samples, "image")
    assert [each["sample"] for each in found["samples"]] == [4, 1]
    for each in found["samples"]:
        sample = samples[each["sample"]]
        chosen = {}

        def choose(scores, features, chosen=chosen):
            kept = literal_selection(scores.tolist(), features[0].tolist(), 7, 2, 0.5, "one_shot")
            chosen.update(zip(("key", "task", "diverse"), kept, strict=True))
            return sorted(token for tokens in kept for token in tokens)

        literal_pruned_run(policy.model, policy.prepare([sample.image], [sample.instruction]), policy.settings, choose)
        assert each["kept"] == chosen
        assert each["instruction"] == sample.instruction
    assert found["samples"][0]["kept"] != found["samples"][1]["kept"]


def test_trajectories_are_the_sums_of_what_the_policies_predict(whole, made, cogact_run, image_samples):
    found = numbers(whole[0], "trajectories")
    dense, compressed = policy_from_checkpoint(cogact_run), load_policy(made / "bundle")
    assert found["dimensions"] == ["x", "y", "z", "gripper"]
    for each in found["samples"]:
        sample = load_samples(image_samples, "image")[each["sample"]]

        def path(policy, seed, sample=sample):
            actions = policy.predict_action(sample.image, sample.instruction, seed=seed)
            return [[*actions[: step + 1, :3].sum(axis=0), actions[step, 6]] for step in range(16)]

        np.testing.assert_allclose(each["dense"], path(dense, 0), rtol=0, atol=1e-9)
        np.testing.assert_allclose(each["compressed"], path(compressed, 0), rtol=0, atol=1e-9)
        for number, other in enumerate(each["dense_other_noise"], start=1):
            np.testing.assert_allclose(other, path(dense, number), rtol=0, atol=1e-9)
        apart = np.subtract(each["dense"][-1], each["compressed"][-1])[:3]
        assert each["end_distance"] == pytest.approx(np.sqrt((apart**2).sum()))
        assert each["end_distance"] > 0
    assert len(each["dense_other_noise"]) == 8


def test_speed_and_success_meet_by_name(whole, timed):
    bench, log = json.loads(timed[0].read_text()), [json.loads(line) for line in timed[1].read_text().splitlines()]
    found = numbers(whole[0], "speed_success")
    assert [row["name"] for row in found["rows"]] == ["dense", "compressed", "random, 5 tokens"]
    assert found["left_out"] == []
    for row in found["rows"]:
        (timing,) = [each for each in bench["rows"] if each["name"] == row["name"]]
        outcomes = [line["success"] for line in log if line.get("candidate") == row["name"] and "success" in line]
        assert row["whole_ms"] == timing["latency_ms"]["whole"]["median"]
        assert (row["successes"], row["episodes"]) == (sum(outcomes), 7)
        expected = timing["speedup"]["dense"]["whole"] if row["name"] != "dense" else {"value": 1.0}
        assert row["speedup"]["value"] == expected["value"]
    dense, *others = found["rows"]
    assert dense["against"] is None
    compared = against_dense(log)
    control = compared["dense, other noise"]
    for row in others:  # the control row was not timed, and judges all the same
        mine = compared[row["name"]]
        assert row["control"] == "dense, other noise"
        assert row["control_reach"] == max(map(abs, control["interval"]))
        assert row["against"] == mine | {"episodes": 7, "real": is_real(mine, control)}
    said = Page(whole[0] / "index.html").text
    assert "the farther end of the interval of 'dense, other noise', which is chance alone" in said
    stages = numbers(whole[0], "stage_times")["rows"]
    assert [row["name"] for row in stages] == ["dense", "compressed", "random, 5 tokens"]


def against_dense(log: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each candidate, from the log's lines."""
    outcomes: dict[str, dict[tuple[str, int], bool]] = {}
    for line in log:
        if "success" in line:
            outcomes.setdefault(line["candidate"], {})[line["task"], line["episode"]] = line["success"]
    dense = outcomes.pop("dense")
    return {
        name: against([[mine[key]] for key in dense], [[dense[key]] for key in dense])
        for name, mine in outcomes.items()
    }


def test_without_a_control_row_nothing_is_real():
    identities = {name: {"settings": {"visual_tokens": {"method": "evla"}}, "noise_stream": 0} for name in "ab"}
    log = LoggedEpisodes({}, identities, {(name, "t", i, 0): name == "a" for name in "ab" for i in range(50)})
    row = {"settings": identities["a"]["settings"], "latency_ms": {"whole": {"median": 1.0}}}
    rows = [row | {"name": "a", "speedup": {}}, row | {"name": "b", "speedup": {"a": {"whole": {"value": 2.0}}}}]
    found, left_out = matched({"references": ["a"], "rows": rows}, log)
    assert (found[1]["against"]["difference"], found[1]["against"]["real"], left_out) == (-1.0, None, [])
    log.identities["c"] = identities["a"] | {"noise_stream": 1}
    assert matched({"references": ["a"], "rows": rows}, log)[0][1]["against"]["real"] is None  # not run yet
    log.success.update({("c", "t", i, 0): i != 3 for i in range(40)})
    assert matched({"references": ["a"], "rows": rows}, log)[0][1]["against"]["real"] is True


@pytest.mark.slow
def test_rows_that_do_not_belong_together_are_left_out(made, timed, tmp_path):
    """Other settings, no episodes, not timed. A baseline is no candidate, a line without its end no episode."""
    bench, log = json.loads(timed[0].read_text()), timed[1].read_text().splitlines()
    bench["rows"][1]["settings"]["visual_tokens"]["num_keep"] = 6
    bench["rows"].append(bench["rows"][1] | {"name": "another"})
    bench["rows"].insert(0, bench["rows"][0] | {"name": "dense, stock"})
    bench["references"].insert(0, "dense, stock")
    more = {
        "candidate": "untimed",
        "task": "left",
        "episode": 0,
        "repetition": 0,
        "seed": 100,
        "success": True,
        "steps": 3,
    }
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    (tmp_path / "log.jsonl").write_text("\n".join([*log, json.dumps(more), '{"candidate": "dense", "ta']))
    named = ("--bench", tmp_path / "bench.json", "--results", tmp_path / "log.jsonl", "--runs", 0)
    evla("report", made, *named, "-o", tmp_path / "report")
    found = numbers(tmp_path / "report", "speed_success")
    assert [row["name"] for row in found["rows"]] == ["dense", "random, 5 tokens"]
    assert found["left_out"] == [
        "compressed (timed with other settings than its episodes were run with)",
        "another (no episodes)",
        "untimed (not timed)",
    ]
    text = Page(tmp_path / "report" / "index.html").text
    assert all(each in text for each in found["left_out"])


@pytest.mark.slow
def test_success_is_compared_where_tasks_have_the_same_shares(made, timed, tmp_path):
    """A candidate in the middle of its tasks is left out; twice the episodes are paired where both have them."""
    lines = timed[1].read_text().splitlines()
    records = [json.loads(line) for line in lines]
    running = ("random, 5 tokens", "far")
    cut = [record for record in records if (record.get("candidate"), record.get("task")) != running]
    dense = [record for record in records if record.get("candidate") == "dense" and "episode" in record]
    twice = [record | {"episode": record["episode"] + 10} for record in dense]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*cut, *twice]))
    evla("report", made, "--bench", timed[0], "--results", tmp_path / "log.jsonl", "--runs", 0, "-o", tmp_path / "out")
    found = numbers(tmp_path / "out", "speed_success")
    assert [(row["name"], row["episodes"]) for row in found["rows"]] == [("dense", 14), ("compressed", 7)]
    assert found["rows"][1]["against"]["episodes"] == 7
    assert found["left_out"] == [
        "random, 5 tokens (its episodes are not of the same tasks in the same shares as dense's)"
    ]
    assert "7 to 14 episodes a row" in Page(tmp_path / "out" / "index.html").text


# What is missing


def test_what_is_missing_is_said_with_the_command_that_makes_it(importance_file, tmp_path):
    root = tmp_path / "only"
    root.mkdir()
    shutil.copy(importance_file, root)
    printed = evla("report", root, "-o", tmp_path / "report")
    page = Page(tmp_path / "report" / "index.html")
    assert list(page.images) == ["layers"]
    assert "1 of 7 pictures. Not drawn: Action head" in page.text
    for said in (
        "evla bench CHECKPOINT BUNDLE --json > bench.json",
        "evla eval CHECKPOINT BUNDLE --suite SUITE -o results.jsonl",
        f"evla export CHECKPOINT {root / 'bundle'}",
        f"evla report {root} -o REPORT --samples SAMPLES",
    ):
        assert said in page.text
        assert said in printed
    assert printed.count("not drawn.") == page.text.count("Not drawn. ") == 6
    assert set(contents(tmp_path / "report")) == {"layers.png", "layers.json", "index.html", "manifest.json"}


def test_without_samples_and_runs_no_model_is_loaded(made, tmp_path, monkeypatch):
    """Operations at full size need no weights."""

    def refuse(*_arguments, **_options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(measured, "policy_from_checkpoint", refuse)
    evla("report", made, "--runs", 0, "-o", tmp_path / "report")
    rows = numbers(tmp_path / "report", "token_cost")["rows"]
    assert rows[0]["flops"]["total"] < rows[-1]["flops"]["total"]
    assert "latency_ms" not in rows[0]


@pytest.mark.slow
def test_a_bundle_alone_knows_its_layers_from_the_plan(made, importance_file, tmp_path):
    evla("report", made / "bundle", "--runs", 0, "-o", tmp_path / "report")
    found = numbers(tmp_path / "report", "layers")
    importance = json.loads(importance_file.read_text())["layers"]
    assert found["importance"] == [layer["importance"] for layer in importance]
    assert found["standard_error"] == [None] * 6


@pytest.mark.parametrize(
    ("tokens", "reasons"),
    [
        pytest.param({"method": "fastv", "num_keep": 5}, {"attended": 5}, marks=pytest.mark.slow),
        pytest.param({"method": "random", "num_keep": 5}, {"random": 5}, marks=pytest.mark.slow),
        pytest.param(
            {"num_keep": 9, "diversity": "greedy"}, {"key": 4, "task": 2, "diverse": 3}, marks=pytest.mark.slow
        ),
        ({"num_keep": None}, "keeps all of its 16 visual tokens"),
        pytest.param({"method": "vla_cache"}, "depends on the frame before", marks=pytest.mark.slow),
    ],
)
def test_every_method_is_drawn_by_its_reasons_or_says_why_not(tokens, reasons, cogact_run, image_samples, tmp_path):
    pipeline.export(cogact_run, tmp_path / "out", pipeline.settings_with(None, visual_tokens=tokens))
    if tokens.get("method") == "vla_cache":
        image_samples = shutil.copytree(image_samples, tmp_path / "samples")
        lines = (image_samples / "samples.jsonl").read_text().splitlines()
        lines = [json.dumps(json.loads(line) | {"episode": 0}) for line in lines]
        (image_samples / "samples.jsonl").write_text("\n".join(lines))
    evla("report", tmp_path / "out", "--samples", image_samples, "--runs", 0, "-o", tmp_path / "report")
    if isinstance(reasons, str):
        assert reasons in Page(tmp_path / "report" / "index.html").text
        assert not (tmp_path / "report" / "kept_tokens.png").exists()
        return
    found = numbers(tmp_path / "report", "kept_tokens")
    samples, policy = load_samples(image_samples, "image"), load_policy(tmp_path / "out")
    assert [each["sample"] for each in found["samples"]] == sorted(spread(samples)[:3])
    for each in found["samples"]:
        assert {reason: len(kept) for reason, kept in each["kept"].items()} == reasons
        policy.reset()
        sample = samples[each["sample"]]
        selection = policy.predict([sample.image], [sample.instruction]).selection
        assert sorted(token for kept in each["kept"].values() for token in kept) == selection.kept[0].tolist()


@pytest.mark.slow
def test_denoising_steps_are_measured_on_the_dense_model_or_read(whole, cogact_run, image_samples, tmp_path):
    """The same numbers as `evla analyze --figures` finds, whose samples make one batch here."""
    importance = tmp_path / "importance.json"
    evla("analyze", cogact_run, "--samples", image_samples, "-o", importance, "--figures", tmp_path / "figures")
    analyzed = json.loads(importance.read_text())["action_head"]
    found = numbers(whole[0], "denoising_steps")
    assert (found["num_denoise_steps"], found["seed"]) == (10, 0)
    for kind, rows in analyzed["step_similarity"].items():
        # Float32 through two orders of reading the layers.
        np.testing.assert_allclose(found["step_similarity"][kind], rows, rtol=0, atol=1e-4)
    evla("report", tmp_path, "-o", tmp_path / "report")
    assert numbers(tmp_path / "report", "denoising_steps")["step_similarity"] == analyzed["step_similarity"]


@pytest.mark.slow
def test_inputs_of_another_checkpoint_are_told(made, image_samples, tmp_path):
    """Another dense model, and an importance file of another: drawn, with a warning, and no layer called removed."""
    other, root = tmp_path / "other", tmp_path / "mixed"
    pico.write_cogact(other)
    weights = torch.load(other / "checkpoints" / "pico.pt")
    next(iter(weights["model"]["llm_backbone"].values())).mul_(1.5)
    torch.save(weights, other / "checkpoints" / "pico.pt")
    root.mkdir()
    shutil.copytree(made / "bundle", root / "bundle")
    pipeline.analyze_to_file(other, image_samples, root / "importance.json")
    named = ("--dense", other, "--samples", image_samples, "--sample", 0, "--runs", 0)
    printed = evla("report", root, *named, "-o", tmp_path / "report")
    assert printed.count("warning ") == 2
    text = Page(tmp_path / "report" / "index.html").text
    assert f"{other} is not what the bundle was made from: its hash is another." in text
    assert "importance.json was measured on another checkpoint than the bundle was made from." in text
    assert numbers(tmp_path / "report", "layers")["removed"] == []
    assert (tmp_path / "report" / "trajectories.png").exists()


@pytest.mark.slow
def test_texts_are_shown_as_they_are(made, image_samples, tmp_path):
    """Markup, formulas, letters that the font lacks; an image that is not square."""
    samples = tmp_path / "samples"
    samples.mkdir()
    pico.images(1)[0].resize((120, 40)).save(samples / "wide.png")
    instruction = '<b onload="x">put $x_1$ & y</b> into the \u62bd\u5c49, ' + "then close it " * 6
    line = json.dumps({"image": "wide.png", "instruction": instruction})
    (samples / "samples.jsonl").write_text(line + "\n")
    evla("report", made, "--samples", samples, "--runs", 0, "-o", tmp_path / "report")
    page = Page(tmp_path / "report" / "index.html")
    assert " ".join(instruction.split()) in page.text
    assert "b" not in page.tags
    assert numbers(tmp_path / "report", "kept_tokens")["samples"][0]["instruction"] == instruction


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sample", 0), "--samples, which is missing."),
        (("--samples", "SAMPLES", "--sample", 5), "--sample 5: SAMPLES holds 5 samples, 0 to 4."),
        (("--samples", "nowhere"), "nowhere does not exist."),
        (("--dense", "nowhere"), "nowhere does not exist."),
        (("--dense", "SAMPLES"), "SAMPLES"),
        (("--bench", "nowhere.json"), "Cannot read nowhere.json"),
        (("--bench", "IMPORTANCE"), "is not what evla bench --json prints."),
        (("--results", "IMPORTANCE"), "this is not a log of evla eval"),
        (("--results", "EMPTY"), "is empty; evla eval -o writes such a log."),
        (("--device", "cuda:9"), "cannot be used"),
        (("--dense", "RUN", "--unnorm-key", "kichen"), "Did you mean 'kitchen'?"),
        (("--runs", -1), "-1 is not in the range"),
    ],
)
def test_report_refuses(options, message, made, cogact_run, image_samples, importance_file, tmp_path):
    (tmp_path / "empty").touch()
    stands_for = {
        "SAMPLES": image_samples,
        "IMPORTANCE": importance_file,
        "EMPTY": tmp_path / "empty",
        "RUN": cogact_run,
    }
    text = evla_error("report", made, *(stands_for.get(o, o) for o in options), "-o", tmp_path / "report")
    assert message.replace("SAMPLES", str(image_samples)) in text
    assert len(text.splitlines()) == 1
    assert not (tmp_path / "report").exists()


def test_a_directory_without_anything_to_draw_is_refused(made, image_samples, tmp_path):
    assert "does not exist" in evla_error("report", tmp_path / "nowhere", "-o", tmp_path / "report")
    text = evla_error("report", image_samples, "-o", tmp_path / "report")
    assert "holds neither a bundle nor importance.json; give what evla run wrote, or a bundle." in text
    for name in "ab":
        shutil.copytree(made / "bundle", tmp_path / "two" / name)
    assert "holds 2 bundles; give one of them" in evla_error("report", tmp_path / "two", "-o", tmp_path / "report")


@pytest.mark.parametrize("change", ["rows", "references", "settings", "median", "twice"])
def test_a_damaged_report_of_bench_is_refused(change, made, timed, tmp_path):
    bench = json.loads(timed[0].read_text())
    if change in ("rows", "references"):
        bench[change] = []
    elif change == "settings":
        del bench["rows"][0]["settings"]
    elif change == "median":
        bench["rows"][0]["latency_ms"]["whole"]["median"] = -1
    else:
        bench["rows"][0]["name"] = bench["rows"][-1]["name"]
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    text = evla_error("report", made, "--bench", tmp_path / "bench.json", "-o", tmp_path / "report")
    assert "is not what evla bench --json prints." in text


@pytest.mark.slow
def test_only_what_evla_wrote_is_replaced(made, image_samples, tmp_path):
    output = tmp_path / "report"
    evla("report", made, "--runs", 0, "-o", output)
    before = contents(output)
    assert "--overwrite" in evla_error("report", made, "--runs", 0, "-o", output)
    assert contents(output) == before
    evla("report", made, "--samples", image_samples, "--runs", 0, "-o", output, "--overwrite")
    assert (output / "kept_tokens.png").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    text = evla_error("report", made, "--runs", 0, "-o", tmp_path / "mine", "--overwrite")
    assert "is not a directory that evla wrote" in text
    assert os.listdir(tmp_path / "mine") == ["notes.txt"]
    assert "create it first" in evla_error("report", made, "-o", tmp_path / "no" / "report")


def test_what_is_read_is_not_written_over(made, tmp_path):
    root = tmp_path / "out"
    shutil.copytree(made, root)
    before = contents(root)
    for output in (root / "bundle", root / "bundle" / "report"):
        text = evla_error("report", root, "--runs", 0, "-o", output, "--overwrite")
        assert "the same or one lies inside the other" in text
    assert contents(root) == before
    evla("report", root, "--runs", 0, "-o", root / "report")
    assert {name: sha256 for name, sha256 in contents(root).items() if not name.startswith("report/")} == before


def test_without_matplotlib_one_line_says_what_to_install(made, tmp_path, monkeypatch):
    """As where it is not installed: it cannot be found, and importing it fails."""
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    error = evla_error("report", made, "-o", tmp_path / "report")
    assert error == "Error: Drawing needs matplotlib: pip install 'evla[figures]'.\n"
    assert not (tmp_path / "report").exists()
