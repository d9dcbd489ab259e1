"""Sharded training (FSDP2) that resumes with any number of ranks, on GPUs or on the CPU.

    elastic-run --standalone --nproc-per-node 2 --max-restarts 3 examples/fsdp2.py --checkpoint checkpoint

Each rank holds and saves only its shard. torch.distributed.checkpoint fits the shards together again, also when there
are more or fewer ranks than before: after a node is lost, or has joined.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit a function with FSDP2.")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a directory; on several nodes a shared one")
    parser.add_argument("--kill-step", type=int, help="for the demonstration: the step at which rank 1 kills itself")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device, (world_size,))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1)).to(device)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    begin = load(args.checkpoint, model, optimizer)
    if rank == 0:
        print(f"begins at step {begin} with {world_size} ranks", flush=True)
    for step in range(begin, args.steps):
        if step == args.kill_step and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        inputs = torch.randn(64, 8, device=device)
        loss = nn.functional.mse_loss(model(inputs), inputs.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % args.save_every == 0:
            save(args.checkpoint, model, optimizer, step + 1)
    if rank == 0:
        print(f"loss {loss.item():.3f}", flush=True)
    dist.destroy_process_group()
    os._exit(0)  # as in digits_ddp.py


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Save in a directory of its own. The link that says which one is complete is set last."""
    save_shards(state_of(model, optimizer), checkpoint_id=path / f"step-{step}")
    if dist.get_rank() == 0:
        beside = path / "latest.new"
        beside.write_text(str(step))
        os.replace(beside, path / "latest")


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the latest checkpoint, if there is one. Return the step to begin with."""
    if not (path / "latest").exists():
        return 0
    step = int((path / "latest").read_text())
    state = state_of(model, optimizer)
    load_shards(state, checkpoint_id=path / f"step-{step}")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return step


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


if __name__ == "__main__":
    main()
