"""`method` in the settings: what old files mean, what each method obeys, what is written."""

import pytest

from evla_cli.checkpoint.files import read_yaml, write_yaml
from evla_cli.errors import EvlaError
from evla_cli.settings import (
    CACHE_METHODS,
    TOKEN_METHODS,
    ActionCacheSettings,
    InferenceSettings,
    VisualTokenSettings,
)

# For every key a value that is not its default.
VALUES = {
    "num_keep": 9,
    "prune_layer": 3,
    "num_key": 2,
    "task_ratio": 0.25,
    "context": "instruction",
    "diversity": "greedy",
    "seed": 4,
    "similarity_threshold": 0.9,
    "num_static": 8,
    "num_task": 3,
    "entropy_scale": 2.0,
    "interval": 5,
    "modules": ("mlp",),
    "blocks": (0, 2),
}
METHODS = [(VisualTokenSettings, method, keys) for method, keys in TOKEN_METHODS.items()]
METHODS += [(ActionCacheSettings, method, keys) for method, keys in CACHE_METHODS.items()]


@pytest.mark.parametrize(("section", "method", "keys"), METHODS)
def test_a_method_takes_its_own_keys_and_refuses_the_others(section, method, keys):
    chosen = section(method=method, **{key: VALUES[key] for key in keys})
    assert {key: getattr(chosen, key) for key in keys} == {key: VALUES[key] for key in keys}
    for key in section.__dataclass_fields__.keys() - {"method", *keys}:
        assert getattr(chosen, key) == section.__dataclass_fields__[key].default
        with pytest.raises(EvlaError, match=f"{key} does nothing under method '{method}'.* choose '"):
            section(method=method, **{key: VALUES[key]})


@pytest.mark.parametrize(("section", "method", "keys"), METHODS)
def test_a_file_holds_what_the_method_obeys_and_reads_back(section, method, keys, tmp_path):
    chosen = section(method=method, **{key: VALUES[key] for key in keys})
    name = "visual_tokens" if section is VisualTokenSettings else "action_cache"
    settings = InferenceSettings(**{name: chosen})
    write_yaml(tmp_path / "inference.yaml", settings.to_record(), "")
    assert list(read_yaml(tmp_path / "inference.yaml")[name]) == ["method", *keys]
    assert InferenceSettings.load(tmp_path / "inference.yaml") == settings


def test_a_file_without_method_means_what_it_always_did(tmp_path):
    old = tmp_path / "inference.yaml"
    old.write_text("schema_version: 1\nvisual_tokens: {num_keep: 9}\naction_cache: {interval: 5}\n")
    settings = InferenceSettings.load(old)
    assert settings == InferenceSettings(1, VisualTokenSettings(9), ActionCacheSettings(5))
    assert (settings.visual_tokens.method, settings.action_cache.method) == ("evla", "static")
