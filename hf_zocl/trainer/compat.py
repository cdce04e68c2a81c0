"""The private and undocumented names of the Trainer, accelerate and datasets that the package uses.

`HookedTrainer` is a Trainer with hooks that transformers does not offer; the functions stand for what has no public
name. All hold for transformers 5.20 to 5.24, accelerate 1.15 and datasets 5.1 to 5.2; if a release drops one,
`tests/trainer/test_compat.py` fails and names it. Those that the lower floors use are in `private_names.py`, PEFT's in
`models/moe_adapter/model.py` and `models/placement.py`.

Of transformers: overridden are `_save_checkpoint`, `_save_rng_state`, `_run_epoch`, `_issue_warnings_after_load`,
`_wrap_model`, `_move_model_to_device`, `_load_from_checkpoint`, `_load_best_model` and the undocumented
`create_accelerator_and_postprocess`; called is `_get_output_dir`; read or set are `_tr_loss`,
`_globalstep_last_logged`, `_total_loss_scalar`, and the undocumented `loss_is_scaled_for_ga`,
`model_accepts_loss_kwargs`, `compute_loss_func`, `current_gradient_accumulation_steps`, `is_fsdp_enabled`,
`is_deepspeed_enabled` and `callback_handler`. Of torch's data-parallel wrapper: `_sync_buffers` and
`forward_sync_buffers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, IterableDatasetShard
from peft import PeftModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..passes.structure import shadowed
from ..private_names import is_offloaded


class HookedTrainer(Trainer):
    """A `Trainer` with more hooks. It does nothing by itself: a subclass extends the hooks it needs.

    Callbacks come too late or too early for them: `on_save` when older checkpoints are gone, `on_epoch_begin` before
    a step that nothing stops, `on_train_begin` when the model is wrapped.
    """

    def _saving_checkpoint(self, folder: Path) -> AbstractContextManager:
        """A context around the saving of a checkpoint, in every process."""
        return nullcontext()

    def _before_state(self, folder: Path) -> None:
        """Called in every process when all of a checkpoint except the Trainer's state is saved."""

    def _after_state(self, folder: Path) -> None:
        """Called where the state is saved, just after it: before a checkpoint is pushed and older ones are removed."""

    def _has_loaded_best(self, folder: Path) -> None:
        """Called as a training ends, when the weights of its best checkpoint have taken the place of the last ones."""

    def _has_epoch(self) -> bool:
        """Whether there is a step left for the next epoch."""
        return True

    def _accepts(self, load_result: Any) -> bool:
        """Whether a checkpoint's weights, just loaded, need no warning about missing or unexpected ones."""
        return False

    def _before_wrapping(self, model: nn.Module) -> nn.Module:
        """The model that accelerate will prepare for training; or another one, already prepared."""
        return model

    # Called by transformers.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """`Trainer._save_checkpoint` saves a checkpoint within a training, and removes older ones."""
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._saving_checkpoint(folder), _after_saving(self.state, lambda: self._after_state(folder)):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """`Trainer._save_rng_state` is the Trainer's last act for a checkpoint in every process."""
        super()._save_rng_state(output_dir)
        self._before_state(Path(output_dir))

    def _run_epoch(self, *args, **kwargs) -> None:
        """`Trainer._run_epoch` takes the steps of an epoch, at least one."""
        if self._has_epoch():
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """`Trainer._issue_warnings_after_load` looks at what `load_state_dict` returned for a checkpoint."""
        if not self._accepts(load_result):
            super()._issue_warnings_after_load(load_result)

    def create_accelerator_and_postprocess(self) -> None:
        """`Trainer.create_accelerator_and_postprocess`; accelerate then leaves alone whatever it has offloaded itself.

        It recognises such a model by a map of two devices (`Accelerator.verify_device_map`), and would move any other.
        """
        super().create_accelerator_and_postprocess()
        verify = self.accelerator.verify_device_map
        self.accelerator.verify_device_map = lambda model: has_offloaded(model) or verify(model)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """`Trainer._move_model_to_device`; an offloaded model stays where it is, even without a `hf_device_map`."""
        if not has_offloaded(model):
            super()._move_model_to_device(model, device)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """`Trainer._load_from_checkpoint` loads a checkpoint's weights as a training goes on.

        Of several adapters it leaves one active, and trained; older releases leave out the one called "default".
        """
        loaded = self.model if model is None else model
        with _staying_in_place(loaded), _keeping_active(loaded):
            # A host's override may take no model, like that of sentence-transformers.
            super()._load_from_checkpoint(resume_from_checkpoint, *([] if model is None else [model]))
            if _has_other_adapters(loaded) and not is_sharded(self):
                _load_adapters(loaded, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """`Trainer._load_best_model` loads the best checkpoint's weights as a training ends.

        It takes the file of the adapter "default" for the active one's, and has no other; PEFT saves others beside it.
        """
        folder, model = Path(self.state.best_model_checkpoint or ""), self.model
        with _staying_in_place(model), _keeping_active(model):
            if _has_other_adapters(model) and not is_sharded(self):
                _load_adapters(model, folder)
            else:
                super()._load_best_model()
        self._has_loaded_best(folder)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: DataLoader | None = None) -> nn.Module:
        """`Trainer._wrap_model` comes just before `accelerator.prepare`; a different model counts as prepared."""
        if training and model is self.model:
            model = self._before_wrapping(model)
        return super()._wrap_model(model, training, dataloader)


