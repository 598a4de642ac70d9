"""Documentation that is made from the code says what the code says."""

from __future__ import annotations

from docs.diagrams import PAGE, with_diagram


def test_the_state_diagram_is_the_one_of_the_table() -> None:
    page = PAGE.read_text()
    assert "SetSigned --> Unmasked: UnmaskRequested" in page
    assert with_diagram(page) == page
