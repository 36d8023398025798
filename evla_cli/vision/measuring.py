"""What each block of a vision tower does, seen while calibration samples pass through on their way to the decoder.

Patches alone count: class and register tokens are no part of what the towers hand on. The importance of a block is
|out - in|^2 / (2 |in| |out|), mean over them: the features leave a tower as they are, long or short.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from evla_cli.errors import EvlaError
from evla_cli.families.base import Checkpoint, Tower
from evla_cli.methods.layer_importance import importance_and_error, position_likeness, sample_similarity
from evla_cli.methods.mlp_pruning import channel_energy
from evla_cli.plan import LayerScore
from evla_cli.ranks import Ranks

Energies = list[tuple[Tensor, int]]  # by batch: sum of squares of every channel, number of rows


class TowerMeter:
    """Gathers, for every block that runs, the likeness of its input and output by sample and, `with_channels`, the
    energy of its MLP channels by batch. `watch` is for `DecoderStream`."""

    def __init__(self, checkpoint: Checkpoint, with_channels: bool = False):
        self._towers, self._with_channels = checkpoint.family.towers, with_channels
        num_blocks = {name: checkpoint.tower_sizes(name)[0] - 1 for name in self._towers}
        self._similarities: dict[str, list[list[float]]] = {n: [[] for _ in range(num_blocks[n])] for n in num_blocks}
        self._energies: dict[str, list[Energies]] = {n: [[] for _ in range(num_blocks[n])] for n in num_blocks}

    @contextmanager
    def watch(self, model: Any) -> Iterator[None]:
        handles: list[Any] = []
        for name, tower in self._towers.items():
            for number, block in enumerate(model.get_submodule(tower.blocks)[:-1]):
                handles += self._hooks(name, tower, model, number, block)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, name: str, tower: Tower, model: Any, number: int, block: Any) -> Iterator[Any]:
        begin = tower.num_prefix_tokens(model.config)
        similarities, energies = self._similarities[name][number], self._energies[name][number]

        def compare(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            values = sample_similarity(position_likeness(arguments[0][:, begin:], output[:, begin:]), None)
            if not bool(values.isfinite().all()):
                raise EvlaError(
                    f"Block {number} of the {name} tower gives NaN or infinite hidden states in {output.dtype}; try "
                    "--dtype float32."
                )
            similarities.extend(values.tolist())

        def add_up(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            energies.append(channel_energy(arguments[0][:, begin:], None))

        yield block.register_forward_hook(compare)
        if self._with_channels:
            yield block.mlp.fc2.register_forward_pre_hook(add_up)

    def scores(self, ranks: Ranks) -> dict[str, tuple[LayerScore, ...]]:
        """Of every tower; each rank is given those of all samples."""
        return {
            name: tuple(
                LayerScore(number, *importance_and_error(ranks.gather(values))) for number, values in enumerate(blocks)
            )
            for name, blocks in self._similarities.items()
        }

    def channels(self, ranks: Ranks, reduce: Callable[[Energies], Any]) -> dict[str, Any]:
        """`reduce` of the energies of all batches, for every block: `dino.0`, `dino.1`, ..."""
        return {
            channel_name(name, number): reduce(ranks.gather(energies))
            for name, blocks in self._energies.items()
            for number, energies in enumerate(blocks)
        }


def channel_name(tower: str, block: int) -> str:
    """What a block's channels are called in the file that `activations_file` names."""
    return f"{tower}.{block}"
