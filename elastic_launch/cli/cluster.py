"""What a batch system tells its processes about a job, as values of options: ``--cluster slurm``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from elastic_launch.errors import UsageError
from elastic_launch.parsing import is_number

if TYPE_CHECKING:
    from elastic_launch.cli.options import Option

Values = dict[str, tuple[str, str]]
"""The text of an option and the variable that it comes from, by the option's attribute name."""

ENDPOINT = ("rdzv_endpoint", "master_addr", "master_port")
"""Options that say where the nodes meet. If one is given, the batch system is not asked."""
_MEETS_AT_A_NODE = ("c10d", "static")
"""Backends whose endpoint is one of the nodes."""
_FIRST_PORT, _PORTS = 20000, 10000


def fill(
    args: argparse.Namespace, given: dict[str, str], environ: Mapping[str, str], options: Sequence[Option]
) -> None:
    """Set the options that neither the user nor a file has given to what the batch system says.

    Args:
        args: the parsed command line, whose ``cluster`` names the batch system.
        given: where each value that is not a default comes from; receives the variables that are used.
        environ: the variables.
        options: all options.

    Raises:
        UsageError: this process is not where an agent of such a job should be.
    """
    if args.standalone:
        return
    values = CLUSTERS[args.cluster](environ)
    if given.keys() & set(ENDPOINT) or ("rdzv_backend" in given and args.rdzv_backend not in _MEETS_AT_A_NODE):
        del values["rdzv_endpoint"], values["rdzv_backend"]
    read = {option.dest: option.read for option in options}
    for name, (text, source) in values.items():
        if name not in given:
            try:
                setattr(args, name, read[name](text))
            except UsageError as error:
                raise UsageError(f"--cluster={args.cluster}: {source}={error}") from error
            given[name] = source


def slurm(environ: Mapping[str, str]) -> Values:
    """Return what Slurm says about this node's part of a job step.

    >>> values = slurm({"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node-7"})
    >>> values["nnodes"], values["rdzv_id"], values["rdzv_endpoint"]
    (('1', 'SLURM_JOB_NUM_NODES'), ('4711', 'SLURM_JOB_ID'), ('node-7:27688', 'SLURM_JOB_NODELIST'))

    Raises:
        UsageError: a variable is missing, or the job is one that needs more than these variables.
    """
    job, _ = _variable(environ, "SLURM_JOB_ID")
    nodes, nodes_source = _variable(environ, "SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES")
    hosts, hosts_source = _variable(environ, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
    step = environ.get("SLURM_STEP_ID", "")
    tasks = environ.get("SLURM_STEP_NUM_TASKS", nodes)
    if "SLURM_HET_SIZE" in environ:
        raise UsageError(
            "--cluster=slurm: this is a heterogeneous job, whose components have node lists of their own; "
            "pass --nnodes, --rdzv-backend, --rdzv-endpoint and --rdzv-id"
        )
    if not step and nodes != "1":
        raise UsageError(
            f"--cluster=slurm: job {job} has {nodes} nodes, and this is not a job step, which would have a launcher on "
            "each: start it with srun --ntasks-per-node=1, or pass --standalone for this node alone"
        )
    if tasks != nodes:
        raise UsageError(
            f"--cluster=slurm: step {job}.{step} starts {tasks} launchers on {nodes} nodes: pass srun "
            f"--ntasks={nodes} --ntasks-per-node=1; the launcher starts the workers (--nproc-per-node)"
        )
    rank = environ.get("SLURM_NODEID", "0")
    numbers = {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step or "0", "SLURM_NODEID": rank, nodes_source: nodes}
    for name, value in numbers.items():
        if not is_number(value):
            raise UsageError(f"--cluster=slurm: {name}={value!r}: must be a number")
    port = _FIRST_PORT + (8 * int(job) + int(step or 0)) % _PORTS
    return {
        "nnodes": (nodes, nodes_source),
        "node_rank": (rank, "SLURM_NODEID"),
        "rdzv_backend": ("c10d", "--cluster"),
        "rdzv_endpoint": (f"{first_host(hosts)}:{port}", hosts_source),
        "rdzv_id": (f"{job}.{step}" if step else job, "SLURM_JOB_ID"),
    }


def first_host(hosts: str) -> str:
    """Return the first host of a list in Slurm's notation.

    >>> first_host("n[01-03,07],login"), first_host("rack[2-3]n[08,11]-ib"), first_host("a,b")
    ('n01', 'rack2n08-ib', 'a')
    """
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", hosts).split(",", 1)[0]


def _variable(environ: Mapping[str, str], *names: str) -> tuple[str, str]:
    """Return the value of the first of these variables that is set, and its name."""
    for name in names:
        if environ.get(name):
            return environ[name], name
    raise UsageError(f"--cluster=slurm: {names[-1]} is not set: this process is not part of a Slurm job")


CLUSTERS = {"slurm": slurm}
"""The batch systems, by the value of ``--cluster``."""
