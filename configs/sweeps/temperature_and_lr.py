"""The sweep of temperature_and_lr.yaml from Python, with a space of its own: first coarse, then closer to the best.

Run: python configs/sweeps/temperature_and_lr.py   (after `make quickstart`, whose data it reads)
"""

import logging
from pathlib import Path

import rayembed

EXPERIMENT = Path(__file__).with_suffix(".yaml")


def main() -> None:
    """Two sweeps in run folders of their own; killed, each goes on where it was left."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("rayembed").setLevel(logging.INFO)
    coarse = rayembed.tune(
        EXPERIMENT,
        {
            "train.temperature": {"choice": [0.02, 0.05, 0.1]},
            "train.learning_rate": {"choice": [1e-5, 5e-5]},
        },
        overrides=["output_dir=runs/coarse", "cache_dir=runs/coarse/cache", "tune.then=null"],
        search="grid",
    )
    temperature, rate = coarse.best["train.temperature"], coarse.best["train.learning_rate"]
    close = rayembed.tune(
        EXPERIMENT,
        {
            "train.temperature": {"uniform": [temperature / 2, temperature * 2]},
            "train.learning_rate": {"loguniform": [rate / 3, rate * 3]},
        },
        overrides=["output_dir=runs/close", "cache_dir=runs/coarse/cache"],  # vectors and tokens are made once
        search="optuna",
        num_samples=6,
        then="train",
    )
    for sweep in (coarse, close):
        print(f"{sweep.metric} {sweep.figure:.4f} with {sweep.best} (as it is: {sweep.baseline_figure})")


if __name__ == "__main__":
    main()
