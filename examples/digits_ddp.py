"""Train a small network on handwritten digits on several processes, and survive the loss of one of them.

    elastic-run --standalone --nproc-per-node 2 --max-restarts 1 examples/digits_ddp.py --kill-rank 1 --kill-epoch 5

Every worker trains on its own share of the images, and DistributedDataParallel averages their gradients. Rank 0 writes
a checkpoint after each epoch. When a worker dies, the launcher stops the others and starts all of them again; they find
the checkpoint and go on from there. The line above makes rank 1 kill itself in its fifth epoch, to show just that.

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

    # The launcher's environment variables say who we are and where the others are; no argument is needed here.
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)

    train_set, held_out = load_data()
    sampler: DistributedSampler[int] = DistributedSampler(train_set, seed=0)  # a distinct share for each rank
    batches = DataLoader(train_set, batch_size=32, sampler=sampler)

    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)

    # All ranks look for the checkpoint before DistributedDataParallel makes them meet, and rank 0 writes its first one
    # after that: so either all of them find it, or none does.
    first_epoch = load_checkpoint(args.path, network, optimizer)
    model = DistributedDataParallel(network)
    if rank == 0:
        start = "start" if first_epoch == 1 else f"resumed from epoch {first_epoch}"
        print(f"{start}: {world_size} ranks, {len(train_set)} images", flush=True)

    for epoch in range(first_epoch, args.epochs + 1):
        sampler.set_epoch(epoch)  # another order in each epoch, and the same again when it is repeated after a restart
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

    # The network is the same on all ranks by now, so one of them can judge it.
    if rank == 0:
        correct = count_correct(network, held_out)
        print(f"accuracy on {len(held_out)} held-out images: {100 * correct / len(held_out):.1f} %", flush=True)
        if args.checkpoint is None:
            args.path.unlink(missing_ok=True)
    dist.destroy_process_group()
    # With torch 2.13 and gloo, a thread of the process group can outlive it, and now and then aborts the process while
    # Python shuts down. So this one ends without that.
    os._exit(0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Distributed training on scikit-learn's digits.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoint", type=Path, help="kept at the end; on several nodes, on a shared file system")
    parser.add_argument("--kill-rank", type=int, help="for the demonstration: this rank kills itself,")
    parser.add_argument("--kill-epoch", type=int, help="in the middle of this epoch (the first one is 1)")
    args = parser.parse_args()

    # The run's id is the same after a restart and, with --standalone, another one for the next job.
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    args.path = args.checkpoint or Path(tempfile.gettempdir()) / f"digits_ddp_{run_id}.pt"
    return args


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """The images to train with and those held out; the split is the same on every rank."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16.0, labels, test_size=0.2, random_state=0, stratify=labels)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
    train_y, test_y = (torch.tensor(part) for part in split[2:])
    return TensorDataset(train_x, train_y), TensorDataset(test_x, test_y)


def save_checkpoint(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, next_epoch: int) -> None:
    beside = path.with_name(path.name + ".new")
    torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": next_epoch}, beside)
    os.replace(beside, path)  # in one step: a death at any moment leaves a whole checkpoint, the old one or the new


def load_checkpoint(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The epoch to begin with: 1 if there is no checkpoint."""
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
    """Once only: the workers that are started after this death live."""
    if rank == chosen and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        print(f"rank {rank} kills itself", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
