"""Draws the state diagrams of the documentation from the tables in the code.

python -m docs.diagrams          # rewrites them in place
"""

from __future__ import annotations

import re
from pathlib import Path

from protocol.secagg.client import TRANSITIONS

PAGE = Path(__file__).parent / "reference" / "secure-aggregation.md"
_BLOCK = re.compile(r"(<!-- begin generated: .*? -->\n).*?(<!-- end generated -->)", re.DOTALL)


def client_diagram() -> str:
    """The client's machine as a Mermaid state diagram, without repeated events, which change nothing."""
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> Advertised"]
    for (state, event), rule in TRANSITIONS.items():
        if rule.leads_to is not state:
            lines.append(f"    {state.__name__} --> {rule.leads_to.__name__}: {event.__name__}")
    states = dict.fromkeys(state for state, _ in TRANSITIONS)
    lines += [f"    {state.__name__} --> Aborted: rule broken" for state in states]
    lines += [f"    {state.__name__} --> Ended: RoundEnded" for state in states]
    return "\n".join([*lines, "    Aborted --> [*]", "    Ended --> [*]", "```"]) + "\n"


def with_diagram(page: str) -> str:
    """The page with its generated block made anew."""
    return _BLOCK.sub(lambda match: match[1] + client_diagram() + match[2], page)


if __name__ == "__main__":
    PAGE.write_text(with_diagram(PAGE.read_text()))
