"""PruneNet as published, beside which evla's is measured: mean KS distance of its rows of a checkpoint's gate matrices.

    python scripts/published_prunenet.py out/bench-perplexity/model

The policy is a linear map of a row of the gate matrix from hidden to intermediate size, then a vector; the loss is
-reward * sum of log(keep probability) over the drawn rows, the reward 1 / KS between the singular values of the matrix
and of the slice, each counting once. docs/prunenet.md says why this policy does not learn. What the published code
(github.com/LCS2-IIITD/PruneNet) does otherwise is mended as far as it must be to run: the score itself stands for
log(a) - log(1 - a), which is NaN once a rounds to 1; the gradient is clipped before the step; W (A^T r) + b.r stands
for (W A^T + b) r; of all policies seen the best is kept; top rows are taken, not drawn, in the end. F, D as in evla.
"""

import argparse
import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from evla_cli.families import open_checkpoint
from evla_cli.methods.mlp_pruning import prune_width, select_rows_random, top_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--mlp-prune-ratio", type=float, default=0.25)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.checkpoint)
    gates = [
        checkpoint.weights[f"{checkpoint.family.decoder_layers}.{layer}.mlp.gate_proj.weight"].load().float()
        for layer in range(checkpoint.num_layers)
    ]
    num_keep = prune_width(checkpoint.intermediate_size, arguments.mlp_prune_ratio)
    spectra = [singular_values(gate) for gate in gates]
    for seed in range(arguments.seeds):
        random = [select_rows_random(gates[0].shape[0], num_keep, seed, layer) for layer in range(len(gates))]
        found = [ks_distance(spectra[at], singular_values(gates[at][rows])) for at, rows in enumerate(random)]
        print(f"seed {seed}: mean KS of random rows {sum(found) / len(found):.4f}", flush=True)
        _, history = published_rows(gates, num_keep, seed)
        print(f"seed {seed}: mean KS of the policy's top rows, untrained {history[0]:.4f}, best {min(history):.4f}")


def published_rows(
    gates: list[Tensor], num_keep: int, seed: int = 0, episodes: int = 20, discount: float = 0.99
) -> tuple[list[Tensor], list[float]]:
    """The top rows of the best policy for every gate matrix (F, D), and mean KS of the top rows by episode."""
    torch.manual_seed(seed)
    num_rows, bound = gates[0].shape[0], gates[0].shape[1] ** -0.5
    parameters = [
        nn.Parameter(torch.empty(gates[0].shape).uniform_(-bound, bound)),
        nn.Parameter(torch.empty(num_rows).uniform_(-bound, bound)),
        nn.Parameter(torch.rand(num_rows)),
    ]
    linear, bias, vector = parameters
    optimizer = torch.optim.AdamW(parameters, lr=0.001)
    spectra = [singular_values(gate) for gate in gates]

    def score(gate: Tensor) -> Tensor:
        return gate @ (linear.T @ vector) + bias @ vector

    def distance(at: int, rows: Tensor) -> float:
        return ks_distance(spectra[at], singular_values(gates[at][rows]))

    history: list[float] = []
    best: list[Tensor] = []
    for episode in range(episodes + 1):
        with torch.no_grad():
            tops = [top_rows(score(gate), num_keep) for gate in gates]
            history.append(sum(distance(at, rows) for at, rows in enumerate(tops)) / len(gates))
            if history[-1] == min(history):
                best = tops
            if episode == episodes:
                break
            draws, rewards = [], []
            for at, gate in enumerate(gates):  # the policy is fixed while an episode's rows are drawn
                keep = nn.functional.logsigmoid(score(gate) + noise(num_rows, seed, episode, at, "noise"))
                gumbel = -torch.log(-torch.log(uniform(num_rows, seed, episode, at, "draw")))
                draws.append(top_rows(keep + gumbel, num_keep))  # K in proportion to keep, without replacement
                rewards.append(1 / max(distance(at, draws[-1]), 0.5 / min(gate.shape)))
        for at, gate in enumerate(gates):
            keep = nn.functional.logsigmoid(score(gate) + noise(num_rows, seed, episode, at, "loss"))
            loss = -keep[draws[at]].sum() * discount**at * rewards[at]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    return best, history


def singular_values(matrix: Tensor) -> Tensor:
    """Ascending, from the smaller Gram matrix in float64."""
    narrow = matrix.double() if matrix.shape[0] >= matrix.shape[1] else matrix.double().T
    return torch.linalg.eigvalsh(narrow.T @ narrow).clamp_min(0).sqrt()


def ks_distance(a: Tensor, b: Tensor) -> float:
    """Two-sample Kolmogorov-Smirnov statistic of ascending values."""
    at = torch.cat([a, b])
    below_a, below_b = (torch.searchsorted(values, at, right=True) / values.numel() for values in (a, b))
    return float((below_a - below_b).abs().max())


def uniform(num: int, *path: object) -> Tensor:
    digest = hashlib.sha256("/".join(map(str, path)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    return torch.rand(num, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)


def noise(num: int, *path: object) -> Tensor:
    """Relaxed-Bernoulli noise for a score."""
    return torch.logit(uniform(num, *path)).float()


if __name__ == "__main__":
    main()
