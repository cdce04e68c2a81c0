"""The targets of the pretraining images: their labels, the teacher's classes, and the words for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from teacher import load_teacher
from torch import Tensor
from wordnet import ClassTree, Node
from words import cached_embeddings


LABEL_WEIGHT = 0.5  # weight of the label, next to the teacher's classes


@dataclass
class Words:
    """Names, their MiniLM vectors and the tree of classes.

    Attributes:
        tree: WordNet above the classes of ImageNet-1k.
        texts: All names and descriptions.
        vectors: The vector of each text, (texts, 384).
        vocabulary: The positions in `texts` of the names of classes and of other things.
        labels: The numbers (of 1,000) of the classes that have images, in the order of the images' labels.
    """

    tree: ClassTree
    texts: list[str]
    vectors: Tensor
    vocabulary: np.ndarray
    labels: np.ndarray

    @classmethod
    def load(cls, order: dict, folder: Path, device: torch.device, max_words: int | None = None) -> Words:
        names = dict(zip(order["wnid"], order["synonyms"], strict=True))
        tree = ClassTree(names)
        vocabulary = tree.names() + tree.other_names()[:max_words]
        texts = vocabulary + sorted({text for node in tree.nodes for text in node.described})
        vectors = cached_embeddings(texts, folder, device).to(device)
        labels = np.array([tree.wnids.index(wnid) for wnid in order["wnid"]])
        return cls(tree, texts, vectors, np.arange(len(vocabulary)), labels)

    @cached_property
    def leaves(self) -> list[Node]:
        """The 1,000 classes, by number."""
        single = {node.leaves[0]: node for node in self.tree.nodes if not node.children}
        return [single[number] for number in range(len(single))]

    @cached_property
    def position(self) -> dict[str, int]:
        return {text: number for number, text in enumerate(self.texts)}

    def membership(self, nodes: list) -> Tensor:
        """Return the number of the node that every class belongs to: (1000,)."""
        owner = torch.empty(1000, dtype=torch.long)
        for number, node in enumerate(nodes):
            owner[node.leaves] = number
        return owner


def soft_targets(features: Tensor, labels: Tensor, words: Words, device: torch.device) -> Tensor:
    """Return each image's label mixed with the teacher's probabilities of the 1,000 classes, float16: (N, 1000)."""
    head = load_teacher(device)._fc
    with torch.inference_mode():
        soft = torch.cat([head(part.to(device).float()).softmax(-1).half() for part in features.split(5000)])
    number = torch.from_numpy(words.labels).to(device)[labels.to(device)]
    soft = (1 - LABEL_WEIGHT) * soft
    soft[torch.arange(len(soft), device=device), number] += LABEL_WEIGHT
    return soft
