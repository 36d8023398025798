"""Reuse the action head's block outputs between denoising steps (FORA, arXiv 2407.01425; EfficientVLA, section 3.4).

CogACT's blocks add their attention and their MLP output to the stream without a gate. So where every block reuses both,
the reused outputs sum up to one tensor, the stream's change over the whole stack at the last computed step: one buffer
and one addition instead of two a block (`StackCache`). Where only some modules are reused, each keeps its own output
(`ModuleCache`). A cache lives for one sampling call; rows of classifier-free guidance share one schedule.
"""

from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

BlockRunner = Callable[[nn.ModuleList, Tensor], Tensor]  # how an action head runs its block stack


def cache_schedule(num_steps: int, interval: int) -> tuple[bool, ...]:
    """True where a step is computed: steps since the start, not the diffusion's own time steps.

    (CogACT's time steps are 90, 80, ... 0. Read literally, the paper's `t mod 5` would compute them all.)
    """
    return tuple(step % interval == 0 for step in range(num_steps))


class StackCache:
    """The change of the whole block stack, one tensor (B, 1 + H, E) in float32."""

    def __init__(self, schedule: Sequence[bool]):
        self.schedule = schedule
        self.change: Tensor | None = None

    def at(self, step: int) -> BlockRunner:
        def run(blocks: nn.ModuleList, tokens: Tensor) -> Tensor:
            if self.schedule[step]:
                output = tokens
                for block in blocks:
                    output = block(output)
                if step + 1 < len(self.schedule) and not self.schedule[step + 1]:
                    self.change = output.float() - tokens.float()
                return output
            assert self.change is not None, "the first step of a schedule is always computed"
            return (tokens.float() + self.change).to(tokens.dtype)

        return run


class ModuleCache:
    """The attention and MLP outputs of the blocks that reuse them."""

    def __init__(self, schedule: Sequence[bool], modules: Collection[str], blocks: Collection[int]):
        self.schedule = schedule
        self.modules, self.blocks = modules, blocks
        self.outputs: dict[tuple[int, str], Tensor] = {}

    def at(self, step: int) -> BlockRunner:
        def run(blocks: nn.ModuleList, tokens: Tensor) -> Tensor:
            for number, block in enumerate(blocks):
                tokens = tokens + self._output(step, number, "attention", block.norm1, block.attn, tokens)
                tokens = tokens + self._output(step, number, "mlp", block.norm2, block.mlp, tokens)
            return tokens

        return run

    def _output(self, step: int, block: int, kind: str, norm: Any, module: Any, tokens: Tensor) -> Tensor:
        if kind not in self.modules or block not in self.blocks:
            return module(norm(tokens))
        if self.schedule[step]:
            self.outputs[block, kind] = module(norm(tokens))
        return self.outputs[block, kind]


def step_similarity(features: Sequence[Tensor]) -> list[float]:
    """Cosine between one module's outputs at consecutive steps, mean over batch and tokens (the paper's figure 1c)."""
    pairs = pairwise(features)
    cosine = torch.nn.functional.cosine_similarity
    return [float(cosine(before.float(), after.float(), dim=-1).mean()) for before, after in pairs]
