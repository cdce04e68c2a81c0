"""What a forward pass reads and changes besides parameters: random generators, and a model's buffers and modes."""

from __future__ import annotations

import random
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..private_names import TorchDispatchMode, own_buffers, version, written_tensors
from .task_aware import task_aware


# Copying a buffer of up to this many bytes (statistics, counters, masks) costs nothing.
SMALL_BYTES = 1 << 20
# Their kernels write the running statistics without raising torch's version counter.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Buffers:
    """A model's buffers, and which of them a forward pass changes. Made once per training.

    Small buffers are always copied. Large ones are mostly quantised weights: a pass leaves these alone, and a copy
    would double the model's memory. So only large buffers that a pass was seen to change are copied, such as a queue
    of features.

    Args:
        source: The model; or its buffers, if they stay the same objects.
    """

    def __init__(self, source: nn.Module | Iterable[torch.Tensor] = ()):
        self._model = source if isinstance(source, nn.Module) else _holder(source)
        self.changing: set[str] = set()
        self.is_watched = False
        self._checksums: dict[str, tuple[weakref.ref[torch.Tensor], int, int | None]] = {}

    def places(self) -> dict[str, tuple[nn.Module, str]]:
        """The module that holds each buffer, and its name there, by the buffer's full name."""
        modules = [(f"{path}." if path else "", module) for path, module in self._model.named_modules()]
        return {prefix + name: (module, name) for prefix, module in modules for name in own_buffers(module)}

    def modules(self) -> Iterator[nn.Module]:
        return self._model.modules()

    def changed(self) -> list[torch.Tensor]:
        """Those that a pass was seen to change."""
        found = [own_buffers(module)[key] for name, (module, key) in self.places().items() if name in self.changing]
        return [tensor for tensor in found if tensor is not None]

    def is_copied(self, name: str, tensor: torch.Tensor) -> bool:
        return tensor.nbytes <= SMALL_BYTES or name in self.changing

    def changes_unseen(self, name: str, module: nn.Module) -> bool:
        """Whether a buffer may change without torch counting it: through `.data`, or by batch normalisation."""
        return name in self.changing or (module.training and isinstance(module, BATCH_NORMS))

    def watch(self, devices: Collection[torch.device], run: Callable[[], Any]) -> None:
        """Find out which buffers the forward pass `run` changes, and put them back.

        Raises:
            RuntimeError: If it changes a large buffer in a way that torch does not see.
        """
        self.is_watched = True
        state = ForwardState(devices, self)
        if not state.tensors:
            return
        with _CopyBeforeWriting(state.tensors) as copies, uncounted(self._model):
            run()
        self.changing.update(copies)
        state.values.update(copies)
        for name, tensor in state.tensors.items():
            if name in state.values:
                if not _holds(tensor, state.values[name]):
                    self.changing.add(name)
            elif state.checksums[name] is not None:
                state.see_that_it_holds_the_same(name, tensor, _checksum(tensor))
        state.restore()

    def checksum(self, name: str, tensor: torch.Tensor) -> int | None:
        """The checksum of a large buffer that is not copied; None before `watch`."""
        if not self.is_watched:
            return None
        known, seen, checksum = self._checksums.get(name, (lambda: None, 0, None))
        if known() is not tensor or seen != version(tensor):
            checksum = _checksum(tensor)
            self._checksums[name] = (weakref.ref(tensor), version(tensor), checksum)
        return checksum


