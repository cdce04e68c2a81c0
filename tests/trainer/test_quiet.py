from collections import defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_zocl.trainer.quiet import leaving_no_trace


def test_attributes_and_containers_are_as_before_and_the_same_objects():
    host = SimpleNamespace(count=3, metrics={"train": defaultdict(list)}, texts=deque(["a"], maxlen=2), names={"x"})
    host.metrics["train"]["loss"].append(1.0)
    metrics, losses, texts = host.metrics, host.metrics["train"]["loss"], host.texts
    with leaving_no_trace(host):
        host.count += 1
        host.metrics["train"]["loss"].append(2.0)
        host.metrics["train"]["tokens"].append(5)
        host.metrics["eval"] = {}
        host.texts.extend("bc")
        host.names.clear()
        host.cache = 7
    assert host.metrics is metrics and host.metrics["train"]["loss"] is losses and host.texts is texts
    assert (host.count, dict(metrics["train"]), list(metrics), list(texts)) == (3, {"loss": [1.0]}, ["train"], ["a"])
    assert (host.names, host.texts.maxlen, host.cache) == ({"x"}, 2, 7)


def test_it_is_put_back_when_the_block_fails():
    host = SimpleNamespace(seen=[])
    with pytest.raises(KeyError), leaving_no_trace(host):
        host.seen.append(1)
        raise KeyError
    assert host.seen == []


def test_containers_that_hold_themselves_end():
    host = SimpleNamespace(ring=[])
    host.ring.append(host.ring)
    with leaving_no_trace(host):
        host.ring.append(1)
    assert len(host.ring) == 1


def test_tensors_and_arrays_that_are_counted_in_are_as_before():
    host = SimpleNamespace(seen=torch.zeros(2), counts={"rows": np.zeros(2)}, large=torch.zeros(1 << 20))
    seen, rows = host.seen, host.counts["rows"]
    with leaving_no_trace(host):
        host.seen += 1
        host.counts["rows"] += 1
    assert host.seen is seen and host.counts["rows"] is rows
    assert not seen.any() and not rows.any()


def test_the_examples_of_a_dataset_are_not_looked_at():
    class Examples(list):
        def copy(self):
            raise AssertionError("an epoch's examples are copied at every step")

    with leaving_no_trace(SimpleNamespace(train_dataset=Examples([1]), eval_dataset={"test": Examples([1])})):
        pass
