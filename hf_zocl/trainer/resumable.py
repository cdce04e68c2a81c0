"""`ResumableTrainer`: a `transformers.Trainer` whose trainings can stop anywhere and go on bit for bit."""

from __future__ import annotations

import errno
import json
import re
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..checks import first_of
from ..files import NO_ROOM, existing_folder, fingerprint, room_error, written_whole
from ..models import unsaved_parameters
from ..passes.task_aware import task_aware
from .compat import HookedTrainer, continue_logging, is_sharded, last_logged_step, pending_loss


logger = logging.get_logger(__name__)

# Written last into a checkpoint: size and SHA-256 of every other file.
MANIFEST_FILE = "manifest.json"


class ResumeError(ValueError):
    """A training or a run cannot go on from where it was told to."""


class SaveError(OSError):
    """Something could not be saved; what was saved before is whole.

    Args:
        path: What was to be saved.
        cause: The system's error.
    """

    def __init__(self, path: str | Path, cause: OSError):
        reason = str(cause.strerror or cause).strip().split("\n")[0].rstrip(".")
        space, advice = "", "go on"
        if cause.errno in NO_ROOM:
            advice = "make room, then go on"
        if cause.errno == errno.ENOSPC:
            space = f" {shutil.disk_usage(existing_folder(path)).free / 1e6:.0f} MB are free there."
        super().__init__(
            f"{path} could not be saved: {reason}.{space} What was saved before is whole: {advice} with --resume (for "
            "a Trainer: resume_from_checkpoint=True)."
        )


@contextmanager
def saving(path: str | Path, tensors: Iterable[torch.Tensor] = ()) -> Iterator[None]:
    """Inside, the caller writes `path`, a file or a folder, with `tensors` in it.

    Raises:
        SaveError: If the system does not let it be written; any other error passes through.
    """
    try:
        yield
    except Exception as error:
        cause = error if isinstance(error, OSError) else room_error(Path(path), error, sum(t.nbytes for t in tensors))
        if cause is None or isinstance(error, SaveError):
            raise
        raise SaveError(path, cause) from error


