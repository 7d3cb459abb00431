"""One step of learning: who decays, how the rate moves, and that cached gradients are the gradients."""

from __future__ import annotations

import io
import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.encoders import Item
from pipeline.training.feeding import PreparedStep
from pipeline.training.learning import Learner, new_optimiser, new_schedule, parameter_groups
from pipeline.training.objective import Objective
from pipeline.training.processes import Processes
from tests.training.tiny import ToyEncoder, Toys, feeder_of, params_of, runtime_of, tiny_clip, toys, weights_of

KINDS = ["words", "captions", "both"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return toys(tmp_path_factory.mktemp("learning"), KINDS)


class Lesson:
    """A learner and its steps; `options` are those of the training, of either sort."""

    def __init__(self, toy: Toys, encoder: Any, chunk_size: int = 0, cached: bool = False, **options: Any):
        params = params_of(**{"hard_negatives": 1, "symmetric": True, **options})
        runtime = runtime_of(chunk_size=chunk_size, cached_gradients=cached)
        self.feeder, self.encoder = feeder_of(toy, params, runtime, encoder), encoder
        self.learner = Learner(encoder, Objective(toy.examples, params.symmetric, Processes()), params, runtime,
                               self.feeder.course.num_steps)

    def prepared(self, count: int) -> list[PreparedStep]:
        return list(islice(self.feeder.steps(0), count))

    def gradients(self) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss and gradients of the first step, its dropout drawn from a fixed state; the weights stay."""
        torch.manual_seed(11)
        step = self.prepared(1)[0]
        self.learner.optimiser.zero_grad()
        way = self.learner._cached if self.learner.runtime.cached_gradients else self.learner._direct
        outcome = way(step, self.feeder.course.step(0))
        named = self.encoder.model.named_parameters()
        return float(outcome.loss.detach()), {name: tensor.grad.clone() for name, tensor in named}

    def learn(self, count: int) -> list[float]:
        torch.manual_seed(11)
        return [float(self.learner.step(step, self.feeder.course.step(number)).loss)
                for number, step in enumerate(self.prepared(count))]


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], relative: float = 1e-6) -> None:
    """Each tensor's difference against its own size; sums of zeros may differ by the last bits of the largest."""
    assert one.keys() == other.keys()
    largest = max(float(tensor.abs().max()) for tensor in one.values())
    for name in one:
        bound = relative * float(one[name].norm()) + 1e-9 * largest
        assert float((one[name] - other[name]).norm()) <= bound, name


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 0])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_cached_gradients_are_the_gradients(toy: Toys, chunk_size: int, dropout: float) -> None:
    """Of every parameter, with the same dropout in both passes."""
    losses, found = zip(*(Lesson(toy, ToyEncoder(dropout), chunk_size, cached).gradients() for cached in (False, True)))
    assert losses[0] == losses[1]
    assert all(float(tensor.abs().max()) > 0 for tensor in found[0].values())
    assert_close(*found)


def test_dropout_is_at_work(toy: Toys) -> None:
    """Or the test above would show nothing."""
    assert Lesson(toy, ToyEncoder(0.4)).gradients()[0] != Lesson(toy, ToyEncoder(0.0)).gradients()[0]


@pytest.mark.parametrize("chunk_size", [1, 3, 7])
def test_chunks_change_no_gradient(toy: Toys, chunk_size: int) -> None:
    whole, chunked = (Lesson(toy, ToyEncoder(), size).gradients() for size in (0, chunk_size))
    assert whole[0] == pytest.approx(chunked[0], rel=1e-7)
    assert_close(whole[1], chunked[1])


