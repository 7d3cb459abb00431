"""The in-batch contrastive loss: each query against the candidates of all processes.

Definition: cross-entropy over cosines times exp(logit_scale), the query's own positive as the target; `symmetric` adds
the same from candidates to queries and halves the sum (Radford et al., "Learning Transferable Visual Models From
Natural Language Supervision", 2021); from queries to candidates alone as in Wei et al., "UniIR" (2023). Unlike
there, what answers a query beside its target is left out of the sum instead of being punished, and hard negatives
are columns for every query.

Shapes: B queries of this process, N = B * processes, C candidates of all processes, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.training.draws import Draw
from pipeline.training.examples import Examples
from pipeline.training.feeding import Layout
from pipeline.training.processes import Processes

if TYPE_CHECKING:
    from torch import Tensor


class Outcome(NamedTuple):
    """Loss and in-batch accuracy of this process's queries; scalars, the loss with gradients."""

    loss: Any
    accuracy: Any


class Excluded(NamedTuple):
    """Pairs that are left out of the sums: queries against candidates [B, C], positives against queries [B, N]."""

    candidates: np.ndarray
    queries: np.ndarray


def excluded(examples: Examples, draw: Draw, rank: int, world: int) -> Excluded:
    """What must not count as a negative, for process `rank` of the joint `draw` of all processes.

    Candidates stand in the order in which they are gathered: positives of all processes, then their hard negatives.
    """
    size = len(draw.queries) // world
    own = slice(rank * size, (rank + 1) * size)
    columns_C = np.concatenate([draw.positives, draw.negatives.reshape(-1)])
    targets = np.arange(size), np.arange(size) + rank * size
    candidates = examples.are_positive(draw.queries[own], columns_C) | (columns_C < 0)
    queries = examples.are_positive(draw.queries, draw.positives[own]).T
    candidates[targets] = queries[targets] = False
    return Excluded(candidates, queries)


@dataclass(frozen=True)
class Objective:
    """The loss of one step, given the vectors of its items."""

    examples: Examples
    symmetric: bool
    processes: Processes

    def __call__(self, vectors_ID: Tensor, scale: Tensor, layout: Layout, joint: Draw) -> Outcome:
        """`vectors_ID` are not normalised; `joint` is the draw of all processes, `layout` that of this one."""
        import torch
        from torch.nn import functional

        processes, device = self.processes, vectors_ID.device
        units_ID = functional.normalize(vectors_ID.float(), dim=-1)
        queries_BD, positives_BD = _rows(units_ID, layout.queries), _rows(units_ID, layout.positives)
        everyones = [processes.gather(positives_BD)]
        if len(layout.negatives):  # a place without a negative holds any vector: it is excluded
            everyones.append(processes.gather(_rows(units_ID, layout.negatives.clip(0))))
        out = excluded(self.examples, joint, processes.rank, processes.world)
        target_B = torch.arange(len(queries_BD), device=device) + processes.rank * len(queries_BD)
        logits_BC = _logits(queries_BD, torch.cat(everyones), scale, out.candidates)
        loss = functional.cross_entropy(logits_BC, target_B)
        if self.symmetric:
            logits_BN = _logits(positives_BD, processes.gather(queries_BD), scale, out.queries)
            loss = (loss + functional.cross_entropy(logits_BN, target_B)) / 2
        return Outcome(loss, (logits_BC.detach().argmax(dim=1) == target_B).float().mean())


def _rows(vectors_ID: Tensor, places_B: np.ndarray) -> Tensor:
    """Like vectors_ID[places_B], whose gradient would be summed in an order that depends on the threads' luck."""
    import torch
    return vectors_ID.index_select(0, torch.from_numpy(places_B).to(vectors_ID.device, non_blocking=True))


def _logits(rows_BD: Tensor, columns_CD: Tensor, scale: Tensor, excluded_BC: np.ndarray) -> Tensor:
    import torch
    left_out_BC = torch.from_numpy(excluded_BC).to(rows_BD.device, non_blocking=True)
    return (scale * rows_BD @ columns_CD.T).masked_fill(left_out_BC, float("-inf"))
