"""Build the environment variables from which a worker learns its rank and its peers."""

from __future__ import annotations

from collections.abc import Mapping

from elastic_launch.job import Assignment
from elastic_launch.worker_spec import WorkerSpec


def worker_environment(
    spec: WorkerSpec, assignment: Assignment, local_rank: int, *, run_id: str, inherited: Mapping[str, str]
) -> dict[str, str]:
    """Return the variables that a worker gets in addition to those it inherits, with torch's names and meanings."""
    return {
        "RANK": str(assignment.rank(local_rank)),
        "LOCAL_RANK": str(local_rank),
        "GROUP_RANK": str(assignment.group_rank),
        "ROLE_RANK": str(assignment.base_role_rank + local_rank),
        "ROLE_NAME": spec.role,
        "WORLD_SIZE": str(assignment.world_size),
        "LOCAL_WORLD_SIZE": str(assignment.local_world_size),
        "GROUP_WORLD_SIZE": str(assignment.group_world_size),
        "ROLE_WORLD_SIZE": str(assignment.role_world_size),
        "MASTER_ADDR": spec.master_addr or assignment.master_addr,
        "MASTER_PORT": str(spec.master_port or assignment.master_port),
        "TORCHELASTIC_RESTART_COUNT": str(assignment.restart_count),
        "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_USE_AGENT_STORE": str(assignment.agent_store and not spec.master_port),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": inherited.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
    }