def test_gradients_against_autograd_by_hand(toy: Toys) -> None:
    """All items encoded as one batch, normalised, and held against each other by hand: no chunk, no layout."""
    lesson = Lesson(toy, ToyEncoder(), 3, True, hard_negatives=0, symmetric=False, instruction="none")
    _, found = lesson.gradients()
    draw, model, examples = lesson.feeder.course.step(0), lesson.encoder.model, toy.examples
    model.zero_grad()
    sides = []
    for table, rows in ((examples.queries, draw.queries), (examples.candidates, draw.positives)):
        own = [table.slice(int(row), 1).to_pylist()[0] for row in rows]
        batch = [lesson.encoder.prepare(Item(row["text"], toy.images.open(row["image"]) if row["image"] else None))
                 for row in own]
        vectors = lesson.encoder.embed(batch)
        sides.append(vectors / vectors.norm(dim=1, keepdim=True))
    logits = model.logit_scale.exp() * sides[0] @ sides[1].T
    loss = torch.zeros(())
    for row, query in enumerate(draw.queries.tolist()):
        answers = examples.positives.of(query).tolist()
        columns = [column for column, candidate in enumerate(draw.positives.tolist())
                   if column == row or candidate not in answers]
        loss = loss + torch.logsumexp(logits[row][columns], dim=0) - logits[row][row]
    (loss / len(draw.queries)).backward()
    assert_close({name: tensor.grad for name, tensor in model.named_parameters()}, found, 1e-5)


@pytest.mark.parametrize("options", [
    {}, {"clip_norm": 0.05}, {"max_scale": 4.6}, {"warmup": 0.3, "clip_norm": 0.05}], ids=str)
def test_a_large_batch_in_small_chunks_learns_the_same(toy: Toys, options: dict[str, Any]) -> None:
    """Five steps: the memory of three items, the negatives of the whole batch."""
    for dropout, chunk_size in ((0.0, 0), (0.2, 3)):  # other chunks draw other dropout, so there they are the same
        direct = Lesson(toy, ToyEncoder(dropout), chunk_size, **options)
        cached = Lesson(toy, ToyEncoder(dropout), 3, True, **options)
        assert direct.learn(5) == pytest.approx(cached.learn(5), rel=1e-6)
        assert_close(weights_of(direct.encoder), weights_of(cached.encoder))


def test_tiny_clip_learns_the_same_in_chunks(toy: Toys, tmp_path: Path) -> None:
    """Real towers in float32, texts of a chunk cut at their own lengths.

    Nothing depends on the bias of attention's keys: its gradient is rounding error, which a small epsilon blows up.
    """
    lessons = [Lesson(toy, tiny_clip(tmp_path), *how, epsilon=1e-4) for how in ((0, False), (3, True), (3, False))]
    losses = [lesson.learn(4) for lesson in lessons]
    for lesson, own in zip(lessons[1:], losses[1:]):
        assert own == pytest.approx(losses[0], abs=1e-5)
        for name, tensor in weights_of(lesson.encoder).items():
            torch.testing.assert_close(tensor, weights_of(lessons[0].encoder)[name], rtol=0, atol=1e-5)
    assert losses[0][-1] < losses[0][0], "it learns"


def test_checkpointed_activations_change_nothing(toy: Toys, tmp_path: Path) -> None:
    plain, checkpointed = Lesson(toy, tiny_clip(tmp_path), 5), Lesson(toy, tiny_clip(tmp_path), 5)
    checkpointed.encoder.model.set_grad_checkpointing(True)
    assert plain.gradients()[0] == checkpointed.gradients()[0]
    assert_close(plain.gradients()[1], checkpointed.gradients()[1])


def test_the_gradient_is_clipped_as_a_whole(toy: Toys) -> None:
    """What the optimiser sees has the norm that was asked for, and the direction of before."""
    for bound in (0.01, 1e6):
        free, clipped = Lesson(toy, ToyEncoder()), Lesson(toy, ToyEncoder(), clip_norm=bound)
        _, raw = free.gradients()
        clipped.learn(1)
        found = {name: tensor.grad for name, tensor in clipped.encoder.model.named_parameters()}
        norm = math.sqrt(sum(float(tensor.square().sum()) for tensor in raw.values()))
        share = min(1.0, bound / norm)
        assert_close({name: tensor * share for name, tensor in raw.items()}, found, 1e-4)


