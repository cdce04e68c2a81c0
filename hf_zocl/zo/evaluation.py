"""The cheapest way to a loss under a perturbation.

A dual encoder's towers meet only in the last product, and a perturbation that starts in layer k leaves the layers
below as they are. So one step runs each tower once at θ (the first-order pass does, where there is one) and once for
every perturbation of its own parameters, from layer k on; a loss is then the model's own forward pass with both towers
replayed. Several small candidates of one tower go through it as one batch.

Nothing of the model is rewritten: for the length of a call, an attribute of a module (`forward`, `layers`, `weight`)
is shadowed by another. Every loss equals that of the plain forward pass, to rounding: each shortcut is compared with
it once (see `SelfCheck`), and one that differs is switched off by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from .estimator import Point
from .packing import PackedPrompts, Packing
from .perturbation import Combination, Perturbation
from .random_state import Buffers, ForwardState, uncounted
from .self_check import SelfCheck, holding, without_autocast
from .streaming import StreamedPerturbation


logger = logging.getLogger(__name__)

# Elements of hidden state that a batch of candidates may always have; beyond it, as many as the largest tower has.
MIN_BATCH_ELEMENTS = 1 << 20


class PlainEvaluation:
    """Every loss by one full forward pass, all of them from the same state, so that dropout masks do not differ.

    Args:
        forward: Returns the loss, a scalar, at the present parameters.
        before: The state in which the step's first forward pass started: every evaluation starts there too.
        after: The state that a single pass leaves behind, to which `close` returns, so that the number of queries does
            not change what the next step draws; by default, the state after the first evaluation.
    """

    def __init__(
        self,
        forward: Callable[[], torch.Tensor],
        before: ForwardState | None = None,
        after: ForwardState | None = None,
    ):
        self.forward, self.before, self.after = forward, before, after

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Watch a whole forward pass at θ, such as the first-order one."""
        yield
        self.after = self.before.now()

    def finer(self, forward: Callable[[], torch.Tensor], *_: Any) -> PlainEvaluation:
        """The evaluation of the same micro-batch by another, finer forward pass."""
        return PlainEvaluation(forward, self.before, self.after)

    def losses(self, points: Sequence[Point]) -> list[torch.Tensor]:
        """The loss at every point; scalars."""
        watch(points, lambda: self._loss({}))
        losses = []
        for point in points:
            loss = self._loss(point)
            while _was_missed(point):
                loss = self._loss(point)
            losses.append(loss)
        return losses

    def _loss(self, point: Point) -> torch.Tensor:
        if self.before is not None:
            self.before.restore()
        with at(point):
            loss = self.forward()
        if self.after is None and self.before is not None:
            self.after = self.before.now()
        return loss

    def close(self) -> None:
        if self.after is not None:
            self.after.restore()


@contextmanager
def at(point: Point) -> Iterator[None]:
    """All perturbations of the point at once."""
    with ExitStack() as stack:
        for perturbation, offset in point.items():
            stack.enter_context(perturbation.at(offset))
        yield


def watch(points: Iterable[Point], full_pass: Callable[[], Any]) -> None:
    """See once, in a full pass at θ, where streamed parameters are read (`StreamedPerturbation.watching`)."""
    unseen = {perturbation for point in points for perturbation in _streamed(point) if not perturbation.is_watched}
    if unseen:
        with ExitStack() as stack:
            for perturbation in unseen:
                stack.enter_context(perturbation.watching())
            full_pass()


def _streamed(point: Point) -> list[StreamedPerturbation]:
    return [perturbation for perturbation in point if isinstance(perturbation, StreamedPerturbation)]


def _was_missed(point: Point) -> bool:
    """Whether the last pass may have read streamed parameters at θ: then the next one moves them for longer."""
    missed = [perturbation for perturbation in _streamed(point) if perturbation.widen()]
    return bool(missed)


@dataclass(frozen=True)
class Tower:
    """One half of a dual encoder, as transformers builds it (`CLIPModel`, `SiglipModel` and their kin).

    Attributes:
        name: `vision` or `language`.
        module: What the model calls.
        layers: Its stack of layers, run in order; None where it is built otherwise.
    """

    name: str
    module: nn.Module
    layers: nn.ModuleList | None

    def first_layer_of(self, perturbation: Perturbation) -> int | None:
        """The index of the first layer with a parameter of `perturbation`; None if one lies outside the layers."""
        mine = {id(parameter) for parameter in perturbation.parameters} & {id(p) for p in self.module.parameters()}
        if self.layers is None:
            return None
        of_layer = [{id(p) for p in layer.parameters()} & mine for layer in self.layers]
        if len(set().union(*of_layer)) < len(mine):
            return None
        return next(index for index, parameters in enumerate(of_layer) if parameters)


