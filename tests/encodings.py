"""What gives a value away: each listed encoding of it, made by other means than the worker's own."""

import json
import string
import urllib.parse


def encodings(value: str) -> list[bytes]:
    """All of them that have at least 4 bytes."""
    raw = value.encode()
    bits = "".join(f"{byte:08b}" for byte in raw)
    alphabet = string.ascii_uppercase + string.ascii_lowercase + string.digits
    found = [raw, json.dumps(value)[1:-1].encode(), raw.hex().encode(), raw.hex().upper().encode(), urllib.parse.quote(value, safe="").encode()]
    found.append(urllib.parse.quote_plus(value).encode())
    for more in ("+/", "-_"):
        for skipped in (0, 4, 2):  # bits which the byte before has a part in: at the three alignments
            sixes = [bits[at : at + 6] for at in range(skipped, len(bits), 6)]
            found.append("".join((alphabet + more)[int(six, 2)] for six in sixes if len(six) == 6).encode())
    return [text for text in found if len(text) >= 4]
