"""Methods against forgetting that act task by task: one file each."""

from .classifier_alignment import ClassifierAlignment
from .plugin import TaskPlugin, load_plugins, plugin_file, plugin_names, task_plugins


__all__ = ["ClassifierAlignment", "TaskPlugin", "load_plugins", "plugin_file", "plugin_names", "task_plugins"]