def find_towers(model: nn.Module) -> dict[str, Tower]:
    """The towers of the dual encoder in `model`, by structure; none if there is no dual encoder, or several."""
    attributes = {"vision": "vision_model", "language": "text_model"}
    found = [
        module
        for module in model.modules()
        if all(isinstance(module._modules.get(name), nn.Module) for name in attributes.values())
        and isinstance(module._parameters.get("logit_scale"), torch.Tensor)
    ]
    if len(found) != 1:
        return {}
    towers = {}
    for name, attribute in attributes.items():
        module = found[0].get_submodule(attribute)
        encoder = module._modules.get("encoder")
        layers = encoder._modules.get("layers") if encoder is not None and "embeddings" in module._modules else None
        towers[name] = Tower(name, module, layers if isinstance(layers, nn.ModuleList) else None)
    return towers


# A shortcut: what it does, and in which tower.
Shortcut = tuple[str, str | None]
TOWERS, PACKING = ("the reuse of towers", None), ("the packing of prompts", "language")
REST, LAYERS, STACKING = "weights left as they are", "the reuse of layers", "candidates side by side"


class TowerPlan:
    """What holds for all steps: which tower a perturbation runs, from which layer on, and by which shortcuts.

    Modules may say what they stand, by attributes: `couples_towers` of the model (its loss is not made of the towers'
    features alone; default: it is), `stackable` (its parameters may have a leading dimension of candidates, all of
    them together; default: a linear layer's may) and `packable` (a row may hold several prompts; default: it may).

    Args:
        model: The model, unwrapped.
        perturbations: One per branch.
        reduce: Averages a tensor of losses over data-parallel ranks.

    Attributes:
        used: The shortcuts that were seen to hold; None as long as none was looked at.
    """

    def __init__(
        self,
        model: nn.Module,
        perturbations: Iterable[Perturbation],
        reduce: Callable[[torch.Tensor], torch.Tensor] = lambda losses: losses,
    ):
        self.model, self.all_perturbations, self.reduce = model, list(perturbations), reduce
        self.buffers = Buffers(model)
        self.towers = {} if getattr(model, "couples_towers", False) else find_towers(model)
        self.perturbations: dict[str, Perturbation | None] = dict.fromkeys(self.towers)
        self.packing = Packing(model)
        self.used: set[Shortcut] | None = None
        self.is_warned = False
        self.first_layer: dict[str, int | None] = dict.fromkeys(self.towers)
        self.stacked: dict[str, list[tuple[nn.Module, str, int]] | None] = {}
        self.packable = all(
            getattr(module, "packable", True) for tower in self.towers.values() for module in tower.module.modules()
        )
        self.within_towers: set[Perturbation] = set()
        owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                owners.setdefault(id(parameter), []).append((module, name))
        for perturbation in self.all_perturbations:
            for name, tower in self.towers.items():
                inside = {id(p) for p in tower.module.parameters()}
                mine = [id(p) in inside for p in perturbation.parameters]
                if not any(mine):
                    continue
                units = perturbation.units if isinstance(perturbation, StreamedPerturbation) else []
                moves_with_tower = any(tower.module in scope for unit in units for scope in unit.scopes)
                if self.perturbations[name] is not None or moves_with_tower:  # two branches in one tower, or its call
                    self.towers = {}
                    return
                self.perturbations[name] = perturbation
                self.first_layer[name] = tower.first_layer_of(perturbation)
                if all(mine):
                    self.within_towers.add(perturbation)
                    self.stacked[name] = _stackable(perturbation, tower.module, owners)

    @property
    def shortcuts(self) -> list[Shortcut]:
        """Those that there are, the one first that the others build on."""
        moved = [name for name, perturbation in self.perturbations.items() if perturbation is not None]
        return [
            TOWERS,
            *((REST, name) for name in moved if self.perturbations[name] in self.within_towers),
            *((LAYERS, name) for name in moved if self.first_layer[name]),
            *([PACKING] if self.packable and PACKING[1] in moved else []),
            *((STACKING, name) for name in moved if self.stacked.get(name) is not None),
        ]

    @property
    def precision(self) -> float:
        """The relative spacing of the coarsest numbers among the weights, of those in which anything is computed."""
        dtypes = {parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point()}
        widths = (torch.finfo(dtype).eps for dtype in dtypes if dtype.itemsize > 1)
        return max(widths, default=torch.finfo(torch.bfloat16).eps)

    def offset(self, name: str, point: Point) -> Combination | None:
        """Where the tower's parameters are at `point`: an offset, or None at θ."""
        return point.get(self.perturbations[name])


