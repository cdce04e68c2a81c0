"""Figures and reports of a run, drawn from its `results.json` alone."""

from .figures import draw_accuracy_matrix, plot_accuracy_matrix
from .table import format_results


__all__ = ["draw_accuracy_matrix", "format_results", "plot_accuracy_matrix"]
