"""How sure a choice of layers is: a bootstrap over calibration samples, and what other samples would have chosen.

Samples are drawn with replacement, whole and for all layers at once: layers are compared on the same samples. Letters
used here: R resamples, S samples, L layers or candidates.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000
SEED = 0
# A choice that more than one resample in twenty would have made the other way is no choice that the samples made.
UNDECIDED_SHARE = 0.05


def resample_weights(num_samples: int, num_resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """(R, S), each row adding up to 1: how much every sample counts in each resample."""
    counts = np.random.default_rng(seed).multinomial(num_samples, [1 / num_samples] * num_samples, num_resamples)
    return counts / num_samples


def drop_shares(values: np.ndarray, num_drop: int, candidates: Sequence[int]) -> np.ndarray:
    """(L): in what share of the resamples a layer is among the `num_drop` candidates of lowest mean; ties: lower index.

    Args:
        values: (S, L), every sample's value for every layer.
    """
    means = resample_weights(len(values)) @ values[:, list(candidates)]
    lowest = np.argsort(means, axis=1, kind="stable")[:, :num_drop]
    shares = np.zeros(values.shape[1])
    np.add.at(shares, np.asarray(candidates)[lowest.ravel()], 1 / len(means))
    return shares.round(6)


def exchanged_share(dropped: np.ndarray, kept: np.ndarray) -> float:
    """In what share of the resamples the layer that stays has the lower mean: values of both (S), sample by sample."""
    return float(((resample_weights(len(kept)) @ (kept - dropped)) < 0).mean().round(6))


def stability(values: np.ndarray, dropped: Collection[int], candidates: Collection[int]) -> dict[str, Any] | None:
    """For the plan: whether the samples told the last layer that goes from the first that stays.

    Args:
        values: (S, L), every sample's value for every layer.
        dropped: layers that go, chosen by the mean among the candidates.
        candidates: layers that could have been chosen.

    Returns None where there is nothing to tell: one sample, or no choice.
    """
    ordered = sorted(candidates, key=lambda layer: (values[:, layer].mean(), layer))
    out, stay = [n for n in ordered if n in dropped], [n for n in ordered if n not in dropped]
    if len(values) < 2 or not out or not stay:
        return None
    shares = drop_shares(values, len(out), sorted(candidates))
    share = exchanged_share(values[:, out[-1]], values[:, stay[0]])
    return {
        "num_resamples": RESAMPLES,
        "seed": SEED,
        "last_dropped": out[-1],
        "first_kept": stay[0],
        "exchanged_share": share,
        "told_apart": share <= UNDECIDED_SHARE,
        "drop_shares": {layer: float(shares[layer]) for layer in sorted(candidates)},
    }


def set_stability(drawn: np.ndarray, dropped: Collection[int], candidates: Collection[int]) -> dict[str, Any] | None:
    """`stability` of a set that is chosen as a whole, from the set that every resample chooses, (R, L) bool.

    The last layer that goes is the one that the fewest resamples remove, the first that stays the one that most do.
    """
    shares = drawn.mean(axis=0).round(6)
    out = [layer for layer in candidates if layer in dropped]
    stay = [layer for layer in candidates if layer not in dropped]
    if not out or not stay:
        return None
    last, first = min(out, key=lambda layer: shares[layer]), max(stay, key=lambda layer: shares[layer])
    share = float((drawn[:, first] & ~drawn[:, last]).mean().round(6))
    return {
        "num_resamples": RESAMPLES,
        "seed": SEED,
        "last_dropped": last,
        "first_kept": first,
        "exchanged_share": share,
        "told_apart": share <= UNDECIDED_SHARE,
        "drop_shares": {layer: float(shares[layer]) for layer in sorted(candidates)},
    }
