"""The kernel that needs nothing but torch: on every processor and GPU.

Products are formed tile by tile. The running bound comes from maxima over groups of columns: looking at every product
would cost as much as the product itself.

Shapes: N rows (W of a window, T of a tile, G groups of its columns), Q queries (B of a block), K hits, P pairs, D
dimensions.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from pipeline.indexes import coarse as coarse_pass
from pipeline.indexes import score
from pipeline.indexes.hits import best
from pipeline.indexes.search import Search
from pipeline.indexes.window import Sizes, Window, pairs_per_query, tiles

if TYPE_CHECKING:
    import torch

_MERGE_WIDTH = 1024


class TorchKernel:
    def dtype(self, coarse: str, device: str) -> str:
        return coarse_pass.coarse_type(coarse, device)

    def finer(self, dtype: str) -> str | None:
        return None if dtype == "float32" else "float32"

    def query_rows(self, sizes: Sizes, k: int, dimension: int) -> int:
        return sizes.query_rows

    def attempt(self, search: Search, window: Window, part: slice) -> bool:
        rows = window.packed(search.dtype, partial(_rows, search=search))
        queries_BD = search.queries.vectors_QD[part]
        bounds = search.bounds(part, rows, coarse_pass.rounding_of_products(queries_BD))
        limit = len(queries_BD) * pairs_per_query(search.k)
        top_BK = bounds.products_of(search.scores_so_far(part))
        found: list[_Pairs] = []
        for start, stop, groups in tiles(len(rows.vectors_ND), search.sizes.tile_rows, search.k):
            product_BT = coarse_pass.product(queries_BD, rows.vectors_ND[start:stop])
            grouped_BXG = product_BT.unflatten(1, (-1, groups))
            maxima_BG = grouped_BXG.amax(dim=1).float()
            top_BK = _top(top_BK, maxima_BG, search.k)
            floor_B = bounds.floor(top_BK.amin(dim=1))
            found.append(_survivors(grouped_BXG, maxima_BG, floor_B, start))
            if sum(len(pairs.row_P) for pairs in found) <= limit:
                continue
            found = [_Pairs.joined(found).above(floor_B)]
            if len(found[0].row_P) > limit // 2:
                if search.refine(window):
                    return False
                _settle(search, window, part, found.pop())
                top_BK = bounds.products_of(search.scores_so_far(part))
        if found:
            _settle(search, window, part, _Pairs.joined(found).above(floor_B))
        return True


def _rows(window: Window, search: Search) -> coarse_pass.CoarseRows:
    return coarse_pass.coarse_rows(window.stored_WD, search.mean_D, search.dtype)


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


def _settle(search: Search, window: Window, part: slice, pairs: _Pairs) -> None:
    """Score the pairs in float64 and merge them into the best so far."""
    import torch

    order_P = torch.argsort(pairs.query_P.short(), stable=True)
    exact_BD, norms_B = search.stored_QD[part].double(), search.norms_Q[part]
    step = search.sizes.query_rows * pairs_per_query(search.k)
    for start in range(0, len(order_P), step):
        query_P = pairs.query_P[order_P[start : start + step]]
        row_P = pairs.row_P[order_P[start : start + step]]
        scores_P = score.pair_scores(exact_BD, norms_B, query_P, window.stored_WD, row_P)
        _merge(search.keys_QK[part], query_P, score.pack(scores_P, window.ranks_W[row_P]))
    search.examined += len(order_P)


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
