"""What every process trains on where the last batch of an epoch is not full, and how it leaves the others."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import TrainingArguments

from hf_zocl.trainer.data_parallel import DataParallelTrainer, _CountingBatchSampler, _last_round
from hf_zocl.trainer.placement import whole_tensors
from tests.helpers import Mlp, arguments, rows


class OfItsOwn:
    """A batch sampler as users write them: it has no `sampler`."""

    drop_last = False

    def __init__(self, sizes: list[int], batch_size: int | None):
        self.sizes_to_give, self.batch_size, self.epochs = sizes, batch_size, 0

    def __iter__(self):
        self.epochs += 1
        first = 0
        for size in self.sizes_to_give:
            yield list(range(first, first + size))
            first += size

    def __len__(self):
        return len(self.sizes_to_give)


def regular(examples: int, size: int):
    return BatchSampler(SequentialSampler(range(examples)), size, False)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("examples", [1, 5, 10, 12, 13, 24, 25])
@pytest.mark.parametrize("kind", ["torch's", "of its own"])
def test_the_own_examples_of_an_epoch_are_each_example_once(kind, examples, split, processes):
    size = 6
    sizes = [size] * (examples // size) + [examples % size] * (examples % size > 0)
    own: list[int] = []
    for process in range(processes):
        sampler = regular(examples, size) if kind == "torch's" else _CountingBatchSampler(OfItsOwn(sizes, size))
        shard = BatchSamplerShard(sampler, processes, process, split_batches=split)
        batches = [list(batch) for batch in shard]
        if counts := _last_round(shard):
            batches[-1] = batches[-1][: counts[process]]
        own += [index for batch in batches for index in batch]
    assert sorted(own) == list(range(examples))


def test_batches_of_any_sizes_are_each_some_processes_own():
    sizes = [3, 5, 2, 4, 1]
    own = []
    for process in range(3):
        shard = BatchSamplerShard(_CountingBatchSampler(OfItsOwn(sizes, None)), 3, process)
        *batches, last = [list(batch) for batch in shard]
        own += [index for batch in [*batches, last[: _last_round(shard)[process]]] for index in batch]
    assert sorted(own) == list(range(sum(sizes)))


def test_a_batch_sampler_is_not_asked_again_for_what_it_gave():
    sampler = OfItsOwn([4, 4, 2], 4)
    shard = BatchSamplerShard(_CountingBatchSampler(sampler), 2, 0)
    assert [len(batch) for batch in shard] == [4, 4]
    assert _last_round(shard) == [2, 0]
    assert sampler.epochs == 1
    assert shard.batch_sampler.drop_last is False


def keep_last_batch(given: list, accepts: bool = False, items_of_all: bool = True, **ends) -> list[tuple[dict, float]]:
    """What each process keeps of its last batch, and what that counts; given: its shard, its loader and its batch."""
    found = []
    for rank, (shard, loader, inputs) in enumerate(given):
        state = SimpleNamespace(end_of_dataloader=True, **ends)
        trainer = SimpleNamespace(
            _shard=shard,
            _shares=[],
            accelerator=SimpleNamespace(num_processes=2, process_index=rank, gradient_state=state),
            callback_handler=SimpleNamespace(train_dataloader=loader),
            model_accepts_loss_kwargs=accepts,
            compute_loss_func=None,
        )
        own = DataParallelTrainer._own_examples(trainer, dict(inputs), items_of_all)
        found.append((own, trainer._shares[0]))
    return found


def last_batch(inputs: dict, accepts: bool, items_of_all: bool = True) -> list[tuple[dict, float]]:
    """What two processes make of the last batch of 10 examples in batches of 4."""
    shards = [BatchSamplerShard(regular(10, 4), 2, rank) for rank in range(2)]
    return keep_last_batch([(shard, None, inputs) for shard in shards], accepts, items_of_all)


@pytest.mark.parametrize("accepts", [False, True])
@pytest.mark.parametrize("labels", [None, [0, 1, 2, 3]], ids=["without labels", "labels that cannot be counted"])
def test_without_a_count_of_items_an_idle_process_counts_nothing(accepts, labels):
    inputs = {"x": torch.arange(4.0)} | ({} if labels is None else {"labels": labels})
    (first, share), (second, nothing) = last_batch(inputs, accepts)
    assert first["x"].tolist() == [0, 1] and len(second["x"]) == 1
    assert (share, nothing) == (2.0, 0.0)


def test_batches_that_are_not_evened_out_count_by_their_examples():
    shards = [BatchSamplerShard(regular(13, 4), 2, rank, even_batches=False) for rank in range(2)]
    given = [{"x": torch.arange(8.0, 12.0)}, {"x": torch.tensor([12.0])}]
    (first, share), (second, other) = keep_last_batch(
        [(s, None, x) for s, x in zip(shards, given, strict=True)], remainder=5
    )
    assert first["x"].tolist() == [8, 9, 10, 11] and second["x"].tolist() == [12]
    assert (share, other) == (1.6, 0.4)


def test_batches_that_the_main_process_hands_out_count_by_their_own_examples():
    loader = DataLoaderDispatcher(rows(13), batch_size=4)
    given = [{"x": torch.tensor([8.0, 9.0, 10.0])}, {"x": torch.tensor([11.0, 12.0, 0.0])}]
    (first, share), (second, other) = keep_last_batch([(None, loader, x) for x in given], remainder=5)
    assert first["x"].tolist() == [8, 9, 10] and second["x"].tolist() == [11, 12]
    assert (share, other) == (1.2, 0.8)


@pytest.mark.parametrize("labels", [torch.zeros(4, dtype=torch.long), torch.zeros(4)], ids=["classes", "numbers"])
def test_a_loss_that_counts_items_is_in_proportion_and_an_idle_process_counts_nothing(labels):
    (first, share), (second, nothing) = last_batch({"x": torch.arange(4.0), "labels": labels}, accepts=True)
    assert (share, nothing) == (1.0, 0.0)
    assert first["labels"].tolist() == [0, 0] and second["labels"].tolist() == [-100]
    # Where every process divides by its own items, its loss is a mean like any other.
    (_, share), (second, nothing) = last_batch({"x": torch.arange(4.0), "labels": labels}, True, items_of_all=False)
    assert (share, nothing) == (2.0, 0.0)
    assert second["labels"].tolist() == [0]


def test_hidden_labels_are_there_again_when_the_items_are_counted(tmp_path):
    """A model that takes `**kwargs` and returns a plain mean would return NaN for labels that are all -100."""
    trainer = DataParallelTrainer(model=Mlp(), args=arguments(tmp_path, cls=TrainingArguments), train_dataset=rows())
    shard = BatchSamplerShard(regular(10, 4), 2, 1)
    trainer.callback_handler.train_dataloader = SimpleNamespace(batch_sampler=shard)
    ends = SimpleNamespace(end_of_dataloader=True)
    trainer.accelerator = SimpleNamespace(num_processes=2, process_index=1, gradient_state=ends)
    trainer.model_accepts_loss_kwargs = True
    labels = torch.arange(4) + 7
    batches, items = trainer.get_batch_samples(iter([{"labels": labels, "x": torch.ones(4, 4)}]), 1, "cpu")
    assert items == 0
    assert batches[0]["labels"].tolist() == [7]
    assert trainer._shares == [0.0]
    assert trainer._uncounted == {}


def test_what_has_no_row_for_every_example_stays_as_it_is():
    inputs = {"x": torch.arange(8.0).view(4, 2), "weights": torch.ones(7), "scale": torch.tensor(2.0)}
    (first, _), _ = last_batch(inputs, accepts=False)
    assert first["x"].shape == (2, 2)
    assert torch.equal(first["weights"], torch.ones(7)) and first["scale"] == 2


# The first handler of all runs last, in C: so the interpreter ends before its lock is let go once more.
LEAVES = """
import atexit, sys
atexit.register(sum, range(5 * 10**7))
import os, tempfile, time
import torch
import torch.distributed as dist
from hf_zocl.trainer.data_parallel import leave_process_group

