"""CogACT's diffusion transformer: predicts the noise in an action chunk from one cognition token.

Letters used here: B batch, H action horizon, A action dim, D language-model width, E head width.
Module names equal those of CogACT's published checkpoints (`action_model.net.*`), so weights need no renaming.

Reference: Li et al., "CogACT", arXiv 2411.19650, sections 3.3 and A; Peebles and Xie, "DiT", arXiv 2212.09748.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

BlockRunner = Callable[[nn.ModuleList, Tensor], Tensor]


class ActionHeadConfig(PreTrainedConfig):
    """Sizes of the action head; the defaults are DiT-B. DiT-S is 6 x 384 with 4 heads, DiT-L 24 x 1024 with 16."""

    model_type = "cogact_action_head"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    condition_size: int = 4096  # width of the cognition token
    action_dim: int = 7
    action_horizon: int = 16  # actions in a chunk: the present one and 15 future ones
    num_train_steps: int = 100


class ActionHead(nn.Module):
    def __init__(self, config: ActionHeadConfig):
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.history_embedder = _Projection(config.action_dim, width)  # published weights carry it; nothing uses it
        self.x_embedder = _Projection(config.action_dim, width)
        self.t_embedder = TimestepEmbedder(width)
        self.z_embedder = ConditionEmbedder(config.condition_size, width)
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(config.action_horizon + 1, width))
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.num_hidden_layers))
        self.final_layer = FinalLayer(width, config.action_dim)

    def forward(
        self, noisy_actions: Tensor, timesteps: Tensor, condition: Tensor, run_blocks: BlockRunner | None = None
    ) -> Tensor:
        """The predicted noise.

        Args:
            noisy_actions: (B, H, A), normalised actions with noise.
            timesteps: (B,), the training steps the noise belongs to, 0 (almost clean) to 99.
            condition: (B, 1, D), the cognition token, or `null_condition` where there is none.
            run_blocks: how the block stack is run; caching (`evla_cli.methods.action_cache`) goes in here.
        """
        context = self.t_embedder(timesteps).unsqueeze(1) + self.z_embedder(condition)
        return self.denoise(noisy_actions, context, run_blocks)

    def denoise(self, noisy_actions: Tensor, context: Tensor, run_blocks: BlockRunner | None = None) -> Tensor:
        """`forward` from time and condition embedded already: their sum is one token, (B, 1, E)."""
        tokens = (run_blocks or run_all_blocks)(self.blocks, self.embed(noisy_actions, context))
        return self.final_layer(tokens)[:, 1:]  # (B, 1 + H, A) -> (B, H, A)

    def embed(self, noisy_actions: Tensor, context: Tensor) -> Tensor:
        """(B, 1 + H, E): the context token, then one a noisy action."""
        return torch.cat((context, self.x_embedder(noisy_actions)), dim=1) + self.positional_embedding

    def null_condition(self, batch_size: int) -> Tensor:
        """(B, 1, D): the learned condition of classifier-free guidance's unconditional half."""
        return self.z_embedder.uncondition.unsqueeze(0).expand(batch_size, 1, -1)


def run_all_blocks(blocks: nn.ModuleList, tokens: Tensor) -> Tensor:
    for block in blocks:
        tokens = block(tokens)
    return tokens


class DiTBlock(nn.Module):
    """Pre-norm transformer block without gates or adaptive norms: time enters as a token, not as a modulation."""

    def __init__(self, config: ActionHeadConfig):
        super().__init__()
        width = config.hidden_size
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, config.num_attention_heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, config.intermediate_size)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        qkv = self.qkv(tokens).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, E / heads)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width))


class Mlp(nn.Module):
    def __init__(self, width: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(width, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens), approximate="tanh"))


class TimestepEmbedder(nn.Module):
    """Sinusoids of the time step, then a small MLP."""

    num_frequencies = 128

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        angles = timesteps[:, None].float() * _frequencies(self.num_frequencies, timesteps.device)  # (B, 128)
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


@functools.lru_cache
def _frequencies(count: int, device: torch.device) -> Tensor:
    exponents = torch.arange(count, dtype=torch.float32) / count
    return torch.exp(-math.log(10000) * exponents).to(device)


class ConditionEmbedder(nn.Module):
    """Projects the cognition token and owns the null condition, which has the cognition token's width."""

    def __init__(self, condition_size: int, width: int):
        super().__init__()
        self.linear = nn.Linear(condition_size, width)
        self.uncondition = nn.Parameter(0.02 * torch.randn(1, condition_size))

    def forward(self, condition: Tensor) -> Tensor:
        return self.linear(condition)


class FinalLayer(nn.Module):
    def __init__(self, width: int, action_dim: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, action_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.norm_final(tokens))


class _Projection(nn.Module):
    """One linear layer under the name that the published weights use (`x_embedder.linear`)."""

    def __init__(self, in_size: int, out_size: int):
        super().__init__()
        self.linear = nn.Linear(in_size, out_size)

    def forward(self, values: Tensor) -> Tensor:
        return self.linear(values)
