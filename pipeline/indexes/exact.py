"""The exact search: one pass over a stream of vectors, exact for any data, in memory that does not grow with
the pool.

Rows are taken in windows. Within a window a low-precision product is formed tile by tile; a running lower
bound of each query's k-th best score (from maxima over groups of columns: looking at every product would
cost as much as the product itself) lets almost everything be dropped at once; what could still be among the
first k gets its float64 score while its vector is in memory. Ids never depend on how rows are windowed or
how coarse the product is. Where too much survives, the window is refined: surplus copies of equal vectors
go, then the product is made in float32.

Shapes: N rows (W of a window, T of a tile, G groups of its columns), Q queries (B of a block), K hits, D
dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.indexes import coarse as coarse_pass
from pipeline.indexes import score
from pipeline.indexes.blocks import as_tensor, regroup
from pipeline.indexes.hits import Hits, best, hits_from_keys
from pipeline.indexes.statistics import Statistics, refuse_unless_finite
from pipeline.indexes.window import Sizes, Window, pairs_per_query, tiles
from pipeline.support.errors import UserError

if TYPE_CHECKING:
    import torch

_MERGE_WIDTH = 1024


def exact_search(queries_QD: np.ndarray, blocks: Iterable[tuple[Any, ...]], id_order_N: np.ndarray, k: int,
                 statistics: Statistics, device: str = "cpu", coarse: str = "auto",
                 memory_bytes: int = 2 << 30) -> Hits:
    """The first k rows of every query by score descending, then id ascending (`score.py` defines both).

    `blocks` are tuples (first row, ..., vectors [N, D]), read once; `id_order_N` ranks the id of every row.
    `coarse` and `memory_bytes` change the speed, never a hit. UserError if a vector is not finite or the
    dimensions differ.
    """
    import torch

    if queries_QD.shape[1] != statistics.dimension:
        raise UserError(f"queries have {queries_QD.shape[1]} dimensions, the pool has {statistics.dimension}",
                        do="queries and candidates must come from one encoder")
    assert k > 0 and len(id_order_N) < 2**31, (k, len(id_order_N))
    sizes = Sizes.within(memory_bytes, queries_QD.shape[1], k)
    stored_QD = as_tensor(queries_QD, device)
    norms_Q = score.norms(stored_QD)
    refuse_unless_finite(norms_Q.cpu().numpy(), [f"query number {number}" for number in range(len(norms_Q))])
    search = _Search(stored_QD[norms_Q > 0], norms_Q[norms_Q > 0], k, statistics, coarse, sizes)
    with coarse_pass.full_precision():
        lowest_K = _scan(search, blocks, id_order_N)
    keys_QK = torch.empty(len(norms_Q), k, dtype=torch.int64, device=stored_QD.device)
    keys_QK[norms_Q > 0] = search.keys_QK
    keys_QK[norms_Q == 0] = lowest_K  # every row scores 0 with a zero query
    return hits_from_keys(best(keys_QK, k), id_order_N, search.examined)


def _scan(search: _Search, blocks: Iterable[tuple[Any, ...]], id_order_N: np.ndarray) -> torch.Tensor:
    """Search every window; the keys of the k lowest ids seen, at score 0."""
    import torch

    device = search.stored_QD.device
    lowest_K = torch.full((1, search.k), score.NO_HIT, device=device)
    for rows_W, vectors_WD in regroup(blocks, search.sizes.window_rows):
        ranks_W = torch.from_numpy(id_order_N[rows_W].astype(np.int64)).to(device)
        keys_W = score.pack(torch.zeros(len(rows_W), device=device), ranks_W)
        lowest_K = best(torch.cat([lowest_K, keys_W[None]], dim=1), search.k)
        window = Window(vectors_WD, as_tensor(vectors_WD, str(device)), ranks_W)
        for start in range(0, len(search.stored_QD), search.sizes.query_rows):
            search.block(window, slice(start, start + search.sizes.query_rows))
    return lowest_K[0]


class _Pairs(NamedTuple):
    """Surviving pairs: the query's place in its block, the row's in its window, their product."""

    query_P: torch.Tensor
    row_P: torch.Tensor
    product_P: torch.Tensor

    def above(self, floor_B: torch.Tensor) -> _Pairs:
        import torch

        place_P = torch.nonzero(self.product_P >= floor_B[self.query_P]).squeeze(1)
        return _Pairs(self.query_P[place_P], self.row_P[place_P], self.product_P[place_P])

    @classmethod
    def joined(cls, parts: list[_Pairs]) -> _Pairs:
        import torch

        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))


@dataclass
class _Search:
    """The state of a search: the best keys of each query so far."""

    stored_QD: torch.Tensor
    norms_Q: torch.Tensor
    k: int
    statistics: Statistics
    coarse: str
    sizes: Sizes
    examined: int = 0
    keys_QK: torch.Tensor = field(init=False)
    mean_D: torch.Tensor = field(init=False)
    dtype: str = field(init=False)
    queries: coarse_pass.CoarseQueries = field(init=False)

    def __post_init__(self) -> None:
        import torch

        device = self.stored_QD.device
        self.keys_QK = torch.full((len(self.stored_QD), self.k), score.NO_HIT, device=device)
        self.mean_D = torch.from_numpy(self.statistics.mean_D).to(device)
        self._choose(coarse_pass.coarse_type(self.coarse, str(device)))

    def _choose(self, dtype: str) -> None:
        self.dtype = dtype
        self.queries = coarse_pass.coarse_queries(self.stored_QD, self.norms_Q, self.mean_D, dtype)

    def block(self, window: Window, part: slice) -> None:
        """Search a window for a block of queries, refining the window while too much survives."""
        while not self._attempt(window, part):
            pass

    def _attempt(self, window: Window, part: slice) -> bool:
        """False, with nothing changed but the window made finer, if too many pairs survived."""
        rows = window.in_precision(self.dtype, self.mean_D)
        bounds = coarse_pass.Bounds(self.queries, part, rows)
        queries_BD = self.queries.vectors_QD[part]
        limit = len(queries_BD) * pairs_per_query(self.k)
        top_BK = bounds.products_of(score.unpack(self.keys_QK[part])[0])
        found: list[_Pairs] = []
        for start, stop, groups in tiles(len(rows.vectors_ND), self.sizes.tile_rows, self.k):
            product_BT = coarse_pass.product(queries_BD, rows.vectors_ND[start:stop])
            grouped_BXG = product_BT.unflatten(1, (-1, groups))
            maxima_BG = grouped_BXG.amax(dim=1).float()
            top_BK = _top(top_BK, maxima_BG, self.k)
            floor_B = bounds.floor(top_BK.amin(dim=1))
            found.append(_survivors(grouped_BXG, maxima_BG, floor_B, start))
            if sum(len(pairs.row_P) for pairs in found) <= limit:
                continue
            found = [_Pairs.joined(found).above(floor_B)]
            if len(found[0].row_P) > limit // 2:
                if self._refine(window):
                    return False
                self._settle(window, part, found.pop())
                top_BK = bounds.products_of(score.unpack(self.keys_QK[part])[0])
        if found:
            self._settle(window, part, _Pairs.joined(found).above(floor_B))
        return True

    def _refine(self, window: Window) -> bool:
        if not window.is_distinct and window.drop_surplus_copies(self.k):
            return True
        if self.coarse != "auto" or self.dtype == "float32":
            return False
        self._choose("float32")
        return True

    def _settle(self, window: Window, part: slice, pairs: _Pairs) -> None:
        """Score the pairs in float64 and merge them into the best so far."""
        import torch

        order_P = torch.argsort(pairs.query_P.short(), stable=True)
        exact_BD, norms_B = self.stored_QD[part].double(), self.norms_Q[part]
        step = self.sizes.query_rows * pairs_per_query(self.k)
        for start in range(0, len(order_P), step):
            query_P = pairs.query_P[order_P[start : start + step]]
            row_P = pairs.row_P[order_P[start : start + step]]
            scores_P = score.pair_scores(exact_BD, norms_B, query_P, window.stored_WD, row_P)
            _merge(self.keys_QK[part], query_P, score.pack(scores_P, window.ranks_W[row_P]))
        self.examined += len(order_P)


def _top(top_BK: torch.Tensor, maxima_BG: torch.Tensor, k: int) -> torch.Tensor:
    import torch

    return torch.cat([top_BK, maxima_BG], dim=1).topk(k, dim=1, sorted=False).values


def _survivors(grouped_BXG: torch.Tensor, maxima_BG: torch.Tensor, floor_B: torch.Tensor,
               first_row: int) -> _Pairs:
    """The pairs of a tile that reach the floor; column x of group g is row x G + g."""
    import torch

    query_H, group_H = torch.nonzero(maxima_BG >= floor_B[:, None], as_tuple=True)
    products_HX = grouped_BXG[query_H, :, group_H].float()
    hit_P, column_P = torch.nonzero(products_HX >= floor_B[query_H][:, None], as_tuple=True)
    row_P = first_row + column_P * maxima_BG.shape[1] + group_H[hit_P]
    return _Pairs(query_H[hit_P], row_P, products_HX[hit_P, column_P])


def _merge(keys_BK: torch.Tensor, query_P: torch.Tensor, keys_P: torch.Tensor) -> None:
    """Put new keys, grouped by query, into the best keys of each query, in place."""
    import torch

    counts_B = torch.bincount(query_P, minlength=len(keys_BK))
    place_P = torch.arange(len(query_P), device=query_P.device) - (counts_B.cumsum(0) - counts_B)[query_P]
    for low in range(0, int(counts_B.max()), _MERGE_WIDTH):
        now_P = (place_P >= low) & (place_P < low + _MERGE_WIDTH)
        width = min(_MERGE_WIDTH, int(counts_B.max()) - low)
        new_BM = torch.full((len(keys_BK), width), score.NO_HIT, device=keys_P.device)
        new_BM[query_P[now_P], place_P[now_P] - low] = keys_P[now_P]
        keys_BK.copy_(best(torch.cat([keys_BK, new_BM], dim=1), keys_BK.shape[1]))
