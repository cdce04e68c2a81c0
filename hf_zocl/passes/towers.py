"""The cheapest way to compute a loss under a perturbation.

A dual encoder's towers meet only in the last product, and a perturbation that starts in layer k leaves the layers
below as they are. So one step runs each tower once at θ (the first-order pass does, where there is one) and once for
every perturbation of its own parameters, from layer k on; a loss is then the model's own forward pass with both towers
replayed. Several small candidates of one tower go through it as one batch.

The model is not rewritten: for the length of a call, an attribute of a module (`forward`, `layers`, `weight`) is
shadowed by another. Every loss equals that of the plain forward pass, up to rounding: each shortcut is compared with
it once (see `SelfCheck`), and one that differs is switched off with a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from ..private_names import attention_kernel
from ..zo.directions import Combination
from ..zo.estimators import Point
from ..zo.estimators.base import wide
from .candidates import SharedDraws, repeat, rows_of, stacked
from .plain import PlainEvaluation, at, watch
from .plan import LAYERS, PACKING, REST, STACKING, Shortcut, TowerPlan
from .prompts import PackedPrompts
from .random_state import ForwardState
from .structure import Tower, forward_of, shadowed


# Elements of hidden state that a batch of candidates may always have; beyond it, as many as the largest tower has.
MIN_BATCH_ELEMENTS = 1 << 22


@dataclass
class _TowerRecord:
    """What one step has recorded of a tower."""

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    calls: int = 0
    elements: int = 0
    hidden: torch.Tensor | None = None
    entry: ForwardState | None = None
    resume: ForwardState | None = None
    exit: ForwardState | None = None
    # By offset; None at θ.
    outputs: dict[Combination | None, Any] = field(default_factory=dict)
    packed: PackedPrompts | None = None
    has_asked_for_packing: bool = False

    @cached_property
    def draws(self) -> bool:
        """Whether the tower draws random numbers: dropout masks, routing noise."""
        return not self.entry.same_random_state(self.exit)


class TowerEvaluation:
    """The losses of one micro-batch of a dual encoder: a tower runs only where its own parameters differ.

    Args:
        plan: See `TowerPlan`.
        forward: The model's full forward pass without gradient: the loss, a scalar, at the current parameters.
        context: The context in which a tower runs on its own, such as autocast.
        before: The state in which the step's first forward pass started.
        batch_candidates: Whether candidates may go through a tower as one batch.
        reuse_layers: Whether the layers below the first perturbed one may be skipped.
        pack_prompts: Whether prompts that begin alike may share their beginning.
        used: The shortcuts to take; default: those of the plan, which are checked before any is taken.
    """

    def __init__(
        self,
        plan: TowerPlan,
        forward: Callable[[], torch.Tensor],
        before: ForwardState,
        context: Callable[[], AbstractContextManager] = nullcontext,
        batch_candidates: bool = True,
        reuse_layers: bool = True,
        pack_prompts: bool = True,
        used: Collection[Shortcut] | None = None,
    ):
        self.plan, self.forward, self.before, self.context = plan, forward, before, context
        self.batch_candidates, self.reuse_layers, self.pack_prompts = batch_candidates, reuse_layers, pack_prompts
        self._own_used = used
        self.records = {name: _TowerRecord() for name in plan.towers}
        self.after: ForwardState | None = None
        self.plain: PlainEvaluation | None = None
        self.draws = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Watch a whole forward pass at θ, such as the first-order one: its features need not be computed again."""
        with self._watching({}):
            yield

    def finer(
        self,
        forward: Callable[[], torch.Tensor],
        context: Callable[[], AbstractContextManager],
        towers: Collection[str | None],
    ) -> PlainEvaluation | TowerEvaluation:
        """The evaluation of the same micro-batch by another, finer forward pass.

        It reuses what was recorded: the states before the first perturbed layer, and the features of the other tower,
        are the same in all losses that are compared.

        Args:
            forward, context: As for the evaluation itself.
            towers: The towers that run again.
        """
        if self.plain is not None:
            return self.plain.finer(forward)
        options = self.batch_candidates, self.reuse_layers, self.pack_prompts
        finer = TowerEvaluation(self.plan, forward, self.before, context, *options)
        if self.after is not None:
            finer.after, finer.draws, finer.records = self.after, self.draws, {}
            for name, record in self.records.items():
                outputs = {} if name in towers else {offset: _wide(own) for offset, own in record.outputs.items()}
                hidden = None if record.hidden is None else wide(record.hidden)
                finer.records[name] = replace(record, outputs=outputs, hidden=hidden)
        return finer

    def losses(self, points: Sequence[Point]) -> list[torch.Tensor]:
        """The loss at every point; scalars."""
        watch(points, lambda: self._plain_evaluation().losses([{}]))
        points, losses = list(points), []
        if points and self.after is None:
            point = points.pop(0)
            self.before.restore()
            with at(point), self._watching(point):
                losses.append(self.forward())
        if self.plain is None and self._used is None:
            self.plan.check(self.forward, self.before, self._by)
            if not self.plan.used:
                self.plain = self._plain_evaluation()
        if self.plain is not None:
            return losses + self.plain.losses(points)
        for name in self.records:
            self._run_tower(name, dict.fromkeys(self.plan.offset(name, point) for point in points))
        return losses + [self._combine(point) for point in points]

    @property
    def _used(self) -> Collection[Shortcut] | None:
        return self.plan.used if self._own_used is None else self._own_used

    def _uses(self, shortcut: Shortcut) -> bool:
        """Whether a shortcut is taken; True before the check, so that what it needs is recorded."""
        return self._used is None or shortcut in self._used

    def _by(self, used: Collection[Shortcut]) -> Callable[[Sequence[Point]], list[torch.Tensor]]:
        """Computes losses with these shortcuts and no others."""
        options = self.batch_candidates, self.reuse_layers, self.pack_prompts
        return lambda points: TowerEvaluation(
            self.plan, self.forward, self.before, self.context, *options, used=used
        ).losses(points)

    def _plain_evaluation(self) -> PlainEvaluation:
        return PlainEvaluation(self.forward, self.before, self.after)

    def close(self) -> None:
        if self.plain is not None:
            self.plain.close()
        elif self.draws:
            self.after.restore()
        self.records.clear()

    @contextmanager
    def _watching(self, point: Point) -> Iterator[None]:
        """Record both towers during a whole forward pass at `point`."""
        with ExitStack() as stack:
            for name in self.records:
                stack.enter_context(self._watching_tower(name, self.plan.offset(name, point)))
            yield
        self.after = self.before.now()
        self.draws = not self.before.same_random_state(self.after)
        for name, record in list(self.records.items()):
            if record.calls == 0 and self.plan.perturbations[name] is None:
                del self.records[name]  # the loss reads features computed earlier
        is_dual = all(record.calls == 1 and record.outputs for record in self.records.values())
        if not is_dual or not self.before.same_buffers(self.after):
            self.plain = self._plain_evaluation()

    @contextmanager
    def _watching_tower(self, name: str, offset: Combination | None) -> Iterator[None]:
        tower, record = self.plan.towers[name], self.records[name]
        original, devices = tower.module.forward, self.before.devices

        def watched(*args, **kwargs):
            record.calls += 1
            record.args, record.kwargs, record.entry = args, kwargs, ForwardState(devices)
            with self._layers(tower, watch, skip=0):
                output = original(*args, **kwargs)
            if _is_pooled(output):
                record.outputs[offset], record.exit = _pooled(output), ForwardState(devices)
            return output

        def watch(hidden, *args, **kwargs):
            if record.elements == 0:
                record.elements = hidden.numel()
                if self._keeps_hidden(name):
                    record.hidden, record.resume = hidden.detach(), ForwardState(devices)
            return hidden

        with forward_of(tower.module, watched):
            yield

    def _keeps_hidden(self, name: str) -> bool:
        """Whether the states before the first perturbed layer are worth their memory."""
        first = self.plan.first_layer[name]
        if first is None or not self.reuse_layers:
            return False
        if first > 0:
            return self._uses((LAYERS, name))
        return self._packs(name) and attention_kernel(self.plan.towers[name].module) == "sdpa"

    def _packs(self, name: str) -> bool:
        return name == PACKING[1] and self.pack_prompts and self.plan.packable and self._uses(PACKING)

    @contextmanager
    def _layers(self, tower: Tower, inserted: Callable, skip: int) -> Iterator[None]:
        """The tower with `inserted` in front of its first perturbed layer, and without its first `skip` layers."""
        if tower.layers is None:
            yield
            return
        layers, first = list(tower.layers), self.plan.first_layer[tower.name] or 0
        with shadowed(tower.module.get_submodule("encoder"), layers=[*layers[skip:first], inserted, *layers[first:]]):
            yield

    def _run_tower(self, name: str, offsets: Iterable[Combination | None]) -> None:
        """Make sure that the tower's output at every offset is recorded."""
        record, perturbation = self.records[name], self.plan.perturbations[name]
        missing = [offset for offset in offsets if offset not in record.outputs]
        if None in missing:
            missing.remove(None)
            record.outputs[None] = self._tower_output(name)
        if not missing:
            return
        if not record.has_asked_for_packing and self._packs(name) and self._keeps_hidden(name) and not record.draws:
            record.has_asked_for_packing = True
            kwargs = record.kwargs if record.hidden is not None else {}
            record.packed = self.plan.packing.prompts(kwargs.get("input_ids"), kwargs.get("attention_mask"))
        size = self._batch_size(name, len(missing))
        for first in range(0, len(missing), size):
            chunk = missing[first : first + size]
            if len(chunk) == 1:
                with perturbation.at(chunk[0]):
                    record.outputs[chunk[0]] = self._tower_output(name)
                continue
            outputs = self._stacked_outputs(name, chunk)
            record.outputs.update(zip(chunk, outputs, strict=True))

    def _stacked_outputs(self, name: str, offsets: Sequence[Combination]) -> list[Any]:
        """The tower's output at every offset, by one pass over one copy of the batch per offset."""
        record = self.records[name]
        with ExitStack() as stack:
            stack.enter_context(stacked(self.plan.stacked[name], self.plan.perturbations[name].stack(offsets)))
            if record.draws:
                stack.enter_context(SharedDraws(len(offsets), rows_of((record.args, record.kwargs))))
            output = self._tower_output(name, copies=len(offsets))
        return _split(output, len(offsets))

    def _batch_size(self, name: str, count: int) -> int:
        """How many candidates go through the tower at once without using more memory than the step does elsewhere.

        Their hidden states and weights together may have as many elements as the largest tower's hidden states. Where
        random numbers are drawn, all candidates get the same ones.
        """
        record = self.records[name]
        if count < 2 or not self.batch_candidates or not self._stacks(name) or not record.elements:
            return 1
        budget = max(MIN_BATCH_ELEMENTS, *(other.elements for other in self.records.values()))
        elements = record.elements
        if record.packed is not None:
            elements = record.packed.index.numel() * record.hidden.shape[-1]
        return max(1, budget // (elements + len(self.plan.perturbations[name])))

    def _stacks(self, name: str) -> bool:
        return self.plan.stacked.get(name) is not None and self._uses((STACKING, name))

    def _tower_output(self, name: str, copies: int = 1) -> Any:
        """Run a tower on its recorded inputs, from the first perturbed layer on where that is possible."""
        tower, record = self.plan.towers[name], self.records[name]
        kwargs, rows, packed = record.kwargs, rows_of((record.args, record.kwargs)), record.packed
        hidden = record.hidden if self._keeps_hidden(name) else None
        if packed is not None:
            kwargs = {**kwargs, "input_ids": packed.pack(kwargs["input_ids"]), "attention_mask": packed.mask}
            hidden, rows = packed.pack(hidden), len(packed.index)
        hidden = repeat(hidden, copies, rows)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.context())
            if hidden is not None:
                stack.enter_context(self._layers(tower, lambda *_, **__: hidden, self.plan.first_layer[name]))
                stack.enter_context(shadowed(tower.module, embeddings=lambda *_, **__: hidden))
            if record.draws:
                (record.entry if hidden is None else record.resume).restore()
            # Not the module itself: the recorded inputs have passed its hooks, and its output will pass them later.
            output = tower.module.forward(*repeat(record.args, copies, rows), **repeat(kwargs, copies, rows))
            if packed is not None:
                output.pooler_output = packed.last_states(output.last_hidden_state, copies)
            return _pooled(output)

    def _combine(self, point: Point) -> torch.Tensor:
        """The loss from the towers' outputs: the model's forward pass with both of them replayed.

        Parameters outside the towers, such as a projection's, and those that the loss itself reads are moved to the
        point.
        """
        resting = {p for name, p in self.plan.perturbations.items() if self._uses((REST, name))}
        outside = {p: offset for p, offset in point.items() if p not in resting & self.plan.within_towers}
        if self.draws:
            self.before.restore()
        with ExitStack() as stack:
            stack.enter_context(at(outside))
            for name, record in self.records.items():
                offset = self.plan.offset(name, point)
                replay = _Replay(record.outputs[offset], record.exit if self.draws else None)
                stack.enter_context(forward_of(self.plan.towers[name].module, replay))
            return self.forward()


