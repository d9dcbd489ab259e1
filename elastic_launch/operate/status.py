"""``elastic-job status``: one job, all its nodes, once or again and again."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from elastic_launch.core import job_view
from elastic_launch.env import TOKEN_FILE, environment
from elastic_launch.errors import RendezvousError, UsageError
from elastic_launch.operate.jobs import Job, NoJobError, choose, parser, running_jobs
from elastic_launch.operate.show import screen
from elastic_launch.operate.store_reader import StoreReader
from elastic_launch.parsing import parse_rdzv_conf


class View:
    """Where the view of a job comes from: the agents on this host, and the store if the job has several nodes.

    ``job`` is the job as its agents here know it; None: only the store tells of it.
    """

    def __init__(self, job: Job | None, reader: StoreReader | None) -> None:
        self.job = job
        self._reader = reader

    def look(self, statuses: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Any]:
        """Return the view as it is now; ``statuses`` are newer ones of the agents.

        Raises:
            NoJobError: no job with this id has met at the store.
            RendezvousError: the store cannot be read, and no agent is here.
        """
        statuses = list(statuses if statuses is not None else self.job.agents if self.job else [])
        if self._reader:
            try:
                if records := self._reader.read():
                    return job_view.of_store(self._reader.run_id, records, statuses)
            except RendezvousError:
                if not statuses:
                    raise
        if not statuses:
            raise NoJobError(f"{self._reader.run_id if self._reader else ''}: no such job at this store")
        return job_view.of_agents(statuses[0]["job"], statuses)

    def close(self) -> None:
        """Disconnect from the store."""
        if self._reader:
            self._reader.close()


def main(argv: Sequence[str]) -> int:
    """Show the job. Return the exit status."""
    options = parser("status", "show a job: its nodes, ranks, restarts, and what it waits for")
    options.add_argument("--json", action="store_true", help="print one JSON object; with --watch one per line")
    options.add_argument("--watch", action="store_true", help="show it until it ends, or until Ctrl-C")
    options.add_argument(
        "--rdzv-backend", metavar="NAME", help="c10d, static or etcd: ask the job's store, from any host"
    )
    options.add_argument("--rdzv-endpoint", metavar="HOST:PORT", default="", help="where the store is")
    options.add_argument("--rdzv-id", metavar="ID", help="the job's id")
    options.add_argument("--rdzv-conf", metavar="KEY=VALUE,...", default="", help="further settings of the store")
    options.add_argument(
        "--token-file", metavar="FILE", help=f"the job's token (default: {TOKEN_FILE}, or the agent's)"
    )
    options.add_argument(
        "--store-gate",
        action="store_true",
        help="the job was started with --store-gate (known for agents on this host)",
    )
    args = options.parse_args(argv)
    environ = environment()
    with contextlib.closing(_view(args, environ)) as view:
        if args.watch:
            from elastic_launch.operate.watch import watch  # late: few need it

            return watch(view, as_json=args.json)
        seen = view.look()
        if args.json:
            print(json.dumps({"version": 1, **seen}))
        else:
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
            print("\n".join(screen(seen, time.time(), width)))
    return 0


def _view(args: Any, environ: Mapping[str, str]) -> View:
    settings = {name: str(value) for name, value in parse_rdzv_conf(args.rdzv_conf).items()}
    if args.rdzv_endpoint or args.rdzv_backend or args.rdzv_id:
        if args.job:
            raise UsageError(f"{args.job}: JOB is for jobs of this host; with --rdzv-endpoint the job is --rdzv-id")
        job = args.rdzv_id or "none"
        store = args.rdzv_backend or "c10d", args.rdzv_endpoint
        return View(None, StoreReader(job, *store, settings, environ, _token_file(args, environ), args.store_gate))
    job = choose(running_jobs(environ), args.job)
    if given := _token_file(args, environ):
        settings["token_file"] = given
    try:
        return view_of_job(job, environ, settings)
    except RendezvousError as error:
        print(f"elastic-job: only what the agents on this host know: {error}", file=sys.stderr)
        return View(job, None)


def _token_file(args: Any, environ: Mapping[str, str]) -> str:
    return args.token_file or environ.get(TOKEN_FILE, "")


def view_of_job(job: Job, environ: Mapping[str, str], settings: Mapping[str, str] | None = None) -> View:
    """Return the view of a job that has agents on this host.

    Args:
        job: the job.
        environ: variables of the bridge to etcd.
        settings: further ones of ``--rdzv-conf`` for the store, and ``token_file``.

    Raises:
        RendezvousError: the job's store cannot be reached.
    """
    store = job.agents[0]["store"]
    if not store["endpoint"] or job.agents[0].get("max_nodes") == 1:
        return View(job, None)
    given = {**store["settings"], **(settings or {})}
    token_file, has_gate = given.pop("token_file", ""), given.pop("store_gate", "") == "true"
    try:
        return View(job, StoreReader(job.id, store["backend"], store["endpoint"], given, environ, token_file, has_gate))
    except UsageError as error:  # the agents named the store, and may have a file that is gone since
        raise RendezvousError(str(error)) from error
