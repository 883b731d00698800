"""The running softmax of a row that is read in tiles: each lane of a tile keeps a maximum and a sum of its own.

A row's lanes are reduced once, at its end: no warp waits for another while it reads.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The lowest fp32 number, a lane's first maximum: its difference to a logit of -inf is infinite and adds exp(-inf) = 0,
# where -inf minus -inf would be NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def lane_softmax_update(lane_max, lane_sum, z):
    """One more logit per lane into the maxima and the sums of exponentials, by one exponential per logit."""
    small = tl.exp(-tl.abs(z - lane_max))
    is_new = z > lane_max
    lane_sum = tl.where(is_new, lane_sum * small + 1.0, lane_sum + small)
    return tl.where(is_new, z, lane_max), lane_sum


@triton.jit
def lane_moment_update(lane_max, lane_sum, lane_moment, z):
    """The sums of exponential times (logit - maximum), from the maxima and sums before `z` is added to them."""
    difference = z - lane_max
    small = tl.exp(-tl.abs(difference))
    # A small of 0 leaves nothing of the other summand, whose factor may be infinite.
    risen = tl.where(small > 0.0, small * (lane_moment - difference * lane_sum), 0.0)
    added = lane_moment + tl.where(small > 0.0, small * difference, 0.0)
    return tl.where(difference > 0.0, risen, added)
