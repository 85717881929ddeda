"""The network card through which the processes of several nodes meet on their CPUs (gloo)."""

import os
import socket
import struct
from collections.abc import MutableMapping
from contextlib import suppress

GLOO_CARD = "GLOO_SOCKET_IFNAME"
ELSEWHERE = "192.0.2.1"  # set aside for documentation (RFC 5737), so never on this network
SIOCGIFADDR = 0x8915  # of linux/sockios.h: a card's address


def name_network_card(environ: MutableMapping[str, str] = os.environ) -> None:
    """Make gloo use the network card that leads to the other nodes, unless the user named one.

    By itself gloo takes the one that this host's name stands for. On Debian and its kin that is
    often 127.0.1.1, where no other node can connect.
    """
    here, world = environ.get("LOCAL_WORLD_SIZE", "1"), environ.get("WORLD_SIZE", "1")
    if here == world or GLOO_CARD in environ:
        return
    for host in (environ.get("MASTER_ADDR", ""), ELSEWHERE):  # the first node is its own master
        if (card := card_towards(host)) not in (None, "lo"):
            environ[GLOO_CARD] = str(card)
            return


def card_towards(host: str) -> str | None:
    """The name of the network card that leads to a host, by IPv4; None if none does."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # of a datagram's socket: nothing is sent
        own = probe.getsockname()[0]
        if own.startswith("127."):
            return "lo"
        return next((card for card in _cards() if _address(probe, card) == own), None)
    return None


def _cards() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _address(opened: socket.socket, card: str) -> str | None:
    """The IPv4 address of a card, as Linux tells it to any open socket."""
    from fcntl import ioctl  # there is none on Windows

    with suppress(OSError):
        found = ioctl(opened.fileno(), SIOCGIFADDR, struct.pack("256s", card[:15].encode()))
        return socket.inet_ntoa(found[20:24])
    return None
