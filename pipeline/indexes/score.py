"""The definition of a score and of the order of hits, as code that gives the same bits on every device.

score(q, c) = float32(<q, c> / (|q| |c|)), computed in float64 from the stored values; 0 if either vector is
zero. Products of stored values are exact in float64. They are added by repeatedly folding the upper half of
a row onto its lower half: elementwise additions only, so the result depends on D alone and not on blocks,
threads, vector units or position, at about the price of a library's own sum.

Shapes: N rows or P pairs, Q queries, D dimensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.indexes.parallel import in_pieces

if TYPE_CHECKING:
    import torch

NO_HIT = -(2**63)  # the key of an empty place: below the key of every score
_RANK_BITS = 32


def folded_sum(terms_ND: torch.Tensor) -> torch.Tensor:
    """Sums of the rows [N] in the order described above. Overwrites its argument."""
    count = terms_ND.shape[1]
    while count > 1:
        half = (count + 1) // 2
        terms_ND[:, : count - half] += terms_ND[:, half:count]
        count = half
    return terms_ND[:, 0].clone()


def norms(vectors_ND: torch.Tensor) -> torch.Tensor:
    """Euclidean norms, float64 [N]; not finite exactly where a row holds NaN or infinity."""
    import torch

    norms_N = torch.empty(len(vectors_ND), dtype=torch.float64, device=vectors_ND.device)

    def fill(piece: slice) -> None:
        values_ND = vectors_ND[piece].double()
        norms_N[piece] = _root(folded_sum(values_ND * values_ND))

    in_pieces(fill, len(vectors_ND), vectors_ND.device)
    return norms_N


def _root(values_N: torch.Tensor) -> torch.Tensor:
    """Square roots, correctly rounded: torch's own, from a vector library on processors, are one bit off at times."""
    import torch

    return torch.from_numpy(np.sqrt(values_N.numpy())) if values_N.device.type == "cpu" else values_N.sqrt()


def pair_scores(queries_QD: torch.Tensor, query_norms_Q: torch.Tensor, query_P: torch.Tensor,
                vectors_ND: torch.Tensor, row_P: torch.Tensor) -> torch.Tensor:
    """float32 [P]: the score of query `query_P[i]` (given in float64) with stored vector `row_P[i]`."""
    import torch

    distinct, place_P = torch.unique(row_P, return_inverse=True)
    row_norms = norms(vectors_ND.index_select(0, distinct))
    scores_P = torch.empty(len(row_P), dtype=torch.float32, device=vectors_ND.device)

    def fill(piece: slice) -> None:
        terms_ND = vectors_ND.index_select(0, row_P[piece]).double()
        terms_ND *= queries_QD.index_select(0, query_P[piece])
        scale_N = query_norms_Q[query_P[piece]] * row_norms[place_P[piece]]
        scores_P[piece] = torch.where(scale_N > 0, folded_sum(terms_ND) / scale_N, 0.0).float()

    in_pieces(fill, len(row_P), vectors_ND.device)
    return scores_P


def pack(scores: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """One int64 key per hit: a larger key is a better hit, by score, then by lower rank of its id."""
    import torch

    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0: equal scores must have equal bits
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats count backwards in their bits
    return (ordered.long() << _RANK_BITS) + ((1 << _RANK_BITS) - 1 - ranks)


def unpack(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (float32) and ranks (int64) of keys; -inf and -1 where there is no hit."""
    import torch

    ordered = (keys >> _RANK_BITS).int()
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    ranks = (1 << _RANK_BITS) - 1 - (keys & ((1 << _RANK_BITS) - 1))
    empty = keys == NO_HIT
    return scores.masked_fill(empty, float("-inf")), ranks.masked_fill(empty, -1)
