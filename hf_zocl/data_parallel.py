"""`DataParallelTrainer`: a `transformers.Trainer` that trains in several processes as it does in one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import DistributedType, broadcast, find_batch_size, slice_tensors
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer


class DataParallelTrainer(Trainer):
    """The mean of the processes' losses, and so of their gradients, is that over all examples of the batch.

    Also where an epoch's last batch gives the processes unequal shares, which accelerate evens out by repeating
    examples: these are cut off, and a process's loss is multiplied by what its own examples count. It takes the
    arguments of `Trainer`.

    A subclass that takes losses beside `Trainer.training_step`'s does so within `_counting_own_examples`, and says
    what it trains without autograd (`_gradient_free_parameters`).
    """

    # Parameters that are trained though they require no gradient.
    _gradient_free_parameters: Sequence[nn.Parameter] = ()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # How the examples are shared out among the processes, if they are.
        self._shard: BatchSamplerShard | None = None
        # What this process's examples count in the mean over the processes: for every micro-batch of the step, and
        # for the present one, within its training step.
        self._shares: list[float] = []
        self._share: float | None = None

    def get_train_dataloader(self) -> DataLoader:
        dataloader = super().get_train_dataloader()
        shard = dataloader.batch_sampler
        self._shard = shard if isinstance(shard, BatchSamplerShard) else None
        return dataloader

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The Trainer's, without the examples that accelerate repeats to fill the last batch of every process."""
        self._shares.clear()
        return super().get_batch_samples(map(self._own_examples, epoch_iterator), num_batches, device)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """`Trainer.training_step`, in which the loss counts what this process's examples do."""
        with self._counting_own_examples():
            return super().training_step(model, inputs, num_items_in_batch)

    @contextmanager
    def _counting_own_examples(self) -> Iterator[None]:
        """Inside, every loss of the next micro-batch counts what this process's examples do; may be nested."""
        if self._share is not None:
            yield
            return
        self._share = self._shares.pop(0) if self._shares else 1.0
        try:
            yield
        finally:
            self._share = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """`Trainer.compute_loss`, in training times what this process's examples count in the mean over all.

        That is 1 but for an epoch's last batch in several processes. An override should call this one for it.
        """
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._share in (None, 1.0):
            return result
        return (result[0] * self._share, result[1]) if return_outputs else result * self._share

    def _own_examples(self, inputs: dict[str, torch.Tensor | Any]) -> dict[str, torch.Tensor | Any]:
        """A micro-batch without repeated examples; what it counts is noted.

        `BatchSamplerShard` fills the last batch of an epoch, process after process, with examples from the epoch's
        beginning. A process for which none but these are left keeps one, which counts nothing: the others wait for its
        part in the means.
        """
        share, count = 1.0, self.accelerator.num_processes
        is_last = self._shard is not None and self.accelerator.gradient_state.end_of_dataloader
        tail = _tail(self._shard) if is_last else 0
        if tail:
            size = find_batch_size(inputs)
            own = min(max(tail - size * self.accelerator.process_index, 0), size)
            inputs = slice_tensors(inputs, slice(max(own, 1)))
            # A loss that counts items is a sum divided by those of all processes: it is in proportion already.
            if not (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
                share = own * count / tail
            elif own == 0 and "labels" in inputs:
                inputs["labels"] = torch.full_like(inputs["labels"], -100)
        self._shares.append(share)
        return inputs

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: DataLoader | None = None) -> nn.Module:
        """The Trainer's, before accelerate wraps the model for several processes.

        A model that accelerate has prepared once, for an evaluation, it takes as it is from then on, and training
        would go without the data-parallel wrapper: it must be prepared anew. Where nothing requires a gradient there
        is nothing to wrap for, and torch refuses to.
        """
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        is_launched = self.accelerator.distributed_type != DistributedType.NO  # perhaps as the only process
        if training and model is self.model and is_launched and not is_sharded:
            self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            model._is_accelerate_prepared = False
            trained = self._gradient_free_parameters
            if trained and not any(parameter.requires_grad for parameter in model.parameters()):
                broadcast([parameter.data for parameter in trained])  # the wrapper does this first
                return self.accelerator.prepare_model(model, evaluation_mode=True)
        return super()._wrap_model(model, training, dataloader)


def _tail(shard: BatchSamplerShard) -> int:
    """The examples in an epoch's last batch over all processes; 0 if it is full, left out, or every process has it."""
    if shard.num_processes == 1 or shard.drop_last:
        return 0
    total = shard.batch_size * (1 if shard.split_batches else shard.num_processes)
    return len(shard.batch_sampler.sampler) % total
