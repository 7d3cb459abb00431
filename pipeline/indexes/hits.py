"""Hits of a search, the rank of each candidate_id, and how parts of a union are joined.

Hits hold row numbers, not ids: ids are looked up once, when a run is written. The rank of an id among all
ids of the pool breaks ties, so the order of hits does not depend on the order in which a pool was embedded.

Shapes: Q queries, K hits kept per query, N rows of the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.indexes import score
from pipeline.support.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Hits:
    """The best rows of every query, best first; row -1 and score -inf where the pool has fewer than K rows.

    `examined` counts the pairs that were scored one by one (0 for a FAISS index).
    """

    rows_QK: np.ndarray
    scores_QK: np.ndarray
    examined: int = 0


def id_order(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """int64 [N]: the rank of each id in ascending order of code points; UserError if an id occurs twice."""
    # large_string: the ids of a large union, taken in order, may exceed the 2 GiB that string offsets reach
    chunks = [ids] if isinstance(ids, pa.Array) else ids.chunks
    wide = pa.chunked_array(chunks, ids.type).cast(pa.large_string())
    if wide.null_count:
        raise UserError(f"{wide.null_count} candidates have no candidate_id", do="give every candidate an id")
    order_N = pc.sort_indices(wide).to_numpy()
    ascending = wide.take(pa.array(order_N))
    repeated = pc.equal(ascending[1:], ascending[:-1]).to_numpy() if len(wide) > 1 else np.zeros(0, bool)
    if repeated.any():
        raise UserError(f"{int(repeated.sum())} candidate ids occur more than once in this pool",
                        f"first: {ascending[int(repeated.argmax())].as_py()}",
                        "ids must be unique in a pool and across the members of a union")
    ranks_N = np.empty(len(order_N), np.int64)
    ranks_N[order_N] = np.arange(len(order_N))
    return ranks_N


def merge_hits(parts: Sequence[tuple[Hits, int]], id_order_N: np.ndarray, k: int) -> Hits:
    """The best k over the members of a union: each member's hits, and the number of its first row."""
    rows = [np.where(hits.rows_QK >= 0, hits.rows_QK + first, -1) for hits, first in parts]
    scores_QM = np.concatenate([hits.scores_QK for hits, _ in parts], axis=1)
    examined = sum(hits.examined for hits, _ in parts)
    return ordered_hits(np.concatenate(rows, axis=1), scores_QM, id_order_N, k, examined)


def ordered_hits(rows_QM: np.ndarray, scores_QM: np.ndarray, id_order_N: np.ndarray, k: int,
                 examined: int) -> Hits:
    """The best k of M distinct rows per query (in any order, -1 for none), by score and then by id."""
    import torch

    padding = ((0, 0), (0, k))
    rows = torch.from_numpy(np.pad(rows_QM.astype(np.int64), padding, constant_values=-1))
    scores = torch.from_numpy(np.pad(scores_QM.astype(np.float32), padding, constant_values=-np.inf))
    # where there is no row, -1 looks up some rank: its key is replaced in the next line
    keys = score.pack(scores, torch.from_numpy(id_order_N.astype(np.int64))[rows])
    place_QK = torch.where(rows >= 0, keys, score.NO_HIT).topk(k, dim=1).indices
    rows_QK, scores_QK = rows.gather(1, place_QK), scores.gather(1, place_QK)
    return Hits(rows_QK.numpy(), scores_QK.masked_fill(rows_QK < 0, float("-inf")).numpy(), examined)


def best(keys_QM: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest keys of each row, descending, padded with NO_HIT."""
    import torch

    padding_QK = keys_QM.new_full((len(keys_QM), k), score.NO_HIT)
    return torch.cat([keys_QM, padding_QK], dim=1).topk(k, dim=1).values


def hits_from_keys(keys_QK: torch.Tensor, id_order_N: np.ndarray, examined: int) -> Hits:
    """Hits of sorted keys, whose ranks are those of the whole pool."""
    scores_QK, ranks_QK = (tensor.cpu().numpy() for tensor in score.unpack(keys_QK))
    # rank -1, no hit, points to the last place
    row_of_rank_N = np.full(len(id_order_N) + 1, -1, np.int64)
    row_of_rank_N[id_order_N] = np.arange(len(id_order_N))
    return Hits(row_of_rank_N[ranks_QK], scores_QK, examined)


def recall_against_exact(hits: Hits, exact_hits: Hits, k: int) -> float:
    """Mean over queries of the share of the exact first k rows that `hits` has among its own first k."""
    shares = []
    for found_K, true_K in zip(hits.rows_QK[:, :k], exact_hits.rows_QK[:, :k], strict=True):
        wanted = true_K[true_K >= 0]
        shares.append(np.isin(wanted, found_K).mean() if len(wanted) else 1.0)
    return float(np.mean(shares)) if shares else 1.0