class ForwardState:
    """A snapshot of the random generators, and of a model's buffers and modes.

    The generators are torch's, Python's, and numpy's if it is loaded (SpecAugment draws its masks there). Every small
    buffer is copied, and every large one that a pass changes (see `Buffers`). A module's mode is training or not: a
    loss that calls `eval()` would leave the next pass without dropout.

    Args:
        devices: Where the model runs: one device, or all that it is spread over. Their generators are kept as well as
            the CPU's.
        buffers: A model's `Buffers`, or the buffers themselves: for example running statistics of batch normalisation.
        earlier: A state of the same buffers; its copies are reused where nothing has changed since.
    """

    @torch.compiler.disable
    def __init__(
        self,
        devices: torch.device | Collection[torch.device],
        buffers: Buffers | Iterable[torch.Tensor] = (),
        earlier: ForwardState | None = None,
    ):
        self.devices = (devices,) if isinstance(devices, torch.device) else tuple(devices)
        self.buffers = buffers if isinstance(buffers, Buffers) else Buffers(buffers)
        self.places: dict[str, tuple[nn.Module, str]] = self.buffers.places() if earlier is None else earlier.places
        present = {name: own_buffers(module).get(key) for name, (module, key) in self.places.items()}
        self.tensors = {name: tensor for name, tensor in present.items() if tensor is not None}
        # A module that replaces a buffer may record that in an attribute.
        self.attributes = {module: _plain_attributes(module) for module, _ in self.places.values()}
        modules = self.buffers.modules() if earlier is None else earlier.modes
        self.modes: dict[nn.Module, bool] = modes_of(modules)
        # Counted by torch at every change in place; comparing values would wait for the accelerator.
        self.versions = {name: version(tensor) for name, tensor in self.tensors.items()}
        self.values: dict[str, torch.Tensor] = {}
        self.checksums: dict[str, int | None] = {}
        for name, tensor in self.tensors.items():
            if not self.buffers.is_copied(name, tensor):
                self.checksums[name] = self.buffers.checksum(name, tensor)
            elif earlier is not None and self._same_buffer(name, earlier):
                self.values[name] = earlier.values[name]
            else:
                self.values[name] = tensor.clone()
        self.cpu, self.python = torch.get_rng_state(), random.getstate()
        self.numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
        on = [device for device in self.devices if device.type != "cpu"]
        self.accelerators = {device: torch.get_device_module(device).get_rng_state(device) for device in on}

    def now(self) -> ForwardState:
        """The current state of the same generators, buffers and modules."""
        return ForwardState(self.devices, self.buffers, earlier=self)

    @torch.compiler.disable
    def restore(self) -> None:
        restore_modes(self.modes)
        for name, (module, key) in self.places.items():
            tensor = self.tensors.get(name)
            if own_buffers(module).get(key) is not tensor:  # a pass has put another in its place
                own_buffers(module)[key] = tensor
                vars(module).update(self.attributes[module])
            if tensor is None or (
                version(tensor) == self.versions[name] and not self.buffers.changes_unseen(name, module)
            ):
                continue
            if name in self.values:
                tensor.copy_(self.values[name])
            else:
                self.see_that_it_holds_the_same(name, tensor, self.buffers.checksum(name, tensor))
            self.versions[name] = version(tensor)
        torch.set_rng_state(self.cpu)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        for device, state in self.accelerators.items():
            torch.get_device_module(device).set_rng_state(state, device)

    def see_that_it_holds_the_same(self, name: str, tensor: torch.Tensor, checksum: int | None) -> None:
        """Check a large buffer that may have been written to: a broadcast between processes writes the same values."""
        if checksum is None or checksum != self.checksums[name]:
            raise RuntimeError(
                f"The buffer {name} ({tuple(tensor.shape)}, {tensor.nbytes >> 20} MB) was changed by a forward pass, "
                "but not by the first one, so it was not copied and cannot be restored for the passes that are "
                "compared. Have the model change it in place in every forward pass, or never."
            )

    def same_buffers(self, other: ForwardState) -> bool:
        return self.tensors.keys() == other.tensors.keys() and all(
            self._same_buffer(name, other) for name in self.tensors
        )

    def _same_buffer(self, name: str, other: ForwardState) -> bool:
        is_same = self.tensors[name] is other.tensors.get(name) and self.versions[name] == other.versions[name]
        return is_same and not self.buffers.changes_unseen(name, self.places[name][0])

    def same_random_state(self, other: ForwardState) -> bool:
        if not torch.equal(self.cpu, other.cpu) or self.python != other.python:
            return False
        if self.numpy is not None and not all(map(_equal, self.numpy, other.numpy)):
            return False
        return all(torch.equal(state, other.accelerators[device]) for device, state in self.accelerators.items())


def modes_of(modules: Iterable[nn.Module]) -> dict[nn.Module, bool]:
    """Whether each module is in training mode."""
    return {module: module.training for module in modules}


def restore_modes(modes: Mapping[nn.Module, bool]) -> None:
    """Put back what `modes_of` returned."""
    for module, mode in modes.items():
        if module.training != mode:  # setting an attribute of a module is slow, and each pass comes here
            module.training = mode


@contextmanager
def uncounted(model: nn.Module | None) -> Iterator[None]:
    """Inside, a model that counts what its forward passes do (`TaskAware.training_state`) counts nothing."""
    aware = task_aware(model)
    counts = aware.training_state()
    try:
        yield
    finally:
        aware.load_training_state(counts)


class _CopyBeforeWriting(TorchDispatchMode):
    """Copies a tensor just before the first operation that writes to it; entering returns the copies, by name."""

    supports_higher_order_operators = True

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        self._tensors = tensors
        self._copies: dict[str, torch.Tensor] = {}
        self._names: dict[int | None, list[str]] = {}
        for name, tensor in tensors.items():
            self._names.setdefault(_address(tensor), []).append(name)

    def __enter__(self) -> dict[str, torch.Tensor]:
        super().__enter__()
        return self._copies

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in written_tensors(func, args, kwargs):
            self._keep(tensor)
        return func(*args, **kwargs)

    def _keep(self, tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor):
            for name in self._names.get(_address(tensor), ()):
                if name not in self._copies:
                    self._copies[name] = self._tensors[name].clone()


def _holds(tensor: torch.Tensor, values: torch.Tensor) -> bool:
    try:
        return torch.equal(tensor, values)
    except (RuntimeError, NotImplementedError):  # sparse or quantised
        return True


def _address(tensor: torch.Tensor) -> int | None:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a quantised tensor may be made of others
        return None


def _checksum(tensor: torch.Tensor) -> int | None:
    """A checksum of the content and its order; None if the tensor cannot be read as bytes."""
    try:
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    except (RuntimeError, NotImplementedError):
        return None
    whole = len(data) // 8 * 8 if data.storage_offset() % 8 == 0 else 0
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for piece in (data[:whole].view(torch.int64), data[whole:]):
        for chunk in piece.split(1 << 20):
            weights = 2 * torch.arange(len(chunk), dtype=torch.int64, device=data.device) + 1
            total = total * 31 + (chunk * weights).sum()
    return int(total)


def _holder(tensors: Iterable[torch.Tensor]) -> nn.Module:
    module = nn.Module()
    for number, tensor in enumerate(tensors):
        module.register_buffer(str(number), tensor)
    return module


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str, type(None)))}


def _equal(some: Any, others: Any) -> bool:
    return bool((some == others).all()) if hasattr(some, "all") else some == others
