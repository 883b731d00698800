"""Tile sizes and thresholds of the preference loss, and the bytes that its kernels move.

Legend: N tokens, K completions, P pairs.
"""

from __future__ import annotations

# Up to this size each pair sums the tokens of both sides, in one launch.
DIRECT_TOKENS = 8192
# Up to this size each piece of a completion reads all pairs, in a backward of one launch.
DIRECT_PAIRS = 128
# Maximum tokens summed by one program; longer batches have longer pieces, so that no completion has more than
# MAX_PIECES to join for each of its pairs.
MIN_PIECE = 1024
MAX_PIECES = 1024
# A tile of completions: one per row, COLUMNS tokens at a time; completions of 128 tokens fill it. The forward waits
# for its loads, so its tiles are larger: 64 bytes per thread are in flight.
SUM_ROWS, GRAD_ROWS, COLUMNS = 8, 4, 128
PAIR_ROWS, PAIR_COLUMNS = 32, 32
BLOCK_N = 1024
BLOCK_P = 256
MAX_PEAKS = 256
PEAK_BLOCK = 1024
NUM_WARPS = 4


def cdiv(number: int, divisor: int) -> int:
    """Quotient, rounded up."""
    return -(-number // divisor)


def piece_tokens(num_tokens: int) -> int:
    """Tokens of a piece: a power of two."""
    return max(MIN_PIECE, 1 << (cdiv(num_tokens, MAX_PIECES) - 1).bit_length())


def fixed_point_bits(num_pairs: int) -> int:
    """Bits of the largest term of a coefficient such that 2 P terms fit in 61 bits."""
    return 61 - (2 * num_pairs).bit_length()


def num_peaks(num_pairs: int, num_completions: int) -> int:
    """Programs that search for the largest term and zero the accumulators."""
    return min(MAX_PEAKS, cdiv(max(num_pairs, num_completions), PEAK_BLOCK))


def num_blocks(num_tokens: int) -> int:
    """Blocks of tokens in which a later piece of a completion can begin: all but the batch's first."""
    return max(0, cdiv(num_tokens, piece_tokens(num_tokens)) - 1)


def moved_bytes(
    num_tokens: int,
    num_pairs: int,
    num_completions: int,
    has_weight: bool = False,
    *,
    has_pair_beta: bool = False,
    has_pair_weight: bool = False,
    tokens_of_pairs: int | None = None,
    anchors: int = 0,
    later_pieces: int = 0,
    later_pieces_of_pairs: int = 0,
    empty_tiles: int = 0,
    logp_bytes: int = 4,
) -> tuple[int, int]:
    """Bytes that the kernels load and store, forward and backward, given offsets and int64 indices.

    Args:
        num_tokens, num_pairs, num_completions: N, P, K.
        has_weight: with fp32 token weights.
        has_pair_beta, has_pair_weight: with fp32 factors of each pair, which only the forward reads.
        tokens_of_pairs: sum over the pairs of the tokens of both sides (None: N, each completion is in one pair).
        anchors: sides of pairs that are the constant 0.
        later_pieces: pieces that are not their completion's first; `cdiv(length, piece_tokens(N)) - 1` each.
        later_pieces_of_pairs: sum over the pairs of the later pieces of both sides.
        empty_tiles: tiles of GRAD_ROWS completions without a token.
        logp_bytes: size of a log-prob.

    An atomic addition counts as a load and a store.
    """
    per_token, blocks = 2 * logp_bytes + 4 * has_weight, num_blocks(num_tokens)
    of_pairs = num_pairs * (4 * 4 + 4 * has_pair_beta + 4 * has_pair_weight)
    sides = 2 * num_pairs - anchors  # their offsets are read
    if is_direct(num_tokens, num_pairs):
        tokens = num_tokens if tokens_of_pairs is None else tokens_of_pairs
        forward = tokens * per_token + num_pairs * 16 + sides * 16 + of_pairs
    else:
        # Offsets of each completion, and for each block, of all rows of its tile; then sums, read by each pair.
        forward = num_tokens * per_token + num_completions * 16 + blocks * (8 + SUM_ROWS * 16)
        forward += 4 * (num_completions + blocks)
        forward += num_pairs * 16 + sides * (16 + 4) + 4 * later_pieces_of_pairs + of_pairs
    backward = num_tokens * (logp_bytes + 4 * has_weight) + num_completions * 16 + blocks * (8 + GRAD_ROWS * 16)
    busy_tiles = cdiv(num_completions, GRAD_ROWS) - empty_tiles + later_pieces
    if num_pairs <= DIRECT_PAIRS:
        return forward, backward + busy_tiles * num_pairs * (8 + 16)
    peaks = num_peaks(num_pairs, num_completions)
    backward += num_pairs * 8 + peaks * 4 + num_completions * 8
    backward += cdiv(num_pairs, BLOCK_P) * peaks * 4 + 4 + num_pairs * (8 + 2 * 8) + sides * 16
    backward += busy_tiles * 4 + (num_completions + (later_pieces - empty_tiles) * GRAD_ROWS) * 8
    return forward, backward


def is_direct(num_tokens: int, num_pairs: int) -> bool:
    """Whether tokens and pairs are few: each pair then sums the tokens of both sides, in one launch."""
    return num_tokens <= DIRECT_TOKENS and num_pairs <= DIRECT_PAIRS
