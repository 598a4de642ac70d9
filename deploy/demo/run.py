"""The demo itself: a private fleet on this machine, from the first model to the report.

One of two files that know both applications (the other is a simulation's), so it lives outside both cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from deploy.broker import BrokerProcess
from deploy.demo.options import DemoError, DemoOptions
from deploy.demo.processes import ProcessGroup, signals_raise
from deploy.demo.result import DemoResult


@dataclass(frozen=True, slots=True)
class Stage:
    """What every fold of a demo stands on.

    Attributes:
        processes: the children and their temporary directory.
        broker_url: where devices and aggregator connect.
        broker_name: what the report calls the broker.
    """

    processes: ProcessGroup
    broker_url: str
    broker_name: str


@contextmanager
def stage(options: DemoOptions) -> Iterator[Stage]:
    """Opens the broker and an empty process group; whatever ends the block, nothing of them stays.

    The children stop before the broker, so that they can say good-bye.
    """
    with ExitStack() as stack:
        stack.enter_context(signals_raise())
        if options.broker is None:
            broker = stack.enter_context(BrokerProcess())
            url, name = broker.url, str(broker.kind)
        else:
            url, name = options.broker, "given by address"
        yield Stage(stack.enter_context(ProcessGroup()), url, name)


def run_demo(options: DemoOptions) -> DemoResult:
    """Runs the demo and writes its report.

    Raises:
        DemoError: it cannot be done as asked, or a process failed.
    """
    raise DemoError("the aggregator and the devices are not wired to the demo yet")
