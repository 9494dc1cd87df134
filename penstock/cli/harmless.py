"""What a task wrote, for a terminal: its text and its colours, and nothing that does more.

A terminal obeys what it is shown. Left alone are SGR, what moves within the line (\\r, \\b) and erases in it (EL), as progress bars do. Taken out are
all other sequences, which would move the cursor over what others wrote, set the title or the clipboard (OSC 52), or have the terminal answer.
"""

import re

_PIECE = 64
"""Characters of a sequence that has not ended by which it is known again."""
_SEQUENCE = re.compile(
    r"(?P<kept>\x1b\[(?:(?P<style>[0-9;:]*)m|[0-2]?K))"
    r"|(?:\x1b\[|\x9b)[0-?]*+[ -/]*+[@-~]"  # CSI
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*+[\x07\x9c]"  # OSC, DCS and other strings; `ESC \`, too, ends one, and the line
    r"|\x1b[ -/]*+[0-OQ-WYZ\\`-~]"
    r"|(?P<begun>(?:\x1b\[|\x9b)[0-?]*+[ -/]*+|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*+|\x1b[ -/]*+)"
    r"|[\x00-\x07\x0b\x0c\x0e-\x1f\x7f-\x9f]"
)


class Harmless:
    """One stream. `styled`: what it was last told leaves the terminal in other than its own colours."""

    def __init__(self) -> None:
        self.styled = False
        self._begun = ""

    def __call__(self, text: str) -> str:
        """What can be shown of the next piece of the stream; a sequence may begin in one and end in another."""
        text, self._begun = self._begun + text, ""
        return _SEQUENCE.sub(self._shown, text)

    def _shown(self, match: re.Match[str]) -> str:
        if match["style"] is not None:
            self.styled = match["style"].strip("0;") != ""
        elif match["begun"] and match.end() == len(match.string):
            self._begun = match["begun"][:_PIECE]
        return match["kept"] or ""