class Trainer:
    def __init__(self, group):
        self.group, self.callback = group, self  # referred to until Python collects its garbage

rank = int(os.fork() != 0)
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)

def train():
    Trainer(dist.group.WORLD)
    dist.barrier()
    if rank == 0:
        time.sleep(float(sys.argv[3]))
    dist.all_reduce(torch.ones(10), async_op=True)  # which a thread of gloo's lets go of

train()
if sys.argv[2] == "leave":
    leave_process_group()
else:
    dist.destroy_process_group()
names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
if rank == 0:
    os._exit(0)
print(sum(name == "pt_gloo_runloop" for name in names), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads the names of threads")
@pytest.mark.parametrize("how", ["leave", "destroy alone"])
@pytest.mark.slow
def test_a_process_that_leaves_has_no_thread_that_could_abort_it(how, tmp_path):
    command = [sys.executable, "-c", LEAVES, str(tmp_path / "store"), how, "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    threads = json.loads(done.stdout)
    if how == "leave":
        assert threads == 0
        assert done.returncode == 0, done.stderr
    else:  # one or two, as it happens
        assert threads > 0


@pytest.mark.parametrize(
    "first",
    [
        {"mask": None},
        {"names": ["a", "b", "c", "d"]},
        {"prototypes": torch.zeros(3, 2)},
        {"bias": torch.zeros(1, 2)},
        {"nested": {"ids": [torch.zeros(2), torch.zeros(3), torch.zeros(1), torch.zeros(2)]}},
    ],
    ids=lambda first: next(iter(first)),
)
def test_the_rows_of_a_batch_are_known_whatever_stands_first_in_it(first):
    inputs = {**first, "x": torch.arange(4.0), "labels": torch.arange(4)}
    (own, share), (idle, nothing) = last_batch(inputs, accepts=False)
    assert own["x"].tolist() == own["labels"].tolist() == [0, 1] and len(idle["x"]) == 1
    assert (share, nothing) == (2.0, 0.0)
    for name in ("prototypes", "bias"):
        assert own.get(name) is first.get(name)
    assert own.get("names", ["a", "b"]) == ["a", "b"]
    assert len(own.get("nested", {"ids": [1, 2]})["ids"]) == 2


def test_a_batch_in_which_nothing_has_a_row_an_example_stays_as_it_is():
    packed = {"input_ids": torch.arange(17)[None]}
    (own, share), (other, same) = last_batch(packed, accepts=False)
    assert own["input_ids"].shape == other["input_ids"].shape == (1, 17)
    assert share == same == 1.0


def test_what_processes_begin_with_alike_is_everything_that_they_hold_as_plain_tensors():
    model, count = Mlp(), torch.zeros(1)
    model.tied = model.layers[0].weight
    model.quantised = nn.Parameter(TwoTensor(torch.zeros(2), torch.ones(2)), requires_grad=False)
    model.elsewhere = nn.Parameter(torch.empty(2, device="meta"))
    model.register_buffer("count", count)
    held = {tensor.data_ptr() for tensor in whole_tensors(model)}
    wrapped = [model.quantised.a, model.quantised.b]
    plain = [*model.layers.parameters(), *wrapped, count]
    assert held == {tensor.data_ptr() for tensor in plain} and len(whole_tensors(model)) == len(plain)
    whole_tensors(model)[0].fill_(3.0)
    assert bool((model.layers[0].weight == 3.0).all())
