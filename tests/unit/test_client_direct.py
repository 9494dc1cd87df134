"""Which direct addresses a client uses."""

import pytest

from penstock.client.http import Http
from penstock.client.model import Direct


@pytest.mark.parametrize(
    ("server", "offered", "used"),
    [
        ("http://127.0.0.1:7420", "http://127.0.0.1:7421/x", True),
        ("http://localhost:7420", "http://127.0.0.1:7421/x", True),
        ("http://penstock.example", "http://artifacts.example/x", True),
        ("https://penstock.example", "https://artifacts.example/x", True),
        ("http://penstock.example", "https://artifacts.example/x", True),
        ("https://penstock.example", "http://artifacts.example/x", False),  # would show what was private
        ("http://penstock.example", "http://127.0.0.1:7421/x", False),  # this is another machine than the server's
        ("http://penstock.example", "file:///etc/passwd", False),
    ],
)
def test_an_address_is_used_when_it_is_as_private_and_the_same_machine(server: str, offered: str, used: bool) -> None:
    direct = Direct(url=offered, token="t")
    assert Http(server, "t", 1.0).direct(direct) == (direct if used else None)
    assert Http(server, "t", 1.0).direct(None) is None
