"""What a forward pass changes is put back, and what it leaves alone is not copied."""

import time

import pytest
import torch
from torch import nn

from hf_zocl.passes import Buffers, ForwardState
from hf_zocl.passes.random_state import SMALL_BYTES
from tests.helpers import Mlp, rows, train


CPU = torch.device("cpu")
LARGE = SMALL_BYTES // 4 + 1  # elements of float32


class Changes(nn.Module):
    """A module whose pass does something to its buffers."""

    def __init__(self, change, **buffers):
        super().__init__()
        self.change = change
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self):
        self.change(self)


def in_place(m):
    m.buffer[1:3].add_(torch.rand(2))


def through_data(m):
    m.buffer.data.mul_(0.9).add_(torch.rand(1))


def by_another(m):
    m.buffer = m.buffer * 0.9 + torch.rand(1)


@pytest.mark.parametrize("size", [8, LARGE])
@pytest.mark.parametrize("change", [in_place, through_data, by_another])
def test_what_a_pass_changes_is_put_back_bit_by_bit(change, size):
    model = Changes(change, buffer=torch.randn(size), positions=torch.arange(3))
    expected, buffers = model.buffer.clone(), Buffers(model)
    buffers.watch(CPU, model)
    assert torch.equal(model.buffer, expected)
    for _ in range(2):
        before = ForwardState(CPU, buffers)
        model()
        after = before.now()
        once = model.buffer.clone()
        assert not torch.equal(once, expected) and not before.same_buffers(after)
        for _ in range(3):
            before.restore()
            assert torch.equal(model.buffer, expected)
            model()
            assert torch.equal(model.buffer, once)
        model()
        after.restore()
        assert torch.equal(model.buffer, once)
        before.restore()


def normalise(m):
    """By a kernel that writes statistics without torch's counting it."""
    torch.nn.functional.batch_norm(torch.randn(4, len(m.buffer)), m.buffer, m.other, training=True)


def test_a_small_buffer_that_changes_unseen_is_put_back():
    model = Changes(normalise, buffer=torch.zeros(8), other=torch.ones(8))
    buffers = Buffers(model)
    buffers.watch(CPU, model)
    before = ForwardState(CPU, buffers)
    assert model.buffer.tolist() == [0] * 8
    model()
    assert model.buffer.tolist() != [0] * 8 and not before.same_buffers(before.now())
    before.restore()
    assert model.buffer.tolist() == [0] * 8 and model.other.tolist() == [1] * 8


def test_a_large_buffer_that_changes_unseen_is_refused():
    model = Changes(normalise, buffer=torch.zeros(LARGE), other=torch.ones(LARGE))
    with pytest.raises(RuntimeError, match="was changed by a forward pass"):
        Buffers(model).watch(CPU, model)


def test_an_attribute_that_goes_with_a_buffer_is_put_back_with_it():
    """As transformers keeps the length for which rotary frequencies were computed."""

    def grow(m):
        if m.length < 5:
            m.length, m.buffer = 5, torch.full((2,), 5.0)

    model = Changes(grow, buffer=torch.ones(2))
    model.length = 1
    before = ForwardState(CPU, Buffers(model))
    for _ in range(2):
        model()
        assert model.buffer.tolist() == [5, 5]
        before.restore()
        assert (model.length, model.buffer.tolist()) == (1, [1, 1])


def test_a_modules_mode_is_put_back():
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    before = ForwardState(CPU, Buffers(model))
    model.eval()
    after = before.now()
    before.restore()
    assert [module.training for module in model.modules()] == [True, True, False]
    after.restore()
    assert [module.training for module in model.modules()] == [False, False, False]


def test_large_buffers_that_no_pass_changes_are_not_copied():
    sizes = {f"weight{i}": torch.zeros(4 * LARGE, dtype=torch.int32) for i in range(16)}  # 64 MB
    model = Changes(lambda m: m.count.add_(1), count=torch.tensor(0), **sizes)
    buffers = Buffers(model)
    buffers.watch(CPU, model)
    start = time.perf_counter()
    states = [ForwardState(CPU, buffers) for _ in range(5)]
    assert (time.perf_counter() - start) / 5 < 5e-3
    assert set(states[0].values) == {"count"}
    assert set(ForwardState(CPU, model.buffers()).values) == {"0"}


def test_a_large_buffer_that_only_a_later_pass_changes_is_an_error():
    model = Changes(lambda m: m.buffer.add_(m.step), buffer=torch.zeros(LARGE))
    model.step, buffers = 0, Buffers(model)
    buffers.watch(CPU, lambda: None)
    before = ForwardState(CPU, buffers)
    model.buffer.copy_(model.buffer.clone())  # a broadcast writes what was there
    before.restore()
    model.step = 1
    model()
    with pytest.raises(RuntimeError, match=rf"The buffer buffer \(\({LARGE},\), 1 MB\) was changed"):
        before.restore()


@pytest.mark.parametrize("layers", [[1], "all"])
def test_queries_do_not_touch_a_queue_of_features(tmp_path, layers):
    class Queue(Mlp):
        def __init__(self):
            super().__init__()
            self.register_buffer("queue", torch.zeros(LARGE))
            self.register_buffer("end", torch.tensor(0))

        def forward(self, x, labels=None):
            if self.training:
                self.queue[int(self.end) : int(self.end) + len(x)] = x[:, 0]
                self.end += len(x)
            return super().forward(x, labels)

    model = Queue()
    train(tmp_path, model, data=rows(), zo_layers=layers, zo_queries=5, max_steps=3)
    assert model.end == 3 * 8 and model.queue.count_nonzero() == 3 * 8
