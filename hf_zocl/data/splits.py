"""A dataset's splits: its image and label columns, the names of its classes, and the rows of each class."""

from __future__ import annotations

import numbers
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np

from ..checks import check_type, check_writable
from .image_folders import image_folder_files, load_image_folder


TRAIN_SPLITS = ("train",)
TEST_SPLITS = ("test", "validation", "valid", "val")
LABEL_COLUMNS = ("label", "labels")
# Names of ImageNet's copies on the Hub (the last part): their class names are WordNet's lists of synonyms.
LISTS_SYNONYMS = re.compile(
    r"(tiny-?|mini-?)?imagenet(-?\d+)?([-_](1k|21k|22k|a|c|o|r|sketch|v2|wds)\b.*)?", re.IGNORECASE
)
CLASS_ORDER_SEED = 1993


def clean_class_name(name: str, lists_synonyms: bool = False) -> str:
    """Make a dataset's class name fit for a prompt.

    WordNet ids are removed, underscores and repeated blanks become one blank, and a name all in capitals becomes lower
    case unless it is as short as an acronym (`CD`, `SUV`). Other names keep their case. Of comma-separated synonyms,
    only the first stays; commas separate synonyms if the name has a WordNet id, or `lists_synonyms` says so.

    >>> clean_class_name("n01440764 tench, Tinca tinca")
    'tench'
    >>> clean_class_name("golden__retriever")
    'golden retriever'
    >>> clean_class_name("1,000 yen")
    '1,000 yen'

    Args:
        name: The class name in the dataset.
        lists_synonyms: Whether the dataset's names are lists of synonyms, as ImageNet's are.
    """
    name, ids = re.subn(r"\bn\d{8}(?!\d)", " ", name)
    if ids or lists_synonyms:
        name = next((part for part in name.split(",") if part.strip(" _")), "")
    words = " ".join(name.replace("_", " ").split())
    return words.lower() if words.isupper() and len(words) > 3 else words


@dataclass(frozen=True)
class Split:
    """A split of the dataset: its name, its rows, and, once the columns are chosen, each row's number and labels."""

    name: str
    data: datasets.Dataset
    labels: np.ndarray | None = None
    domains: np.ndarray | None = None
    row_ids: np.ndarray | None = None
    note: str = ""  # why the split may lack images

    def with_columns(self, image_column: str, label_column: str, domain_column: str | None = None) -> Split:
        domains = None if domain_column is None else self._domains(domain_column)
        data = self.data.with_format(None).select_columns([image_column, label_column])
        if (image_column, label_column) != ("image", "label"):
            data = data.rename_columns({image_column: "image", label_column: "label"})
        if not (feature := data.features["image"]).decode:  # a dataset may leave decoding to its user
            data = data.cast_column("image", replace(feature, decode=True))
        # Through Arrow, a million labels take a fraction of a second, and no image is touched.
        column = data.select_columns("label").with_format("arrow")[:]["label"]
        labels = self.filled(column, f"label in column {label_column!r}")
        labels = labels if labels.dtype == object else labels.astype(np.int64)
        return Split(self.name, data, labels, domains, np.arange(len(labels)))

    def filled(self, column: Any, what: str) -> np.ndarray:
        """The values of an Arrow column; none may be missing."""
        if column.null_count:
            row = int(np.argmax(column.is_null().to_numpy()))
            raise ValueError(
                f"split {self.name!r}: {column.null_count} of {len(column)} images have no {what}; the first is row "
                f"{row}."
            )
        return column.to_numpy()

    def _domains(self, column: str) -> np.ndarray:
        usable = [name for name, feature in self.data.features.items() if _holds_labels(feature)]
        _column(self, column, usable, "domain_column", "of class labels, integers or strings")
        values = self.data.select_columns(column).with_format("arrow")[:][column]
        values = self.filled(values, f"domain in domain_column={column!r}")
        feature = self.data.features[column]
        if not isinstance(feature, datasets.ClassLabel):
            return values
        outside = np.flatnonzero((values < 0) | (values >= feature.num_classes))
        if outside.size:  # -1 stands for a missing label
            raise ValueError(
                f"split {self.name!r}, row {outside[0]}: domain {values[outside[0]]} in domain_column={column!r} is "
                f"outside its {feature.num_classes} names; {outside.size} of {len(values)} rows are."
            )
        return np.array(feature.names)[values]

    def rows(self, rows: np.ndarray) -> Split:
        domains = None if self.domains is None else self.domains[rows]
        return Split(self.name, self.data.select(rows), self.labels[rows], domains, self.row_ids[rows], self.note)

    def in_domain(self, domain) -> Split:
        kept = self.rows(np.flatnonzero(self.domains == domain))
        return replace(kept, name=f"{self.name} of domain {domain}")

    def select(self, rows: dict[int, np.ndarray], labels: Iterable[int]) -> Split:
        """The rows of some classes, in the dataset's order."""
        return self.rows(np.sort(np.concatenate([rows[label] for label in labels])))


