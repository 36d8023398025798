"""Every version of the libraries that is declared: the same actions, no call that is to go, one warning beyond them."""

import configparser
import json
import logging
import re
import shutil
import warnings
from pathlib import Path

import demo_actions
import numpy as np
import pico
import pytest
from check_versions import read_pins
from test_cli import evla, evla_json

from evla_cli import versions
from evla_cli.evaluation.latency import Batch, measure_latency
from evla_cli.evaluation.stock import load_stock_policy
from evla_cli.families import open_checkpoint
from evla_cli.runtime.policy import load_policy, policy_from_checkpoint
from evla_cli.settings import InferenceSettings
from evla_cli.versions import NEWEST_TESTED, untested, warn_of_untested_versions

ROOT = Path(__file__).resolve().parent.parent


def test_the_demos_actions_are_those_of_every_version():
    expected = json.loads(demo_actions.FILE.read_text())
    found = demo_actions.demo_actions()
    assert list(found) == list(expected)
    for name, actions in found.items():
        # float32 in the kernels of another processor or version; a token chosen otherwise moves them by 0.01.
        np.testing.assert_allclose(actions, expected[name], rtol=0, atol=1e-4, err_msg=name)


def test_no_command_calls_what_a_library_means_to_drop(cogact_run, image_samples, tmp_path):
    samples = ("--samples", image_samples, "--num-samples", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        evla("analyze", cogact_run, *samples, "-o", tmp_path / "i.json")
        options = ("--importance", tmp_path / "i.json", "--drop-layers", 1, "--mlp-prune-ratio", 0.5)
        evla("prune", cogact_run, tmp_path / "pruned", *options, "--mlp-method", "activation")
        for name, tokens in (("evla", "{num_keep: 7, num_key: 2}"), ("vla_cache", "{method: vla_cache}")):
            (tmp_path / "s.yaml").write_text(f"schema_version: 1\nvisual_tokens: {tokens}\n")
            evla("export", tmp_path / "pruned", tmp_path / name, "--settings", tmp_path / "s.yaml")
            assert evla_json("verify", tmp_path / name)["ok"]
            evla("predict", tmp_path / name, "--image", image_samples / "0.png", "--instruction", "open")
        evla("compare", cogact_run, tmp_path / "evla", *samples)
        # All that `evla bench` runs; the command itself starts a process for each candidate.
        policies = [load_stock_policy(cogact_run), *(load_policy(tmp_path / name) for name in ("evla", "vla_cache"))]
        measure_latency(
            {str(number): policy for number, policy in enumerate(policies)},
            Batch(pico.images(1), ["open drawer"]),
            runs=1,
            warmup=1,
        )


def test_another_kind_of_attention_in_a_config_changes_nothing(bundle, tmp_path):
    """The decoder's masks are made for SDPA, which needs none without padding; eager attention looked ahead then."""
    shutil.copytree(bundle, tmp_path / "eager", ignore=shutil.ignore_patterns("manifest.json"))
    config = json.loads((bundle / "config.json").read_text())
    (tmp_path / "eager/config.json").write_text(json.dumps(config | {"attn_implementation": "eager"}))
    pruned = InferenceSettings.load(bundle / "inference.yaml")
    usual, other = (
        policy_from_checkpoint(path, pruned).predict_action(pico.images(1)[0], "open drawer", seed=0)
        for path in (bundle, tmp_path / "eager")
    )
    np.testing.assert_allclose(other, usual, rtol=0, atol=1e-4)  # the towers do as asked: float32 in another order


def test_newest_tested_is_what_the_pinned_files_say():
    newest, usual = read_pins(ROOT / "constraints/newest.txt"), read_pins(ROOT / "constraints.txt")
    assert {
        "python": _classified()[-1],
        "numpy": usual["numpy"],
        "torch": usual["torch"],
        "transformers": newest["transformers"],
    } == NEWEST_TESTED


def test_the_oldest_are_the_lower_bounds():
    """All but torch's, which is left as it is."""
    bounds = dict(re.findall(r"^([\w-]+)>=([\d.]+)", _setup()["options"]["install_requires"].strip(), re.MULTILINE))
    oldest = read_pins(ROOT / "constraints/oldest.txt")
    assert bounds.keys() - oldest.keys() == {"torch"}
    for name in bounds.keys() - {"torch"}:
        assert oldest[name].startswith(bounds[name]), name
    assert _setup()["options"]["python_requires"] == f">={_classified()[0]}"


def _setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def _classified() -> list[str]:
    return re.findall(r"Python :: (3\.\d+)", _setup()["metadata"]["classifiers"])


@pytest.mark.parametrize(
    "installed",
    [{}, {"torch": "2.13.0+cpu"}, {"torch": "2.13.0.dev1"}, {"transformers": "5.9.2", "numpy": "1.26.4"}],
)
def test_what_was_tested_and_older_is_passed_in_silence(installed):
    assert untested(NEWEST_TESTED | installed) == ""


def test_what_is_newer_is_named_in_one_line():
    line = untested(NEWEST_TESTED | {"transformers": "5.100.0", "torch": "2.13.1+cu130", "python": "3.14"})
    assert "python 3.14 is newer than 3.13, torch 2.13.1+cu130 is newer than 2.13.0, transformers 5.100.0 is" in line
    assert "\n" not in line


def test_the_warning_comes_once_however_much_is_opened(cogact_run, bundle, monkeypatch, caplog):
    monkeypatch.setitem(versions.NEWEST_TESTED, "transformers", "5.0.0")
    warn_of_untested_versions.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "evla_cli"):
            for path in (cogact_run, bundle, cogact_run):
                open_checkpoint(path)
    finally:
        warn_of_untested_versions.cache_clear()
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"Warning: transformers [\d.]+ is newer than 5\.0\.0, the newest .*", line)