def _stackable(
    perturbation: Perturbation, tower: nn.Module, owners: dict[int, list[tuple[nn.Module, str]]]
) -> list[tuple[nn.Module, str, int]] | None:
    """The module that holds each parameter, and its name there; None if one cannot hold candidates' side by side."""
    if isinstance(perturbation, StreamedPerturbation):
        return None
    mine = {id(parameter) for parameter in perturbation.parameters}
    for module in tower.modules():
        inside = [id(parameter) in mine for parameter in module.parameters()]
        if hasattr(module, "stackable") and any(inside) and not (module.stackable and all(inside)):
            return None
    holders = [owners[id(parameter)] for parameter in perturbation.parameters]
    if any(len(holder) > 1 for holder in holders):  # tied weights
        return None
    found = [(*holder[0], index) for index, holder in enumerate(holders)]
    # A subclass may have its weight read by another module, as `nn.MultiheadAttention` does.
    is_able = all(type(module) is nn.Linear or hasattr(module, "stackable") for module, _, _ in found)
    return found if is_able else None


@dataclass
class _TowerRecord:
    """What one step knows of a tower."""

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
        forward: The model's whole forward pass without gradient: the loss, a scalar, at the present parameters.
        context: Under which a tower runs on its own, such as autocast.
        before: The state in which the step's first forward pass started.
        batch_candidates: Whether candidates may go through a tower as one batch.
        reuse_layers: Whether the layers below the first perturbed one may be skipped.
        pack_prompts: Whether prompts that begin alike may share their beginning.
        used: The shortcuts to take; default: those of the plan, each seen to hold before any is taken.
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

        What was recorded serves: the states before the first perturbed layer, and the features of the other tower, are
        the same in all losses that are compared.

        Args:
            forward, context: As for the evaluation itself.
            towers: Those that run anew.
        """
        if self.plain is not None:
            return self.plain.finer(forward)
        options = self.batch_candidates, self.reuse_layers, self.pack_prompts
        finer = TowerEvaluation(self.plan, forward, self.before, context, *options)
        if self.after is not None:
            finer.after, finer.draws = self.after, self.draws
            for name, record in self.records.items():
                outputs = {} if name in towers else {offset: _wide(own) for offset, own in record.outputs.items()}
                hidden = None if record.hidden is None else _widened(record.hidden)
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
            self._check_shortcuts()
        if self.plain is not None:
            return losses + self.plain.losses(points)
        for name in self.records:
            self._run_tower(name, dict.fromkeys(self.plan.offset(name, point) for point in points))
        return losses + [self._combine(point) for point in points]

    @property
    def _used(self) -> Collection[Shortcut] | None:
        return self.plan.used if self._own_used is None else self._own_used

    def _uses(self, shortcut: Shortcut) -> bool:
        """Whether a shortcut is taken; as long as it is not known, what it needs is recorded."""
        return self._used is None or shortcut in self._used

    def _check_shortcuts(self) -> None:
        """See once a training which shortcuts hold; where nothing can be seen, this micro-batch does without any.

        In float32, where rounding hides the least. It leaves no trace: parameters, buffers and random numbers are as
        they were, and what a model counts of its passes is not counted.
        """
        plan, state = self.plan, self.before.now()
        with uncounted(plan.model), without_autocast(self.before.device.type):
            check = SelfCheck(PlainEvaluation(self.forward, self.before).losses, plan.precision, plan.reduce)
            check.look(plan.all_perturbations)
            faults = {}
            if check.is_seen:
                plan.used, faults = holding(plan.shortcuts, lambda used: check.fault(self._by(used)))
        state.restore()
        if not check.is_seen and not plan.is_warned:
            plan.is_warned = True
            logger.warning(
                "The loss does not change with the weights by more than its rounding, so shortcuts cannot be compared "
                "with full forward passes: these are taken until it does."
            )
        for (what, tower), fault in faults.items():
            logger.warning(
                f"Switched off: {what}{f' ({tower} tower)' if tower else ''}, for {fault}."
                + (" Every loss is a full forward pass." if (what, tower) == TOWERS else "")
            )
        if TOWERS in faults:
            plan.towers = {}
        if not plan.used:
            self.plain = self._plain_evaluation()

    def _by(self, used: Collection[Shortcut]) -> Callable[[Sequence[Point]], list[torch.Tensor]]:
        """Losses by some shortcuts alone."""
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
        is_dual = all(record.calls == 1 and record.outputs for record in self.records.values())
        if not is_dual or not self.before.same_buffers(self.after):
            self.plain = self._plain_evaluation()

    @contextmanager
    def _watching_tower(self, name: str, offset: Combination | None) -> Iterator[None]:
        tower, record = self.plan.towers[name], self.records[name]
        original, device = tower.module.forward, self.before.device

        def watched(*args, **kwargs):
            record.calls += 1
            record.args, record.kwargs, record.entry = args, kwargs, ForwardState(device)
            with self._layers(tower, watch, skip=0):
                output = original(*args, **kwargs)
            if _is_pooled(output):
                record.outputs[offset], record.exit = _pooled(output), ForwardState(device)
            return output

        def watch(hidden, *args, **kwargs):
            if record.elements == 0:
                record.elements = hidden.numel()
                if self._keeps_hidden(name):
                    record.hidden, record.resume = hidden.detach(), ForwardState(device)
            return hidden

        with _forward_of(tower.module, watched):
            yield

    def _keeps_hidden(self, name: str) -> bool:
        """Whether the states before the first perturbed layer are worth their memory."""
        first = self.plan.first_layer[name]
        if first is None or not self.reuse_layers:
            return False
        if first > 0:
            return self._uses((LAYERS, name))
        config = getattr(self.plan.towers[name].module, "config", None)
        return self._packs(name) and getattr(config, "_attn_implementation", None) == "sdpa"

    def _packs(self, name: str) -> bool:
        return name == PACKING[1] and self.pack_prompts and self.plan.packable and self._uses(PACKING)

    @contextmanager
    def _layers(self, tower: Tower, inserted: Callable, skip: int) -> Iterator[None]:
        """The tower with `inserted` in front of its first perturbed layer, and without its first `skip` layers."""
        if tower.layers is None:
            yield
            return
        layers, first = list(tower.layers), self.plan.first_layer[tower.name] or 0
        with shadowed(tower.module._modules["encoder"], layers=[*layers[skip:first], inserted, *layers[first:]]):
            yield

    def _run_tower(self, name: str, offsets: Iterable[Combination | None]) -> None:
        """Make sure of the tower's output at every offset."""
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
        """The tower's output at every offset by one pass, of a copy of the batch for each."""
        with self._stacked(name, self.plan.perturbations[name].stack(offsets)):
            output = self._tower_output(name, copies=len(offsets))
        return _split(output, len(offsets))

    def _batch_size(self, name: str, count: int) -> int:
        """How many candidates go through the tower at once: so many that no more memory is used than elsewhere.

        Their hidden states and weights together may have as many elements as the largest tower's hidden states. Where
        random numbers are drawn, candidates go one by one, under the same masks.
        """
        record = self.records[name]
        if count < 2 or not self.batch_candidates or not self._stacks(name) or not record.elements or record.draws:
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
        kwargs, rows, packed = record.kwargs, _rows((record.args, record.kwargs)), record.packed
        hidden = record.hidden if self._keeps_hidden(name) else None
        if packed is not None:
            kwargs = {**kwargs, "input_ids": packed.pack(kwargs["input_ids"]), "attention_mask": packed.mask}
            hidden, rows = packed.pack(hidden), len(packed.index)
        hidden = _repeat(hidden, copies, rows)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.context())
            if hidden is not None:
                stack.enter_context(self._layers(tower, lambda *_, **__: hidden, self.plan.first_layer[name]))
                stack.enter_context(shadowed(tower.module, embeddings=lambda *_, **__: hidden))
            if record.draws:
                (record.entry if hidden is None else record.resume).restore()
            # What was recorded has been through the module's hooks, and its output will go through them.
            output = tower.module.forward(*_repeat(record.args, copies, rows), **_repeat(kwargs, copies, rows))
            if packed is not None:
                output.pooler_output = packed.last_states(output.last_hidden_state, copies)
            return _pooled(output)

    @contextmanager
    def _stacked(self, name: str, stacks: Sequence[torch.Tensor]) -> Iterator[None]:
        """Every perturbed module holds the weights of all candidates, and maps each one's rows by its own."""
        with ExitStack() as stack:
            for module, parameter, index in self.plan.stacked[name]:
                stack.enter_context(shadowed(module, **{parameter: stacks[index]}))
            for module in {module for module, _, _ in self.plan.stacked[name] if isinstance(module, nn.Linear)}:
                stack.enter_context(shadowed(module, forward=_StackedForward(module)))
            yield

    def _combine(self, point: Point) -> torch.Tensor:
        """The loss from the towers' outputs: the model's forward pass with both of them replayed.

        Parameters outside the towers, such as a projection's, and those that the loss reads itself are where the point
        says.
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
                stack.enter_context(_forward_of(self.plan.towers[name].module, replay))
            return self.forward()


@contextmanager
def shadowed(module: nn.Module, **attributes: Any) -> Iterator[None]:
    """Let attributes of a module be others for a while: an instance's own come before its class's."""
    own = vars(module)
    saved = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del own[name]
        own.update(saved)


def _forward_of(module: nn.Module, forward: Callable) -> AbstractContextManager:
    """Let `forward` stand in for the module's own, also where `module.compile()` was called."""
    return shadowed(module, forward=forward, _compiled_call_impl=None)


