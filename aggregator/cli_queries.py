"""The commands `covey query ...`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from aggregator import cli_answers
from aggregator import cli_output as output
from aggregator.cli_options import Form, Json, Output, Where, idle, service
from aggregator.cli_waiting import nothing_yet, wait
from aggregator.client import Client
from aggregator.operations import OperationRefused
from aggregator.queries import DEFAULT_BINS, DEFAULT_QUANTILE_BINS, QueryRequest
from aggregator.settings import InvalidSettings, invalid
from protocol.dp.parameters import PrivacyMode
from protocol.plan import (
    MAX_BINS,
    HistogramQuestion,
    MeanQuestion,
    QuantileQuestion,
    Question,
    SumQuestion,
)

Ask = Callable[..., Question]

query_app = typer.Typer(
    no_args_is_help=True,
    help="Figures over fields that devices declare: nobody sees the value of any one device.",
)


def _asking(question_of: Ask) -> Callable[..., None]:
    """Makes a command of a question: its own options, and those that every query has."""
    own = inspect.signature(question_of, eval_str=True).parameters
    shared = inspect.signature(_ask, eval_str=True).parameters

    @functools.wraps(question_of)
    def command(**given: Any) -> None:
        options = {name: given.pop(name) for name in own}
        _ask(functools.partial(question_of, **options), **given)

    parameters = [p for name, p in shared.items() if name != "question"] + list(own.values())
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _ask(
    question: Callable[[], Question],
    field: Annotated[str, typer.Argument(help="Name of the field, as devices declare it.")],
    low: Annotated[float, typer.Option(help="Values below it count as it: chosen without the data.")],
    high: Annotated[float, typer.Option(help="Values above it count as it.")],
    state: Where = None,
    cohort: Annotated[int, typer.Option(min=2, help="Devices in a full cohort.")] = 10,
    minimum: Annotated[
        int | None,
        typer.Option(min=2, help="Check-ins that the round needs.", show_default="above 2/3 of the cohort"),
    ] = None,
    min_survivors: Annotated[
        int | None,
        typer.Option(min=2, help="Answers that a sum needs.", show_default="as many as --minimum"),
    ] = None,
    privacy: Annotated[
        PrivacyMode, typer.Option(help="Who adds noise: nobody, the aggregator, every device.")
    ] = PrivacyMode.DISTRIBUTED,
    noise_multiplier: Annotated[
        float | None,
        typer.Option(min=0.0, help="Noise over sensitivity.", show_default="1 where there is noise"),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(help="Choose the noise so that this query costs at most this.", show_default=False),
    ] = None,
    delta: Annotated[float, typer.Option(help="The delta at which epsilon is stated.")] = 1e-5,
    max_epsilon: Annotated[
        float | None,
        typer.Option(help="Do not ask if it takes the fleet beyond it.", show_default="no limit"),
    ] = None,
    gather: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for a full cohort.")] = 3.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Draws the cohort.", show_default="random")] = None,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    try:
        request = QueryRequest(
            field=field,
            low=low,
            high=high,
            question=question(),
            cohort=cohort,
            minimum=minimum,
            min_survivors=min_survivors,
            privacy=privacy,
            noise_multiplier=noise_multiplier,
            epsilon=epsilon,
            delta=delta,
            gather_seconds=gather,
            epsilon_limit=max_epsilon,
            seed=seed,
        )
        request.resolve()  # NaN cannot travel: refused here, before anybody is asked
    except ValidationError as error:
        raise OperationRefused(str(invalid(error))) from error
    except InvalidSettings as error:
        raise OperationRefused(str(error)) from error
    with service(state) as client:
        campaign = client.start_query(request)
        if idle(state):
            output.hint(
                "no aggregator is running: the query begins when you start `covey aggregator run`; "
                f"see its answer with `covey query show {campaign.campaign[:8]}`"
            )
            return
        wait(client, campaign.campaign, f"query {campaign.campaign[:8]}")
        _show(client, campaign.campaign, json=json or form is Form.JSON)


@query_app.command("mean")
@_asking
def query_mean() -> Question:
    """Asks for the mean of a field.

    Example: covey query mean battery-temperature --low 0 --high 80 --cohort 100
    """
    return MeanQuestion()


@query_app.command("sum")
@_asking
def query_sum() -> Question:
    """Asks for the sum of a field.

    Example: covey query sum recordings --low 0 --high 1000 --epsilon 1
    """
    return SumQuestion()


@query_app.command("histogram")
@_asking
def query_histogram(
    bins: Annotated[int, typer.Option(min=2, max=MAX_BINS, help="Intervals of equal width.")] = DEFAULT_BINS,
) -> Question:
    """Asks how many values lie in each of some intervals.

    Example: covey query histogram recording-length --low 0 --high 60 --bins 12
    """
    return HistogramQuestion(bins=bins)


@query_app.command("quantile")
@_asking
def query_quantile(
    q: Annotated[float, typer.Option(min=0.0, max=1.0, help="The share of values below the answer.")] = 0.5,
    bins: Annotated[
        int, typer.Option(min=2, max=MAX_BINS, help="Intervals that are told apart: finer is noisier.")
    ] = DEFAULT_QUANTILE_BINS,
) -> Question:
    """Asks for the value that a share q of the values lie below: 0.5 is the median.

    Example: covey query quantile battery-temperature --low 0 --high 80 --q 0.9
    """
    return QuantileQuestion(q=q, bins=bins)


@query_app.command("list")
def query_list(state: Where = None, json: Json = False, form: Output = Form.TABLE) -> None:
    """Lists queries and their answers.

    Example: covey query list --json
    """
    with service(state) as client:
        queries = [campaign for campaign in client.campaigns() if campaign.model is None]
        rounds = [each for each in client.rounds() if each.model is None]
    if json or form is Form.JSON:
        output.dump(rounds)
    elif not queries:
        output.line("no queries yet: ask one with `covey query mean FIELD --low X --high Y`")
    else:
        cli_answers.listing(queries, rounds)


@query_app.command("show")
def query_show(
    query: Annotated[str, typer.Argument(help="Id of the query, or its beginning.")],
    state: Where = None,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    """Shows the answer of a query again; it costs nothing.

    Example: covey query show 3f2a9c10
    """
    with service(state) as client:
        found = [c for c in client.campaigns() if c.model is None and c.campaign.startswith(query)]
        if len(found) != 1:
            problem = "several queries begin" if found else "no query begins"
            raise OperationRefused(f"{problem} with {query}: see `covey query list`")
        _show(client, found[0].campaign, json=json or form is Form.JSON)


def _show(client: Client, campaign_id: str, *, json: bool) -> None:
    campaign, rounds = client.campaign(campaign_id), client.rounds(campaign_id)
    round_ = rounds[-1] if rounds else None
    if json and round_ is not None:
        output.dump(round_)
    if round_ is None or round_.report.answer is None:
        nothing_yet(campaign, round_, "the query")
        return
    if not json:
        cli_answers.answer(round_, round_.report.answer)
