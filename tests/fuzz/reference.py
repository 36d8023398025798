"""What a text says, by the standard parsers, and whether evla took it for the same."""

import json
from typing import Any

import yaml


def json_value(text: bytes) -> Any:
    """Errors (ValueError): no JSON, or a name that stands twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), f"accepted a name that stands twice: {pairs!r:.200}"
        return dict(pairs)

    return json.loads(text.decode("utf-8-sig"), object_pairs_hook=unique)


def yaml_value(text: bytes) -> Any:
    """What PyYAML makes of it, which must be what a reader who knows only decimal numbers sees in it."""
    value = yaml.safe_load(text)
    _assert_plain(value, yaml.load(text, yaml.BaseLoader))  # BaseLoader: every scalar is its text
    return value


def _assert_plain(value: Any, text: Any) -> None:
    if isinstance(value, dict):
        assert len(value) == len(text), f"accepted a key that stands twice, or merged: {text!r:.200}"
        for item, item_text in zip(value.items(), text.items(), strict=True):
            _assert_plain([*item], [*item_text])
    elif isinstance(value, list):
        for item, item_text in zip(value, text, strict=True):
            _assert_plain(item, item_text)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        decimal = text.lstrip("+-").replace(".", "").replace("e+", "").replace("e-", "").isdigit()
        assert decimal, f"accepted {text} as {value}"
        assert str(value) == text.lstrip("+") or isinstance(value, float), f"accepted {text} as {value}"
        assert value == float(text) or isinstance(value, int), f"accepted {text} as {value}"


def assert_holds(found: Any, expected: Any, where: str = "") -> None:
    """Everything in `expected` stands in `found`, with its type; integers may have become floats, lists tuples."""
    if isinstance(expected, dict):
        assert isinstance(found, dict), f"{where}: {found!r:.100} for {expected!r:.100}"
        for key, value in expected.items():
            assert key in found, f"{where} lost {key!r:.100}"
            assert_holds(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert isinstance(found, list | tuple), f"{where}: {found!r:.100} for {expected!r:.100}"
        assert len(found) == len(expected), f"{where}: {len(found)} items for {len(expected)}"
        for number, (item, value) in enumerate(zip(found, expected, strict=True)):
            assert_holds(item, value, f"{where}[{number}]")
    else:
        same_type = type(found) is type(expected) or (type(found) is float and type(expected) is int)
        assert same_type, f"{where}: {found!r:.100} for {expected!r:.100}"
        assert found == (float(expected) if type(found) is float else expected), (
            f"{where}: {found!r:.100} for {expected!r:.100}"
        )
