"""Figures, tables and reports of runs, drawn from the files in their folders alone."""

from .compare import COMPARISON_FILES, Comparison, compare_groups, compare_runs, mean_and_deviation, paired_differences
from .figures import draw_accuracy_matrix, plot_accuracy_matrix
from .html import write_report
from .runs import RESULTS_FILE, RunGroup, load_groups, load_seeds
from .table import format_evaluation, format_results


__all__ = [
    "COMPARISON_FILES",
    "RESULTS_FILE",
    "Comparison",
    "RunGroup",
    "compare_groups",
    "compare_runs",
    "draw_accuracy_matrix",
    "format_evaluation",
    "format_results",
    "load_groups",
    "load_seeds",
    "mean_and_deviation",
    "paired_differences",
    "plot_accuracy_matrix",
    "write_report",
]
