"""Whether weights are quantised, and how, as the config or their names tell. evla works on plain weights alone."""

from collections.abc import Iterable
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

from evla_cli.errors import EvlaError

_SECTIONS = ("quantization_config", "compression_config")  # the latter in older configs of compressed-tensors
_BITS = ("bits", "w_bit", "nbits", "weight_bits")  # gptq and awq, old awq, hqq, others
# What replaces a linear layer's `weight`, or stands beside it, by who writes it.
_SUFFIXES = {
    ".qweight": "gptq or awq",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "fp8",
    ".weight_scale": "fp8 or int8",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".W_q": "hqq",
    "_blocks": "mxfp4",
}


def check_not_quantized(config: dict[str, Any], names: Iterable[str], where: Path) -> None:
    found = quantization(config, names)
    if found is not None:
        raise EvlaError(
            f"{where} is quantised ({found}): evla needs the model as it was before; prune that, and quantise the "
            "result."
        )


def quantization(config: dict[str, Any], names: Iterable[str]) -> str | None:
    """The method, such as "gptq, 4 bits"; None where the weights are plain.

    Args:
        config: the model's, whole.
        names: of the weights.
    """
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _SECTIONS:
            if section.get(key):
                return _said(section[key])
    for name in names:
        for suffix, method in _SUFFIXES.items():
            if name.endswith(suffix):
                return f"{method}, by the name of {name}"
    return None


def _said(entry: Any) -> str:
    if not isinstance(entry, dict):
        return short_repr(entry)
    method = entry.get("quant_method")
    for bits in (4, 8):
        if entry.get(f"load_in_{bits}bit"):  # older configs of bitsandbytes name no method
            return f"{method or 'bitsandbytes'}, {bits} bits"
    said = next((f", {entry[key]} bits" for key in _BITS if type(entry.get(key)) is int), "")
    return f"{method or 'by an unnamed method'}{said}"
