"""One step of learning: vectors, loss, gradients, optimiser.

With `cached_gradients` a batch may be larger than memory (Gao et al., "Scaling Deep Contrastive Learning Batch Size
under Memory Limited Setup", 2021): chunks are encoded without gradients, the loss gives the gradient of every
vector, then each chunk is encoded again and given its part. All candidates of the batch stay negatives of all
queries, unlike with plain accumulation. The price is a second forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from pipeline.encoders.uniir_clip import FUSION_LAYERS
from pipeline.training.draws import Draw
from pipeline.training.feeding import PreparedStep
from pipeline.training.objective import Objective, Outcome
from pipeline.training.processes import Processes
from pipeline.training.settings import Params, Runtime

if TYPE_CHECKING:
    from torch import Tensor, nn


def parameter_groups(model: nn.Module, params: Params) -> list[dict[str, Any]]:
    """Groups for the optimiser: biases, norms and the logit scale do not decay; fusion layers have their own rate."""
    decayed, kept, fusion = [], [], []
    for name, tensor in model.named_parameters():
        if name.startswith(FUSION_LAYERS):  # they start untrained
            fusion.append(tensor)
        elif tensor.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale")):
            kept.append(tensor)
        else:
            decayed.append(tensor)
    rate, decay = params.learning_rate, params.weight_decay
    groups = [{"params": kept, "lr": rate, "weight_decay": 0.0}, {"params": decayed, "lr": rate, "weight_decay": decay},
              {"params": fusion, "lr": params.fusion_learning_rate, "weight_decay": decay}]
    return [group for group in groups if group["params"]]


def new_optimiser(model: nn.Module, params: Params) -> Any:
    import torch
    on_cuda = next(model.parameters()).is_cuda
    return torch.optim.AdamW(parameter_groups(model, params), betas=(params.betas[0], params.betas[1]),
                             eps=params.epsilon, fused=on_cuda or None)


def new_schedule(optimiser: Any, params: Params, num_steps: int) -> Any:
    """Linear warm-up over the share `warmup` of all steps, then a cosine down to 0."""
    from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
    rising = int(num_steps * params.warmup)
    falling = CosineAnnealingLR(optimiser, max(1, num_steps - rising))
    if not rising:
        return falling
    return SequentialLR(optimiser, [LinearLR(optimiser, 1 / (rising + 1), 1.0, rising), falling], [rising])


class Learner:
    """A model in training. `step` learns from one prepared step; `state` is all that a resumed training needs."""

    def __init__(self, encoder: Any, objective: Objective, params: Params, runtime: Runtime, num_steps: int):
        import torch
        self.params, self.runtime, self.objective = params, runtime, objective
        self.processes: Processes = objective.processes
        self.model: nn.Module = encoder.model
        self.model.train()
        if runtime.gradient_checkpointing:
            encoder.model.set_grad_checkpointing(True)
        self.device = torch.device(encoder.device)
        self._vectors = self.processes.share(_vectors_and_scale(encoder))
        self.optimiser = new_optimiser(self.model, params)
        self.schedule = new_schedule(self.optimiser, params, num_steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=params.precision == "fp16")

    def step(self, prepared: PreparedStep, joint: Draw) -> Outcome:
        """Learn from one step; loss and accuracy are those of before the update."""
        import torch
        self.optimiser.zero_grad(set_to_none=True)
        gradients = self._cached if self.runtime.cached_gradients else self._direct
        outcome = gradients(prepared, joint)
        if self.params.clip_norm:
            self.scaler.unscale_(self.optimiser)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.params.clip_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.schedule.step()
        if self.params.max_scale:
            with torch.no_grad():
                self.model.logit_scale.clamp_(max=math.log(self.params.max_scale))  # type: ignore[operator]
        return Outcome(outcome.loss.detach(), outcome.accuracy)

    @property
    def learning_rate(self) -> float:
        return float(self.optimiser.param_groups[0]["lr"])

    @property
    def scale(self) -> float:
        return float(self.model.logit_scale.detach().exp())  # type: ignore[operator]

    def is_finite(self) -> bool:
        """Whether every weight still is a number."""
        import torch
        return all(bool(torch.isfinite(tensor).all()) for tensor in self.model.parameters())

    def state(self) -> dict[str, Any]:
        return {"optimiser": self.optimiser.state_dict(), "schedule": self.schedule.state_dict(),
                "scaler": self.scaler.state_dict()}

    def load_state(self, state: dict[str, Any], new_options_from: int | None = None) -> None:
        """Go on from a saved state; with other options than it was saved under, from that step on."""
        if state["scaler"]:  # empty under another precision than fp16
            self.scaler.load_state_dict(state["scaler"])
        if new_options_from is None:
            self.optimiser.load_state_dict(state["optimiser"])
            self.schedule.load_state_dict(state["schedule"])
            return
        for _ in range(new_options_from):
            self.optimiser.step()  # without gradients: nothing but the order that the schedule insists on
            self.schedule.step()
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state["optimiser"]["state"], "param_groups": groups})

    def _direct(self, prepared: PreparedStep, joint: Draw) -> Outcome:
        vectors_ID, scale = self._vectors(prepared.chunks)
        outcome = self.objective(vectors_ID, scale, prepared.layout, joint)
        self.scaler.scale(outcome.loss).backward()
        return outcome

    def _cached(self, prepared: PreparedStep, joint: Draw) -> Outcome:
        import torch
        states, parts = [], []
        with torch.no_grad():
            for chunk in prepared.chunks:
                states.append(random_state(self.device))
                vectors, scale = self._vectors([chunk])
                parts.append(vectors)
        vectors_ID, scale = torch.cat(parts).requires_grad_(), scale.detach().requires_grad_()
        outcome = self.objective(vectors_ID, scale, prepared.layout, joint)
        self.scaler.scale(outcome.loss).backward()
        assert vectors_ID.grad is not None
        self._backward_by_chunks(prepared.chunks, states, vectors_ID.grad, scale.grad)
        return outcome

    def _backward_by_chunks(self, chunks: Sequence[list[Any]], states: Sequence[Any], gradient_ID: Tensor,
                            gradient_of_scale: Tensor | None) -> None:
        """The second pass, with the same dropout; processes exchange gradients with the last chunk only."""
        import torch
        after, start = random_state(self.device), 0
        for number, (chunk, state) in enumerate(zip(chunks, states)):
            is_last = number == len(chunks) - 1
            set_random_state(state, self.device)
            with nullcontext() if is_last or self.processes.world == 1 else self._vectors.no_sync():
                vectors, scale = self._vectors([chunk])
                own = gradient_ID[start:start + len(chunk)]
                pairs = [(vectors, own), (scale, gradient_of_scale)] if is_last else [(vectors, own)]
                torch.autograd.backward(*map(list, zip(*pairs)))  # type: ignore[arg-type]
            start += len(chunk)
        set_random_state(after, self.device)


def _vectors_and_scale(encoder: Any) -> Any:
    """A module: chunks of prepared items -> their vectors [I, D] and exp(logit_scale), as one graph."""
    import torch

    class VectorsAndScale(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = encoder.model

        def forward(self, chunks: list[list[Any]]) -> tuple[Tensor, Tensor]:
            vectors = [encoder.embed(chunk) for chunk in chunks]
            return torch.cat(vectors), self.model.logit_scale.exp()

    return VectorsAndScale()


def random_state(device: Any) -> dict[str, Tensor]:
    """States of torch's generators, on the CPU and on the device that is used."""
    import torch
    state = {"cpu": torch.get_rng_state()}
    return state if device.type == "cpu" else {**state, device.type: torch.cuda.get_rng_state(device)}


def set_random_state(state: dict[str, Tensor], device: Any) -> None:
    import torch
    torch.set_rng_state(state["cpu"])
    if device.type in state and device.type != "cpu":
        torch.cuda.set_rng_state(state[device.type], device)
