"""The named benchmarks: where each dataset is, and how the field splits it into tasks."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

from ..sample.pretraining import pretraining_rows
from .benchmark import Benchmark, BenchmarkSequence
from .class_lists import (
    CALTECH_PROMPTS,
    CIFAR100_ICARL_ORDER,
    CIFAR100_NAMES,
    CIFAR_PROMPTS,
    EUROSAT_NAMES,
    MNIST_NAMES,
    TINY_IMAGENET_NAMES,
    TINY_IMAGENET_ORDER,
)
from .splits import CLASS_ORDER_SEED


_PYCIL_ORDER = "class order: PyCIL's seed"
_MOE_ADAPTERS = "MoE-Adapters4CL (Yu et al., CVPR 2024)"
_ZSCL = "ZSCL (Zheng et al., ICCV 2023), mtil/src/datasets"

_CIFAR10 = Benchmark(
    name="cifar10",
    dataset_id="uoft-cs/cifar10",
    image_column="img",
    initial_increment=2,
    increment=2,
    prompt_template="a photo of a {}.",
    source=(
        "Krizhevsky 2009; five tasks of two classes, the usual split CIFAR-10; "
        f"{_PYCIL_ORDER}; prompt: CLIP (Radford et al. 2021)"
    ),
)

_CIFAR100 = Benchmark(
    name="cifar100",
    dataset_id="uoft-cs/cifar100",
    image_column="img",
    label_column="fine_label",
    initial_increment=10,
    increment=10,
    prompt_template="a bad photo of a {}.",
    source=(
        f"Krizhevsky 2009; ten steps of ten and prompt: {_MOE_ADAPTERS}, "
        "cil/configs/class/cifar100_10-10-MoE-Adapters.yaml, whose own class order is cifar100-moe-adapters; "
        f"{_PYCIL_ORDER}; names: the Hub's, with crab spelt right"
    ),
    class_names=CIFAR100_NAMES,
)

_TINY_IMAGENET = Benchmark(
    name="tiny-imagenet",
    dataset_id="zh-plus/tiny-imagenet",
    test_split="valid",
    initial_increment=20,
    increment=20,
    prompt_template="a bad photo of a {}.",
    source=(
        "Le & Yang 2015; ten steps of 20: Branch, or Layer? (arXiv 2506.12409); prompt, names and class order: "
        f"{_MOE_ADAPTERS}, cil/configs/class/tinyimagenet_100-20.yaml and cil/class_orders/tinyimagenet.yaml"
    ),
    class_order_seed=None,
    class_order=TINY_IMAGENET_ORDER,
    class_names=TINY_IMAGENET_NAMES,
)

_TINY_IMAGENET_32 = replace(
    _TINY_IMAGENET,
    name="tiny-imagenet-32",
    dataset_id=None,
    prompt_template="a photo of a {}.",
    source=(
        "Le & Yang 2015, resized to 32×32; ten steps of 20; of the training images the fifth that mini-clip has not "
        f"seen (hf_zocl.sample.pretraining); names: the dataset's; {_PYCIL_ORDER}; prompt: CLIP (Radford et al. "
        "2021). A local dataset: give dataset_path"
    ),
    class_order_seed=CLASS_ORDER_SEED,
    class_order=None,
    class_names=None,
    excluded_train_rows=pretraining_rows,
)

_IMAGENET_R = Benchmark(
    name="imagenet-r",
    dataset_id="axiong/imagenet-r",
    train_split="test",
    test_split="test",
    label_column="wnid",
    name_column="class_name",
    test_fraction=0.2,
    initial_increment=20,
    increment=20,
    prompt_template="a bad photo of a {}.",
    source=(
        "Hendrycks et al., ICCV 2021; ten steps of 20 and 80/20 split: DualPrompt (Wang et al., ECCV 2022), whose "
        "ratio LAMDA-PILOT, PyCIL's successor, shares; the Hub's copy has one split, so ours is drawn class by class "
        f"(their lists of files are not published as code); {_PYCIL_ORDER} over sorted WordNet ids, as LAMDA-PILOT's; "
        f"prompt: that of {_MOE_ADAPTERS} for its other datasets (Branch, or Layer? states none)"
    ),
)

_CUB = Benchmark(
    name="cub-200",
    dataset_id="Donghyun99/CUB-200-2011",
    initial_increment=20,
    increment=20,
    prompt_template="a photo of a {}, a type of bird.",
    source=(
        "Wah et al. 2011, official split; ten steps of 20 and seeds 1993, 1996, 1997: SLCA (Zhang et al., ICCV 2023), "
        f"exps/slca_cub_mocov3.json; {_PYCIL_ORDER}; prompt: CLIP's for birds (Radford et al. 2021); names: the "
        "Hub's. The Hub copy's columns are taken to be image and label, as in its owner's other datasets"
    ),
)

_STANFORD_CARS = Benchmark(
    name="stanford-cars",
    dataset_id="tanganke/stanford_cars",
    initial_increment=20,
    increment=20,
    prompt_template=(
        "a photo of a {}, a type of car.",
        "a photo of a {}.",
        "a photo of the {}.",
        "a photo of my {}.",
        "i love my {}!",
        "a photo of my dirty {}.",
        "a photo of my clean {}.",
        "a photo of my new {}.",
        "a photo of my old {}.",
    ),
    source=(
        "Krause et al. 2013, official split; steps of 20: SLCA (Zhang et al., ICCV 2023), exps/slca_cars.json, the "
        f"last of 16; {_PYCIL_ORDER}; prompts: {_ZSCL}, which are CLIP's"
    ),
)

_FOOD = Benchmark(
    name="food-101",
    dataset_id="ethz/food101",
    test_split="validation",
    initial_increment=21,
    increment=20,
    prompt_template="a photo of a {}, a type of food.",
    source=(
        "Bossard et al., ECCV 2014, official split (the Hub calls the test images validation); five steps of 20, the "
        f"first of 21 so that nothing is left over: ours; {_PYCIL_ORDER}; prompt: {_ZSCL}, which is CLIP's"
    ),
)


def _whole(name: str, dataset_id: str, prompt: str | tuple[str, ...], source: str, **options: Any) -> Benchmark:
    """A dataset of MTIL, as one task; `increment` splits it."""
    return Benchmark(
        name=name,
        dataset_id=dataset_id,
        initial_increment=None,
        increment="all",
        prompt_template=prompt,
        class_order_seed=None,
        source=f"{source}; prompts: {_ZSCL}, which are CLIP's; class order: the dataset's own, as there",
        **options,
    )


_AIRCRAFT = _whole(
    "aircraft",
    "Donghyun99/FGVC-Aircraft",
    ("a photo of a {}, a type of aircraft.", "a photo of the {}, a type of aircraft."),
    "Maji et al. 2013, variants, official train and test splits, as torchvision's in ZSCL",
)
_CALTECH = _whole(
    "caltech101",
    "flwrlabs/caltech101",
    CALTECH_PROMPTS,
    "Fei-Fei et al. 2004; one split, 80/20 as in ZSCL, drawn by us class by class; names: the Hub's, not ZSCL's",
    test_fraction=0.2,
)
_DTD = _whole(
    "dtd",
    "tanganke/dtd",
    tuple(f"a photo of {a} {{}} {kind}." for a in ("a", "the") for kind in ("texture", "pattern", "thing", "object")),
    "Cimpoi et al., CVPR 2014; the Hub copy trains on 3,760 images (official train and validation), ZSCL on 1,880",
)
_EUROSAT = _whole(
    "eurosat",
    "timm/eurosat-rgb",
    tuple(f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")),
    "Helber et al. 2019; the Hub copy's train and test splits (16,200 and 5,400); ZSCL draws 80/20; names: CLIP's",
    class_names=EUROSAT_NAMES,
)
_FLOWERS = _whole(
    "flowers102",
    "dpdl-benchmark/oxford_flowers102",
    "a photo of a {}, a type of flower.",
    "Nilsback & Zisserman 2008, official train and test splits (1,020 and 6,149), as ZSCL",
)
_MNIST = _whole(
    "mnist",
    "ylecun/mnist",
    'a photo of the number: "{}".',
    "LeCun et al. 1998, official splits; names: torchvision's, as ZSCL",
    class_names=MNIST_NAMES,
)
_PET = _whole(
    "oxford-pet",
    "timm/oxford-iiit-pet",
    "a photo of a {}, a type of pet.",
    "Parkhi et al., CVPR 2012, official trainval and test splits, as ZSCL",
)
_SUN = _whole(
    "sun397",
    "tanganke/sun397",
    ("a photo of a {}.", "a photo of the {}."),
    "Xiao et al., CVPR 2010; the Hub copy's halves (19,850 each), where ZSCL draws 80/20; names: the Hub's",
)


def _steps(base: Benchmark, increment: int, first: int | None = None, source: str = "") -> Benchmark:
    """The same dataset with other increments, which its name states."""
    suffix = f"-inc{increment}" if first is None else f"-base{first}-inc{increment}"
    return replace(
        base,
        name=base.name + suffix,
        initial_increment=increment if first is None else first,
        increment=increment,
        source=f"{base.source}; here {'' if first is None else f'a base of {first} classes and '}{increment} a step"
        + (f": {source}" if source else ""),
    )


_SINGLE = (
    _CIFAR10,
    replace(
        _CIFAR10,
        name="cifar10-sample",
        dataset_id="cifar10-sample",
        source=f"2,000 training and 500 test images of CIFAR-10, in the package; as cifar10: {_CIFAR10.source}",
    ),
    _CIFAR100,
    *(_steps(_CIFAR100, increment, None, _MOE_ADAPTERS) for increment in (2, 5, 10)),
    _steps(_CIFAR100, 20, None, "Branch, or Layer? (arXiv 2506.12409)"),
    *(
        _steps(_CIFAR100, increment, 50, "PyCIL's B50 protocol (UCIR, Hou et al., CVPR 2019)")
        for increment in (2, 5, 10)
    ),
    replace(
        _CIFAR100,
        name="cifar100-moe-adapters",
        class_order_seed=None,
        class_order=CIFAR100_ICARL_ORDER,
        source=(
            f"Krizhevsky 2009; steps, prompt and class order (iCaRL's own): {_MOE_ADAPTERS}, "
            "cil/class_orders/cifar100.yaml; names: the Hub's, with crab spelt right"
        ),
    ),
    _TINY_IMAGENET,
    _steps(_TINY_IMAGENET, 20),
    *(_steps(_TINY_IMAGENET, increment, 100, _MOE_ADAPTERS) for increment in (5, 10, 20)),
    _TINY_IMAGENET_32,
    _IMAGENET_R,
    _steps(_IMAGENET_R, 10, None, "LAMDA-PILOT, exps/simplecil_inr.json"),
    _steps(_IMAGENET_R, 20),
    _CUB,
    _STANFORD_CARS,
    _FOOD,
    *(_AIRCRAFT, _CALTECH, _DTD, _EUROSAT, _FLOWERS, _MNIST, _PET, _SUN),
)

# Order I is alphabetical; order II: order = [9, 6, 7, 8, 5, 10, 0, 1, 3, 4, 2] in ZSCL's mtil/results.ipynb.
_BY_NAME = {benchmark.name: benchmark for benchmark in _SINGLE}
_MTIL_DATASETS = (
    *("aircraft", "caltech101", "cifar100", "dtd", "eurosat", "flowers102"),
    *("food-101", "mnist", "oxford-pet", "stanford-cars", "sun397"),
)
_MTIL_ORDER_II = (9, 6, 7, 8, 5, 10, 0, 1, 3, 4, 2)
_MTIL = BenchmarkSequence(
    name="mtil",
    benchmarks=tuple(_BY_NAME[name] for name in _MTIL_DATASETS),
    prompts={"cifar100": CIFAR_PROMPTS},
    source=f"Multi-domain task-incremental learning, order I: {_ZSCL} and README.md",
)

BENCHMARKS: dict[str, Benchmark | BenchmarkSequence] = {
    benchmark.name: benchmark
    for benchmark in (
        *_SINGLE,
        _MTIL,
        replace(
            _MTIL,
            name="mtil-order-2",
            benchmarks=tuple(_BY_NAME[_MTIL_DATASETS[position]] for position in _MTIL_ORDER_II),
            source="Multi-domain task-incremental learning, order II: ZSCL (ICCV 2023), mtil/results.ipynb",
        ),
    )
}


def get_benchmark(name: str) -> Benchmark | BenchmarkSequence:
    """The registered benchmark of that name.

    Raises:
        ValueError: If there is none; the message lists the names.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    close = difflib.get_close_matches(str(name), BENCHMARKS, n=2)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(
        f"benchmark={name!r} is not registered.{hint} Expected one of {', '.join(map(repr, BENCHMARKS))}."
    )
