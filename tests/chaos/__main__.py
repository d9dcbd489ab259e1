"""Run jobs on three hosts, strike them with faults, and check what follows. Needs root; see ``--help``."""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from tests.chaos.faults import BACKENDS, BLINK, FAULTS, Fault, Outcome, expected
from tests.chaos.job import DEADLINE, ChaosJob, ViolationError, now
from tests.support.hosts import Host

PER_JOB = 20
"""Number of faults in one job."""
START = 90.0
"""Seconds in which a job must train on all hosts."""
REMAKE = 30.0
"""Seconds in which it must do so again after a fault is over, with a store that was lost."""


class Result(NamedTuple):
    """What followed a fault."""

    kind: str
    outcome: str
    seconds: float | None
    """From the fault to the first step of the next round; with a lost store, from its return."""
    lost: int
    """Number of steps that were done again."""


def strike(job: ChaosJob, kind: str, host: Host, slack: float) -> Result:
    """Strike a job, and check what follows.

    Raises:
        ViolationError: It is not what the table says.
    """
    fault, outcome = FAULTS[kind], expected(FAULTS[kind], job.backend, host)
    job.look()
    before, used = job.round, job.restarts()
    at = now()
    fault.strike(job, host)
    if outcome in (Outcome.WITHOUT, Outcome.RESTART):
        bound = DEADLINE + 2 if outcome is Outcome.WITHOUT else 2
        job.wait(lambda: job.round > before, at + bound + slack, f"a round after {kind}")
    job.wait(lambda: now() >= at + fault.lasts, at + fault.lasts + slack, "the fault's end")
    fault.heal(job, host)
    healed = now()
    since = healed
    job.wait(lambda: job.trains(since), healed + REMAKE + slack, "all hosts train again")
    if outcome is Outcome.NOTHING and job.round != before:
        raise ViolationError("a new round, where the old one should go on")
    charged = job.restarts() - used
    if charged != (outcome is Outcome.RESTART):
        raise ViolationError(f"{charged} restarts were used up")
    words = fault.words.replace("HOST", host.name)
    if words and job.round != before and not re.search(words, job.said()):
        raise ViolationError(f"no agent names {host.name} and the reason ({words})")
    first = job.first_step_after(before)
    seconds = first.time - (healed if outcome is Outcome.STORE else at) if first else None
    return Result(kind, outcome.name.lower() if outcome else "", seconds, job.lost_steps(before) if first else 0)


def strike_twice(job: ChaosJob, kinds: list[str], hosts: list[Host], slack: float) -> Result:
    """Strike a job with two faults at once. All hosts must train again when both are over."""
    job.look()
    before, used, at = job.round, job.restarts(), now()
    faults: list[Fault] = [FAULTS[kind] for kind in kinds]
    for fault, host in zip(faults, hosts, strict=True):
        fault.strike(job, host)
    lasts = max(fault.lasts for fault in faults)
    job.wait(lambda: now() >= at + lasts, at + lasts + slack, "the faults' end")
    for fault, host in zip(faults, hosts, strict=True):
        fault.heal(job, host)
    healed = now()
    job.wait(lambda: job.trains(healed), healed + REMAKE + DEADLINE + slack, "all hosts train again")
    charged, may_be = job.restarts() - used, sum(Outcome.RESTART in fault.outcomes.values() for fault in faults)
    if charged > may_be:
        raise ViolationError(f"{charged} restarts were used up")
    first = job.first_step_after(before)
    return Result("two at once", "", first.time - at if first else None, job.lost_steps(before) if first else 0)