class ResumableTrainer(HookedTrainer):
    """A `Trainer` that, when it goes on from a checkpoint, ends with the weights and logs of one that never stopped.

    For that, a checkpoint also holds the loss not yet logged, and the counts of a `TaskAware` model. An incomplete
    checkpoint is never used, and training goes on only with as many processes, and as many examples per step, as the
    checkpoint was saved with. It takes the arguments of `Trainer`.

    A subclass says what it trains without autograd (`_gradient_free_parameters`), what it trains that the model lacks
    (`_foreign_parameters`), and whether its checkpoints leave out what is frozen (`_leaves_out_frozen`); it extends
    `_save_progress` and `_restore_progress` by whatever else its training needs to go on.

    Attributes:
        earlier_seconds: How long the training lasted up to the checkpoint that it went on from.
    """

    @property
    def _gradient_free_parameters(self) -> Sequence[nn.Parameter]:
        """Parameters that are trained although they require no gradient."""
        return ()

    @property
    def _foreign_parameters(self) -> Sequence[nn.Parameter]:
        """Trained parameters that do not belong to the model."""
        return ()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.earlier_seconds = 0.0
        self._started = 0.0
        self._checkpoint: Path | None = None
        # Files that others have left in the folder of the checkpoint that is being saved.
        self._others: dict[Path, tuple[int, ...]] = {}
        self.add_callback(_Begin(self))

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args, **kwargs):
        """`Trainer.train`.

        Args:
            resume_from_checkpoint: A checkpoint's folder; True: the last one in `output_dir` that is whole.

        Raises:
            SaveError: If a checkpoint cannot be written.
            ResumeError: If the last one is asked for, and none is whole; or if the given one is damaged, was saved by
                another number of processes or with another number of examples per step, or lacks something that is
                trained.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ResumeError(f"resume_from_checkpoint=True: no checkpoint in {self.args.output_dir} is whole.")
        if isinstance(resume_from_checkpoint, Path):
            resume_from_checkpoint = str(resume_from_checkpoint)
        self._checkpoint = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
        if self._checkpoint is not None:
            if problem := _damage(self._checkpoint):
                raise ResumeError(f"resume_from_checkpoint={resume_from_checkpoint!r}: {problem}.")
            self._check_processes(self._checkpoint)
        self._check_saved()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @property
    def _examples_per_step(self) -> int:
        """The number of examples in a step, over all processes."""
        args = self.args
        per_process = args.train_batch_size * args.gradient_accumulation_steps
        return per_process if args.accelerator_config.split_batches else per_process * args.world_size

    def _check_processes(self, checkpoint: Path) -> None:
        """Refuse a checkpoint after which the data would not go on where they stopped."""
        processes, file = self.args.world_size, checkpoint / self._progress_file
        progress = load_file(file) if file.is_file() else {}
        saved_by = int(progress["processes"]) if "processes" in progress else self._processes_of(checkpoint)
        if saved_by != processes:
            raise ResumeError(
                f"{checkpoint} was saved by {_count(saved_by)}, and this training has {_count(processes)}: expected "
                f"{_count(saved_by)}, or the data would not go on where they stopped."
            )
        examples = int(progress.get("examples_per_step", self._examples_per_step))
        if examples != self._examples_per_step and not self.args.auto_find_batch_size:
            raise ResumeError(
                f"{checkpoint} was saved with {examples} examples a step, and this training has "
                f"{self._examples_per_step} (per_device_train_batch_size={self.args.per_device_train_batch_size}, "
                f"gradient_accumulation_steps={self.args.gradient_accumulation_steps}, {_count(processes)}): expected "
                f"{examples}, or the data would not go on where they stopped."
            )

    def _check_saved(self) -> None:
        """Refuse a PEFT model's checkpoint that lacks something trained; warn if such a checkpoint would be saved.

        Raises:
            ResumeError: If the checkpoint to go on from lacks something trained.
        """
        if not isinstance(self.model, PeftModel) or is_sharded(self):
            return
        frozen = self._frozen_names()
        trained = {name: parameter for name, parameter in self.model.named_parameters() if name not in frozen}
        lost = unsaved_parameters(self.model, trained)
        if not lost:
            return
        reason = f"PEFT does not save {first_of(lost)}, which is trained"
        if self._checkpoint is not None:
            raise ResumeError(f"{self._checkpoint}: {reason}, so the training cannot go on from this checkpoint.")
        if self.args.save_strategy != "no":
            logger.warning(f"Training cannot go on from the checkpoints of this run: {reason}.")

    def _processes_of(self, checkpoint: Path) -> int:
        """How many processes saved the checkpoint of another Trainer, as far as its random states tell."""
        processes, states = self.args.world_size, list(checkpoint.glob("rng_state*.pth"))
        own = "rng_state.pth" if processes == 1 else f"rng_state_{self.args.process_index}.pth"
        # A machine may hold only the states of its own processes.
        is_mine = (checkpoint / own).is_file() and not (checkpoint / f"rng_state_{processes}.pth").is_file()
        return processes if is_mine or not states else len(states)

    def _begin(self) -> None:
        self._started, self.earlier_seconds = time.perf_counter(), 0.0
        if self._checkpoint is not None:
            self._restore_progress(self._checkpoint)

    def _has_epoch(self) -> bool:
        """False after the last step: from a checkpoint saved there, the Trainer would take one more."""
        return self.state.global_step < self.state.max_steps

    @contextmanager
    def _saving_checkpoint(self, folder: Path) -> Iterator[None]:
        """Inside, a checkpoint is written; one that cannot be written as a whole is removed.

        Raises:
            SaveError: If it cannot be written.
        """
        if self.args.should_save:  # another training's, or half of an earlier one
            self._others = {path: _stamp(path) for path in unknown_files(folder)}
            remove_checkpoint(folder, keep=self._others)
            _write_manifest(folder, self._others)  # that of an unfinished checkpoint
        self.accelerator.wait_for_everyone()
        try:
            with self._without_frozen(), saving(folder, self._largest_file()):
                yield
        except Exception:
            if self.args.should_save and not is_whole(folder):
                remove_checkpoint(folder, keep=self._others)
            raise

    def _after_state(self, folder: Path) -> None:
        """Write the manifest, which says that all files are there, after the Trainer's last file."""
        _write_manifest(folder, self._others)

    @contextmanager
    def _without_frozen(self) -> Iterator[None]:
        """Inside, the model's state lacks what a checkpoint leaves out: frozen parameters, and second names."""
        if not self._takes_frozen_out:
            yield
            return
        left_out = self._frozen_names() | self._second_names()

        def leave_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
            for name in left_out:
                state.pop(prefix + name, None)

        handle = self.model.register_state_dict_post_hook(leave_out)
        try:
            yield
        finally:
            handle.remove()

    def _accepts(self, load_result: Any) -> bool:
        """Parameters that are not trained need not be in a checkpoint; all others must be."""
        if isinstance(self.model, (PreTrainedModel, PeftModel)):
            return False
        missing = sorted(set(load_result.missing_keys) - self._frozen_names() - self._second_names())
        if missing or load_result.unexpected_keys:
            raise ResumeError(
                f"{self._checkpoint}: the checkpoint of another model: "
                f"missing {missing or 'nothing'}, unexpected {load_result.unexpected_keys or 'nothing'}."
            )
        return True

    @property
    def _leaves_out_frozen(self) -> bool:
        """Whether a checkpoint of a model that is not a `PreTrainedModel` holds only the trained parameters."""
        return task_aware(self.model).reloads_frozen_weights

    @property
    def _takes_frozen_out(self) -> bool:
        """Whether this class leaves frozen weights out: PEFT does so itself, and a `PreTrainedModel` saves all."""
        is_known = isinstance(self.model, (PreTrainedModel, PeftModel))
        return not is_known and not is_sharded(self) and self._leaves_out_frozen

    def _largest_file(self) -> list[torch.Tensor]:
        """The tensors of a checkpoint's largest file, which is that of the weights or of the optimizer."""
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        moments = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        return max(self._saved_parameters(), moments, key=lambda tensors: sum(tensor.nbytes for tensor in tensors))

    def _saved_parameters(self) -> list[nn.Parameter]:
        """The model's parameters that a checkpoint holds."""
        leaves_out = isinstance(self.model, PeftModel) or (
            self._leaves_out_frozen and not isinstance(self.model, PreTrainedModel)
        )
        frozen = self._frozen_names() if leaves_out else set()
        return [parameter for name, parameter in self.model.named_parameters() if name not in frozen]

    def _frozen_names(self) -> set[str]:
        """The parameters that are not trained, by all their names."""
        trained = {id(parameter) for parameter in self._gradient_free_parameters}
        named = self.model.named_parameters(remove_duplicate=False)
        return {name for name, parameter in named if not parameter.requires_grad and id(parameter) not in trained}

    def _second_names(self) -> set[str]:
        """The further names of tensors that have several, such as VeRA's matrices, which all layers share."""
        named = [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]
        first: dict[int, str] = {}
        return {name for name, tensor in named if first.setdefault(id(tensor), name) != name}

    def _before_state(self, folder: Path) -> None:
        """Save, next to the random state, what else a training needs to go on; every process saves its own."""
        self._save_progress(folder)
        self.accelerator.wait_for_everyone()  # what the Trainer writes next says that everything is there

    def _save_progress(self, folder: Path) -> None:
        """Write into a checkpoint what the Trainer forgets. Every process calls this."""
        counts = task_aware(self.model).training_state()
        progress = {
            "seconds": torch.tensor(self.earlier_seconds + time.perf_counter() - self._started, dtype=torch.float64),
            "pending_loss": pending_loss(self).detach(),
            "last_logged_step": torch.tensor(last_logged_step(self)),
            "processes": torch.tensor(self.args.world_size),
            "examples_per_step": torch.tensor(self._examples_per_step),
            **{f"model.{name}": value for name, value in counts.items()},
            **{f"foreign.{number}": value.detach() for number, value in enumerate(self._foreign_parameters)},
        }
        if (left_out := self._left_out()) is not None:
            progress["left_out"] = left_out
        save_file(progress, folder / self._progress_file)

    def _left_out(self) -> torch.Tensor | None:
        """The L1 norms of the frozen weights that checkpoints leave out; None if they leave none out."""
        if not self._takes_frozen_out:
            return None
        frozen = self._frozen_names()
        left_out = [value.detach() for name, value in self.model.named_parameters() if name in frozen]
        counted = [value for value in left_out if value.is_floating_point() and not value.is_meta]
        sums = [float(torch.linalg.vector_norm(value, ord=1, dtype=torch.float64)) for value in counted]
        return torch.tensor(sums, dtype=torch.float64)

    def _check_left_out(self, folder: Path, before: torch.Tensor | None) -> None:
        now = self._left_out()
        if before is None or now is None:  # earlier releases did not say
            return
        if before.shape != now.shape or not torch.allclose(before, now, rtol=1e-6):
            raise ResumeError(
                f"{folder} leaves out the frozen weights of {type(self.model).__name__}, and they have changed since "
                "it was saved: load the same ones (or draw them from the same seed) before it goes on."
            )

    def _restore_progress(self, folder: Path) -> None:
        """As training begins, restore what `_save_progress` wrote, if the checkpoint was saved by this class."""
        file = folder / self._progress_file
        if not file.is_file():
            return
        progress = load_file(file)
        self._check_left_out(folder, progress.get("left_out"))
        self.earlier_seconds = float(progress["seconds"])
        continue_logging(self, int(progress["last_logged_step"]), progress["pending_loss"])
        for number, parameter in enumerate(self._foreign_parameters):
            if f"foreign.{number}" not in progress:
                raise ResumeError(f"{file} lacks trained parameters that are outside the model.")
            parameter.data.copy_(progress[f"foreign.{number}"])
        counts = {name.removeprefix("model."): v for name, v in progress.items() if name.startswith("model.")}
        task_aware(self.model).load_training_state(counts)

    @property
    def _progress_file(self) -> str:
        suffix = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        return f"progress{suffix}.safetensors"


