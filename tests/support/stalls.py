"""The watch of a simulated node's progress."""

from __future__ import annotations

from elastic_launch.core.agent.lifecycle import AgentPhase
from elastic_launch.core.progress.messages import (
    AllStalled,
    ClaimStall,
    ProgressEvent,
    ProgressRequest,
    ReportStacks,
    ReportVerdict,
    StacksComplete,
    StacksWanted,
)
from elastic_launch.core.progress.stack_groups import NodeStacks
from elastic_launch.core.progress.verdict import Verdict
from tests.support.simulation import Agent

VERDICT = Verdict((3,), "it loops", "train.py:4 in step", True, "lock")


class Watch:
    """Plays the watch of a node's progress: it answers what the rendezvous asks for."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.events: list[ProgressEvent] = []
        self.is_mute = False
        agent.watch = self

    def __call__(self, event: ProgressEvent) -> None:
        self.events.append(event)
        match event:
            case AllStalled(number) if not self.is_mute:
                stacks = NodeStacks(self.agent.name, 2.0, (), (), (), ())
                self.agent.world.after(0.2, lambda: self.ask(ReportStacks(number, stacks)))
            case StacksWanted(number):
                self.ask(ReportStacks(number, NodeStacks(self.agent.name, 0.5, (), (), (), ())))
            case StacksComplete(number):
                self.ask(ReportVerdict(number, VERDICT, 3, "the stacks"))

    def ask(self, request: ProgressRequest) -> None:
        """Ask the rendezvous for something, as the watch does until the round has been decided."""
        if self.agent.state.phase in (AgentPhase.RUNNING, AgentPhase.AGREEING) and not self.agent.dead:
            self.agent.ask(request)

    def claim(self) -> None:
        self.ask(ClaimStall())

    def of(self, kind: type) -> list[ProgressEvent]:
        return [event for event in self.events if isinstance(event, kind)]
