"""The server's configuration admits no text that could become more than a name."""

from pathlib import Path
from typing import Any

import pytest

from libs.bus.accounts import server_config


def config(**changed: Any) -> str:
    return server_config(**{"port": 4222, "store_dir": Path("/data"), "services": {"builds": "a"}, "workers": {"w1": "b"}} | changed)


@pytest.mark.parametrize("name", ["", "a.b", "w 1", 'w"', "w1\n", "*", ">", "w}", "ü", "a" * 65])
def test_a_name_that_is_not_safe_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a safe user name"):
        config(workers={name: "b"})
    with pytest.raises(ValueError, match="not a safe user name"):
        config(services={name: "b"})


@pytest.mark.parametrize("password", ["", 'x" }', "$2a$11$abc", "a b", "x\n"])
def test_a_password_that_is_not_safe_is_refused_without_being_told(password: str) -> None:
    with pytest.raises(ValueError, match="not a safe password for 'w1'") as refusal:
        config(workers={"w1": password})
    assert not password or password not in str(refusal.value)


def test_a_path_that_would_end_its_quotes_is_refused() -> None:
    with pytest.raises(ValueError, match="not a safe path"):
        config(store_dir=Path('/data"'))


def test_a_name_is_one_user_s() -> None:
    with pytest.raises(ValueError, match="both a service and a worker"):
        config(workers={"builds": "b"})
