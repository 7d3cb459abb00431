"""FAISS indexes: built in blocks on unit vectors, holding row numbers only, the same bytes for the same
vectors.

Cosine is the inner product of unit vectors in float32, so scores differ from the exact search in their last
digits even for `Flat`, and every other type may miss rows: measure it with `recall_against_exact`.
HNSW-like graphs depend on the order in which threads add, so they are built by one thread: slow, and
reproducible. Some mistakes that FAISS would answer by ending the process are refused before it sees them.

Shapes: N rows, Q queries, K hits, D dimensions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.indexes import score
from pipeline.indexes.blocks import as_tensor, regroup
from pipeline.indexes.hits import Hits, ordered_hits
from pipeline.indexes.parallel import in_pieces
from pipeline.support.errors import UserError

Blocks = Callable[[], Iterable[tuple[Any, ...]]]

_FACTORY, _PARAMETERS = "index.factory", "retrieve.faiss_parameters"
_PARAMETER_EXAMPLES = "for example nprobe=16 (IVF) or efSearch=64 (HNSW)"
_EXAMPLES = "for example Flat, IVF1024,Flat, HNSW32, IVF4096,PQ64 or OPQ64,IVF4096,PQ64"
_ADD_ROWS = 65_536  # fixed: a graph depends on the rows that are added together
_GRAPHS = ("HNSW", "NSG", "NNDESCENT")
_TIES_AT_THE_CUT = 32  # FAISS orders equal scores by row; this many more are asked for and ordered by id
_DEADLY = re.compile(r"(?<!\d)0|HNSW1(?!\d)|NSG[12](?!\d)")  # FAISS 1.15 divides by these, crashes or never ends
_USUAL_DIMENSIONS = (768, 512, 1024, 640, 896, 1152, 27_720)  # the last has many divisors, for PQ


def build_index(factory: str, blocks: Blocks, dimension: int, rows: int, train_rows: int = 131_072,
                seed: int = 0, threads: int | None = None) -> Any:
    """A FAISS index of inner products over the unit vectors of `blocks()`, which is called once or twice.

    It is trained on `train_rows` rows drawn with `seed`. UserError if `factory` is not a FAISS factory string
    for this dimension, or the pool has too few rows to train it.
    """
    index = _empty_index(factory, dimension)
    with _threads(1 if any(graph in factory.upper() for graph in _GRAPHS) else threads):
        if not index.is_trained:
            _train(index, factory, blocks(), rows, train_rows, seed)
        for rows_N, vectors_ND in regroup(blocks(), _ADD_ROWS):
            assert rows_N[0] == index.ntotal, "rows out of order"
            try:
                index.add(_units(vectors_ND))
            except RuntimeError as error:
                raise UserError(f"FAISS cannot add to {factory} ({_reason(error)})", _FACTORY, _EXAMPLES) from None
    assert index.ntotal == rows, (index.ntotal, rows)
    return index


def check_factory(factory: str) -> None:
    """UserError if FAISS cannot make this for any usual dimension: to be known before days of embedding."""
    refusals: list[UserError] = []
    for dimension in _USUAL_DIMENSIONS:
        try:
            _empty_index(factory, dimension)
            return
        except UserError as error:
            refusals.append(error)
    raise refusals[0]


def check_parameters(parameters: str) -> None:
    """UserError if this cannot be a list such as nprobe=16,efSearch=64; needs no FAISS."""
    for part in filter(None, parameters.split(",")):
        name, _, text = part.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        is_width = name.endswith(("nprobe", "efSearch"))  # also of a coarse quantiser
        if not name or not math.isfinite(value) or (is_width and (value < 1 or value % 1)):
            raise UserError(f"{part!r} is not a search parameter: name=number, nprobe and efSearch whole from 1 on",
                            _PARAMETERS, _PARAMETER_EXAMPLES)


def _faiss() -> Any:
    # torch first: in the other order there are two OpenMP pools, and forked loaders can hang
    import torch  # noqa: F401

    import faiss

    return faiss


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    faiss = _faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(number or before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _empty_index(factory: str, dimension: int) -> Any:
    faiss = _faiss()
    if _DEADLY.search(factory):
        raise UserError(f"{factory!r} has a number that is too small", _FACTORY, _EXAMPLES)
    try:
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(f"{factory!r} is not an index that FAISS can make for {dimension} dimensions "
                        f"({_reason(error)})", _FACTORY, _EXAMPLES) from None
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:  # some types take no notice of what they are asked for
        raise UserError(f"FAISS makes {factory!r} for Euclidean distances only", _FACTORY, _EXAMPLES)
    return index


def _reason(error: BaseException) -> str:
    """The last line of a FAISS error, without the name of the C++ function and file."""
    last = str(error).strip().splitlines()[-1]
    return re.sub(r"^Error in .* at \S+:\d+: (Error: )?", "", last)[:160]


def _units(vectors_ND: np.ndarray) -> np.ndarray:
    """Unit vectors in float32; a zero vector stays zero."""
    import torch

    stored_ND = as_tensor(vectors_ND)
    units_ND = torch.empty(stored_ND.shape, dtype=torch.float32)
    norms_N = score.norms(stored_ND)
    norms_N[norms_N == 0] = 1.0

    def fill(piece: slice) -> None:
        units_ND[piece] = stored_ND[piece].double() / norms_N[piece, None]

    in_pieces(fill, len(stored_ND), stored_ND.device)
    return units_ND.numpy()


def _train(index: Any, factory: str, blocks: Iterable[tuple[Any, ...]], rows: int, train_rows: int,
           seed: int) -> None:
    needed, available = _rows_to_train(index), min(rows, train_rows)
    if available < needed:
        raise UserError(f"{factory} needs at least {needed:,} rows to train, and has {available:,}",
                        *((_FACTORY, "use Flat, a smaller IVF or PQ") if rows < needed
                          else ("index.train_rows", f"set index.train_rows={needed} or more")))
    chosen = np.zeros(rows, bool)
    chosen[np.random.default_rng(seed).choice(rows, available, replace=False)] = True
    sample = [vectors_ND[chosen[rows_N]] for rows_N, vectors_ND in regroup(blocks, _ADD_ROWS)]
    try:
        index.train(_units(np.concatenate(sample)))
    except RuntimeError as error:
        raise UserError(f"{factory} could not be trained on {available:,} rows ({_reason(error)})",
                        _FACTORY, _EXAMPLES) from None


def _rows_to_train(index: Any) -> int:
    """As many rows as the largest set of centroids that is fitted to them."""
    faiss = _faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, (faiss.IndexPreTransform, faiss.IndexIDMap)):
        return max(_rows_to_train(index.index), _dimension_to_rotate(index))
    if isinstance(index, faiss.IndexRefine):
        return _rows_to_train(index.base_index)
    lists = index.nlist if isinstance(index, faiss.IndexIVF) else 1
    codes = 2**index.pq.nbits if hasattr(index, "pq") else 1
    return max(lists, codes)


def _dimension_to_rotate(index: Any) -> int:
    """A learnt projection needs as many rows as it has dimensions."""
    faiss = _faiss()
    if not isinstance(index, faiss.IndexPreTransform):
        return 1
    chain = [faiss.downcast_VectorTransform(index.chain.at(place)) for place in range(index.chain.size())]
    return max([1, *(step.d_out for step in chain if not step.is_trained)])


def search_index(index: Any, queries_QD: np.ndarray, k: int, id_order_N: np.ndarray,
                 parameters: str | None = None) -> Hits:
    """The best k rows that the index finds, ties by id.

    `parameters` are FAISS's own, as `nprobe=16,efSearch=64`; they stay set in the index.
    UserError if the index does not know a parameter or the dimension differs.
    """
    faiss = _faiss()
    if queries_QD.shape[1] != index.d:
        raise UserError(f"queries have {queries_QD.shape[1]} dimensions, the index has {index.d}", None,
                        "queries and candidates must come from one encoder")
    check_parameters(parameters or "")
    units_QD = _units(queries_QD)
    try:
        faiss.ParameterSpace().set_index_parameters(index, parameters or "")
        scores_QM, rows_QM = index.search(units_QD, k + _TIES_AT_THE_CUT)
    except RuntimeError as error:
        if not parameters:
            raise
        raise UserError(f"this index does not take the parameters {parameters!r} ({_reason(error)})", _PARAMETERS,
                        _PARAMETER_EXAMPLES) from None
    return ordered_hits(rows_QM, scores_QM, id_order_N, k, examined=0)


def write_index(index: Any, path: Path) -> None:
    """Write the index to `path`; making that atomic is the caller's business."""
    _faiss().write_index(index, str(path))


def read_index(path: Path) -> Any:
    """Read an index, mapped from disk where its type allows; UserError if it is missing or damaged."""
    faiss = _faiss()
    for flags in (faiss.IO_FLAG_MMAP_IFC, 0):
        try:
            return faiss.read_index(str(path), flags)
        except RuntimeError as error:
            reason = _reason(error)
    raise UserError(f"this FAISS index cannot be read ({reason})", str(path),
                    f"make it again: rm -r {path.parent}")
