"""Image folders with a folder per class: which folders are splits and which are classes, whatever their names."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import datasets
from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder


IMAGES = frozenset(ImageFolder.EXTENSIONS)
# Files that describe the content of a folder.
DESCRIPTIONS = frozenset({".csv", ".jsonl", ".parquet", ".arrow", ".json", ".txt", ".zip", ".tar", ".gz", ".py"})
DEEPEST = 8  # levels of folders above an image, because a link to its own parent would never end
SPLITS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}


def image_folder_files(folder: str | os.PathLike[str]) -> dict[str, list[str]] | None:
    """The files of each split of an image folder, as patterns for `datasets.load_dataset("imagefolder")`.

    Two layouts are recognised: `train/cat/1.png` (the outer folder is the split, the inner one the class), and
    `cat/1.png` (a single split). Folders may group the classes, at the same depth for every image:
    `train/animals/cat/1.png`. Any other folder is left to `load_dataset`. That takes every folder called `train` for a
    split, so with a class of that name it would train on the test images.

    Args:
        folder: A local folder.

    Returns:
        Split → patterns; None if the folder has another layout.

    Raises:
        ValueError: If a folder is named like a split, while its siblings are not but hold classes as it does; or if a
            class's folder is a link that `load_dataset` would not follow.
    """
    folders, files = _entries(Path(folder))
    if _has_images(files) or _are_described(files):
        return None
    classes = {each: _classes(each) for each in folders}
    splits = {each: SPLITS[each.name.lower()] for each in folders if each.name.lower() in SPLITS}
    depths = {len(paths[0]) if (paths := classes[each]) else 0 for each in splits}
    if len(depths) == 1 and (depth := depths.pop()):
        others = [each for each in folders if each not in splits and classes[each] and len(classes[each][0]) == depth]
        if others and len(set(splits.values())) == 1:
            raise ValueError(
                f"its folder {next(iter(splits)).name!r} may be a split, or hold classes as {others[0].name!r} does; "
                "expected only folders of splits, such as train and test, or everything in one folder called train."
            )
        is_clear = len(set(splits.values())) == len(splits)
        return {split: _patterns(each, classes[each]) for each, split in splits.items()} if is_clear else None
    own = _classes(Path(folder))
    return {"train": _patterns(Path(folder), own)} if own and not _hold_splits(own) else None


def load_image_folder(patterns: dict[str, list[str]]) -> datasets.DatasetDict:
    """Load the images of `image_folder_files`: columns `image` and `label`, the name of the class's folder."""
    return datasets.load_dataset("imagefolder", data_files=patterns, drop_labels=False)


def _classes(folder: Path, most: int = DEEPEST) -> list[tuple[str, ...]] | None:
    """The folders that hold images within a folder, as paths of equal depth.

    Returns:
        None if their depths differ, a folder of folders has images, or a file describes the images.
    """
    folders, files = _entries(folder)
    if _has_images(files) or _are_described(files):
        return None
    found = []
    for each in folders:
        inner, names = _entries(each)
        if _are_described(names) or (inner and (_has_images(names) or most == 1)):
            return None
        below = _classes(each, most - 1) if inner else [()] * _has_images(names)
        if below is None:
            return None
        found += [(each.name, *path) for path in below]
    return found if len({len(path) for path in found}) <= 1 else None


def _hold_splits(classes: list[tuple[str, ...]]) -> bool:
    """Tell whether some folders may be splits: one above the classes, or all those that share a parent."""
    inside: dict[tuple[str, ...], list[bool]] = {}
    for *above, name in classes:
        if any(each.lower() in SPLITS for each in above):
            return True
        inside.setdefault(tuple(above), []).append(name.lower() in SPLITS)
    return any(map(all, inside.values()))


def _patterns(folder: Path, classes: list[tuple[str, ...]]) -> list[str]:
    """The images of the classes in a folder: one pattern for all, and one for each class whose folder is a link."""
    root, real = os.path.abspath(folder), os.path.realpath(folder)
    paths = {os.path.join(root, *path): os.path.join(real, *path) for path in classes}
    linked = [place for place, unlinked in paths.items() if os.path.realpath(place) != unlinked]
    # `datasets` follows links only in front of a pattern's first special character.
    if odd := next((place for place in linked if glob.escape(place) != place), None):
        raise ValueError(
            f"its folder {odd!r} is a link, which cannot be followed: rename it without any of *, ? and [."
        )
    whole = [glob.escape(root) + "/*" * (len(classes[0]) + 1)] if len(linked) < len(paths) else []
    return whole + [f"{place}/*" for place in linked]


def _are_described(files: list[str]) -> bool:
    return any(Path(file).suffix.lower() in DESCRIPTIONS for file in files)


def _has_images(files: list[str]) -> bool:
    return any(os.path.splitext(file)[1].lower() in IMAGES for file in files)


def _entries(folder: Path) -> tuple[list[Path], list[str]]:
    """The folders and the file names in a folder, without those that `datasets` skips."""
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
