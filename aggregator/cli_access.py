"""Commands `login`, `logout`, `whoami`, `console`, `token ...`, `audit-log`: who does what, and who did."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from aggregator import cli_output as output
from aggregator import profile as profiles
from aggregator.access.roles import Role
from aggregator.cli_options import Form, Json, Output, Where, seconds, service
from aggregator.client import Client
from aggregator.operations import OperationRefused
from aggregator.private_file import replace_private
from aggregator.web.schemas import MAX_TOKEN_DAYS, TokenRequest

token_app = typer.Typer(no_args_is_help=True, help="Tokens: who may do what over the API.")


def login(
    url: Annotated[str, typer.Argument(help="Of the service: https://host:8443.")],
    token_file: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Holds the token.", show_default="standard input"),
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="The fleet's ca.pem, when its CA issued the service's certificate.",
            show_default="the system's list",
        ),
    ] = None,
) -> None:
    """Makes the other commands go to a service elsewhere, as whoever the token says.

    The token is never an argument: everybody on this machine can read those.

    Examples:

      covey login https://aggregator.example:8443 --ca ca.pem --token-file admin-token

      pass covey | covey login https://aggregator.example:8443
    """
    if token_file is None and sys.stdin.isatty():
        token = typer.prompt("token", hide_input=True)
    else:
        token = sys.stdin.read(8192) if token_file is None else token_file.read_text()[:8192]
    profile = profiles.Profile(url=url, token=token.strip(), ca=None if ca is None else ca.read_text())
    with Client(profile.url, profile.token, ca=profile.ca) as client:
        me = client.whoami()
    path = profiles.profile_file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_private(path, profile.model_dump_json().encode())
    output.line(f"logged in to {me.fleet} at {url} as {me.name}, {me.role}; `covey logout` forgets it")


def logout() -> None:
    """Forgets the service of `covey login`; the token stays valid until it is revoked.

    Example: covey logout
    """
    output.line("forgotten" if profiles.forget() else "nobody was logged in")


def whoami(state: Where = None, json: Json = False, form: Output = Form.TABLE) -> None:
    """Shows which service the commands go to, and who they are there.

    Example: covey whoami
    """
    with service(state) as client:
        me = client.whoami()
        if json or form is Form.JSON:
            output.dump(me)
        else:
            output.line(f"{me.name}, {me.role}, in {me.fleet} (covey {me.covey})")


def console(state: Where = None) -> None:
    """Prints a link to the console that signs a browser in as you: once, within ten minutes.

    Example: covey console --state agg
    """
    # With an extra that the other commands can do without.
    from aggregator.web.in_process import URL

    with service(state) as client:
        if client.url == URL:
            raise OperationRefused("no service runs here, so there is no console: `covey aggregator run`")
        output.line(client.url + client.sign_in_link().path)
    output.hint("it works once, within ten minutes; whoever opens it is signed in as you")


@token_app.command("create")
def token_create(
    role: Annotated[Role, typer.Option(help="What it allows.")],
    expires: Annotated[str, typer.Option(help="After how long: 30d, 12h, 90m; a year at most.")] = "30d",
    label: Annotated[str, typer.Option(help="What to call it.", show_default=False)] = "",
    state: Where = None,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    """Makes a token and prints it, this once: only a hash of it is kept.

    Example: covey token create --role viewer --expires 30d --label dashboard > token
    """
    request = TokenRequest(role=role, label=label, seconds=seconds(expires, MAX_TOKEN_DAYS))
    with service(state) as client:
        made = client.create_token(request)
    if json or form is Form.JSON:
        output.dump(made)
        return
    output.hint(f"token {made.token}, {made.role}, expires in {expires}; it is shown this once:")
    output.line(made.secret)


@token_app.command("list")
def token_list(state: Where = None, json: Json = False, form: Output = Form.TABLE) -> None:
    """Lists the tokens, without what opens them.

    Example: covey token list
    """
    with service(state) as client:
        output.tokens(client.tokens(), json=json or form is Form.JSON)


@token_app.command("revoke")
def token_revoke(
    token: Annotated[str, typer.Argument(help="Its id: the middle part.")], state: Where = None
) -> None:
    """Revokes a token, from the next request on.

    Example: covey token revoke 3f2a91c07d5e
    """
    with service(state) as client:
        client.revoke_token(token)
    output.line(f"{token} opens nothing any more")


def audit_log(
    last: Annotated[int, typer.Option(min=1, max=1000, help="How many entries.")] = 50,
    state: Where = None,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    """Shows what operators did, and what was refused them; newest first.

    Example: covey audit-log --last 20
    """
    with service(state) as client:
        output.audit_log(client.audit_log(limit=last).items, json=json or form is Form.JSON)
