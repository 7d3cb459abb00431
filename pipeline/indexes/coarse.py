"""The coarse pass of the exact search: low-precision products, and the proof of how far off they can be.

Let u = c/|c|, m the pool's mean, x = u - m, x' its stored low-precision form, q a unit query and q' its
form. The score of (q, c) is <q, x> + <q, m>, and the second term is the same for all candidates. The
product p that is computed from q' and x' satisfies

    |<q, x> - p| <= |q - q'| |x'| + |q| |x - x'| + gamma |q'| |x'| + beta |p|

the first two terms by Cauchy-Schwarz with residuals measured on the data; gamma = D u / (1 - D u) for a sum
of D products accumulated in float32 in any order (Higham, Accuracy and Stability of Numerical Algorithms,
section 3.1); beta where the product itself is written in low precision. So p bounds the score from both
sides, and whoever cannot reach the k-th best lower bound is outside the true first k: no recall is lost,
for any data.

Shapes: N rows, Q queries, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pipeline.indexes.parallel import in_pieces
from pipeline.support.errors import UserError, nearest

if TYPE_CHECKING:
    import torch

COARSE = ("auto", "float32", "bfloat16", "float16", "int8")
_ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
# centring: the float32 reciprocal, product and difference of a unit vector, of norm 2 at most: 4 x 2^-24;
# rounding of the two scores that are compared: 2 x 2^-24; float64 arithmetic and flushed denormals: far less
_SLACK = 8 * 2.0**-24
# a norm taken in float32 is off by less than (D + 2) x 2^-24
NORM_SLACK = 1.001
_LARGEST_DIMENSION = 16_000
# outside, a float32 reciprocal or a square would overflow or lose bits
_PLAIN_NORMS = (1e-20, 1e20)
# tensor cores align and truncate what they add: up to 8 units of the float32 grain instead of half of one
_CUDA_ACCUMULATION = 8.0


def coarse_type(name: str, device: str) -> str:
    """The type that `auto` stands for on this machine; UserError if the name is not known."""
    import torch

    if name not in COARSE:
        raise UserError(f"coarse precision {name!r} is not known", "retrieve.coarse",
                        nearest(name, COARSE) or f"one of {', '.join(COARSE)}")
    if name == "int8":
        raise UserError("torch has no first pass in int8", "retrieve.coarse",
                        "it needs the native kernel and a processor with AVX-512 VNNI; `auto` takes it where it can")
    if name != "auto":
        return name
    if torch.device(device).type == "cuda":
        return "float16"
    abilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    has_bfloat16 = any(abilities.get(unit) for unit in ("avx512_bf16", "amx_bf16"))
    return "bfloat16" if has_bfloat16 else "float32"


class RowBounds(Protocol):
    """Bounds over all rows of |x'| and of |x - x'|."""

    @property
    def largest_norm(self) -> float: ...
    @property
    def largest_residual(self) -> float: ...


class CoarseRows(NamedTuple):
    """x' [N, D] and its bounds."""

    vectors_ND: torch.Tensor
    largest_norm: float
    largest_residual: float


def coarse_rows(stored_ND: torch.Tensor, mean_D: torch.Tensor, dtype: str) -> CoarseRows:
    """Unit vectors minus the mean, in low precision."""
    import torch

    coarse_ND = torch.empty(stored_ND.shape, dtype=getattr(torch, dtype), device=stored_ND.device)

    def fill(piece: slice) -> tuple[float, float]:
        centred_ND = _centred(stored_ND[piece], mean_D)
        coarse_ND[piece] = centred_ND
        norm = _largest_norm(centred_ND)
        return norm, _largest_norm(centred_ND.sub_(coarse_ND[piece]))

    facts = in_pieces(fill, len(stored_ND), stored_ND.device)
    norm, residual = (max(fact) for fact in zip(*facts, strict=True))
    return CoarseRows(coarse_ND, norm + residual, residual)


def _centred(stored_ND: torch.Tensor, mean_D: torch.Tensor) -> torch.Tensor:
    import torch

    values_ND = stored_ND.float()
    norms_N = torch.linalg.vector_norm(values_ND, dim=1, dtype=torch.float64)
    refuse_unless_finite(norms_N)
    is_zero = norms_N == 0
    if bool((is_zero | ((norms_N > _PLAIN_NORMS[0]) & (norms_N < _PLAIN_NORMS[1]))).all()):
        scale_N = (1.0 / norms_N).masked_fill_(is_zero, 0.0).float()
        return torch.addcmul(-mean_D, values_ND, scale_N[:, None])
    units_ND = stored_ND.double() / norms_N.masked_fill(is_zero, 1.0)[:, None]
    return (units_ND - mean_D.double()).float()


def refuse_unless_finite(norms_N: torch.Tensor) -> None:
    if not bool(norms_N.isfinite().all()):
        raise UserError("a vector of the pool holds NaN or infinity", None, "embed the pool again")


def _largest_norm(vectors_ND: torch.Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(vectors_ND, dim=1).max()) * NORM_SLACK


