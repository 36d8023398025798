"""Entries of a decoder's config that say something of single layers, and what they are once layers are gone.

Models write them in three forms: a list with one value a layer (`layer_types`), a list of layer numbers
(`attn_layer_indices`), and a mapping from layer number to settings (`per_layer_config`). They are known by their form
and a word in their name, so that the next model's are found, too; whether the pruned model is what it should be is
checked before anything is written (`evla_cli.checking`).
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

# A form alone would also fit languages, labels, or multipliers of which there are as many as layers by chance.
_NAMES = re.compile(r"layer|block|pattern|types$|sparsity|window|heads|intermediate|rope")
_NUMBERS = re.compile(r"layer|idx|indices|index")


def layer_entries(config: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """The entries of `config` that are about single layers."""
    return {key: value for key, value in config.items() if _form(key, value, num_layers)}


def of_kept_layers(config: dict[str, Any], num_layers: int, keep_layers: Sequence[int]) -> dict[str, Any]:
    """Those entries for a decoder that keeps these layers (ascending), which are numbered anew."""
    position = {layer: number for number, layer in enumerate(keep_layers)}
    kept: dict[str, Any] = {}
    for key, value in layer_entries(config, num_layers).items():
        form = _form(key, value, num_layers)
        if form == "values":
            kept[key] = [value[layer] for layer in keep_layers]
        elif form == "numbers":
            kept[key] = [position[layer] for layer in value if layer in position]
        else:  # JSON makes text of the numbers
            kept[key] = {
                type(layer)(position[int(layer)]): entry for layer, entry in value.items() if int(layer) in position
            }
    return kept


def _form(key: str, value: Any, num_layers: int) -> str | None:
    """Which form of such an entry this is: "values", "numbers" or "mapping"; None where it is none."""
    if not value:
        return None
    if isinstance(value, dict):
        return "mapping" if "layer" in key and all(_is_layer(layer, num_layers) for layer in value) else None
    if not isinstance(value, list | tuple):
        return None
    if _NUMBERS.search(key) and all(type(n) is int and 0 <= n < num_layers for n in value):
        ascending = all(a < b for a, b in pairwise(value))
        # Of two layers, [0, 1] may be their numbers or a switch for each; of more, a switch would repeat itself.
        if ascending and (len(value) != num_layers or num_layers > 2 or not key.startswith("no_")):
            return "numbers"
    return "values" if len(value) == num_layers and _NAMES.search(key) else None


def _is_layer(key: Any, num_layers: int) -> bool:
    if isinstance(key, str):
        return re.fullmatch("0|[1-9][0-9]{0,5}", key) is not None and int(key) < num_layers
    return type(key) is int and 0 <= key < num_layers
