"""The named benchmarks: where each dataset lies, and how the field cuts it into tasks."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, replace
from typing import Any

from .class_lists import CIFAR100_NAMES, TINY_IMAGENET_NAMES, TINY_IMAGENET_ORDER
from .tasks import CLASS_ORDER_SEED, TaskStream


@dataclass(frozen=True)
class Benchmark:
    """A dataset and the protocol by which it becomes a stream of tasks.

    Args:
        name: What recipes call it.
        dataset_id: Hub id; or the name of a dataset in `hf_zocl.sample`, which has none.
        train_split, test_split, image_column, label_column: As the dataset calls them.
        initial_increment, increment: Classes of the first task, and of every other.
        class_order_seed: Draws the class order where `class_order` is None.
        prompt_template: The class prompt, with a `{}` for the name.
        source: Where each of these choices comes from.
        class_order: Label ids in order of arrival.
        class_names: By label id, as prompts need them; None: the dataset's, cleaned.
        name_column: A column of class names, where the labels are not readable.
        test_fraction: The share of each class that is tested on, where the dataset has one split only.
        config_name, revision: For `datasets.load_dataset`.
    """

    name: str
    dataset_id: str
    train_split: str
    test_split: str
    image_column: str
    label_column: str
    initial_increment: int
    increment: int
    prompt_template: str
    source: str
    class_order_seed: int | None = CLASS_ORDER_SEED
    class_order: tuple[int, ...] | None = None
    class_names: tuple[str, ...] | None = None
    name_column: str | None = None
    test_fraction: float | None = None
    config_name: str | None = None
    revision: str | None = None

    def stream(self, dataset_path: str | os.PathLike[str] | None = None, **overrides: Any) -> TaskStream:
        """Build the benchmark's stream.

        Args:
            dataset_path: A local copy of the dataset; default: the Hub's, or the package's own.
            overrides: Any argument of `TaskStream.from_dataset`, instead of the benchmark's; None changes nothing.
                An `increment` without `initial_increment` holds for the first task too, and a `class_order_seed`
                without `class_order` replaces an order that the benchmark states.

        Raises:
            ValueError: If the dataset does not fit (see `TaskStream.from_dataset`).
        """
        from ..sample import NAMES, resolve

        given = {argument: value for argument, value in overrides.items() if value is not None}
        options = self._options()
        if "increment" in given:
            options["initial_increment"] = None
        if "class_order_seed" in given:
            options["class_order"] = None
        options["dataset_id"] = None if self.dataset_id in NAMES else self.dataset_id
        dataset = resolve(self.dataset_id)
        if dataset_path is not None:
            dataset = os.fspath(dataset_path)
            options["config_name"] = options["revision"] = None  # the Hub's, not the local copy's
            if not os.path.exists(dataset):
                raise ValueError(f"dataset_path={dataset!r}: there is no such folder for benchmark {self.name!r}.")
        return TaskStream.from_dataset(dataset, **{**options, **given})

    def _options(self) -> dict[str, Any]:
        shared = (
            "name",
            "train_split",
            "test_split",
            "image_column",
            "label_column",
            "initial_increment",
            "increment",
        )
        shared += ("class_order_seed", "class_order", "class_names", "name_column", "test_fraction")
        shared += ("config_name", "revision")
        return {argument: getattr(self, argument) for argument in shared}


def get_benchmark(name: str) -> Benchmark:
    """The registered benchmark of that name.

    Raises:
        ValueError: If there is none; the message lists those there are.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    close = difflib.get_close_matches(str(name), BENCHMARKS, n=2)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(f"benchmark={name!r} is not registered.{hint} There are {', '.join(map(repr, BENCHMARKS))}.")


_CIFAR10_SOURCE = (
    "Krizhevsky 2009; five tasks of two classes, the usual split CIFAR-10; "
    "class order: PyCIL's seed; prompt: CLIP (Radford et al. 2021)"
)

_CIFAR10 = Benchmark(
    name="cifar10",
    dataset_id="uoft-cs/cifar10",
    train_split="train",
    test_split="test",
    image_column="img",
    label_column="label",
    initial_increment=2,
    increment=2,
    prompt_template="a photo of a {}.",
    source=_CIFAR10_SOURCE,
)

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        _CIFAR10,
        replace(
            _CIFAR10,
            name="cifar10-sample",
            dataset_id="cifar10-sample",
            source=f"2,000 training and 500 test images of CIFAR-10, in the package; as cifar10: {_CIFAR10_SOURCE}",
        ),
        Benchmark(
            name="cifar100",
            dataset_id="uoft-cs/cifar100",
            train_split="train",
            test_split="test",
            image_column="img",
            label_column="fine_label",
            initial_increment=10,
            increment=10,
            prompt_template="a bad photo of a {}.",
            source=(
                "Krizhevsky 2009; ten steps of ten and prompt: MoE-Adapters4CL "
                "(cil/configs/class/cifar100_10-10-MoE-Adapters.yaml), whose own class order is another; "
                "class order: PyCIL's seed; names: the Hub's, with crab spelt right"
            ),
            class_names=CIFAR100_NAMES,
        ),
        Benchmark(
            name="tiny-imagenet",
            dataset_id="zh-plus/tiny-imagenet",
            train_split="train",
            test_split="valid",
            image_column="image",
            label_column="label",
            initial_increment=20,
            increment=20,
            prompt_template="a bad photo of a {}.",
            source=(
                "Le & Yang 2015; ten steps of 20: the paper's; prompt, names and class order: MoE-Adapters4CL "
                "(cil/configs/class/tinyimagenet_100-20.yaml, cil/class_orders/tinyimagenet.yaml)"
            ),
            class_order_seed=None,
            class_order=TINY_IMAGENET_ORDER,
            class_names=TINY_IMAGENET_NAMES,
        ),
        Benchmark(
            name="imagenet-r",
            dataset_id="axiong/imagenet-r",
            train_split="test",
            test_split="test",
            image_column="image",
            label_column="wnid",
            name_column="class_name",
            test_fraction=0.2,
            initial_increment=20,
            increment=20,
            prompt_template="a bad photo of a {}.",
            source=(
                "Hendrycks et al., ICCV 2021; ten steps of 20 and 80/20 split: DualPrompt (ECCV 2022), whose ratio "
                "PyCIL's successor LAMDA-PILOT shares; the Hub's copy has one split, so ours is drawn class by class "
                "(their lists of files are not published as code); class order: PyCIL's seed over sorted WordNet ids; "
                "prompt: MoE-Adapters4CL's for its other datasets (the paper states none)"
            ),
        ),
    )
}
