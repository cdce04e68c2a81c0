"""Measure the share of a training step that loading images takes: decoded every time, and from the cache.

    python scripts/benchmarks/data.py --recipe quickstart [--dataset_path folder]

Any further argument is an argument of a recipe. Prints a Markdown table of the median times of a step and of the
loading before it.
"""

import argparse
import dataclasses
import statistics
import time

from transformers import TrainerCallback

from hf_zocl import ZOCLTrainer
from hf_zocl.commands import Parser, command
from hf_zocl.commands.recipe import build_scheduler, parse_recipe
from hf_zocl.data.images import ImageCollator, PixelCodec, prepare_images


class StepTimes(TrainerCallback):
    """Records the time of each step, and of the loading between two steps."""

    def __init__(self):
        self.loading, self.computing = [], []
        self._mark = None

    def on_step_begin(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if self._mark is not None:
            self.loading.append(now - self._mark)
        self._mark = now

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.computing.append(now - self._mark)
        self._mark = now


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--steps", type=int, default=60)
    options, further = parser.parse_known_args()
    recipe = parse_recipe(["--recipe", options.recipe, "--max_steps", str(options.steps), *further])
    scheduler = build_scheduler(recipe)
    codec = PixelCodec(scheduler.processor.image_processor)
    started = time.perf_counter()
    cached, _ = prepare_images(scheduler.stream, codec, cache_gb=1e6)
    seconds = time.perf_counter() - started
    images = sum(len(task.train) + len(task.test) for task in cached)
    lazy, _ = prepare_images(scheduler.stream, codec, cache_gb=0)
    print("| images | loading, ms | step, ms | loading's share |")
    print("|---|---:|---:|---:|")
    ways = (
        ("decoded and processed every time", scheduler.stream[0], None),
        ("`image_cache_gb=0`: decoded and resized every time", lazy[0], codec),
        ("from the cache", cached[0], codec),
    )
    for name, task, own_codec in ways:
        times = measure(scheduler, task, own_codec)
        # The first steps warm up.
        loading, computing = (1000 * statistics.median(part[5:]) for part in (times.loading, times.computing))
        print(f"| {name} | {loading:.2f} | {computing:.1f} | {100 * loading / (loading + computing):.1f} % |")
    print(f"\nFilling the cache (or finding it): {images} images in {seconds:.1f} s.")


def measure(scheduler, task, codec: PixelCodec | None) -> StepTimes:
    """The step times of one training on a task."""
    scheduler.model.set_classes(task.class_names)
    times = StepTimes()
    args = dataclasses.replace(scheduler.args, remove_unused_columns=False, report_to="none", disable_tqdm=True)
    trainer = ZOCLTrainer(
        model=scheduler.model,
        args=args,
        train_dataset=task.train,
        data_collator=ImageCollator(scheduler.processor, task.arrival_labels, task.first_label, codec),
        callbacks=[times],
    )
    trainer.train()
    return times


if __name__ == "__main__":
    main()