class _Begin(TrainerCallback):
    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._begin()


def last_checkpoint(folder: str | Path) -> Path | None:
    """The whole checkpoint with the most steps in `folder`; later ones that are not whole are named in a warning."""
    found = [(re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path) for path in Path(folder).glob("*")]
    for _, path in sorted(((int(match[1]), path) for match, path in found if match), reverse=True):
        if (problem := what_is_missing(path)) is None:
            return path
        logger.warning(f"{path} is skipped for an earlier checkpoint: {problem}.")
    return None


def _count(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


def is_whole(checkpoint: Path) -> bool:
    """True if a training can go on from a checkpoint."""
    return what_is_missing(checkpoint) is None


def what_is_missing(checkpoint: Path) -> str | None:
    """Why a training cannot go on from a checkpoint; None if it can, with all files as the manifest says.

    One saved with `save_only_model` has no scheduler and no optimizer, so no training can go on from it.
    """
    if not (checkpoint / MANIFEST_FILE).is_file():
        return f"it is unfinished, or from another program (it has no {MANIFEST_FILE})"
    files = _read_manifest(checkpoint)
    if files is None:
        return f"{MANIFEST_FILE} is damaged"
    if not files:
        return "it is unfinished"
    for name in (TRAINER_STATE_NAME, SCHEDULER_NAME):
        if name not in files:
            return f"it was saved without {name}"
    for name, expected in sorted(files.items()):
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected.get("bytes") or fingerprint(file) != expected:
            return f"{name} is damaged"
    return None


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint given by name; None for a plain Trainer's, which has no manifest to check."""
    is_ours = (checkpoint / MANIFEST_FILE).exists() or any(checkpoint.glob("progress*.safetensors"))
    return what_is_missing(checkpoint) if is_ours else None


def unknown_files(checkpoint: Path) -> list[Path]:
    """The files in a checkpoint's folder that it was not saved with: all, if it has no manifest that can be read."""
    files = _read_manifest(checkpoint)
    if files == {}:  # unfinished: its files cannot be told from others
        return []
    own = {checkpoint / name for name in (MANIFEST_FILE, *(files or ()))}
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path not in own)


