"""Who is believed about where a request comes from."""

import pytest

from libs.runtime.addresses import client_address, networks
from libs.runtime.settings import BadSettings

PROXIES = networks("X", "10.0.0.0/8, 192.0.2.1,fd00::/8")


@pytest.mark.parametrize(
    ("remote", "forwarded", "address"),
    [
        ("203.0.113.9", [], "203.0.113.9"),
        ("203.0.113.9", ["198.51.100.7"], "203.0.113.9"),  # nobody's proxy
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.7"], "198.51.100.7"),
        ("10.0.0.1", ["127.0.0.1, 198.51.100.7"], "198.51.100.7"),  # what the client claimed itself
        ("10.0.0.1", ["127.0.0.1", "198.51.100.7"], "198.51.100.7"),
        ("10.0.0.1", ["198.51.100.7, 10.2.3.4,192.0.2.1"], "198.51.100.7"),
        ("10.0.0.1", ["6.6.6.6, 198.51.100.7, 10.2.3.4"], "198.51.100.7"),
        ("10.0.0.1", ["10.9.9.9, 10.2.3.4"], "10.9.9.9"),
        ("10.0.0.1", ["6.6.6.6, rubbish"], "10.0.0.1"),
        ("10.0.0.1", ["6.6.6.6,"], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.7:80"], "10.0.0.1"),
        ("10.0.0.1", ["x" * 50_000], "10.0.0.1"),
        ("::ffff:10.0.0.1", ["::ffff:198.51.100.7"], "198.51.100.7"),
        ("fd00::1", ["2001:db8::7"], "2001:db8::7"),
        ("", ["198.51.100.7"], ""),
    ],
)
def test_a_forwarded_address_counts_as_far_as_trusted_proxies_vouch_for_it(remote: str, forwarded: list[str], address: str) -> None:
    assert client_address(remote, forwarded, PROXIES) == address
    assert client_address(remote, forwarded, ()) == remote


@pytest.mark.parametrize("text", ["x", "10.0.0.1/8", "10.0.0.0/33", "10.0.0.0/8;::1"])
def test_what_is_no_network_is_refused_at_the_start(text: str) -> None:
    with pytest.raises(BadSettings, match="PENSTOCK_X"):
        networks("PENSTOCK_X", text)
