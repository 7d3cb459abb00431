"""The exact search: one pass over a stream of vectors, exact for any data, in memory that does not grow with
the pool.

Rows are taken in windows; the next one is read while the present one is searched. Within a window a low-precision
product of every pair is formed, and a running lower bound of each query's k-th best score lets almost everything be
dropped at once; what could still be among the first k gets its float64 score while its vector is in memory. Ids never
depend on how rows are windowed, how coarse the product is, or which kernel forms it (native_kernel.py on x86
processors, torch_kernel.py anywhere). Where too much survives, the window is refined: surplus copies of equal vectors
go, then the product is made in float32.

Shapes: N rows (W of a window), Q queries (B of a block), K hits, D dimensions.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.indexes import coarse as coarse_pass
from pipeline.indexes import native, score
from pipeline.indexes.blocks import as_tensor, regroup
from pipeline.indexes.hits import Hits, best, hits_from_keys
from pipeline.indexes.native_kernel import NativeKernel
from pipeline.indexes.search import Kernel, Search
from pipeline.indexes.statistics import Statistics, refuse_unless_finite
from pipeline.indexes.torch_kernel import TorchKernel
from pipeline.indexes.window import Sizes, Window
from pipeline.support.ahead import read_ahead
from pipeline.support.errors import UserError, nearest

if TYPE_CHECKING:
    import torch

log = logging.getLogger("pipeline")

KERNELS = ("auto", "native", "torch")
_WORTH_COMPILING = 1e11  # multiplications: some seconds, as long as compiling takes


def exact_search(queries_QD: np.ndarray, blocks: Iterable[tuple[Any, ...]], id_order_N: np.ndarray, k: int,
                 statistics: Statistics, device: str = "cpu", coarse: str = "auto", kernel: str = "auto",
                 memory_bytes: int = 2 << 30) -> Hits:
    """The first k rows of every query by score descending, then id ascending (`score.py` defines both).

    `blocks` are tuples (first row, ..., vectors [N, D]), read once; `id_order_N` ranks the id of every row.
    `coarse`, `kernel` and `memory_bytes` change the speed, never a hit. UserError if a vector is not finite or the
    dimensions differ.
    """
    if queries_QD.shape[1] != statistics.dimension:
        raise UserError(f"queries have {queries_QD.shape[1]} dimensions, the pool has {statistics.dimension}",
                        do="queries and candidates must come from one encoder")
    assert k > 0 and len(id_order_N) < 2**31, (k, len(id_order_N))
    chosen = choose_kernel(kernel, device, coarse, work=queries_QD.size * len(id_order_N))
    return _search(queries_QD, blocks, id_order_N, k, statistics, device, coarse, chosen, memory_bytes)


def _search(queries_QD: np.ndarray, blocks: Iterable[tuple[Any, ...]], id_order_N: np.ndarray, k: int,
            statistics: Statistics, device: str, coarse: str, kernel: Kernel, memory_bytes: int) -> Hits:
    import torch

    stored_QD = as_tensor(queries_QD, device)
    norms_Q = score.norms(stored_QD)
    refuse_unless_finite(norms_Q.cpu().numpy(), [f"query number {number}" for number in range(len(norms_Q))])
    mean_D, sizes = torch.from_numpy(statistics.mean_D), Sizes.within(memory_bytes, queries_QD.shape[1], k)
    search = Search(stored_QD[norms_Q > 0], norms_Q[norms_Q > 0], k, mean_D.to(device), coarse, kernel, sizes)
    with coarse_pass.full_precision():
        lowest_K = _scan(search, blocks, id_order_N)
    keys_QK = torch.empty(len(norms_Q), k, dtype=torch.int64, device=stored_QD.device)
    keys_QK[norms_Q > 0] = search.keys_QK
    keys_QK[norms_Q == 0] = lowest_K  # every row scores 0 with a zero query
    return hits_from_keys(best(keys_QK, k), id_order_N, search.examined)


def choose_kernel(name: str, device: str, coarse: str, work: float) -> Kernel:
    """The kernel of that name; "auto" is the native one where it can be had and `work` is worth compiling it for."""
    import torch

    if name not in KERNELS:
        raise UserError(f"kernel {name!r} is not known", "retrieve.kernel",
                        nearest(name, KERNELS) or f"one of {', '.join(KERNELS)}")
    is_possible = name != "torch" and torch.device(device).type == "cpu"
    library = native.load_if(name == "native" or work > _WORTH_COMPILING) if is_possible else None
    if library is not None and NativeKernel.can(coarse, library) and _is_sound(library):
        return NativeKernel(library)
    if name == "native":
        raise UserError(f"there is no native kernel here for retrieve.device={device}, retrieve.coarse={coarse}",
                        "retrieve.kernel", "see the log; retrieve.kernel=auto takes torch instead")
    return TorchKernel()


@lru_cache(maxsize=1)
def _is_sound(library: native.Native) -> bool:
    """Whether this build finds here what torch finds: compilers and processors are trusted only after a look."""
    random = np.random.default_rng(0)
    vectors_ND, queries_QD = random.standard_normal((300, 70)), random.standard_normal((70, 70))
    statistics = Statistics.of([(0, range(300), vectors_ND.astype(np.float32))], 70)
    for coarse in library.numbers:
        ours, expected = (
            _search(queries_QD.astype(np.float32), [(0, vectors_ND.astype(np.float16))], np.arange(300), 10, statistics,
                    "cpu", number, kernel, 1 << 24)
            for number, kernel in ((coarse, NativeKernel(library)), ("float32", TorchKernel())))
        if not (np.array_equal(ours.rows_QK, expected.rows_QK) and np.array_equal(ours.scores_QK, expected.scores_QK)):
            log.warning("exact search: torch; the native kernel (%s, %s) gives wrong hits here", library.unit, coarse)
            return False
    return True


def _scan(search: Search, blocks: Iterable[tuple[Any, ...]], id_order_N: np.ndarray) -> torch.Tensor:
    """Search every window; the keys of the k lowest ids seen, at score 0."""
    import torch

    device = search.stored_QD.device
    lowest_K = torch.full((1, search.k), score.NO_HIT, device=device)
    for rows_W, vectors_WD in read_ahead(regroup(blocks, search.sizes.window_rows)):
        ranks_W = torch.from_numpy(id_order_N[rows_W].astype(np.int64)).to(device)
        keys_W = score.pack(torch.zeros(len(rows_W), device=device), ranks_W)
        lowest_K = best(torch.cat([lowest_K, keys_W[None]], dim=1), search.k)
        search.window(Window(vectors_WD, as_tensor(vectors_WD, str(device)), ranks_W))
    return lowest_K[0]