class Chaos:
    """Runs job after job until it has had enough."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self._options = options
        self._chance = random.Random(seed)
        self._end = time.monotonic() + 60 * (options.minutes or 1e6)
        self._left = options.faults or 10**9
        self.results: list[Result] = []

    @property
    def has_enough(self) -> bool:
        return self._left <= 0 or time.monotonic() > self._end

    def run_job(self, backend: str, path: Path) -> None:
        """Run one job, and strike it some times.

        Raises:
            ViolationError: Something is not as documented.
        """
        chance, slack = self._chance, self._options.slack
        job = ChaosJob(path, backend, chance, gloo=self._options.gloo)
        try:
            for kind, why in job.missing.items():
                print(f"{backend}: no faults of the kind {kind!r}: {why}", flush=True)
            job.wait(lambda: job.trains(0), now() + START + slack, "the job trains on all hosts")
            for _ in range(PER_JOB):
                if self.has_enough:
                    break
                self._left -= 1
                hosts = chance.sample(job.members, 2)
                kinds = [kind for kind, fault in FAULTS.items() if expected(fault, backend, hosts[0])]
                kinds = [kind for kind in kinds if kind not in job.missing]
                kind = chance.choice(self._options.kind or [*kinds, "two at once"])
                if kind == "two at once":
                    harsh = [name for name in kinds if FAULTS[name].lasts != BLINK and not name.startswith("link")]
                    both = chance.sample(harsh, 2)
                    print(f"{backend}: {both[0]} on {hosts[0].name}, {both[1]} on {hosts[1].name}", end="", flush=True)
                    result = strike_twice(job, both, hosts, slack)
                else:
                    print(f"{backend}: {kind} on {hosts[0].name}", end="", flush=True)
                    result = strike(job, kind, hosts[0], slack)
                self.results.append(result)
                took = "" if result.seconds is None else f", {result.seconds:.1f} s, {result.lost} steps lost"
                print(f": {result.outcome or 'recovered'}{took}", flush=True)
                # The next fault comes after a while in which all train.
                calm = now() + chance.uniform(1, 3)
                job.wait(lambda calm=calm: job.trains(calm), calm + START + slack, "all hosts train on")  # type: ignore[misc]
                job.wait(job.has_all_members, calm + START + slack, "all members of etcd serve")
            job.finish()
            print(f"{backend}: the job has ended well", flush=True)
        finally:
            job.close()


def table(results: list[Result]) -> str:
    """Return what happened, by kind of fault."""
    by_kind: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_kind[result.kind].append(result)
    lines = [f"{'fault':<28} {'times':>5}  {'median s':>8}  {'99 % s':>7}  {'steps lost':>10}"]
    for kind, some in sorted(by_kind.items()):
        times = sorted(result.seconds for result in some if result.seconds is not None)
        lost = [result.lost for result in some]
        middle = f"{statistics.median(times):.1f}" if times else "-"
        high = f"{times[min(len(times) - 1, int(0.99 * len(times)))]:.1f}" if times else "-"
        lines.append(f"{kind:<28} {len(some):>5}  {middle:>8}  {high:>7}  {statistics.mean(lost):>10.1f}")
    outcomes = Counter(result.outcome or "recovered" for result in results)
    summary = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
    return "\n".join([*lines, f"{len(results)} faults, all as documented: {summary}"])


def main() -> int:
    """Return the exit status: 1 at the first violation, whose files are kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, help="how long to go on; the job that runs then is ended")
    parser.add_argument("--faults", type=int, help="how many faults, instead")
    parser.add_argument("--seed", type=int, help="what is drawn is drawn from it; printed at the start")
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="only this one; may be repeated")
    parser.add_argument("--kind", action="append", choices=FAULTS, help="only this kind of fault; may be repeated")
    parser.add_argument("--gloo", action="store_true", help="have the workers exchange tensors with torch")
    parser.add_argument("--slack", type=float, default=15, help="seconds by which a busy machine may be late")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**9) if options.seed is None else options.seed
    backends = options.backend or list(BACKENDS)
    print(f"seed {seed}, {', '.join(backends)}{', gloo' if options.gloo else ''}", flush=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    chaos = Chaos(options, seed)
    number = 0
    while not chaos.has_enough:
        path = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
        try:
            chaos.run_job(backends[number % len(backends)], path)
        except ViolationError as error:
            print(f"\nVIOLATION: {error}\nseed {seed}; the job's files are in {path}", flush=True)
            for output in sorted(path.glob("host-[123].output.*")):
                print(f"--- {output.name}", *output.read_text(errors="replace").splitlines()[-12:], sep="\n")
            print(table(chaos.results).rsplit("\n", 1)[0])
            return 1
        shutil.rmtree(path)
        number += 1
    print(table(chaos.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
