"""Folders of images, a folder a class: which folders are splits and which are classes, whatever they are called."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import datasets
from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder


IMAGES = frozenset(ImageFolder.EXTENSIONS)
# Files that say themselves what a folder holds.
DESCRIPTIONS = frozenset({".csv", ".jsonl", ".parquet", ".arrow", ".json", ".txt", ".zip", ".tar", ".gz", ".py"})
SPLITS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}


def image_folder_files(folder: str | os.PathLike[str]) -> dict[str, str] | None:
    """The files of each split of an image folder, as a pattern for `datasets.load_dataset("imagefolder")`.

    Two kinds are known: `train/cat/1.png` (the outer folder is the split, the inner one the class), and `cat/1.png` (a
    single split). Of every other folder `load_dataset` itself finds out what it is; it takes a folder called `train`
    for a split wherever it lies, so that of a class of that name it would train on the test images.

    Args:
        folder: A local folder.

    Returns:
        Split → pattern; None if the folder is of another kind.
    """
    folders, files = _entries(Path(folder))
    if any(Path(file).suffix.lower() in DESCRIPTIONS for file in files) or _has_images(files):
        return None
    root = glob.escape(os.path.abspath(folder))
    splits = [each for each in folders if each.name.lower() in SPLITS]
    if splits and all(_holds_classes(each) for each in splits):
        patterns = {SPLITS[each.name.lower()]: f"{root}/{glob.escape(each.name)}/*/*" for each in splits}
        return patterns if len(patterns) == len(splits) else None
    if len(folders) > len(splits) and _holds_classes(Path(folder)):
        return {"train": f"{root}/*/*"}
    return None


def load_image_folder(patterns: dict[str, str]) -> datasets.DatasetDict:
    """The images of `image_folder_files`: columns `image` and `label`, the class's folder."""
    return datasets.load_dataset("imagefolder", data_files=patterns, drop_labels=False)


def _holds_classes(folder: Path) -> bool:
    """Whether a folder holds folders of images, and nothing else of its own."""
    classes, files = _entries(folder)
    inside = [_entries(each) for each in classes]
    return (
        not _has_images(files)
        and any(_has_images(files) for _, files in inside)
        and not any(folders for folders, _ in inside)
        and not any(
            Path(file).suffix.lower() in DESCRIPTIONS for names in (files, *(f for _, f in inside)) for file in names
        )
    )


def _has_images(files: list[str]) -> bool:
    return any(os.path.splitext(file)[1].lower() in IMAGES for file in files)


def _entries(folder: Path) -> tuple[list[Path], list[str]]:
    """The folders and the names of the files in a folder, without those that `datasets` passes over."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_dir():
                files.append(entry.name)
            elif not entry.name.startswith("__"):
                folders.append(Path(entry.path))
    return sorted(folders), files
