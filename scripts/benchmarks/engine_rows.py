"""The rows of the engine's benchmark, and the ratios between them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import yaml

from hf_zocl.commands.library import preset_file


SHAPES = {
    "vit-b-16": ({"hidden_size": 768, "layers": 12, "heads": 12, "patch_size": 16}, {"hidden_size": 512, "heads": 8}),
    "vit-l-14": (
        {"hidden_size": 1024, "layers": 24, "heads": 16, "patch_size": 14},
        {"hidden_size": 768, "heads": 12},
    ),
}


@dataclass(frozen=True)
class Setting:
    """The settings that all rows share."""

    shape: str = "vit-b-16"
    batch: int = 32
    rounds: int = 3
    device: str = "cpu"
    threads: int = 2

    @property
    def bf16(self) -> bool:
        return self.device != "cpu"


@dataclass(frozen=True)
class Row:
    """One way to train, and its measured figures."""

    name: str
    kind: str = "zocl"  # inference, fo, fo-checkpointing, mezo, zocl or bare
    adapter: str = "lora"
    classes: int = 20
    branch: str = "dual"
    layers: str | tuple[str, ...] = "all"
    estimator: str = "one-sided"
    queries: int | str = 1
    frozen: str | None = None  # a pattern of names: the adapter's parameters that are not trained
    saved: tuple[str, ...] = ()  # PEFT's modules_to_save: the base's modules that are trained beside the adapter
    int8: bool = False  # whether torchao makes the base's weights int8
    without: str | None = None  # the shortcut left out: towers, layers, batches (and packing), or packing
    figures: dict[str, float] = field(default_factory=dict, compare=False)

    @property
    def model(self) -> tuple[str, int, str | None, tuple[str, ...], bool]:
        """What the row's model is built from; rows in which it is equal share a model."""
        return self.adapter, self.classes, self.frozen, self.saved, self.int8


DUAL = Row("dual, two-sided", estimator="two-sided")
ROWS = [
    Row("inference", "inference"),
    Row("FO", "fo"),
    Row("FO, gradient checkpointing", "fo-checkpointing"),
    Row("MeZO", "mezo"),
    DUAL,
    Row("dual, two-sided, bare loop", "bare", estimator="two-sided"),
    Row("dual, one-sided"),
    Row("vision", branch="vision"),
    Row("language", branch="language"),
    Row("dual hop-even", layers="hop-even"),
    Row("vision hop-even", branch="vision", layers="hop-even"),
    Row("vision prefix-6", branch="vision", layers="prefix-6"),
    Row("vision suffix-6", branch="vision", layers="suffix-6"),
    Row("vision suffix-6, q=4", branch="vision", layers="suffix-6", queries=4),
    Row("  without layer reuse", branch="vision", layers="suffix-6", queries=4, without="layers"),
    Row("language, q=8", branch="language", queries=8),
    Row("  one by one", branch="language", queries=8, without="batches"),
    Row("  batched, not packed", branch="language", queries=8, without="packing"),
    Row("  without tower reuse", branch="language", queries=8, without="towers"),
    Row("MeZO, 100 classes", "mezo", classes=100),
    Row("dual, two-sided, 100 classes", estimator="two-sided", classes=100),
    Row("inference, MoE", "inference", adapter="moe"),
    Row("FO, MoE", "fo", adapter="moe"),
    Row("dual, two-sided, MoE", estimator="two-sided", adapter="moe"),
    Row("vision, MoE", branch="vision", adapter="moe"),
    Row("language, MoE", branch="language", adapter="moe"),
]
SWEEP = [Row(f"dual, q={q}", queries=q) for q in (1, 2, 4, 8, 16)]

# When forward passes alone pay off: scripts/studies/when_it_pays.py sets these rows against the accuracy of the cells
# of the same name, which have the same queries.
QUERIES = "vision=2,language=32"
PRESET, HYBRID = (yaml.safe_load(preset_file(name).read_text(encoding="utf-8")) for name in ("all-zo", "hybrid"))
ALL_ZO = Row(
    "all-zo",
    adapter=PRESET["adapter"],
    branch=PRESET["zo_branch"],
    queries=PRESET["zo_queries"],
    frozen=PRESET["frozen_parameters"][0],
)
PAYS = [
    Row("inference", "inference"),
    Row("FO", "fo"),
    Row("FO, gradient checkpointing", "fo-checkpointing"),
    Row("FO, text tower", "fo", frozen="vision_model"),
    Row("dual/hop-even", layers="hop-even", queries=QUERIES),
    Row(
        "hybrid",
        layers=tuple(HYBRID["zo_layers"]),
        queries=HYBRID["zo_queries"],
        saved=tuple(HYBRID["adapter_config"]["modules_to_save"]),
    ),
    Row("vision/all", branch="vision", queries=QUERIES),
    Row("dual/all", queries=QUERIES),
    replace(ALL_ZO, name="FO, norms", kind="fo", queries=1, figures={}),
    replace(ALL_ZO, name="vision/all, norms", branch="vision", figures={}),
    ALL_ZO,
    replace(ALL_ZO, name="all-zo, int8", int8=True, figures={}),
]

# (name, the row, the row it is compared with, the figure, the highest ratio allowed)
BARS = [
    ("memory over the weights, dual vs inference", DUAL.name, "inference", "activation_bytes", 1.05),
    (
        "memory over the weights, dual vs inference, MoE",
        "dual, two-sided, MoE",
        "inference, MoE",
        "activation_bytes",
        1.05,
    ),
    ("time, dual vs FO", DUAL.name, "FO", "seconds", 1.0),
    ("time, dual vs MeZO, 100 classes", "dual, two-sided, 100 classes", "MeZO, 100 classes", "seconds", 0.7),
    ("time, language q=8 (vision FO) vs FO", "language, q=8", "FO", "seconds", 1.15),
    ("ZO part, vision suffix-6 q=4, layer reuse", "vision suffix-6, q=4", "  without layer reuse", "zo_seconds", 0.6),
    ("ZO part, 8 language queries batched", "language, q=8", "  one by one", "zo_seconds", 0.7),
    ("time, ZOCLTrainer vs a bare loop", DUAL.name, "dual, two-sided, bare loop", "seconds", 1.03),
]
GPU_BARS = [
    ("peak memory, dual vs FO, LoRA", DUAL.name, "FO", "peak_bytes", 0.115),
    ("peak memory, dual vs FO, MoE", "dual, two-sided, MoE", "FO, MoE", "peak_bytes", 0.109),
    ("peak memory, vision vs FO, MoE", "vision, MoE", "FO, MoE", "peak_bytes", 0.347),
    ("peak memory, language vs FO, MoE", "language, MoE", "FO, MoE", "peak_bytes", 0.621),
    ("time, dual vs FO, on GPU", DUAL.name, "FO", "seconds", 0.75),
]


def choose_rows(which: str, bars: list[tuple]) -> list[Row]:
    """`all` rows, those that the `bars` need, or the `quick` ones among these: LoRA, 20 classes, no bare loop.

    `pays` are other rows: those of when_it_pays.py.
    """
    if which == "pays":
        return PAYS
    needed = {name for _, *names, _, _ in bars for name in names} | {"inference, MoE"}
    chosen = [row for row in ROWS if which == "all" or row.name in needed]
    if which != "quick":
        return chosen
    return [row for row in chosen if row.adapter == "lora" and row.classes == 20 and row.kind != "bare"]
