"""Tar's 512-byte headers: v7, ustar, pax and GNU are read; ustar with pax extensions is written."""

from typing import NamedTuple

from libs.archives.rules import ArchiveRefused

BLOCK = 512
END = bytes(2 * BLOCK)
_OCTAL_SIZE = 8 << 30


class Header(NamedTuple):
    """One header block, as it stands: names are not yet checked. `type` is tar's type letter."""

    name: bytes
    mode: int
    size: int
    type: bytes
    link: bytes


def padding(size: int) -> int:
    """How many zeros follow contents of `size` bytes."""
    return -size % BLOCK


def read_header(block: bytes) -> Header:
    """Raises ArchiveRefused for a block that is no tar header."""
    sums = sum(block) - sum(block[148:156]) + 8 * 32
    name = block[:100].partition(b"\0")[0]
    claimed = number(block[148:156], name)
    if claimed != sums and claimed != _signed_sum(block):
        raise ArchiveRefused(name, "has a damaged header")
    if block[257:265] == b"ustar\x0000" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    kind = block[156:157]
    if kind in (b"\0", b"0") and name.endswith(b"/"):
        kind = b"5"
    return Header(
        name=name,
        mode=number(block[100:108], name),
        size=number(block[124:136], name),
        type=kind,
        link=block[157:257].partition(b"\0")[0],
    )


def read_pax(records: bytes, member: bytes) -> dict[bytes, bytes]:
    """The records of an extended header: `<length> <key>=<value>\\n`, one after another. The map that sparse format 0.0 gives as many records comes
    as 0.1's one."""
    found: dict[bytes, bytes] = {}
    extents: list[bytes] = []
    at = 0
    while at < len(records):
        space = records.find(b" ", at, at + 20)
        digits = records[at:space]
        length = int(digits) if space > 0 and digits.isdigit() else 0
        record = records[at : at + length]
        key, equals, value = record[space + 1 - at : -1].partition(b"=")
        if length < 5 or len(record) != length or not equals or not record.endswith(b"\n"):
            raise ArchiveRefused(member, "has a damaged extended header")
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            extents.append(value)
        found[key] = value
        at += length
    if extents:
        found[b"GNU.sparse.map"] = b",".join(extents)
    return found


def header_size(name: bytes, kind: bytes, mode: int, size: int, link: bytes = b"") -> int:
    """Bytes of the header that `write_header` writes."""
    plain = len(name) <= 100 and len(link) <= 100 and size < _OCTAL_SIZE
    return BLOCK if plain else len(write_header(name, kind, mode, size, link))


def write_header(name: bytes, kind: bytes, mode: int, size: int, link: bytes = b"") -> bytes:
    """The header of a member, with an extended one before it where the plain one has no room.
    Owner and times are zero: the same tree gives the same bytes."""
    extended: list[tuple[bytes, bytes]] = []
    if len(name) > 100:
        extended.append((b"path", name))
    if len(link) > 100:
        extended.append((b"linkpath", link))
    if size >= _OCTAL_SIZE:
        extended.append((b"size", b"%d" % size))
    if not extended:
        return _block(name, kind, mode, size, link)
    if not (_is_utf8(name) and _is_utf8(link)):
        extended.insert(0, (b"hdrcharset", b"BINARY"))
    records = b"".join(_record(key, value) for key, value in extended)
    head = _block(b"././@PaxHeader", b"x", 0o644, len(records), b"")
    return b"".join((head, records, bytes(padding(len(records))), _block(name[:100], kind, mode, size if size < _OCTAL_SIZE else 0, link[:100])))


def _block(name: bytes, kind: bytes, mode: int, size: int, link: bytes) -> bytes:
    start = b"%-100b%07o\x000000000\x000000000\x00%011o\x0000000000000\x00" % (b"", mode, size)
    start = name.ljust(100, b"\0") + start[100:]
    block = start + b" " * 8 + kind + link.ljust(100, b"\0") + b"ustar\x0000"
    block = block.ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\x00 " % sum(block) + block[156:]


def _record(key: bytes, value: bytes) -> bytes:
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) > len(str(rest)):
        length += 1
    return b"%d %b=%b\n" % (length, key, value)


def number(field: bytes, member: bytes) -> int:
    """A header's number, octal or GNU's binary. Raises ArchiveRefused."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    if digits.strip(b"01234567"):
        raise ArchiveRefused(member, "has a damaged header")
    return int(digits, 8) if digits else 0


def _signed_sum(block: bytes) -> int:
    """Some old tars summed signed bytes."""
    return sum(byte - 256 if byte > 127 else byte for byte in block[:148] + b" " * 8 + block[156:])


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True
