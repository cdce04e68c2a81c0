"""`DataParallelTrainer`: a `transformers.Trainer` that trains in several processes as it does in one."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import DistributedType, broadcast, honor_type
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging

from ..passes import Buffers
from ..private_names import tree_leaves
from .compat import (
    HookedTrainer,
    asks_for_items,
    dispatched_examples,
    forget_prepared,
    is_sharded,
    leave_out_of_wrapper,
    repeats_uncounted,
    sending_buffers_first,
    training_shard,
)
from .placement import reshard, shards_of, whole_tensors


logger = logging.get_logger(__name__)


class DataParallelTrainer(HookedTrainer):
    """A `Trainer` whose losses and gradients, averaged over processes, are the means over all examples of the batch.

    This also holds for an epoch's last batch, which may give the processes unequal shares. accelerate evens these out
    by repeating examples; here the repeats are cut off, and each process's loss is weighted by its own examples. It
    takes the arguments of `Trainer`.

    A subclass that computes losses besides those of `Trainer.training_step` does so within `_counting_own_examples`,
    and says what it trains without autograd (`_gradient_free_parameters`).
    """

    @property
    def _gradient_free_parameters(self) -> Sequence[nn.Parameter]:
        """Parameters that are trained although they require no gradient."""
        return ()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # How the examples are shared out among the processes, if they are.
        self._shard: BatchSamplerShard | None = None
        # The weight of this process's examples in the mean over processes: for every micro-batch of the step, and for
        # the current one during its training step.
        self._shares: list[float] = []
        self._share: float | None = None
        # Labels that are hidden while items are counted.
        self._uncounted: dict[str, torch.Tensor] = {}

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """As in `Trainer`, without the examples that accelerate repeats to fill the last batch of every process."""
        self._shares.clear()
        shard = self._shard = training_shard(self)
        if shard is not None and not hasattr(shard.batch_sampler, "sampler"):
            shard.batch_sampler = _CountingBatchSampler.of(shard.batch_sampler)
        if repeats_uncounted(self):
            logger.warning_once(
                "dispatch_batches=False: in an epoch's last batch examples of an iterable dataset are repeated, and "
                "the repeats are trained on. Leave dispatch_batches out, or set dataloader_drop_last=True."
            )
        own_examples = partial(self._own_examples, items_of_all=self.args.average_tokens_across_devices)
        batches, items = super().get_batch_samples(map(own_examples, epoch_iterator), num_batches, device)
        if self._uncounted:  # of the epoch's last batch; a mean over no label at all would not be finite
            batches[-1].update(self._uncounted)
            self._uncounted = {}
        return batches, items

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """`Trainer.training_step`, with the loss weighted by this process's own examples."""
        with self._counting_own_examples():
            return super().training_step(model, inputs, num_items_in_batch)

    @contextmanager
    def _counting_own_examples(self) -> Iterator[None]:
        """Inside, every loss of the next micro-batch is weighted by this process's own examples; may be nested."""
        if self._share is not None:
            yield
            return
        self._share = self._shares.pop(0) if self._shares else 1.0
        try:
            yield
        finally:
            self._share = None

    def _sharing_buffers(self, model: nn.Module, buffers: Buffers) -> AbstractContextManager:
        """Passes within begin with the buffers of the first process, in all of them.

        Those of a data-parallel wrapper do: it sends them. The passes that are compared with it go around it.

        Args:
            buffers: The model's. Where there is no wrapper, those that a pass changes are sent.
        """
        if self.accelerator.num_processes > 1 and self.args.ddp_broadcast_buffers is not False:
            if isinstance(model, DistributedDataParallel):
                return sending_buffers_first(model)
            broadcast(buffers.changed())
        return nullcontext()

    @property
    def _own_share(self) -> float:
        """The weight of this process's examples in the mean over all: 1 except in an epoch's last batch."""
        return 1.0 if self._share is None else self._share

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """`Trainer.compute_loss`, in training times the weight of this process's examples in the mean over all.

        That is 1 except in an epoch's last batch with several processes. An override should call this method for it.
        """
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        share = self._own_share
        if share == 1.0:
            return result
        return (result[0] * share, result[1]) if return_outputs else result * share

    def save_model(self, output_dir: str | None = None, *args, **kwargs) -> None:
        """`Trainer.save_model`; first all processes release gathered shards, because the one that saves does."""
        reshard(self.model)
        super().save_model(output_dir, *args, **kwargs)

    def _own_examples(
        self, inputs: dict[str, torch.Tensor | Any], items_of_all: bool = True
    ) -> dict[str, torch.Tensor | Any]:
        """Remove repeated examples from a micro-batch, and note its weight.

        accelerate fills the last batch of an epoch, process after process, with examples from the epoch's beginning. A
        process that has only repeated ones left keeps one, with weight 0: the others wait for its part in the means.

        Args:
            items_of_all: Whether a loss that counts items is divided by those of all processes.
        """
        share, count = 1.0, self.accelerator.num_processes
        is_last = self.accelerator.gradient_state.end_of_dataloader
        own_counts, given = _last_batch(self) if is_last else ([], 0)
        own = own_counts[self.accelerator.process_index] if own_counts else 0
        size = _rows(inputs, given or own) if own_counts else None
        if size is not None:  # else nothing is known to have one row per example
            inputs = _first_rows(inputs, size, max(own, 1))
            # The Trainer counts items where there are labels and the loss asks for their number.
            labels = inputs.get("labels")
            if not (items_of_all and asks_for_items(self) and isinstance(labels, torch.Tensor)):
                share = own * count / sum(own_counts)
            elif own == 0:
                # Such a loss is a sum divided by the items of all processes: it is weighted already.
                share = 0.0
                names = [name for name in ("labels", "shift_labels") if name in inputs]
                self._uncounted = {name: inputs[name] for name in names}
                inputs.update({name: torch.full_like(inputs[name], -100) for name in names})
        self._shares.append(share)
        return inputs

    def _before_wrapping(self, model: nn.Module) -> nn.Module:
        """Let the model be prepared again, as training after an evaluation requires.

        If nothing requires a gradient, there is no reason to wrap the model, and torch refuses to.
        """
        is_launched = self.accelerator.distributed_type != DistributedType.NO  # perhaps as the only process
        if not is_launched or is_sharded(self):
            return model
        forget_prepared(self.accelerator, model)
        trained = self._gradient_free_parameters
        if trained and not any(parameter.requires_grad for parameter in model.parameters()):
            # As the wrapper does first: each process may have drawn a frozen part for itself.
            broadcast(whole_tensors(model))
            return self.accelerator.prepare_model(model, evaluation_mode=True)
        shards = shards_of(model)
        if not shards:
            return model
        # A frozen base in shards needs no reduction, and accelerate refuses to wrap a model that has shards.
        model = self.accelerator.prepare_model(model, evaluation_mode=True)
        leave_out_of_wrapper(model, shards)
        handler = self.accelerator.ddp_handler
        return DistributedDataParallel(model, **({} if handler is None else handler.to_kwargs()))