def has_offloaded(model: nn.Module) -> bool:
    """True if accelerate keeps weights of a model elsewhere until they are needed."""
    return any(map(is_offloaded, model.modules()))


def _has_other_adapters(model: nn.Module) -> bool:
    """True if PEFT's adapters of a model are not just one called "default"."""
    return isinstance(model, PeftModel) and list(model.peft_config) != ["default"]


def _load_adapters(model: PeftModel, folder: Path) -> None:
    """Load each adapter from where PEFT saves it: "default" in the folder itself, others in folders by name."""
    for name in model.peft_config:
        model.load_adapter(str(folder if name == "default" else folder / name), name)


def _staying_in_place(model: nn.Module) -> AbstractContextManager:
    """Inside, PEFT loads an adapter without spreading the model again by a map of its own (`hf_device_map`)."""
    is_spread = getattr(model, "hf_device_map", None) is not None
    return shadowed(model, hf_device_map=None) if is_spread else nullcontext()


@contextmanager
def _keeping_active(model: nn.Module) -> Iterator[None]:
    """After a load inside, the same adapters are active, and the same parameters trained, as before."""
    if not isinstance(model, PeftModel):
        yield
        return
    active, trained = list(model.active_adapters), [parameter.requires_grad for parameter in model.parameters()]
    yield
    if list(model.active_adapters) != active:
        model.base_model.set_adapter(active)
    for parameter, is_trained in zip(model.parameters(), trained, strict=True):
        parameter.requires_grad_(is_trained)


@contextmanager
def _after_saving(state: TrainerState, call: Callable[[], None]) -> Iterator[None]:
    """Inside, `call` follows `state.save_to_json`, the last file of a checkpoint."""
    save = state.save_to_json

    def save_and_call(path: str) -> None:
        save(path)
        call()

    state.save_to_json = save_and_call  # type: ignore[method-assign]
    try:
        yield
    finally:
        del state.save_to_json  # the instance's own


def pending_loss(trainer: Trainer) -> torch.Tensor:
    """The sum of the losses of the steps not yet logged (`_tr_loss`), not summed over processes.

    A callback gets no loss, and `Trainer.log` only the mean over several steps.
    """
    return trainer._tr_loss


def last_logged_step(trainer: Trainer) -> int:
    """The step at which the training loss was last logged (`_globalstep_last_logged`)."""
    return trainer._globalstep_last_logged


def continue_logging(trainer: Trainer, step: int, loss: torch.Tensor) -> None:
    """As a training begins, go on as if it had last logged at `step`, with the sum `loss` since then.

    The Trainer itself starts from 0 at its first step. The loss of earlier calls counts in the log, but not in
    `train_loss` (`_total_loss_scalar`), which covers only the steps of this call.
    """
    trainer._globalstep_last_logged = step
    trainer._tr_loss += loss.to(trainer._tr_loss.device)
    trainer._total_loss_scalar -= float(loss)


