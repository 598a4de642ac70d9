"""Plots of a demo as inline SVG that takes its colours and fonts from the page's style sheet."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from deploy.demo.result import ConfusionMatrix, DemoResult, PhaseSpan

# Matplotlib knows no style sheet: each role is drawn in a colour that nothing else has, and every
# occurrence of that colour becomes a CSS variable. So one SVG serves light and dark.
_PHASE_ROLES: Final = tuple(f"phase-{index}" for index in range(6))
_ROLES: Final = (
    *("text", "muted", "grid", "card", "on-strong", "federated", "local", "central", "dropout"),
    *_PHASE_ROLES,
)
_COLOURS: Final = {role: f"#0100{index:02x}" for index, role in enumerate(_ROLES, start=1)}
_PHASES: Final = ("AdvertiseKeys", "ShareKeys", "MaskedInput", "ConsistencyCheck", "Unmasking")

_STYLE: Final = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be read aloud
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _COLOURS["grid"],
    "axes.labelcolor": _COLOURS["muted"],
    "text.color": _COLOURS["text"],
    "xtick.color": _COLOURS["muted"],
    "ytick.color": _COLOURS["muted"],
    "grid.color": _COLOURS["grid"],
    "legend.frameon": False,
}

Width = Literal["wide", "narrow"]


@dataclass(frozen=True)
class Plot:
    """One plot in two shapes; the style sheet shows the one that fits the screen."""

    wide: str
    narrow: str
    description: str


def accuracy_plot(result: DemoResult) -> Plot:
    """Accuracy on the held-out people after each round, with the two baselines as lines."""
    baselines = {
        role: (value, name)
        for role, value, name in (
            ("local", result.local_accuracy, "one device alone"),
            ("central", result.central_accuracy, "all data pooled"),
        )
        if value is not None
    }
    description = (
        f"Accuracy on held-out people over {result.rounds} rounds: federated from "
        f"{result.accuracy_per_round[0]:.0%} to {result.accuracy_per_round[-1]:.0%}"
        + "".join(f"; {name} {value:.0%}" for value, name in baselines.values())
        + "."
    )

    def draw(width: Width) -> Figure:
        figure, axes = _figure(width, 3.6, 3.3)
        # Labels stand right of the last round, so the lines need that room inside the axes.
        room = 0.2 if width == "wide" else 0.42
        rounds = range(result.rounds + 1)
        ends = baselines | {"federated": (result.accuracy_per_round[-1], "federated")}
        for role, (value, _) in baselines.items():
            axes.hlines(value, 0, result.rounds, color=_COLOURS[role], linewidth=1.6, linestyle=(0, (5, 3)))
        axes.plot(
            rounds,
            result.accuracy_per_round,
            color=_COLOURS["federated"],
            linewidth=2.4,
            marker="o",
            markersize=4 if result.rounds <= 40 else 0,
            solid_capstyle="round",
        )
        seen = (*result.accuracy_per_round, *(value for value, _ in baselines.values()))
        axes.set_ylim(max(0.0, min(seen) - 0.08), min(1.02, max(seen) + 0.08))
        axes.set_xlim(-0.02 * result.rounds, result.rounds * (1 + room))
        positions = _spread(
            [value for value, _ in ends.values()], 0.065 * (axes.get_ylim()[1] - axes.get_ylim()[0])
        )
        for (role, (value, name)), position in zip(ends.items(), positions, strict=True):
            text = f"{value:.0%} {name}" if width == "wide" else f"{value:.0%}\u2009{name.split()[-1]}"
            axes.annotate(
                text,
                (result.rounds * 1.015, position),
                color=_COLOURS[role],
                va="center",
                fontweight="bold",
                annotation_clip=False,
            )
        axes.yaxis.set_major_formatter(lambda value, position: f"{value:.0%}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= result.rounds])
        axes.set_xlabel("round")
        axes.grid(axis="y", linewidth=0.7)
        axes.set_axisbelow(True)
        return figure

    return _render("accuracy", draw, description)


def confusion_plot(confusion: ConfusionMatrix) -> Plot:
    """What the federated model answered for each class, as shares of the true class."""
    size = len(confusion.labels)
    shares = [[count / max(1, sum(row)) for count in row] for row in confusion.counts]
    recall = ", ".join(f"{name} {shares[index][index]:.0%}" for index, name in enumerate(confusion.labels))

    def draw(width: Width) -> Figure:
        figure, axes = _figure(width, 4.6, 4.3)
        for row in range(size):
            for column in range(size):
                share = shares[row][column]
                role = "federated" if row == column else "local"
                axes.add_patch(
                    Rectangle(
                        (column - 0.47, row - 0.47),
                        0.94,
                        0.94,
                        color=_COLOURS["grid"],
                        alpha=0.35,
                        linewidth=0,
                    )
                )
                axes.add_patch(
                    Rectangle(
                        (column - 0.47, row - 0.47),
                        0.94,
                        0.94,
                        color=_COLOURS[role],
                        alpha=_shade(share),
                        linewidth=0,
                    )
                )
                if share >= 0.005:
                    axes.text(
                        column,
                        row,
                        f"{share * 100:.0f}",
                        ha="center",
                        va="center",
                        color=_COLOURS["on-strong" if share > 0.5 else "text"],
                        fontsize=9 if size <= 7 or width == "wide" else 7.5,
                    )
        axes.set_xlim(-0.5, size - 0.5)
        axes.set_ylim(size - 0.5, -0.5)
        labels = [label.replace(" ", "\n", 1) for label in confusion.labels]
        if width == "narrow" and max(map(len, labels)) > 5:
            axes.set_xticks(range(size), confusion.labels, rotation=50, ha="right", rotation_mode="anchor")
        else:
            axes.set_xticks(range(size), labels)
        axes.set_yticks(range(size), labels)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("answer of the model")
        axes.set_ylabel("what the person did" if not confusion.labels[0].isdigit() else "what was written")
        return figure

    return _render("confusion", draw, f"Share of each class recognised: {recall}.")


def timeline_plot(result: DemoResult) -> Plot:
    """One row a round: its phases, and where devices dropped out and came back."""
    by_round: dict[int, list[PhaseSpan]] = {}
    for span in result.timeline:
        by_round.setdefault(span.round, []).append(span)
    began = {number: min(span.start for span in spans) for number, spans in by_round.items()}
    phases = [phase for phase in _PHASES if any(span.phase == phase for span in result.timeline)]
    phases += sorted({span.phase for span in result.timeline} - set(_PHASES))
    colours = {phase: _COLOURS[_PHASE_ROLES[min(index, 5)]] for index, phase in enumerate(phases)}

    def draw(width: Width) -> Figure:
        height = min(12.0, 1.1 + (0.24 if width == "wide" else 0.22) * max(3, len(by_round)))
        legend_columns = len(phases) + 2 if width == "wide" else 2
        figure, axes = _figure(width, height + 0.3, height + 0.2 * (len(phases) + 3) // 2)
        for number, spans in by_round.items():
            for span in spans:
                axes.barh(
                    number,
                    span.end - span.start,
                    left=span.start - began[number],
                    height=0.72,
                    color=colours[span.phase],
                    linewidth=0,
                )
        longest = max(
            (max(span.end for span in spans) - began[number] for number, spans in by_round.items()),
            default=1.0,
        )
        for dropout in result.dropouts:
            if dropout.round in began:
                axes.plot(
                    dropout.at - began[dropout.round],
                    dropout.round,
                    marker="X",
                    color=_COLOURS["dropout"],
                    markeredgecolor=_COLOURS["card"],
                    markersize=9,
                    linestyle="none",
                    zorder=4,
                )
            if dropout.returned_round in began:
                axes.plot(
                    -0.02 * longest,
                    dropout.returned_round,
                    marker="<",
                    color=_COLOURS["text"],
                    markersize=5,
                    linestyle="none",
                    clip_on=False,
                    zorder=4,
                )
        for phase in phases:
            axes.barh(0, 0, color=colours[phase], label=phase)
        axes.plot(
            [], [], marker="X", color=_COLOURS["dropout"], markersize=8, linestyle="none", label="killed"
        )
        axes.plot(
            [], [], marker="<", color=_COLOURS["text"], markersize=5, linestyle="none", label="back again"
        )
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=legend_columns,
            handlelength=0.9,
            handletextpad=0.5,
            columnspacing=1.1,
            borderaxespad=0.3,
        )
        axes.set_ylim(max(by_round, default=1) + 0.6, min(by_round, default=1) - 0.6)
        axes.set_xlim(-0.045 * longest, longest * 1.02)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("seconds into the round")
        axes.set_ylabel("round")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", linewidth=0.7)
        axes.set_axisbelow(True)
        return figure

    dropped = "; ".join(f"{item.device} in round {item.round}, {item.phase}" for item in result.dropouts)
    return _render("timeline", draw, f"Phases of {len(by_round)} rounds. Killed: {dropped or 'none'}.")


def _figure(width: Width, wide_height: float, narrow_height: float) -> tuple[Figure, Axes]:
    size = (8.6, wide_height) if width == "wide" else (4.2, narrow_height)
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def _shade(share: float) -> float:
    """Opacity of a cell; a gap at one half keeps every shade readable under either text colour."""
    return 0.7 * share if share <= 0.5 else 0.85 + 0.15 * share


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """Moves label positions apart until each two are `gap` from one another, in place of overlap."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    positions = list(values)
    for below, above in itertools.pairwise(order):
        positions[above] = max(positions[above], positions[below] + gap)
    return positions


def _render(name: str, draw: Callable[[Width], Figure], description: str) -> Plot:
    with mpl.rc_context(_STYLE):
        return Plot(
            wide=_svg(draw("wide"), f"{name}-wide"),
            narrow=_svg(draw("narrow"), f"{name}-narrow"),
            description=description,
        )


def _svg(figure: Figure, prefix: str) -> str:
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # The size comes from the page; the view box keeps the proportions.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # Several figures share one document, so their ids must differ.
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{prefix}-\1"', text)
    for role, colour in _COLOURS.items():
        text = text.replace(colour, f"var(--{role})")
    return text