def load_splits(dataset, config_name: str | None, revision: str | None) -> Mapping[str, datasets.Dataset]:
    splits = dataset
    if isinstance(dataset, str | os.PathLike):
        try:
            images = image_folder_files(dataset) if config_name is None and os.path.isdir(dataset) else None
            if images is not None:
                return load_image_folder(images)
            splits = datasets.load_dataset(os.fspath(dataset), config_name, revision=revision)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"dataset={dataset!r}, a Hub id or a local folder, cannot be loaded: {error}") from error
    if isinstance(splits, Mapping) and all(isinstance(split, datasets.Dataset) for split in splits.values()):
        return splits
    raise ValueError(
        "dataset: expected a Hub id, a local folder or a DatasetDict that is not streamed, "
        f"got {type(splits).__name__}."
    )


def open_split(
    splits: Mapping[str, datasets.Dataset], given: str | None, argument: str, defaults: tuple[str, ...]
) -> Split:
    wanted = defaults if given is None else (given,)
    name = next((name for name in wanted if name in splits), None)
    if name is None:
        which = f"{argument}={given!r}" if given is not None else f"no {' or '.join(map(repr, wanted))}"
        raise ValueError(f"{which}: the dataset's splits are {listed(splits)}; choose one with {argument}.")
    if len(splits[name]) == 0:
        raise ValueError(f"split {name!r} is empty; choose another with {argument}.")
    return Split(str(name), splits[name])


def find_image_column(split: Split, given: str | None) -> str:
    features = split.data.features
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    return _column(split, given, found, "image_column", "of type Image")


def find_label_column(split: Split, given: str | None) -> str:
    features = split.data.features
    usable = [name for name, feature in features.items() if _holds_labels(feature)]
    if given is not None:
        return _column(split, given, usable, "label_column", "of class labels, integers or strings")
    found = [name for name in usable if isinstance(features[name], datasets.ClassLabel)]
    found = found or [name for name in usable if name in LABEL_COLUMNS]
    what = f"of type ClassLabel, nor one of integers or strings named {' or '.join(map(repr, LABEL_COLUMNS))}"
    return _column(split, given, found, "label_column", what)


def _column(split: Split, given: str | None, found: list[str], argument: str, what: str) -> str:
    """The given column if it is a candidate, otherwise the only candidate."""
    columns = ", ".join(f"{name!r} ({_type_name(feature)})" for name, feature in split.data.features.items())
    if given is not None and given not in found:
        raise ValueError(f"{argument}={given!r} is not a column {what} of split {split.name!r}; it has {columns}.")
    if given is None and not found:
        raise ValueError(f"split {split.name!r} has no column {what}; it has {columns}. {argument} chooses one.")
    if given is None and len(found) > 1:
        raise ValueError(
            f"split {split.name!r} has several such columns, {listed(found)}: choose one with {argument}."
        )
    return given or found[0]


def _is_string(feature) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _holds_labels(feature) -> bool:
    is_integer = isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))
    return isinstance(feature, datasets.ClassLabel) or is_integer or _is_string(feature)


