"""The figures and findings of the paper (arXiv 2506.12409), with which reproduce.py compares measurements."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from hf_zocl.report import Comparison, RunGroup, mean_and_deviation, paired_differences


# MoE adapters on ViT-B/16: Last and Avg, percent; "best" is its best layer-wise setting.
ACCURACIES = {
    "cifar100-inc20": {
        "FO": (80.47, 86.97), "dual/all": (69.29, 77.36), "vision/all": (76.05, 83.93), "language/all": (80.94, 87.00),
        "best": (82.41, 88.51),
    },
    "cifar100-inc10": {
        "FO": (77.52, 85.21), "dual/all": (67.64, 75.88), "vision/all": (72.98, 82.08), "language/all": (76.74, 85.03),
        "best": (79.39, 87.05),
    },
    "tiny-imagenet-inc20": {
        "FO": (52.13, 60.55), "dual/all": (42.40, 47.64), "vision/all": (49.65, 57.90), "language/all": (49.14, 58.69),
        "best": (52.27, 60.98),
    },
    "imagenet-r-inc20": {
        "FO": (65.36, 71.53), "dual/all": (58.56, 65.92), "vision/all": (62.54, 69.84), "language/all": (64.38, 70.38),
        "best": (65.68, 72.16),
    },
}  # fmt: skip
# MoZO's gain over dual hop-even: Last, Avg, points (CIFAR, Tiny-ImageNet, ImageNet-R).
MOZO_GAINS = ((0.75, 0.44), (0.51, 0.70), (0.81, 0.53))
# Peak memory of a training step on a GPU, batch 128, ViT-B/16; GB.
PEAK_GB = {
    "moe": {"FO": 19.96, "dual/all": 2.17, "vision/all": 6.93, "language/all": 12.39},
    "lora": {"FO": 15.11, "dual/all": 1.73, "vision/all": 5.71, "language/all": 11.09},
}
SIGNIFICANT = 0.05


def paper_differences(cell: str, benchmark: str) -> list[str]:
    """The paper's differences from its baseline in Last and Avg; for another benchmark, the mean over its settings."""
    if cell == "MoZO":
        return [f"{statistics.mean(gains[i] for gains in MOZO_GAINS):+.1f}" for i in (0, 1)]
    settings = [ACCURACIES[benchmark]] if benchmark in ACCURACIES else list(ACCURACIES.values())
    if cell not in settings[0]:
        return ["", ""]
    return [f"{statistics.mean(s[cell][i] - s['FO'][i] for s in settings):+.1f}" for i in (0, 1)]


def p_value(differences: Sequence[float]) -> float | None:
    """The p-value of the two-sided paired t-test; None for a single pair, or if all differences are equal."""
    from scipy import stats  # from the extra `reproduce`

    return float(stats.ttest_1samp(differences, 0.0).pvalue) if np.ptp(differences) > 0 else None


def format_p(p: float | None) -> str:
    return "–" if p is None else f"{p:.3f}"


@dataclass(frozen=True)
class Finding:
    """A claim that some cells are better than others; each side is the mean over its cells, seed by seed.

    Args:
        claim: The claim in words.
        better, worse: Patterns of the cells' names; None: all other cells.
        pick: Cells of the better side: `all`, or the one with the highest (`best`) or lowest (`least`) mean.
    """

    claim: str
    better: tuple[str, ...] | None
    worse: tuple[str, ...] | None
    pick: str = "all"

    def rows(self, groups: Sequence[RunGroup]) -> list[tuple[str, ...]]:
        """A row for Last and one for Avg; no row if a side has no cell."""
        better, worse = _matching(groups, self.better), _matching(groups, self.worse)
        better = [group for group in groups if group not in worse] if better is None else better
        worse = [group for group in groups if group not in better] if worse is None else worse
        if not worse or not better:
            return []
        return [self._row(better, worse, *figure) for figure in (("last", "Last"), ("avg", "Avg"))]

    def _row(self, better: list[RunGroup], worse: list[RunGroup], name: str, heading: str) -> tuple[str, ...]:
        claim, means = self.claim, [group.values(name).mean() for group in better]
        if self.pick != "all":
            better = [better[int(np.argmax(means) if self.pick == "best" else np.argmin(means))]]
            claim = f"{claim} ({better[0].name})"
        reference = worse[0]
        high, low = (
            np.mean([paired_differences(group, reference, name) for group in side], axis=0) for side in (better, worse)
        )
        points = 100 * (high - low)
        p = p_value(points)
        return claim, heading, mean_and_deviation(points, 1, sign=True), format_p(p), verdict(points, p)


def _matching(groups: Sequence[RunGroup], patterns: tuple[str, ...] | None) -> list[RunGroup] | None:
    if patterns is None:
        return None
    return [group for group in groups if any(fnmatchcase(group.name, pattern) for pattern in patterns)]


def verdict(differences: np.ndarray, p: float | None) -> str:
    if p is None or not p < SIGNIFICANT:
        return "not decided"
    return "holds" if differences.mean() > 0 else "does not hold"


BRANCH_FINDINGS = (
    Finding("dual/all is the worst: the next worst is above it", None, ("dual/all",), pick="least"),
    Finding("language/all ≥ vision/all", ("language/all",), ("vision/all",)),
)
LAYER_FINDINGS = (
    Finding("hop > prefix and suffix", ("*/hop-*",), ("*/prefix-*", "*/suffix-*")),
    Finding("hop > the whole branch", ("vision/hop-*", "language/hop-*"), ("vision/all", "language/all")),
    Finding("the best hybrid ≥ FO", ("*/hop-*", "*/prefix-*", "*/suffix-*"), ("FO",), pick="best"),
)
FINDINGS = {
    "branch": BRANCH_FINDINGS,
    "layers": LAYER_FINDINGS,
    "all": (*BRANCH_FINDINGS, *LAYER_FINDINGS),
    "mozo": (
        Finding("MoZO improves dual/hop-even", ("MoZO",), ("plain",)),
        Finding("the sign alone improves it", ("sign",), ("plain",)),
        Finding("a smaller ε for vision alone improves it", ("small ε_v",), ("plain",)),
    ),
    "variants": (
        Finding("one estimate, applied directly, is the worst", None, ("aggressive",), pick="least"),
        Finding("conservative + sign is the best", ("conservative + sign",), None),
    ),
}


def compare_with_findings(groups: Sequence[RunGroup], table: str) -> Comparison:
    """The paper's findings, each with the paired difference that decides it."""
    rows = [row for finding in FINDINGS.get(table, ()) for row in finding.rows(groups)]
    note = (
        "Points, mean ± standard deviation over the seeds; p: two-sided paired t-test. Holds or does not hold: "
        f"p < {SIGNIFICANT}. A best or least cell was picked by the same figures, so that its p is too small."
    )
    return Comparison(("finding", "figure", "difference", "p", "verdict"), tuple(rows), note)