def scales_loss(trainer: Trainer, num_items_in_batch: torch.Tensor | int | None) -> bool:
    """True if a micro-batch's loss is already scaled by its items; else it is divided by the number of micro-batches.

    `Trainer.training_step` decides by `loss_is_scaled_for_ga`, where a host sets it, and else by
    `model_accepts_loss_kwargs` and `compute_loss_func`.
    """
    if trainer.loss_is_scaled_for_ga is not None:
        return trainer.loss_is_scaled_for_ga
    by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return by_model or trainer.compute_loss_func is not None


def accumulated_batches(trainer: Trainer) -> int:
    """The number of micro-batches in this step; an epoch's last has fewer (`current_gradient_accumulation_steps`)."""
    return trainer.current_gradient_accumulation_steps


def asks_for_items(trainer: Trainer) -> bool:
    """True if the loss is told the number of items of a step (`model_accepts_loss_kwargs`, `compute_loss_func`)."""
    return trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None


def is_sharded(trainer: Trainer) -> bool:
    """True if FSDP or DeepSpeed wraps the model (`is_fsdp_enabled`, `is_deepspeed_enabled`)."""
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


def put_first(trainer: Trainer, callback: TrainerCallback) -> None:
    """Add a callback before all others (`callback_handler.callbacks`); `add_callback` adds it after them."""
    trainer.add_callback(callback)
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0, callbacks.pop())


def training_shard(trainer: Trainer) -> BatchSamplerShard | None:
    """The sampler that shares out the training examples among the processes, if they are shared out.

    `callback_handler.train_dataloader` is the loader in use, whoever made it; callbacks get it, too.
    """
    sampler = getattr(trainer.callback_handler.train_dataloader, "batch_sampler", None)
    return sampler if isinstance(sampler, BatchSamplerShard) else None


def dispatched_examples(trainer: Trainer) -> int:
    """The number of examples in an epoch's last batch, over all processes, if the main process hands them out; else 0.

    `remainder` is set along with the batch, and does not count examples repeated to give every process as many.
    """
    is_dispatched = isinstance(trainer.callback_handler.train_dataloader, DataLoaderDispatcher)
    return max(trainer.accelerator.gradient_state.remainder, 0) if is_dispatched else 0


def repeats_uncounted(trainer: Trainer) -> bool:
    """Whether the last batch of an epoch may hold repeated examples, and nothing says how many."""
    dataset = getattr(trainer.callback_handler.train_dataloader, "dataset", None)
    return isinstance(dataset, IterableDatasetShard) and dataset.num_processes > 1 and not dataset.drop_last


def gradient_scaler(accelerator: Accelerator) -> torch.amp.GradScaler | None:
    """The scaler of the loss for float16; None without it (`Accelerator.scaler`)."""
    return accelerator.scaler


def forget_prepared(accelerator: Accelerator, model: nn.Module) -> None:
    """Let accelerate prepare a model again that it has prepared before (`_is_accelerate_prepared`).

    Otherwise a model prepared for an evaluation would stay as it is, without a data-parallel wrapper.
    """
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model._is_accelerate_prepared = False  # type: ignore[assignment]


@contextmanager
def sending_buffers_first(model: DistributedDataParallel) -> Iterator[None]:
    """A data-parallel wrapper sends its buffers as the block begins, and not in its forward passes.

    It does so at the first forward pass of a step (`_sync_buffers`, unless `forward_sync_buffers` is off).
    """
    if model.will_sync_module_buffers():
        model._sync_buffers()
    with shadowed(model, forward_sync_buffers=False):
        yield


def leave_out_of_wrapper(model: nn.Module, names: Sequence[str]) -> None:
    """Make a data-parallel wrapper ignore some parameters; the function for this begins with an underscore."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(names))


def rows_in_table(data: datasets.Dataset) -> pa.ChunkedArray | None:
    """The rows of its table `data.data` that a dataset consists of; None if it is all of them (`_indices`)."""
    return None if data._indices is None else data._indices.column(0)


def dataset_fingerprint(data: datasets.Dataset) -> str:
    """The fingerprint of a dataset in datasets' own cache, which changes with every change (`_fingerprint`)."""
    return data._fingerprint
