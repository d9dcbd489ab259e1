"""What the workers do: count steps, note each of them in a file, and save a checkpoint every tenth step."""

import os
import time
from pathlib import Path

from elastic_launch import worker

FOLDER = Path(os.environ["CHAOS_FOLDER"])
RANK, ROUND = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
CHECKPOINT, END = FOLDER / "checkpoint", FOLDER / "end"


def main() -> None:
    if os.environ["CHAOS_GLOO"] == "1":
        import torch
        import torch.distributed

        torch.distributed.init_process_group("gloo")
    notes = os.open(FOLDER / "steps", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    step = int(CHECKPOINT.read_text()) + 1 if CHECKPOINT.exists() else 0
    while not END.exists():
        if os.environ["CHAOS_GLOO"] == "1":
            torch.distributed.all_reduce(torch.ones(1))
        worker.check()
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        os.write(notes, f"{ROUND} {RANK} {step} {now:.6f} {os.uname().nodename} {os.getpid()}\n".encode())
        if RANK == 0 and step % 10 == 0:
            new = FOLDER / f"checkpoint.{os.getpid()}"
            new.write_text(str(step))
            worker.check()
            new.rename(CHECKPOINT)
        print(f"step {step}", flush=True)
        step += 1
        time.sleep(0.05)
    os._exit(0)  # ranks may see the end in different steps


main()
