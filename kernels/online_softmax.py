"""Online softmax of a row that is read in tiles: each lane of a tile keeps its own maximum and sum.

A row's lanes are reduced once, at the end of the row: no warp waits for another while it reads.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The lowest fp32 number, a lane's initial maximum: a logit of -inf minus it is -inf and adds exp(-inf) = 0, but -inf
# minus -inf would be NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def lane_softmax_update(lane_max, lane_sum, z):
    """Adds one logit per lane to the maxima and the sums of exponentials, with one exponential per logit."""
    small = tl.exp(-tl.abs(z - lane_max))
    is_new = z > lane_max
    lane_sum = tl.where(is_new, lane_sum * small + 1.0, lane_sum + small)
    return tl.where(is_new, z, lane_max), lane_sum


@triton.jit
def lane_moment_update(lane_max, lane_sum, lane_moment, z):
    """Updates the sums of exponential times (logit - maximum), given the maxima and sums before `z` is added."""
    difference = z - lane_max
    small = tl.exp(-tl.abs(difference))
    # If small is 0, the other summand vanishes; its factor may be infinite.
    risen = tl.where(small > 0.0, small * (lane_moment - difference * lane_sum), 0.0)
    added = lane_moment + tl.where(small > 0.0, small * difference, 0.0)
    return tl.where(difference > 0.0, risen, added)


@triton.jit
def lane_square_update(lane_max, lane_square, z):
    """Updates the sums of squared exponentials, given the maxima before `z` is added."""
    small = tl.exp(-tl.abs(z - lane_max))
    return tl.where(z > lane_max, lane_square * small * small + 1.0, lane_square + small * small)
