"""Linear layers with weights in half precision, for processors that cannot multiply in it.

Without bfloat16 units (AVX2, most ARM cores) torch multiplies bfloat16 matrices at about a seventh of the speed of
float32. So the weights stay as they are and are widened to float32 piece by piece, each piece small enough for the
cache; the result is rounded once, after the sum, as a bfloat16 unit does. That is as fast as weights in float32 (faster
where memory bounds it) at half their memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PIECE_ELEMENTS = 2**21  # 8 MiB once widened
_HALF = (torch.bfloat16, torch.float16)


class TiledLinear(nn.Linear):
    """`nn.Linear` for weights in half precision: (..., in) -> (..., out) in the input's dtype, summed in float32."""

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features).float()
        output = input.new_empty(len(rows), self.out_features)
        step = max(1, _PIECE_ELEMENTS // self.in_features)
        for start in range(0, self.out_features, step):
            piece = slice(start, start + step)
            bias = None if self.bias is None else self.bias[piece].float()
            output[:, piece] = F.linear(rows, self.weight[piece].float(), bias)
        return output.view(*input.shape[:-1], self.out_features)


def tile_linear(linear: nn.Linear, weight: torch.dtype, compute: torch.dtype, device: torch.device | str) -> bool:
    """Turn a linear layer whose weight has dtype `weight` into a `TiledLinear` where its device cannot multiply that
    with an input of dtype `compute`. Parameters keep their names and their memory. Returns whether it did."""
    if torch.device(device).type != "cpu" or weight not in _HALF:
        return False
    if weight == compute and multiplies_natively(weight):
        return False
    linear.__class__ = TiledLinear
    return True


def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether this processor can multiply matrices in bfloat16 or float16 without widening them first."""
    # torch has no public question for this; these answers are what its own kernels go by. A build without oneDNN, or a
    # version that has renamed them, gives none: then weights are widened, which is right everywhere.
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    try:
        return bool(getattr(torch.ops.mkldnn, name)())
    except (AttributeError, RuntimeError):
        return False