def test_the_scale_is_bounded(toy: Toys) -> None:
    lesson = Lesson(toy, ToyEncoder(), max_scale=4.0)
    assert lesson.learner.scale == pytest.approx(math.exp(1.5))
    lesson.learn(1)
    assert lesson.learner.scale == pytest.approx(4.0)
    free = Lesson(toy, ToyEncoder())
    free.learn(1)
    assert free.learner.scale > 4.4


def test_one_step_is_adamw(toy: Toys) -> None:
    """After the first step each number has moved by its rate against the sign, and decayed if it decays."""
    lesson = Lesson(toy, ToyEncoder(), weight_decay=0.3, learning_rate=0.01)
    before, (_, gradient) = weights_of(lesson.encoder), lesson.gradients()
    lesson.learn(1)
    for name, tensor in weights_of(lesson.encoder).items():
        decay = 0.003 if name in ("token_embedding.weight", "text_projection", "visual.0.weight",
                                  "visual.2.weight") else 0
        expected = before[name] * (1 - decay) - 0.01 * gradient[name] / (gradient[name].abs() + 1e-6)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-9)


class Named(torch.nn.Module):
    """Parameters under the names that OpenAI's CLIP and UniIR's fusion layers have."""

    SHAPES = {
        "logit_scale": (), "positional_embedding": (7, 4), "text_projection": (4, 4), "token_embedding.weight": (9, 4),
        "visual.class_embedding": (4,), "visual.proj": (4, 4), "visual.conv1.weight": (4, 3, 2, 2),
        "visual.ln_pre.weight": (4,), "transformer.resblocks.0.ln_1.bias": (4,), "visual.bn1.weight": (4, 1),
        "transformer.resblocks.0.attn.in_proj_weight": (12, 4), "transformer.resblocks.0.attn.in_proj_bias": (12,),
        "transformer.resblocks.0.mlp.c_fc.weight": (8, 4), "t5_layers.final_layer_norm.weight": (4,),
        "t5_layers.block.0.layer.0.SelfAttention.q.weight": (4, 4),
        "t5_layers.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (8, 2)}

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return iter([(name, torch.nn.Parameter(torch.full(shape, 0.5))) for name, shape in self.SHAPES.items()])


def uniir_group(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Rate and decay by the published rule: t5 apart; norms, biases, vectors and the scale without decay."""
    if "t5" in name:
        return 5e-4, 0.2
    return 1e-5, 0.0 if len(shape) < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale")) else 0.2


def test_groups_are_those_of_the_specification() -> None:
    model, params = Named(), params_of(learning_rate=1e-5, fusion_learning_rate=5e-4, weight_decay=0.2)
    given = dict(model.named_parameters())
    model.named_parameters = lambda *_, **__: iter(given.items())  # type: ignore[method-assign]
    found = {}
    for group in parameter_groups(model, params):
        for tensor in group["params"]:
            name = next(name for name, own in given.items() if own is tensor)
            assert name not in found
            found[name] = (group["lr"], group["weight_decay"])
    assert found == {name: uniir_group(name, shape) for name, shape in Named.SHAPES.items()}


def test_a_model_without_fusion_layers_has_two_groups(tmp_path: Path) -> None:
    model = tiny_clip(tmp_path).model
    groups = parameter_groups(model, params_of())
    assert [group["weight_decay"] for group in groups] == [0.0, 0.1]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    optimiser = new_optimiser(model, params_of())
    assert {(group["betas"], group["eps"]) for group in optimiser.param_groups} == {((0.9, 0.98), 1e-6)}


@pytest.mark.parametrize("num_steps, warmup", [(1, 0.0), (10, 0.0), (100, 0.0), (40, 0.1), (40, 0.5), (7, 0.9),
                                               (3, 0.2), (1000, 0.05)])
def test_the_rate_follows_the_formula(num_steps: int, warmup: float) -> None:
    """Up along a line, from a share of it to all of it, then down a cosine; every group in proportion."""
    model = torch.nn.ModuleDict({"t5_layers": torch.nn.Linear(2, 2), "other": torch.nn.Linear(2, 2)})
    optimiser = new_optimiser(model, params_of(learning_rate=0.01, fusion_learning_rate=0.5))
    schedule = new_schedule(optimiser, params_of(warmup=warmup), num_steps)
    rising = int(num_steps * warmup)
    for step in range(num_steps + 1):
        if step < rising:
            share = 1 / (rising + 1) + (1 - 1 / (rising + 1)) * step / rising
        else:
            share = (1 + math.cos(math.pi * (step - rising) / (num_steps - rising))) / 2
        for group in optimiser.param_groups:
            full = 0.5 if any(own is tensor for tensor in model["t5_layers"].parameters() for own in group["params"]) \
                else 0.01
            assert group["lr"] == pytest.approx(full * share, rel=1e-9, abs=1e-15), step
        optimiser.step()
        schedule.step()


def test_the_rate_goes_on_where_it_stood(toy: Toys) -> None:
    """State saved after three steps and loaded elsewhere: the later steps are those of an uninterrupted training."""
    options: dict[str, Any] = dict(warmup=0.5, clip_norm=1.0)
    whole = Lesson(toy, ToyEncoder(), **options)
    steps = whole.prepared(6)
    losses = [float(whole.learner.step(step, whole.feeder.course.step(number)).loss)
              for number, step in enumerate(steps[:3])]
    weights, state = weights_of(whole.encoder), whole.learner.state()
    again = Lesson(toy, ToyEncoder(), **options)
    again.encoder.model.load_state_dict(weights)
    again.learner.load_state(torch.load(_packed(state), weights_only=True))
    assert again.learner.learning_rate == whole.learner.learning_rate
    for number in range(3, 6):
        both = [float(lesson.learner.step(steps[number], lesson.feeder.course.step(number)).loss)
                for lesson in (whole, again)]
        assert both[0] == both[1]
        losses.append(both[0])
    assert len(set(losses)) == 6
    for name, tensor in weights_of(whole.encoder).items():
        assert torch.equal(tensor, weights_of(again.encoder)[name])


def _packed(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("precision, cached", [("fp16", False), ("fp16", True), ("bf16", True)])
def test_a_scaled_loss_scales_nothing_else(toy: Toys, precision: str, cached: bool) -> None:
    """The toy encoder computes in float64 whatever it is told: with fp16 only the scaler is at work, and out again."""
    plain = Lesson(toy, ToyEncoder(), 3, cached, clip_norm=0.05)
    scaled = Lesson(toy, ToyEncoder(), 3, cached, clip_norm=0.05, precision=precision)
    assert scaled.learner.scaler.is_enabled() == (precision == "fp16")
    assert plain.learn(3) == pytest.approx(scaled.learn(3), rel=1e-5)
    assert_close(weights_of(plain.encoder), weights_of(scaled.encoder), 1e-4)


def test_new_options_hold_from_the_step_they_are_given_at(toy: Toys) -> None:
    """The moments stay, rates and decay are those of a training that had the new options from its start."""
    before = Lesson(toy, ToyEncoder(), warmup=0.5)
    before.learn(3)
    changed: dict[str, Any] = dict(learning_rate=0.3, weight_decay=0.7, warmup=0.2)
    after, fresh = Lesson(toy, ToyEncoder(), **changed), Lesson(toy, ToyEncoder(), **changed)
    after.learner.load_state(before.learner.state(), 3)
    for _ in range(3):
        fresh.learner.optimiser.step()
        fresh.learner.schedule.step()
    for _ in range(3):
        assert after.learner.learning_rate == pytest.approx(fresh.learner.learning_rate, rel=1e-12)
        after.learner.optimiser.step()
        fresh.learner.optimiser.step()
        after.learner.schedule.step()
        fresh.learner.schedule.step()
    kept, given = (lesson.learner.optimiser.state_dict() for lesson in (after, before))
    assert {group["weight_decay"] for group in kept["param_groups"]} == {0.0, 0.7}
    assert kept["state"].keys() == given["state"].keys() != set()
    for number, moments in given["state"].items():
        assert torch.equal(kept["state"][number]["exp_avg_sq"], moments["exp_avg_sq"])