def leave_process_group() -> None:
    """Take this process out of the process group, as the last thing that a command does.

    `torch.distributed.destroy_process_group` alone is not enough: gloo's threads live as long as anything refers to
    the group, such as a wrapped model that waits for garbage collection. A thread that releases a Python tensor while
    the interpreter shuts down aborts the process ("terminate called without an active exception").
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


class _CountingBatchSampler:
    """A batch sampler that knows how many examples the batches of the latest epoch had."""

    def __init__(self, batch_sampler: Any):
        self.batch_sampler = batch_sampler
        self.sizes: list[int] = []

    @classmethod
    def of(cls, batch_sampler: Any) -> _CountingBatchSampler:
        return batch_sampler if isinstance(batch_sampler, cls) else cls(batch_sampler)

    def __iter__(self) -> Iterator[list]:
        self.sizes = []
        for batch in self.batch_sampler:
            self.sizes.append(len(batch))
            yield batch

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batch_sampler, name)


def _last_batch(trainer: DataParallelTrainer) -> tuple[list[int], int]:
    """How many examples of its own each process has in an epoch's last batch; empty if none is repeated.

    Returns:
        These numbers, and how many examples each process was given; 0 if only its own.
    """
    shard, count = trainer._shard, trainer.accelerator.num_processes
    if shard is not None:
        return _last_round(shard), (_batch_size(shard) or 0) if shard.even_batches else 0
    examples = dispatched_examples(trainer)
    if examples % count == 0:
        return [], 0
    part = examples // count + 1
    return _in_turn(examples, part, count), part


def _last_round(shard: BatchSamplerShard) -> list[int]:
    """How many examples of its own each process has in an epoch's last batch; empty if none is repeated."""
    count, size = shard.num_processes, shard.batch_size
    if count == 1 or shard.drop_last:
        return []
    if size is None:  # batches of any size: a process left without one repeats a whole one
        sizes = _batch_sizes(shard.batch_sampler)
        left = len(sizes) % count or min(count, len(sizes))
        return [*sizes[len(sizes) - left :], *[0] * (count - left)]
    tail = _tail(shard)
    part = size // count if shard.split_batches else size
    return _in_turn(tail, part, count) if tail else []


