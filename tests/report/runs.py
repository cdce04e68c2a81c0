"""Folders of runs as a run leaves them, made of random numbers."""

import json
from pathlib import Path

import numpy as np

from hf_zocl.report.gallery import choose, gallery_bytes, small_image
from hf_zocl.report.predictions import PredictionHistory
from tests.report.test_figures import make_results


def save_run(
    folder: Path, seed: int, tasks: int = 5, by_layer: bool = False, more: dict | None = None, **recipe
) -> Path:
    """A run of some seed, with the means of its training logs, and nothing beside `results.json`."""
    rng = np.random.default_rng(seed)
    results = make_results(tasks, **recipe)
    results["seen_accuracy"] = [float(value * rng.uniform(0.9, 1.1)) for value in results["seen_accuracy"]]
    names = ["zo_variance_vision", "zo_variance_language"]
    names += [f"zo_variance_vision_layer_{layer}" for layer in (2, 4, 6)] if by_layer else []
    log = [{"loss": 1.0, **{name: float(rng.uniform(1e-4, 1e-1)) for name in names}} for _ in range(tasks)]
    results |= {"seed": seed, "training": log if recipe.get("zo_branch") != "none" else [{"loss": 1.0}] * tasks}
    results |= {"seconds": 100.0 + seed, "peak_memory_bytes": int(1e9 * rng.uniform(1, 2)), "scenario": "class"}
    results |= {"forgetting": 0.2, "backward_transfer": -0.2, "last": results["seen_accuracy"][-1], **(more or {})}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def random_history(tasks: int, classes: int, images: int, seed: int = 0) -> PredictionHistory:
    """Predictions, half of them right, for a number of classes and of images of each in each task."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(tasks * classes), images)
    arrived = classes * np.repeat(np.arange(1, tasks + 1), classes * images)

    def said(among: np.ndarray) -> np.ndarray:
        true = labels[: len(among)]
        return np.where(rng.random(len(true)) < 0.5, true, rng.integers(0, among))

    after = {t: said(np.full(t * classes * images, t * classes)) for t in range(1, tasks + 1)}
    return PredictionHistory(np.full(tasks, classes * images), labels, said(arrived), after)


def save_whole_run(
    folder: Path, seed: int, tasks: int = 3, classes: int = 3, images: int = 10, names=None, side: int = 32
) -> Path:
    """A run with all that its report can show."""
    rng = np.random.default_rng(seed)
    layers = {"vision": {str(n): "zo" if n % 2 == 0 else "fo" for n in range(1, 7)}, "language": {"1": "fo+zo"}}
    more = {
        "classes": list(names or (f"class {n}" for n in range(tasks * classes))),
        "tasks": [f"task-{n:02d}" for n in range(1, tasks + 1)],
        "assignment": {"branch": "dual", "layers": "hop-even", "towers": layers},
    }
    save_run(folder, seed, tasks, by_layer=True, more=more)
    history = random_history(tasks, classes, images, seed)
    history.write(folder / "predictions.safetensors")
    small = {
        task: {place: small_image(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for place in places}
        for task, places in choose(history, tasks).items()
    }
    (folder / "gallery.json").write_bytes(gallery_bytes(small))
    for task in range(1, tasks + 1):
        log = {name: rng.uniform(1e-4, 1e-2, 12).tolist() for name in ("zo_loss_difference", "zo_variance_vision")}
        log |= {"step": list(range(10, 130, 10)), "loss": rng.uniform(0, 2, 12).tolist(), "zo_noise": [1e-6] * 12}
        (folder / f"task-{task:02d}").mkdir()
        (folder / f"task-{task:02d}" / "training_log.json").write_text(json.dumps(log))
    return folder
