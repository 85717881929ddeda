"""Processes of several nodes meet through a card that leads from one to the other."""

import pytest

from fewstep import network_card
from fewstep.network_card import GLOO_CARD, card_towards, name_network_card

NODES = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "gpu07"}


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The cards that lead to each host."""
    found = {"gpu07": "ib0", network_card.ELSEWHERE: "eth0"}
    monkeypatch.setattr(network_card, "card_towards", found.get)
    return found


def test_gloo_uses_the_card_that_leads_to_the_first_node(cards: dict[str, str]) -> None:
    environ = dict(NODES)
    name_network_card(environ)
    assert environ[GLOO_CARD] == "ib0"


@pytest.mark.parametrize("own", ["lo", None])
def test_the_first_node_itself_uses_the_card_that_leads_elsewhere(
    own: str | None, cards: dict[str, str]
) -> None:
    cards |= {"gpu07": own} if own else {}
    if own is None:
        del cards["gpu07"]
    environ = dict(NODES)
    name_network_card(environ)
    assert environ[GLOO_CARD] == "eth0"


def test_what_the_user_says_stays_and_one_node_needs_nothing(cards: dict[str, str]) -> None:
    for environ in ({**NODES, GLOO_CARD: "bond0"}, {**NODES, "LOCAL_WORLD_SIZE": "16"}):
        before = dict(environ)
        name_network_card(environ)
        assert environ == before


def test_where_no_card_leads_gloo_chooses(cards: dict[str, str]) -> None:
    cards.clear()
    environ = dict(NODES)
    name_network_card(environ)
    assert environ == NODES


def test_this_machine_is_behind_its_loopback_and_an_unknown_one_behind_none() -> None:
    assert card_towards("127.0.0.1") == "lo"
    assert card_towards("no-such-host.invalid") is None
