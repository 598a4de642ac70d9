"""The report of a demo or a simulation: one self-contained page, the same figures as JSON, and a table."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.table import Table

from deploy.demo.plots import Plot, accuracy_plot, confusion_plot, timeline_plot
from deploy.demo.result import DemoResult

_TRUST = {
    "none": "No noise was added: secure aggregation alone hides single updates, the model itself may tell.",
    "central": "Devices clip, the aggregator adds the noise to the unmasked sum: it is trusted to do so.",
    "distributed": "Every device adds its share of the noise before masking: no party ever holds a bare sum.",
    "local": "Every device adds all of the noise to its own update: nobody has to be trusted.",
}
_WHO = {"watch": "people", "digits": "writing forms"}
_ENGINES = {"local": "Covey's own training and encoding, in one process", "tff": "TensorFlow Federated"}


def write_report(result: DemoResult, directory: Path) -> Path:
    """Writes `index.html` and `result.json` into `directory`; returns the path of the page."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "result.json").write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
    page = directory / "index.html"
    page.write_text(render_page(result), encoding="utf-8")
    return page


def render_page(result: DemoResult) -> str:
    """The report as one HTML document that loads nothing from anywhere."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": format_percent,
        "points": format_points,
        "bytes": format_bytes,
        "memory": format_memory,
        "seconds": format_seconds,
        "delta": format_delta,
        "svg": Markup,  # the SVG is our own, and Matplotlib escapes the texts in it
    }
    plots: dict[str, Plot] = {
        "accuracy": accuracy_plot(result),
        "confusion": confusion_plot(result.confusion),
    }
    if result.timeline:
        plots["timeline"] = timeline_plot(result)
    page = environment.get_template("report.html.j2")
    return page.render(
        result=result,
        plots=plots,
        trust=_TRUST[result.privacy],
        epsilon=format_epsilon(result.epsilon),
        slowest_phase=max(result.seconds_per_phase.values(), default=0.0) or 1.0,
        who=_who(result),
        engine=_ENGINES[result.simulation.engine] if result.simulation else "",
    )


def summary_table(result: DemoResult) -> Table:
    """The main figures as a table for the terminal; those that a simulation does not have are left out."""
    who, simulation = _who(result), result.simulation
    name = "Covey demo" if simulation is None else "SIMULATED, no device took part"
    table = Table(title=f"{name}: {result.devices} devices, {result.rounds} rounds", show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    federated = f"[bold green]{format_percent(result.federated_accuracy)}[/]"
    if simulation is not None:
        table.add_row("engine", _ENGINES[simulation.engine])
        table.add_row(f"accuracy on held-out {who}", federated)
        table.add_row("loss on them", f"{simulation.loss_per_round[-1]:.4f}", end_section=True)
    if result.local_accuracy is not None:
        table.add_row(
            f"accuracy on held-out {who}: each device alone, mean", format_percent(result.local_accuracy)
        )
    if simulation is None:
        table.add_row("federated", federated)
    if result.central_accuracy is not None:
        table.add_row("all data pooled centrally", format_percent(result.central_accuracy))
    if result.device_predictions_right is not None:
        table.add_row(
            "answered right by the held-out devices themselves",
            format_percent(result.device_predictions_right),
            end_section=True,
        )
    table.add_row(
        f"privacy ({result.privacy}), epsilon for each {result.privacy_unit}",
        f"{format_epsilon(result.epsilon)} at delta {format_delta(result.delta)}",
    )
    if simulation is None:
        table.add_row("dropouts survived", str(result.dropouts_survived), end_section=True)
    about = "" if simulation is None else ", estimated"
    table.add_row(f"sent by a device in a round{about}", format_bytes(result.upload_bytes_per_round))
    table.add_row(f"received by a device in a round{about}", format_bytes(result.download_bytes_per_round))
    if result.device_peak_rss_bytes is not None:
        table.add_row(
            "peak memory of a device process", format_memory(result.device_peak_rss_bytes), end_section=True
        )
    for phase, seconds in result.seconds_per_phase.items():
        table.add_row(f"{phase}, mean of a round", format_seconds(seconds))
    table.add_row("all rounds", format_seconds(result.round_seconds))
    table.add_row("everything", format_seconds(result.wall_seconds))
    return table


def _who(result: DemoResult) -> str:
    """What the accuracy was measured on."""
    return _WHO.get(result.dataset, "devices")


def format_percent(share: float) -> str:
    """0.8312 as "83.1%"."""
    return f"{share:.1%}"


def format_points(difference: float) -> str:
    """A difference of two shares in percentage points, with its sign: 0.217 as "+21.7"."""
    return f"{difference * 100:+.1f}".replace("-", "\u2212")


def format_bytes(count: int) -> str:
    """Bytes with three digits and a decimal unit: 23456 as "23.5 kB"."""
    size, units = float(count), ["B", "kB", "MB", "GB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        del units[0]
    return f"{size:.3g}\u00a0{units[0]}"


def format_memory(count: int) -> str:
    """Bytes of memory in the unit of `free` and `top`: 58720256 as "56 MiB"."""
    return f"{count / 2**20:.0f}\u00a0MiB"


def format_seconds(seconds: float) -> str:
    """Seconds as people say them: 0.043 as "43 ms", 4.2 as "4.2 s", 95 as "1 min 35 s"."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f}\u00a0ms"
    if seconds < 59.95:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}\u00a0min {rest}\u00a0s"


def format_epsilon(epsilon: float | None) -> str:
    """Epsilon with three digits; infinity where nothing is promised."""
    return "\u221e" if epsilon is None else f"{epsilon:.3g}" if epsilon < 1000 else f"{epsilon:.0f}"


def format_delta(delta: float) -> str:
    """Delta in the notation of the papers: 0.00001 as "1e-5"."""
    return f"{delta:g}".replace("e-0", "e-")
