"""Format the failure report: one block of text, the cause first."""

from __future__ import annotations

from elastic_launch.core.agent.messages import Finish
from elastic_launch.core.progress import goodput
from elastic_launch.errors import RULE, report_head


def format_report(name: str, finish: Finish, max_restarts: int, log_dir: str | None) -> str:
    """Return the report of a failed job.

    Args:
        name: what the workers ran.
        finish: how the job ended, with at least one failure.
        max_restarts: how many restarts were allowed.
        log_dir: the directory of the job's files; None if there are no files.
    """
    lines = [RULE, *report_head(name, [(failure.rank, failure) for failure in finish.failures])]
    why = f"; {finish.why}" if finish.why else ""
    lines += ["-" * len(RULE), f"restarts  : {finish.restarts} of {max_restarts} used{why}"]
    if progress := goodput.summary(finish.goodput):
        lines += [f"progress  : {progress}"]
    if log_dir:
        lines += [f"logs      : {log_dir}"]
    return "\n".join([*lines, RULE])
