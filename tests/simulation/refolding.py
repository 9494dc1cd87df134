"""What was folded as it came is what a fold from the start gives, or from a snapshot in the middle."""

import random
from collections.abc import Mapping, Sequence

from proto.catalogue import category_of
from proto.envelope import Fact
from services.scheduler.board import CATEGORIES, Board
from tests.simulation.readmodel import ReadModel


def refolded(boards: Mapping[str, Board], models: Sequence[ReadModel], facts: Sequence[Fact], chance: random.Random) -> None:
    """Raises AssertionError for a board, or a read model, that is not what the log says. `facts` are all there are, from the first."""
    for name, board in boards.items():
        cut = chance.randint(0, board.position)
        anew = _board(Board(), facts[:cut])
        restored, rest = Board.restore(cut, anew.snapshot()), facts[cut : board.position]
        for again in (_board(restored, rest), _board(anew, rest)):
            assert _told(again) == _told(board), f"the board of {name} at {board.position} is not what the log says (cut at {cut})"
    for model in models:
        again_model = model.anew()
        for happened in facts[: model.position]:
            again_model.apply(happened)
        assert again_model.rows == model.rows, f"a rebuild gives other rows at {model.position}"


def _board(board: Board, facts: Sequence[Fact]) -> Board:
    for happened in facts:
        if category_of(happened.stream) in CATEGORIES:
            board.apply(happened)
    return board


def _told(board: Board) -> tuple[object, ...]:
    return board.snapshot(), board.queue.running, board.held