class _StackedForward:
    """A linear layer's forward pass while its weights are stacked."""

    def __init__(self, module: nn.Linear):
        self.module = module

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return stacked_linear(inputs, self.module.weight, self.module.bias)


def stacked_linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`, also for stacked weights.

    Args:
        inputs: `(rows, …, in)`; for stacked weights the rows are those of candidate 1, then of candidate 2, ….
        weight: `(out, in)`, or `(candidates, out, in)`.
        bias: `(out,)`, or `(candidates, out)`.

    Returns:
        `(rows, …, out)`.
    """
    if weight.dim() == 2:
        if bias is None or bias.dim() == 1:
            return nn.functional.linear(inputs, weight, bias)
        weight = weight.expand(len(bias), -1, -1)  # a bias of every candidate beside the weight of all
    rows = inputs.reshape(len(weight), -1, inputs.shape[-1])
    if bias is None:
        outputs = torch.bmm(rows, weight.mT)
    else:
        outputs = torch.baddbmm(bias.view(-1, 1, bias.shape[-1]), rows, weight.mT)
    return outputs.view(*inputs.shape[:-1], weight.shape[1])


class _Replay:
    """A tower that gives what it gave before, and leaves the random state as it did then."""

    def __init__(self, output: Any, state: ForwardState | None):
        self.output, self.state = output, state

    def __call__(self, *args, **kwargs) -> Any:
        if self.state is not None:
            self.state.restore()
        return type(self.output)(**self.output)


def _is_pooled(output: Any) -> bool:
    return isinstance(output, dict) and output.get("pooler_output") is not None


def _pooled(output: Any) -> Any:
    """What a dual encoder reads of its tower's output: the pooled features; the hidden states would fill memory."""
    features = output["pooler_output"]
    # `detach` would also take a tangent away.
    return _with_features(output, features.detach() if features.requires_grad else features)


def _with_features(output: Any, features: torch.Tensor) -> Any:
    """Pooled features alone, as an output; at their place, for some models read it by number."""
    states = output.get("last_hidden_state")
    stand_in = {} if states is None else {"last_hidden_state": torch.empty(states.shape, device="meta")}
    return type(output)(**stand_in, pooler_output=features)


def _wide(output: Any) -> Any:
    return _with_features(output, _widened(output["pooler_output"]))


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _split(output: Any, parts: int) -> list[Any]:
    return [_with_features(output, piece) for piece in output["pooler_output"].chunk(parts)]


def _rows(value: Any) -> int | None:
    """The rows of the first tensor that is found in a tower's inputs."""
    if isinstance(value, torch.Tensor):
        return len(value) if value.dim() else None
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return next((rows for rows in map(_rows, items) if rows is not None), None)


def _repeat(value: Any, copies: int, rows: int | None) -> Any:
    """Tensors with the rows of a batch once per candidate, in candidate order; anything else as it is."""
    if copies == 1:
        return value
    if isinstance(value, torch.Tensor):
        return value.repeat(copies, *[1] * (value.dim() - 1)) if value.dim() and len(value) == rows else value
    if isinstance(value, tuple):
        return tuple(_repeat(item, copies, rows) for item in value)
    if isinstance(value, dict):
        return {name: _repeat(item, copies, rows) for name, item in value.items()}
    return value