def _write_manifest(checkpoint: Path, others: Mapping[Path, tuple[int, ...]]) -> None:
    """Write down which files a checkpoint has: none yet, if it is unfinished.

    Args:
        checkpoint: Its folder.
        others: The files that were there before, each with its `_stamp`; those written since are the checkpoint's.
    """
    checkpoint.mkdir(parents=True, exist_ok=True)
    present = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    files = sorted(path for path in present if _stamp(path) != others.get(path))
    content = {"files": {path.relative_to(checkpoint).as_posix(): fingerprint(path) for path in files}}
    with written_whole(checkpoint / MANIFEST_FILE) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is written anew."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _read_manifest(checkpoint: Path) -> dict[str, dict[str, Any]] | None:
    try:
        files = json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    is_right = isinstance(files, dict) and all(isinstance(each, dict) for each in files.values())
    return files if is_right else None


def remove_checkpoint(checkpoint: Path, keep: Collection[Path] = ()) -> None:
    """Remove a checkpoint, if there is one, so that it does not pass for whole if the removal is cut off.

    Args:
        checkpoint: Its folder.
        keep: The files in it that stay.
    """
    state, manifest = checkpoint / TRAINER_STATE_NAME, checkpoint / MANIFEST_FILE
    inside = sorted(set(checkpoint.rglob("*")) - {state, manifest}, reverse=True)
    for path in (state, *inside, manifest, checkpoint):
        with suppress(OSError):  # not there, or a folder that is not empty
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif path not in keep:
                path.unlink()
