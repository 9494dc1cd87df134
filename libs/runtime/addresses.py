"""Who is at the other end, also behind proxies of our own."""

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from aiohttp import web

from libs.runtime.settings import BadSettings

Networks = Sequence[IPv4Network | IPv6Network]

PROXIES = web.AppKey("proxies", tuple)
"""The networks of an application's trusted proxies; without them nobody is taken at his word."""


def networks(setting: str, text: str) -> tuple[IPv4Network | IPv6Network, ...]:
    """What `setting` lists: networks (or addresses), with commas between them. Raises BadSettings."""
    try:
        return tuple(ip_network(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise BadSettings(f"{setting}: {error}") from None


def address_of(request: web.Request) -> str:
    """Where a request comes from ("" if that is not known), as far as our own proxies tell."""
    proxies = request.app.get(PROXIES, ())
    return client_address(request.remote or "", request.headers.getall("X-Forwarded-For", ()), proxies)


def client_address(remote: str, forwarded: Iterable[str], proxies: Networks) -> str:
    """`remote`, unless that is a trusted proxy: then whom it names, and so on. Each proxy appends whom it heard, so that what is left of the last one
    whom we do not trust is anybody's word. `forwarded` are the values of X-Forwarded-For."""
    known = remote
    chain = [part.strip() for value in forwarded for part in value.split(",")] if proxies else []
    while chain and (address := _address(known)) is not None and any(address in network for network in proxies):
        before = _address(chain.pop())
        if before is None:
            break
        known = str(before)
    return known


def _address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
