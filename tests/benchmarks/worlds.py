"""What the number of workers, and being killed, change of the final weights: a table over ZeRO's stages.

A 2-layer model, 8 steps of 8 queries, dropout 0, float32; the killed runs end in the checkpoint of step 4 and go on on
the number of workers that the column says. Numbers are the largest difference of any weight to the unbroken run of one
worker under ZeRO 0; how far training moves a weight is said at the end.

Run: OMP_NUM_THREADS=1 python -m tests.benchmarks.worlds
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rayembed.config import Experiment
from tests.conftest import write_tiny_model
from tests.training.processes import in_workers
from tests.training.small_training import Run, experiment, random_rows, train_one, write_row_tokens

Weights = dict[str, torch.Tensor]
WORLDS, STEPS, BATCH = (1, 2, 4), 8, 8


def trained(setup: Experiment, run: Run, workers: int, *steps: int | None) -> None:
    """One run; `steps` is after which it is killed, and from which it goes on."""
    in_workers(workers, train_one, replace(setup, ray=replace(setup.ray, num_workers=workers)), run, *steps)


def apart(found: Weights, expected: Weights) -> str:
    if all(torch.equal(value, expected[name]) for name, value in found.items()):
        return "bit by bit"
    return f"{max(float((value - expected[name]).abs().max()) for name, value in found.items()):.1e}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, nargs="*", default=[0, 1, 2, 3])
    told = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_tiny_model(folder / "model")
        write_row_tokens(random_rows(40), model, folder / "tokens")
        first: Weights | None = None
        print("| ZeRO | workers | unbroken, to 1 worker | killed, to the unbroken on as many | then on other workers |")
        print("| --- | --- | --- | --- | --- |")
        for stage in told.stages:
            settings: dict[str, Any] = {"global_batch_size": BATCH, "max_steps": STEPS, "learning_rate": 1e-3}
            setup = experiment(model, workers=1, stage=stage, adam_epsilon=1e-4, save_steps=4, **settings)
            setup = replace(setup, model=replace(setup.model, dropout=0.0))
            for workers in WORLDS:
                place = folder / f"{stage}-{workers}"
                unbroken, killed = Run(place / "unbroken", folder / "tokens"), Run(place / "killed", folder / "tokens")
                trained(setup, unbroken, workers)
                first = first or unbroken.weights()
                trained(setup, killed, workers, 4)
                others = {}
                for other in WORLDS:
                    trained(setup, killed, other, None, 4)
                    others[other] = killed.weights()
                same = apart(others.pop(workers), unbroken.weights())
                moved = ", ".join(f"{other}: {apart(found, first)}" for other, found in others.items())
                print(f"| {stage} | {workers} | {apart(unbroken.weights(), first)} | {same} | {moved} |", flush=True)
        base = load_file(model / "model.safetensors")
        print(f"training moves weights by up to {apart(first or {}, base)}")


if __name__ == "__main__":
    main()