@dataclass(frozen=True)
class CoarseQueries:
    """q' [Q, D], |q'| and |q - q'| [Q]; and the part <q, m> of every score that centring leaves out [Q]."""

    vectors_QD: torch.Tensor
    norms_Q: torch.Tensor
    residuals_Q: torch.Tensor
    offsets_Q: torch.Tensor


def coarse_queries(stored_QD: torch.Tensor, norms_Q: torch.Tensor, mean_D: torch.Tensor,
                   dtype: str) -> CoarseQueries:
    """Low-precision forms of unit queries, but float32 for int8, of which a kernel makes bytes; none may be zero."""
    import torch

    kept = getattr(torch, "float32" if dtype == "int8" else dtype)
    coarse_QD = torch.empty(stored_QD.shape, dtype=kept, device=stored_QD.device)
    facts_XQ = torch.empty(3, len(stored_QD), dtype=torch.float64, device=stored_QD.device)

    def fill(piece: slice) -> None:
        units_BD = stored_QD[piece].double() / norms_Q[piece, None]
        coarse_QD[piece] = units_BD
        exact_BD = coarse_QD[piece].double()
        facts_XQ[0, piece] = exact_BD.norm(dim=1)
        facts_XQ[1, piece] = (units_BD - exact_BD).norm(dim=1)
        facts_XQ[2, piece] = units_BD @ mean_D.double()

    in_pieces(fill, len(stored_QD), stored_QD.device)
    return CoarseQueries(coarse_QD, *facts_XQ)


def product(queries_QD: torch.Tensor, vectors_ND: torch.Tensor) -> torch.Tensor:
    """Products [Q, N]: float32 where the machine can write it so, otherwise the type of the operands."""
    import torch

    if _writes_float32(queries_QD):
        return torch.mm(queries_QD, vectors_ND.t(), out_dtype=torch.float32)
    return torch.mm(queries_QD, vectors_ND.t())


def _writes_float32(queries_QD: torch.Tensor) -> bool:
    import torch

    return queries_QD.is_cuda and queries_QD.dtype != torch.float32


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products in float32: the proof does not hold for TF32 or bf16 in its place."""
    import torch

    backends: tuple[Any, ...] = (getattr(torch.backends.mkldnn, "matmul"), torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def rounding_of_products(queries_QD: torch.Tensor) -> float:
    """The relative error with which `product` writes its result: beta."""
    if _writes_float32(queries_QD) or queries_QD.itemsize == 4:
        return 0.0
    return 1.001 * _ROUNDING[str(queries_QD.dtype).removeprefix("torch.")]


class Bounds:
    """From products to lower bounds of scores and back, for a block of queries against a set of rows.

    `beta` is the relative rounding with which products are written, beyond their accumulation in float32. `error_Q` is
    float64 [B]: how far a product can be off before that. `lost_Q`: what a kernel's own rounding took from queries.
    """

    def __init__(self, queries: CoarseQueries, part: slice, rows: RowBounds, beta: float = 0.0,
                 lost_Q: torch.Tensor | float = 0.0):
        self._beta, self._offsets_Q = beta, queries.offsets_Q[part]
        self.error_Q = _error(queries, part, rows) + lost_Q * rows.largest_norm

    @property
    def highest_above_Q(self) -> torch.Tensor:
        """float64 [B]: no score is above its product plus this, where beta is 0."""
        return self._offsets_Q + self.error_Q

    def products_of(self, scores_QK: torch.Tensor) -> torch.Tensor:
        """The product of a row of which nothing is known but that its score is this one; float32 [Q, K]."""
        reach_QK = scores_QK.double() - self._offsets_Q[:, None] + self.error_Q[:, None]
        return _rounded_down(reach_QK / (1 - self._beta * reach_QK.sign()))

    def floor(self, kth_product_Q: torch.Tensor) -> torch.Tensor:
        """No row with a smaller product is in the first k, if k rows reach `kth_product_Q`; float32 [Q]."""
        kth_Q = kth_product_Q.double()
        lower_Q = kth_Q * (1 - self._beta * kth_Q.sign()) - self.error_Q
        reach_Q = lower_Q - self.error_Q
        return _rounded_down(reach_Q / (1 + self._beta * reach_Q.sign()))


def _error(queries: CoarseQueries, part: slice, rows: RowBounds) -> torch.Tensor:
    return (queries.residuals_Q[part] * rows.largest_norm + rows.largest_residual
            + _gamma(queries.vectors_QD) * queries.norms_Q[part] * rows.largest_norm + _SLACK)


def _gamma(queries_QD: torch.Tensor) -> float:
    dimension = queries_QD.shape[1]
    assert dimension <= _LARGEST_DIMENSION, dimension
    grain = _ROUNDING["float32"] * (_CUDA_ACCUMULATION if queries_QD.is_cuda else 1.0)
    return dimension * grain / (1 - dimension * grain)


def _rounded_down(values: torch.Tensor) -> torch.Tensor:
    import torch

    narrow = values.float()
    return torch.nextafter(narrow, torch.full_like(narrow, float("-inf")))
