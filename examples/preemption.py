"""A job that may be told to go at any time: all ranks save after the same step, and the next run goes on from there.

    elastic-run --standalone --nproc-per-node 2 examples/preemption.py --checkpoints checkpoints

Batch systems send SIGTERM before a time limit or a preemption. On that, ``should_stop()`` turns true on every rank in
the same call. So each rank can save its own shard, without a word to the others, and the shards fit together. It needs
neither torch nor a process group. A step here takes 10 ms and learns nothing; put yours in its place.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from elastic_launch import worker


def main() -> None:
    parser = argparse.ArgumentParser(description="Train, save when told to stop, and resume.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--checkpoints", type=Path, required=True, help="a directory")
    args = parser.parse_args()

    shard = args.checkpoints / f"rank-{os.environ['RANK']}.json"
    step, weights = load(shard) if shard.exists() else (0, 0.0)
    print(f"begins at step {step}", flush=True)
    while step < args.steps:
        weights = train(weights)
        step += 1
        worker.progress(step)
        if worker.should_stop():
            print(f"told to stop at step {step}", flush=True)
            break  # the status is 0: the rank has done what it was told
        if step % 20 == 0:
            print(f"step {step}", flush=True)
    save(shard, step, weights)


def train(weights: float) -> float:
    time.sleep(0.01)
    return weights + 0.5


def load(shard: Path) -> tuple[int, float]:
    saved = json.loads(shard.read_text())
    return saved["step"], saved["weights"]


def save(shard: Path, step: int, weights: float) -> None:
    shard.parent.mkdir(parents=True, exist_ok=True)
    beside = shard.with_suffix(".new")
    beside.write_text(json.dumps({"step": step, "weights": weights}))
    os.replace(beside, shard)


if __name__ == "__main__":
    main()
