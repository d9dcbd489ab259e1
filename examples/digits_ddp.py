"""Train a small network on handwritten digits in several processes, and survive the loss of one of them.

    elastic-run --standalone --nproc-per-node 2 --max-restarts 1 examples/digits_ddp.py --kill-rank 1 --kill-epoch 5

Each worker trains on its own share of the images, and DistributedDataParallel averages their gradients. Rank 0 writes
a checkpoint after each epoch. When a worker dies, the launcher stops the others and restarts all of them. They resume
from the checkpoint. To demonstrate this, the command above makes rank 1 kill itself in the fifth epoch.

Needs torch and scikit-learn, no GPU.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler


def main() -> None:
    args = parse_arguments()

    # No arguments needed: the launcher's environment variables say which rank this is, and where the others are.
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)

    train_set, held_out = load_data()
    sampler: DistributedSampler[int] = DistributedSampler(train_set, seed=0)  # a different share for each rank
    batches = DataLoader(train_set, batch_size=32, sampler=sampler)

    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)

    # All ranks look for the checkpoint before DistributedDataParallel synchronizes them. Rank 0 writes its first one
    # after that. So either all ranks find it, or none does.
    first_epoch = load_checkpoint(args.path, network, optimizer)
    model = DistributedDataParallel(network)
    if rank == 0:
        start = "start" if first_epoch == 1 else f"resumed from epoch {first_epoch}"
        print(f"{start}: {world_size} ranks, {len(train_set)} images", flush=True)

    for epoch in range(first_epoch, args.epochs + 1):
        sampler.set_epoch(epoch)  # a new order in each epoch, the same one when the epoch is repeated after a restart
        loss_sum = 0.0
        for step, (images, labels) in enumerate(batches):
            if epoch == args.kill_epoch and step == len(batches) // 2:
                die_if_chosen(rank, args.kill_rank)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss_sum += loss.item()

        if rank == 0:
            save_checkpoint(args.path, network, optimizer, next_epoch=epoch + 1)
            print(f"epoch {epoch:2}: loss {loss_sum / len(batches):.4f} on rank 0's share", flush=True)

    # The network is now the same on all ranks, so one of them can evaluate it.
    if rank == 0:
        correct = count_correct(network, held_out)
        print(f"accuracy on {len(held_out)} held-out images: {100 * correct / len(held_out):.1f} %", flush=True)
        if args.checkpoint is None:
            args.path.unlink(missing_ok=True)
    dist.destroy_process_group()
    # With torch 2.13 and gloo, a thread of the process group can outlive it, and occasionally aborts the process while
    # Python shuts down. So skip the shutdown.
    os._exit(0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Distributed training on scikit-learn's digits.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoint", type=Path, help="kept at the end; with several nodes, on a shared file system")
    parser.add_argument("--kill-rank", type=int, help="for the demonstration: the rank that kills itself")
    parser.add_argument("--kill-epoch", type=int, help="the epoch, from 1, in the middle of which it does")
    args = parser.parse_args()

    # The run id stays the same after a restart. With --standalone, each job has its own.
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    args.path = args.checkpoint or Path(tempfile.gettempdir()) / f"digits_ddp_{run_id}.pt"
    return args


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """Return the images for training and those held out. The split is the same on every rank."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16.0, labels, test_size=0.2, random_state=0, stratify=labels)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
    train_y, test_y = (torch.tensor(part) for part in split[2:])
    return TensorDataset(train_x, train_y), TensorDataset(test_x, test_y)


def save_checkpoint(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, next_epoch: int) -> None:
    beside = path.with_name(path.name + ".new")
    torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": next_epoch}, beside)
    os.replace(beside, path)  # atomic: whenever a worker dies, the old or the new checkpoint is complete


def load_checkpoint(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the epoch to begin with: 1 if there is no checkpoint."""
    if not path.exists():
        return 1
    checkpoint = torch.load(path)
    network.load_state_dict(checkpoint["network"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return int(checkpoint["epoch"])


def count_correct(network: nn.Module, held_out: TensorDataset) -> int:
    images, labels = held_out.tensors
    with torch.no_grad():
        return int((network(images).argmax(dim=1) == labels).sum())


def die_if_chosen(rank: int, chosen: int | None) -> None:
    """Kill this worker if it is the chosen rank, but not after a restart."""
    if rank == chosen and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        print(f"rank {rank} kills itself", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
