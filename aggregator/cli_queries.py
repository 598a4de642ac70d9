"""The commands `covey query ...`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
from pydantic import ValidationError

from aggregator import cli_answers
from aggregator import cli_output as output
from aggregator.cli_options import (
    AskedOnce,
    Command,
    Form,
    Json,
    Output,
    Where,
    asked_once,
    idle,
    options_of,
    service,
)
from aggregator.cli_waiting import nothing_yet, wait
from aggregator.client import Client
from aggregator.operations import OperationRefused
from aggregator.queries import DEFAULT_BINS, DEFAULT_QUANTILE_BINS, QueryRequest
from aggregator.settings import InvalidSettings, invalid
from aggregator.web.schemas import Campaign
from protocol.plan import (
    MAX_BINS,
    HistogramQuestion,
    MeanQuestion,
    QuantileQuestion,
    Question,
    SumQuestion,
)

Which = Annotated[str, typer.Argument(metavar="QUERY", help="Id of the query, or its beginning.")]

query_app = typer.Typer(
    no_args_is_help=True,
    help="Figures over fields that devices declare: nobody sees the value of any one device.",
)


@options_of(asked_once, "asked")
def _ask(
    *,
    field: Annotated[str, typer.Argument(help="Name of the field, as devices declare it.")],
    low: Annotated[float, typer.Option(help="Values below it count as it: chosen without the data.")],
    high: Annotated[float, typer.Option(help="Values above it count as it.")],
    state: Where = None,
    question: Question,
    epsilon: Annotated[
        float | None,
        typer.Option(help="Choose the noise so that this query costs at most this.", show_default=False),
    ] = None,
    asked: AskedOnce,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    try:
        request = QueryRequest(field=field, low=low, high=high, question=question, epsilon=epsilon, **asked)
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


def _asking(question_of: Callable[..., Question]) -> Command:
    """Makes a command of a question: its own options, and those that every query has."""
    command = options_of(question_of, "question")(_ask)
    command.__name__, command.__doc__ = question_of.__name__, question_of.__doc__
    return command


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
def query_show(query: Which, state: Where = None, json: Json = False, form: Output = Form.TABLE) -> None:
    """Shows the answer of a query again; it costs nothing.

    Example: covey query show 3f2a9c10
    """
    with service(state) as client:
        _show(client, _one(client, query).campaign, json=json or form is Form.JSON)


@query_app.command("cancel")
def query_cancel(query: Which, state: Where = None, json: Json = False, form: Output = Form.TABLE) -> None:
    """Calls a query off. One whose devices were asked to unmask goes to its end: its privacy is spent.

    Example: covey query cancel 3f2a9c10
    """
    with service(state) as client:
        cancelled = client.cancel_campaign(_one(client, query).campaign)
    if json or form is Form.JSON:
        output.dump(cancelled)
    else:
        output.line(f"query {cancelled.campaign[:8]} is cancelled")


def _one(client: Client, begins: str) -> Campaign:
    found = [each for each in client.campaigns() if each.model is None and each.campaign.startswith(begins)]
    if len(found) != 1:
        problem = "several queries begin" if found else "no query begins"
        raise OperationRefused(f"{problem} with {begins}: see `covey query list`")
    return found[0]


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
