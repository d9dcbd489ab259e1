"""What a node and its rendezvous exchange about a stall, and what the watch of a node's progress asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # few jobs hang, and these modules take time
    from elastic_launch.core.progress.stack_groups import NodeStacks
    from elastic_launch.core.progress.verdict import Verdict


# A stall has a number in its round, from 1. What somebody asked for has a negative one: -1, -2, ...

# From the node to its rendezvous.


class RequestStacks(NamedTuple):
    """Action: have all nodes take their stacks, whatever their workers do."""


class ClaimStall(NamedTuple):
    """Action: tell the other nodes that no worker of this node makes progress."""


class WithdrawClaim(NamedTuple):
    """Action: tell them that one does."""


class ReportStacks(NamedTuple):
    """Action: send this node's stacks to the node that judges them."""

    number: int
    """Number of the stall in the round."""
    stacks: NodeStacks


class ReportVerdict(NamedTuple):
    """Action: tell all nodes what the stacks say."""

    number: int
    verdict: Verdict
    blamed: int
    """The rank whose failure it is if the hang counts as one: the likeliest of those that have answered."""
    text: str
    """The merged stacks, for the failure report."""


# From the rendezvous to the node.


class StacksWanted(NamedTuple):
    """Somebody has asked for the stacks of all nodes: take this node's."""

    number: int


class AllStalled(NamedTuple):
    """No worker of any node makes progress: take the stacks."""

    number: int


class StacksArrived(NamedTuple):
    """On the node that judges: the stacks of one node."""

    number: int
    stacks: NodeStacks


class StacksComplete(NamedTuple):
    """On the node that judges: no more stacks will come."""

    number: int
    missing: tuple[str, ...] = ()
    """Hosts of the nodes that did not send any in time."""


class Judged(NamedTuple):
    """The verdict is known."""

    number: int
    verdict: Verdict
    blamed: int
    text: str


ProgressRequest = RequestStacks | ClaimStall | WithdrawClaim | ReportStacks | ReportVerdict
ProgressEvent = StacksWanted | AllStalled | StacksArrived | StacksComplete | Judged

# From the watch to the one who carries it out.


class TakeStacks(NamedTuple):
    """Action: have the workers write their stacks. ``StacksTaken`` is the answer to the final request."""

    final: bool


class ReportHang(NamedTuple):
    """Action: treat the stall as a failure of this node's worker."""

    local_rank: int
    verdict: Verdict
    text: str