def _type_name(feature) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def encode_strings(train: Split, test: Split, renumbers: bool = True) -> tuple[Split, Split]:
    """Replace string labels by ids, in the order of `in_order` over both splits; other labels stay.

    With `renumbers`, label names that are numbers in alphabetical order, as of folders 1 to 12, are put in numeric
    order. It is off for a dataset in memory, because its user has seen the ids and refers to classes by them.
    """
    for split, other in ((train, test), (test, train)):
        feature, expected = split.data.features["label"], other.data.features["label"]
        if _is_string(feature) != _is_string(expected):
            raise ValueError(
                f"the labels of split {split.name!r} are {_type_name(feature)}, "
                f"those of split {other.name!r} {_type_name(expected)}; expected the same type."
            )
    feature = train.data.features["label"]
    if _is_string(feature):
        strings = in_order({*train.labels, *test.labels})
        ids = {string: label for label, string in enumerate(strings)}
        return tuple(
            _relabelled(split, strings, np.array([ids[string] for string in split.labels], dtype=np.int64))
            for split in (train, test)
        )
    own = feature.names if isinstance(feature, datasets.ClassLabel) else []
    names = in_order(own) if renumbers and own == sorted(own) else own
    if names == own or test.data.features["label"] != feature:
        return train, test
    moved = np.array([names.index(name) for name in own])
    # A label outside the names stays unchanged; a later check reports it.
    moves = [
        np.where((s.labels < 0) | (s.labels >= len(own)), s.labels, moved[s.labels.clip(0, len(own) - 1)])
        for s in (train, test)
    ]
    return _relabelled(train, names, moves[0]), _relabelled(test, names, moves[1])


def _relabelled(split: Split, names: list[str], labels: np.ndarray) -> Split:
    # `Dataset.class_encode_column` would write every image to a new cache file.
    data = split.data.remove_columns("label").add_column("label", labels, feature=datasets.ClassLabel(names=names))
    return replace(split, data=data, labels=labels)


