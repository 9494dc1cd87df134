"""libs/runtime/settings: what the environment says, and what it is told when that is wrong."""

from typing import Literal

import msgspec
import pytest

from libs.runtime.settings import BadSettings, decode


class Settings(msgspec.Struct, frozen=True):
    url: str
    mode: Literal["push", "pull"] = "push"
    slots: int = 4


def test_settings_are_read_and_others_are_not_ours() -> None:
    assert decode(Settings, {"PENSTOCK_URL": "u", "PENSTOCK_SLOTS": "2", "HOME": "/"}) == Settings("u", "push", 2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "PENSTOCK_URL is missing"),
        ({"PENSTOCK_ULR": "u"}, "there is no setting PENSTOCK_ULR; known: PENSTOCK_MODE, PENSTOCK_SLOTS, PENSTOCK_URL"),
        ({"PENSTOCK_URL": "u", "PENSTOCK_MODE": "both"}, "PENSTOCK_MODE: `both` is none of push, pull"),
        ({"PENSTOCK_URL": "u", "PENSTOCK_SLOTS": "many"}, "PENSTOCK_SLOTS: Expected `int`, got `str`"),
    ],
)
def test_a_wrong_setting_is_named(given: dict[str, str], said: str) -> None:
    with pytest.raises(BadSettings) as caught:
        decode(Settings, given)
    assert str(caught.value) == said
