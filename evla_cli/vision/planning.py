"""What is removed from the vision towers: blocks by rank within each tower, and rows of every block's MLP.

A tower's last block never runs, and its features are read off the second-to-last one, by evla and by CogACT's own
code. So the last block stays, whatever it holds, as narrow as the others, and so does SigLIP's pooling head.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from evla_cli.errors import EvlaError
from evla_cli.families.base import Checkpoint
from evla_cli.methods.mlp_pruning import prune_width
from evla_cli.methods.row_selection import MlpLayers, select_channels
from evla_cli.plan import LayerScore, StackPlan, ranked

ReadRms = Callable[[str, int], Tensor]  # tower, block -> root mean square of every channel (F)


@dataclass(frozen=True)
class VisionOptions:
    """What `evla prune` is to remove from every tower.

    Attributes:
        drop_layers: blocks that go from each tower, the least important of those that run.
    """

    drop_layers: int = 0
    mlp_prune_ratio: float = 0.0
    mlp_method: str = "activation"

    def __post_init__(self) -> None:
        if self.drop_layers < 0:
            raise EvlaError(f"vision_drop_layers must not be negative, got {self.drop_layers}.")
        if not 0 <= self.mlp_prune_ratio < 1:
            raise EvlaError(f"vision_mlp_prune_ratio is the fraction removed, in [0, 1), got {self.mlp_prune_ratio}.")

    @property
    def any(self) -> bool:
        return self.drop_layers > 0 or self.mlp_prune_ratio > 0


def plan_towers(
    checkpoint: Checkpoint,
    options: VisionOptions,
    scores: Mapping[str, Sequence[LayerScore]],
    read_rms: ReadRms | None,
    seed: int,
) -> tuple[dict[str, StackPlan], dict[str, Any]]:
    """What stays of every tower, and how it was decided, for the plan's `how`; nothing where nothing is to go.

    Args:
        scores: tower -> its blocks that run; needed to drop any.
        read_rms: needed for rows by activation, and to say what goes with any; None: not measured.
    """
    if not options.any:
        return {}, {}
    rankings = {}
    for name in checkpoint.family.towers:
        num_running = checkpoint.tower_sizes(name)[0] - 1
        if options.drop_layers and len(scores.get(name, ())) != num_running:
            raise EvlaError(
                f"--vision-drop-layers needs --importance from evla analyze of this checkpoint: {num_running} blocks "
                f"of the {name} tower run, {len(scores.get(name, ()))} are ranked."
            )
        rankings[name] = ranked(scores[name]) if options.drop_layers else list(range(num_running))
    towers = foreseen_towers(checkpoint, options, rankings)
    facts: dict[str, Any] = {
        "vision_drop_layers": options.drop_layers,
        "vision_mlp_prune_ratio": options.mlp_prune_ratio,
        "vision_mlp_method": options.mlp_method if options.mlp_prune_ratio else None,
        "vision_importance": {name: [score.importance for score in blocks] for name, blocks in scores.items()} or None,
    }
    if options.mlp_prune_ratio:
        energies = {}
        for name, stack in towers.items():
            towers[name], energies[name] = _with_rows(checkpoint, name, stack, options.mlp_method, read_rms, seed)
        facts |= {"removed_output_energy": energies} if all(energies.values()) else {}
    return towers, facts


def foreseen_towers(
    checkpoint: Checkpoint, options: VisionOptions, rankings: Mapping[str, Sequence[int]] | None = None
) -> dict[str, StackPlan]:
    """Plans of the size that the options lead to, with the first channels of every block and, without rankings, other
    blocks than will be chosen."""
    if not options.any:
        return {}
    if not checkpoint.family.towers:
        raise EvlaError(f"{checkpoint.root} has no vision towers that could be pruned; leave out the --vision options.")
    towers = {}
    for name in checkpoint.family.towers:
        num_blocks, width = checkpoint.tower_sizes(name)
        ranking = list(range(num_blocks - 1)) if rankings is None else rankings[name]
        if options.drop_layers > num_blocks - 2:
            raise EvlaError(
                f"Cannot drop {options.drop_layers} blocks of the {name} tower: of its {num_blocks}, "
                f"{num_blocks - 1} run, and at least one must stay."
            )
        keep = tuple(sorted([*ranking[options.drop_layers :], num_blocks - 1]))
        num_rows = prune_width(width, options.mlp_prune_ratio)
        if options.mlp_prune_ratio and num_rows == width:
            raise EvlaError(
                f"--vision-mlp-prune-ratio {options.mlp_prune_ratio} removes none of {width} channels of the {name} "
                "tower, since what stays is rounded to a multiple of 64 (narrow MLPs: less); give a larger ratio, or 0."
            )
        mlp_keep = (tuple(range(num_rows)),) * len(keep) if num_rows < width else None
        towers[name] = StackPlan(num_blocks, width, keep, mlp_keep)
    return towers


def _with_rows(
    checkpoint: Checkpoint, name: str, stack: StackPlan, method: str, read_rms: ReadRms | None, seed: int
) -> tuple[StackPlan, dict[str, Any] | None]:
    """The plan with its rows chosen, and what goes with the others, where that was measured.

    The last block keeps its first rows: it never runs.
    """
    blocks = checkpoint.family.towers[name].blocks

    def read_mlp(block: int) -> tuple[Tensor, Tensor, Tensor]:
        """(F, D), (F, 1), (D, F): no second matrix gates the first, which its zeros say."""
        rows, columns = (checkpoint.weights[f"{blocks}.{block}.mlp.{fc}.weight"].load() for fc in ("fc1", "fc2"))
        return rows, rows.new_zeros(len(rows), 1), columns

    def read(block: int) -> Tensor:
        assert read_rms is not None
        return read_rms(name, block)

    mlps = MlpLayers(
        stack.keep_layers[:-1],
        read_mlp,
        stack.intermediate_size,
        stack.kept_intermediate_size,
        None if read_rms is None else read,
    )
    choice = select_channels(method, mlps, seed)
    unused = tuple(range(stack.kept_intermediate_size))
    return replace(stack, mlp_keep=(*choice.rows, unused)), choice.removed_energy


def check_towers(towers: Mapping[str, StackPlan], checkpoint: Checkpoint) -> None:
    """Errors: the towers of a plan are not those of the checkpoint, or lose the block that must stay."""
    for name, stack in towers.items():
        if name not in checkpoint.family.towers:
            raise EvlaError(f"The plan prunes the vision tower '{name}', which {checkpoint.root} does not have.")
        sizes = checkpoint.tower_sizes(name)
        if sizes != (stack.num_layers, stack.intermediate_size):
            raise EvlaError(
                f"The plan is for a {name} tower of {stack.num_layers} blocks with {stack.intermediate_size} channels, "
                f"that of {checkpoint.root} has {sizes[0]} with {sizes[1]}."
            )
        if stack.keep_layers[-1] != stack.num_layers - 1 or len(stack.keep_layers) < 2:
            raise EvlaError(
                f"The plan must keep the last block of the {name} tower, which never runs, and one before it: the "
                "features are those of the second-to-last block."
            )
