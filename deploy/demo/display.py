"""What the demo shows in the terminal while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_BARS = "▁▂▃▄▅▆▇█"
_MARKS = {
    "training": ("●", "green"),
    "online": ("○", "cyan"),
    "killed": ("✗", "bold red"),
    "starting": ("·", "dim"),
}


@dataclass(slots=True)
class Scene:
    """What is to be seen at one moment; the demo changes it, the display draws it.

    Attributes:
        headline: what goes on.
        rounds: how many there will be.
        round: number of the running one, 0 before the first.
        phase: of the running round.
        answered: devices that answered in it.
        expected: devices that owe an answer in it.
        accuracy: on the held-out people, version by version.
        devices: device -> one of `training`, `online`, `killed`, `starting`.
        events: what happened, newest last.
    """

    headline: str = "starting"
    rounds: int = 0
    round: int = 0
    phase: str = ""
    answered: int = 0
    expected: int = 0
    accuracy: list[float] = field(default_factory=list)
    devices: dict[str, str] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)

    def __rich__(self) -> RenderableType:
        """Draws the scene."""
        grid = Table.grid(padding=(0, 2))
        grid.add_row(Text("federation", style="dim"), Text(self.headline, style="bold"))
        if self.rounds:
            bar = ProgressBar(total=self.rounds, completed=max(0, self.round - 1), width=30)
            line = Table.grid(padding=(0, 1))
            line.add_row(bar, f"round {self.round} of {self.rounds}")
            grid.add_row(Text("progress", style="dim"), line)
            phase = f"{self.phase}  {self.answered} of {self.expected} devices" if self.phase else "-"
            grid.add_row(Text("phase", style="dim"), phase)
        if self.devices:
            marks = Text()
            for state in self.devices.values():
                mark, style = _MARKS[state]
                marks.append(mark + " ", style=style)
            grid.add_row(Text("devices", style="dim"), marks)
        if self.accuracy:
            curve = "".join(_BARS[min(len(_BARS) - 1, int(value * len(_BARS)))] for value in self.accuracy)
            grid.add_row(
                Text("accuracy", style="dim"),
                Text.assemble((curve, "green"), f"  {self.accuracy[-1]:.1%} on held-out people"),
            )
        rows: list[RenderableType] = [grid]
        rows += [Text(f"  {event}", style="dim") for event in self.events[-4:]]
        return Group(*rows)


@contextmanager
def shown(scene: Scene, console: Console) -> Iterator[None]:
    """Keeps `scene` on the terminal; without one, events are all that is printed."""
    if not console.is_terminal:
        yield
        return
    with Live(scene, console=console, refresh_per_second=8, transient=True):
        yield