class _Replay:
    """Stands in for a tower: returns its recorded output, and leaves the random state as the tower did."""

    def __init__(self, output: Any, state: ForwardState | None):
        self.output, self.state = output, state

    def __call__(self, *args, **kwargs) -> Any:
        if self.state is not None:
            self.state.restore()
        return type(self.output)(**self.output)


def _is_pooled(output: Any) -> bool:
    return isinstance(output, dict) and output.get("pooler_output") is not None


def _pooled(output: Any) -> Any:
    """The part of a tower's output that a dual encoder reads, its pooled features; hidden states would fill memory."""
    features = output["pooler_output"]
    # `detach` would also drop a tangent.
    return _with_features(output, features.detach() if features.requires_grad else features)


def _with_features(output: Any, features: torch.Tensor) -> Any:
    """An output with only pooled features, at their usual index, because some models read it by index."""
    states = output.get("last_hidden_state")
    stand_in = {} if states is None else {"last_hidden_state": torch.empty(states.shape, device="meta")}
    return type(output)(**stand_in, pooler_output=features)


def _wide(output: Any) -> Any:
    return _with_features(output, wide(output["pooler_output"]))


def _split(output: Any, parts: int) -> list[Any]:
    return [_with_features(output, piece) for piece in output["pooler_output"].chunk(parts)]