def in_order(names: Iterable[str]) -> list[str]:
    """The names in numeric order if all are whole numbers, otherwise in alphabetical order.

    >>> in_order(["10", "9", "1"])
    ['1', '9', '10']
    """
    names = list(names)
    if all(re.fullmatch(r"[+-]?[0-9]{1,18}", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def names_from_column(split: Split, column: str, labels: np.ndarray, lists_synonyms: bool = False) -> list[str]:
    """The prompt names by label id; all images of a class have the same."""
    column = _column(
        split, column, [c for c, f in split.data.features.items() if _is_string(f)], "name_column", "of strings"
    )
    ids, rows, places = np.unique(labels, return_index=True, return_inverse=True)
    if not np.array_equal(ids, np.arange(len(ids))):
        raise ValueError(f"name_column={column!r}: split {split.name!r} has no image of some class; give class_names.")
    given = split.data.select_columns(column).with_format("arrow")[:][column]
    own, which = np.unique(split.filled(given, f"name in name_column={column!r}"), return_inverse=True)
    names = np.array([clean_class_name(name, lists_synonyms) for name in own], dtype=object)[which]
    if (other := np.flatnonzero(names != names[rows][places])).size:
        row, first = other[0], rows[places[other[0]]]
        raise ValueError(
            f"name_column={column!r}: split {split.name!r}, rows {first} and {row}: one class is called "
            f"{names[first]!r} and {names[row]!r}; expected one name for each class, or give class_names."
        )
    return list(names[rows])


def split_off(split: Split, fraction: float) -> tuple[Split, Split]:
    """Cut a split in two, class by class: the rest, and `fraction` of every class (at least one image)."""
    check_type("test_fraction", fraction, numbers.Real, "a share between 0 and 1")
    if not 0 < fraction < 1:
        raise ValueError(f"test_fraction={fraction}: expected a share between 0 and 1.")
    is_test = np.zeros(len(split.labels), dtype=bool)
    by_label = np.argsort(split.labels, kind="stable")
    ids, starts = np.unique(split.labels[by_label], return_index=True)
    for label, rows in zip(ids, np.split(by_label, starts[1:]), strict=True):
        count = max(1, round(fraction * len(rows)))
        is_test[_draw(rows, count, (CLASS_ORDER_SEED, int(label)))] = True
    rest = replace(split, note=f" test_fraction={fraction} takes at least one image of every class to test on.")
    return rest.rows(np.flatnonzero(~is_test)), split.rows(np.flatnonzero(is_test))


def read_class_names(
    train: Split, test: Split, given: Sequence[str] | None, lists_synonyms: bool = False
) -> dict[int, str]:
    """The prompt names by label id; every label of both splits has a name."""
    feature, test_feature = train.data.features["label"], test.data.features["label"]
    own = feature.names if isinstance(feature, datasets.ClassLabel) else None
    test_own = test_feature.names if isinstance(test_feature, datasets.ClassLabel) else None
    if own != test_own:
        raise ValueError(
            f"the label names of split {test.name!r} ({listed(test_own or [])}) are not those of split "
            f"{train.name!r} ({listed(own or [])}): one label id would mean two classes."
        )
    if given is not None:
        if not len(given) or (own is not None and len(given) != len(own)):
            expected = len(own) if own is not None else "at least one"
            raise ValueError(f"class_names has {len(given)} names; expected {expected}, one for each class.")
        names, source = dict(enumerate(given)), "class_names"
    elif own is not None:
        names = {label: clean_class_name(name, lists_synonyms) for label, name in enumerate(own)}
        source = "the dataset's label names"
    else:
        # A class of one image has none left once the test share is split off; a later check reports it.
        labels = np.concatenate([train.labels, test.labels]) if train.note else train.labels
        names, source = {int(label): str(label) for label in np.unique(labels)}, f"split {train.name!r}"
    for split in (train, test):
        outside = np.flatnonzero(~np.isin(split.labels, list(names)) | (split.labels < 0))
        if outside.size:
            row = outside[0]
            raise ValueError(
                f"split {split.name!r}, row {row}: label {split.labels[row]} is outside the {len(names)} classes of "
                f"{source} (ids {min(names)} to {max(names)}); {outside.size} of {len(split.labels)} rows are."
            )
    return names


def check_names(names: dict[int, str], feature, are_given: bool) -> None:
    """Check that the names of the stream's classes differ."""
    own = feature.names if isinstance(feature, datasets.ClassLabel) else None
    source = "class_names" if are_given else "the dataset's label names"
    labels_by_name: dict[str, list[int]] = {}
    for label, name in names.items():
        labels_by_name.setdefault(name, []).append(label)
    for name, labels in labels_by_name.items():
        shown = ", ".join(f"{label} ({own[label]!r})" if own else str(label) for label in labels)
        check_writable(f"{source}: class {shown}", name)
        if not name.strip():
            raise ValueError(f"{source}: the name of class {shown} leaves nothing for a prompt; give class_names.")
        if len(labels) > 1:
            raise ValueError(f"{source}: classes {shown} are all called {name!r} in a prompt; give class_names.")


def check_cap(argument: str, cap: int | None) -> None:
    if cap is not None:
        check_type(argument, cap, numbers.Integral, "at least 1 image per class, or None for all")
        if cap < 1:
            raise ValueError(f"{argument}={cap}: expected at least 1 image per class, or None for all.")


def rows_by_class(
    split: Split, order: tuple[int, ...], names: dict[int, str], cap: int | None, seed: int
) -> dict[int, np.ndarray]:
    """The rows of every class of the stream, at most `cap` of each."""
    by_label = np.argsort(split.labels, kind="stable")
    ids = np.array(order)
    ends = [np.searchsorted(split.labels, ids, side=side, sorter=by_label) for side in ("left", "right")]
    rows = {label: by_label[start:stop] for label, start, stop in zip(order, *ends, strict=True)}
    empty = [f"{names[label]!r} (id {label})" for label in order if not len(rows[label])]
    if empty:
        raise ValueError(
            f"split {split.name!r} has no image of {len(empty)} classes: {listed(empty, str)}.{split.note} "
            "Every class of the stream needs one; class_order with partial_order=True can leave classes out."
        )
    if cap is None:
        return rows
    return {label: _draw(candidates, cap, (seed, label)) for label, candidates in rows.items()}


def _draw(candidates: np.ndarray, count: int, seed: tuple[int, ...]) -> np.ndarray:
    if len(candidates) <= count:
        return candidates
    return np.random.default_rng(seed).choice(candidates, count, replace=False)


def listed(values: Iterable, show=repr, limit: int = 10) -> str:
    values = list(values)
    rest = f" and {len(values) - limit} more" if len(values) > limit else ""
    return ", ".join(map(show, values[:limit])) + rest
