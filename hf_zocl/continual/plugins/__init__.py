"""What takes part in a stream's training at the end of every task: one file a method."""

from .classifier_alignment import ClassifierAlignment
from .plugin import PLUGIN_STATE, TaskPlugin, load_plugins, plugin_file, task_plugins


__all__ = ["PLUGIN_STATE", "ClassifierAlignment", "TaskPlugin", "load_plugins", "plugin_file", "task_plugins"]
