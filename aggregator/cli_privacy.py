"""The commands `covey privacy ...`: what rounds would cost, and what they have cost."""

from __future__ import annotations

import json as json_module
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aggregator import cli_output as output
from aggregator.cli_options import Form, Json, Output, Where, service
from aggregator.operations import OperationRefused
from protocol.dp.parameters import NoiseDistribution, PrivacyMode
from protocol.plan import SUBCOHORT_LIMIT

if TYPE_CHECKING:
    from aggregator.privacy.example_forecast import ExampleIntention
    from aggregator.privacy.forecast import Forecast, Outcome

privacy_app = typer.Typer(no_args_is_help=True, help="Differential privacy: plan it, and see what is spent.")


@privacy_app.command("plan")
def privacy_plan(
    population: Annotated[int, typer.Option(help="Enrolled devices that may take part.")],
    cohort: Annotated[int, typer.Option(help="Devices in a full round.")],
    rounds: Annotated[int, typer.Option(help="How many rounds.")],
    epsilon: Annotated[
        float | None, typer.Option(help="What all rounds may cost a device together.", show_default=False)
    ] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Noise over sensitivity, in place of --epsilon.", show_default=False)
    ] = None,
    delta: Annotated[float, typer.Option(help="The delta at which epsilon is stated.")] = 1e-5,
    mode: Annotated[PrivacyMode, typer.Option(help="Who adds the noise.")] = PrivacyMode.DISTRIBUTED,
    bits: Annotated[int, typer.Option(help="Bits of one coordinate on the wire, 8 to 32.")] = 16,
    clip_norm: Annotated[float, typer.Option(help="C, the L2 bound of one update.")] = 1.0,
    min_survivors: Annotated[
        int | None, typer.Option(help="Fewest updates in a sum.", show_default="above 2/3 of the cohort")
    ] = None,
    colluders: Annotated[int, typer.Option(help="Survivors that may reveal their noise.")] = 0,
    parameters: Annotated[int, typer.Option(help="Parameters of the model.")] = 50_000,
    noise: Annotated[NoiseDistribution, typer.Option(help="The integer noise.")] = NoiseDistribution.SKELLAM,
    subcohort_limit: Annotated[
        int, typer.Option(min=2, help="Split a larger cohort, with noise for the sum of each part.")
    ] = SUBCOHORT_LIMIT,
    restart_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Central mode: noise of a tree over so many rounds (DP-FTRL); no device is in two of them.",
            show_default="every round has noise of its own",
        ),
    ] = None,
    sampling: Annotated[
        float, typer.Option(help="Mode example: chance of an example to be in one step.")
    ] = 0.1,
    local_epochs: Annotated[int, typer.Option(help="Mode example: local epochs of a round.")] = 1,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Draw epsilon against rounds.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Works out a campaign before any data is touched: noise, epsilon, utility, bytes.

    Every device counts as one that takes part in all rounds: nothing is assumed of the selection.

    Examples:

      covey privacy plan --population 5000 --cohort 200 --rounds 500 --epsilon 4 --delta 1e-6

      covey privacy plan --population 50 --cohort 10 --rounds 20 --mode example --sampling 0.05 --epsilon 4
    """
    if mode is PrivacyMode.EXAMPLE:
        from aggregator.privacy.example_forecast import ExampleIntention

        if plot is not None or colluders or restart_every is not None:
            raise OperationRefused(
                "mode example has no plot, colluders or noise tree: every device's noise is its own"
            )
        _plan_examples(
            ExampleIntention(
                rounds=rounds,
                local_epochs=local_epochs,
                sampling_probability=sampling,
                delta=delta,
                epsilon=epsilon,
                noise_multiplier=noise_multiplier,
                clip_norm=clip_norm,
                dimension=parameters,
                noise=noise,
            ),
            json=json,
        )
        return
    from aggregator.privacy.forecast import Intention, forecast

    result = forecast(
        Intention(
            population=population,
            cohort=cohort,
            rounds=rounds,
            delta=delta,
            epsilon=epsilon,
            noise_multiplier=noise_multiplier,
            mode=mode,
            bits=bits,
            clip_norm=clip_norm,
            minimum_survivors=min_survivors,
            colluders=colluders,
            dimension=parameters,
            noise=noise,
            restart_every=restart_every,
            subcohort_limit=subcohort_limit,
        )
    )
    content = plan_json(result)
    if json:
        sys.stdout.write(json_module.dumps(content) + "\n")
    else:
        for text in _plan_lines(result, content):
            output.line(text)
    if plot is not None:
        _draw(result, plot)


def _plan_examples(intention: ExampleIntention, *, json: bool) -> None:
    from aggregator.cli_examples import example_json, example_lines
    from aggregator.privacy.example_forecast import forecast_examples

    result = forecast_examples(intention)
    if json:
        sys.stdout.write(json_module.dumps(example_json(result)) + "\n")
        return
    for text in example_lines(result):
        output.line(text)


@privacy_app.command("ledger")
def privacy_ledger(
    state: Where = None,
    delta: Annotated[float, typer.Option(help="The delta at which epsilon is stated.")] = 1e-5,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    """Shows what has been spent, re-computed from the transcript and held against the stored ledger.

    Every device counts as one that was in all rounds. Exit code 1 when transcript and ledger differ.

    Example: covey privacy ledger --json
    """
    with service(state) as client:
        ledger = client.ledger(delta)
    if json or form is Form.JSON:
        output.dump(ledger)
    else:
        output.line("what was released, for a device that was in every round; unit of privacy: the device")
        queries = (("queries", ledger.queries),) if ledger.queries.releases else ()
        for name, spent in (("everything", ledger.population), *ledger.models.items(), *queries):
            epsilon = _epsilon(math.inf if spent.epsilon is None else spent.epsilon)
            output.line(f"{name:16}  {spent.releases:4} releases  epsilon {epsilon}, delta {delta:g}")
        if ledger.matches:
            output.line(f"the stored ledger agrees with the transcript of {ledger.rounds} rounds")
    for difference in ledger.differences:
        output.fail(difference)
    if not ledger.matches:
        raise typer.Exit(1)


@privacy_app.command("audit")
def privacy_audit(
    mode: Annotated[
        PrivacyMode | None, typer.Option(help="Audit this mode.", show_default="every mode with noise")
    ] = None,
    epsilon: Annotated[float, typer.Option(help="The claim; the noise is solved for it.")] = 2.0,
    delta: Annotated[float, typer.Option(help="The delta at which epsilon is stated.")] = 1e-5,
    rounds: Annotated[int, typer.Option(help="Rounds of training.")] = 3,
    canaries: Annotated[int, typer.Option(help="Devices whose part is guessed.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Of data, coins and noise.")] = 1,
    json: Json = False,
) -> None:
    """Attacks small models through the real encoding, and bounds epsilon from below by what it guesses.

    The bound, at 95 %, must lie under the claim; with the noise switched off it must lie above it, or the
    audit shows nothing. Exit code 1 when either is not so.

    Example: covey privacy audit --epsilon 2
    """
    from aggregator.privacy.audit import AuditSettings, audit
    from aggregator.privacy.example_audit import audit_examples

    settings = AuditSettings(epsilon=epsilon, delta=delta, rounds=rounds, canaries=canaries, seed=seed)
    noisy = [each for each in PrivacyMode if each is not PrivacyMode.NONE]
    results = [
        audit_examples(settings, noise) if each is PrivacyMode.EXAMPLE else audit(each, settings, noise)
        for each in (noisy if mode is None else [mode])
        for noise in NoiseDistribution
    ]
    if json:
        content = [asdict(result) | {"passed": result.passed} for result in results]
        sys.stdout.write(json_module.dumps(content) + "\n")
    else:
        output.line(f"{canaries} canaries, {rounds} rounds; lower bounds on epsilon at 95 %, delta {delta:g}")
        for result in results:
            output.line(
                f"{result.mode:12} {result.noise:18} claimed {result.claimed:.3f}, found {result.found:.3f}, "
                f"without noise {result.found_without_noise:.3f}: {'passed' if result.passed else 'FAILED'}"
            )
    if not all(result.passed for result in results):
        output.fail("the claim does not stand, or the audit is too weak to tell: raise --canaries")
        raise typer.Exit(1)


def plan_json(result: Forecast) -> dict[str, object]:
    """The forecast for machines; None stands for an infinite epsilon, which JSON lacks."""
    from aggregator.privacy.references import gaussian_reference, tff_parameters, tree_noise_multiplier

    intention, encoding = result.intention, result.encoding
    z = encoding.privacy.noise_multiplier

    def gaussian(*, tight: bool, sampling: float = 1.0) -> float | None:
        if not z:
            return None
        epsilon = gaussian_reference(
            z,
            rounds=intention.rounds,
            delta=intention.delta,
            sampling_probability=sampling,
            method="pld" if tight else "rdp",
        )
        return _number(epsilon)

    return {
        "noise_multiplier": z,
        "epsilon_per_round": _number(result.epsilon_per_round),
        "epsilon_total": _number(result.epsilon_total),
        "delta": intention.delta,
        "clip_norm": encoding.privacy.clip_norm,
        "scale": encoding.scale,
        "bits": encoding.bits,
        "scaled_l2": math.sqrt(encoding.norm_bound_squared),
        "local_stddev": math.sqrt(encoding.local_variance),
        "min_survivors": encoding.minimum_survivors,
        "central_stddev": math.sqrt(encoding.central_variance),
        "mode": encoding.privacy.mode.value,
        "noise": encoding.privacy.noise.value,
        "unit": "device",
        "population": intention.population,
        "cohort": intention.cohort,
        "colluders": intention.colluders,
        "subcohorts": intention.split.count,
        "rounds": intention.rounds,
        "parameters": intention.dimension,
        "noise_norm": result.noise_norm,
        "bytes_per_device": result.bytes_up,
        "overflow_probability": encoding.overflow_probability,
        "participations": result.participations,
        "epsilon_participations": _number(result.epsilon_participations),
        "colluding": [_outcome(outcome) for outcome in result.colluding],
        "dropping": [_outcome(outcome) for outcome in result.dropping],
        "gaussian_epsilon_total": gaussian(tight=True),
        "gaussian_epsilon_total_rdp": gaussian(tight=False),
        "gaussian_epsilon_total_if_poisson_sampled": gaussian(
            tight=False, sampling=intention.cohort / intention.population
        ),
        "composition": "rounds" if intention.restart_every is None else "tree",
        "restart_every": intention.restart_every,
        "tree": _tree(result, tree_noise_multiplier),
        "tff": asdict(tff_parameters(encoding)) if z else None,
    }


def _tree(result: Forecast, noise_multiplier: Callable[..., float]) -> dict[str, object] | None:
    """What DP-FTRL would need for the same epsilon, were its tree restarted when everybody has had a turn."""
    intention = result.intention
    if not 0 < result.epsilon_total < math.inf or intention.restart_every is not None:
        return None
    epoch = max(1, intention.population // intention.cohort)
    figures = {"rounds": intention.rounds, "restart_every": epoch, "delta": intention.delta}
    return {
        "noise_multiplier": noise_multiplier(epsilon=result.epsilon_total, **figures),
        "restart_every": epoch,
    }


def _outcome(outcome: Outcome) -> dict[str, object]:
    content = asdict(outcome)
    return {key: _number(value) for key, value in content.items()}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _epsilon(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "unbounded: nothing is promised"


def _plan_lines(result: Forecast, content: dict[str, object]) -> list[str]:
    """The forecast for a person."""
    from aggregator.privacy.forecast import rounding_factor, wider_ring

    intention, encoding = result.intention, result.encoding
    privacy, tree = encoding.privacy, encoding.privacy.tree
    wider = wider_ring(encoding)
    lines = [
        f"mode               {privacy.mode} ({privacy.noise}); unit of privacy: the device, zeroed out",
        f"noise multiplier   {privacy.noise_multiplier:g}",
        f"epsilon            {_epsilon(result.epsilon_per_round)} a round, {_epsilon(result.epsilon_total)} "
        f"after {intention.rounds}, at delta {intention.delta:g}, for a device in every round"
        + ("" if tree is None else " that it may join: one of each tree"),
        f"                   {_epsilon(result.epsilon_participations)} for one in {result.participations}, "
        f"the average of a population of {intention.population}",
        f"noise              norm {result.noise_norm:.4g} in the "
        + ("mean update, " if tree is None else "sum of all mean updates since the last restart, at most, ")
        + f"{result.noise_norm / privacy.clip_norm:.3g} times the clip norm {privacy.clip_norm:g}",
        f"ring               {encoding.bits} bits, scale {encoding.scale:.6g}, rounded norm "
        f"{math.sqrt(encoding.norm_bound_squared):.6g} ({rounding_factor(encoding):.4f} of the unrounded), "
        f"overflow below {encoding.overflow_probability:.2g} a round",
        f"a device's noise   standard deviation {math.sqrt(encoding.local_variance):.6g} steps",
        f"a device sends     {result.bytes_up:,} bytes of masked input a round",
        "dropouts           "
        + "; ".join(
            f"{o.survivors} of {intention.split.average} answer: epsilon {_epsilon(o.epsilon_total)}, "
            f"noise {o.noise_norm:.4g}"
            for o in result.dropping
        ),
        "colluders          "
        + "; ".join(
            f"{o.colluders} of {o.survivors}: epsilon {_epsilon(o.epsilon_total)}" for o in result.colluding
        ),
    ]
    if intention.split.count > 1:
        parts = f"{intention.split.count} of {intention.split.average} devices on average"
        lines.insert(1, f"sub-cohorts        {parts}, each with the noise that its own sum needs")
    if wider is not None:
        lines.append(
            f"a wider ring       rounding makes the noise {rounding_factor(encoding):.2f} times louder; with "
            f"--bits {wider} it would be at most 1.05 times"
        )
    sampled = content["gaussian_epsilon_total_if_poisson_sampled"]
    if tree is not None:
        lines.insert(
            1,
            f"noise tree         restarts every {tree.restart_every} rounds; a device is in one of "
            f"them, and in at most {tree.height} noisy sums",
        )
    elif isinstance(sampled, float):
        lines.append(
            f"not claimed        epsilon {sampled:.4g} by amplification, if hidden coins chose every cohort"
        )
    return lines


def _draw(result: Forecast, path: Path) -> None:
    """Draws epsilon against rounds."""
    from aggregator.privacy.forecast import epsilon_curve

    try:
        import matplotlib
    except ImportError as error:
        raise OperationRefused("a plot needs matplotlib: pip install 'covey[demo]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    intention, encoding = result.intention, result.encoding
    points = epsilon_curve(encoding, intention.rounds)
    if not math.isfinite(points[0][1]):
        raise OperationRefused("without noise there is no epsilon to draw")
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(*zip(*points, strict=True), label="a device in every round")
    if intention.epsilon is not None:
        axes.axhline(intention.epsilon, color="tab:red", linestyle="--", label="budget")
    if result.participations < intention.rounds:
        axes.plot(
            result.participations,
            result.epsilon_participations,
            "o",
            label=f"the average device, in {result.participations} rounds",
        )
    axes.set_xlabel("rounds")
    axes.set_ylabel(f"epsilon at delta {intention.delta:g}")
    axes.set_title(
        f"{encoding.privacy.mode}, noise multiplier {encoding.privacy.noise_multiplier:g}, unit: the device"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