def _in_turn(examples: int, part: int, processes: int) -> list[int]:
    """How many of `examples` each process has, if one after another takes `part` of them."""
    return [min(max(examples - part * process, 0), part) for process in range(processes)]


def _tail(shard: BatchSamplerShard) -> int:
    """The examples in an epoch's last batch over all processes; 0 if it is full."""
    sampler = shard.batch_sampler
    examples = len(sampler.sampler) if hasattr(sampler, "sampler") else sum(_batch_sizes(sampler))
    return examples % (shard.batch_size * (1 if shard.split_batches else shard.num_processes))


def _batch_sizes(batch_sampler: Any) -> list[int]:
    """The batch sizes of the latest epoch; if it was not counted, those of a new one."""
    return getattr(batch_sampler, "sizes", None) or [len(batch) for batch in batch_sampler]


def _batch_size(shard: BatchSamplerShard) -> int | None:
    """The examples of a process's batch, repeated ones included; None where batches have any size."""
    if shard.batch_size is None or not shard.split_batches:
        return shard.batch_size
    return shard.batch_size // shard.num_processes


def _rows(inputs: dict[str, Any], expected: int) -> int | None:
    """The rows of a batch; None if no tensor has as many as there are examples, as where texts are packed.

    Args:
        expected: The number of examples; 0 if that is unknown.
    """
    labels = inputs.get("labels")
    lengths = [
        len(tensor) for tensor in tree_leaves(dict(inputs)) if isinstance(tensor, torch.Tensor) and tensor.dim()
    ]
    if not expected and lengths:
        expected = len(labels) if isinstance(labels, torch.Tensor) and labels.dim() else lengths[0]
    return expected if expected in lengths else None


def _first_rows(value: Any, size: int, count: int) -> Any:
    """The first rows of tensors and lists that have one row per example; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value[:count] if value.dim() and len(value) == size else value
    if isinstance(value, Mapping):
        return type(value)({name: _first_rows(own, size, count) for name, own in value.items()})  # type: ignore[call-arg]
    if not isinstance(value, (list, tuple)):
        return value
    has_rows = any(isinstance(own, torch.Tensor) and own.dim() and len(own) == size for own in value)
    if len(value) == size and not has_rows:
        return value[:count]
    return honor_type(value, (_first_rows(own, size, count) for own in value))
