"""What runs in a container that was started before its step was known: a program of some 80 bytes, which needs nothing of the image. It reads one
message from its stdin, and makes the system calls that stand there, one after the other; the last of them is the step's. Pure."""

import platform
import struct
from collections.abc import Mapping, Sequence

BEGUN = b"\x06"
"""It says so on stdout when nothing but the step's own command is left to be called: whoever has not heard it knows that nothing has run."""
LARGEST, LONGEST = 1 << 20, (32 << 12) - 1
"""Bytes of a message, and of one text in it: of both the kernel takes as much for a command and its environment."""

_CODE_AT, _MESSAGE_AT = 0x400000, 0x600000
_OPEN, _CLOSE, _WRITE, _CHDIR, _EXECVE = 2, 3, 1, 80, 59
_CODE = bytes.fromhex(
    "bd00006000"  # start:  mov  ebp, MESSAGE
    "31db"  #               xor  ebx, ebx                   read so far
    "31c0"  # more:         xor  eax, eax                   read(0, MESSAGE + ebx, LARGEST - ebx)
    "31ff"  #               xor  edi, edi
    "488d741d00"  #         lea  rsi, [rbp + rbx]
    "ba00001000"  #         mov  edx, LARGEST
    "29da"  #               sub  edx, ebx
    "0f05"  #               syscall
    "85c0"  #               test eax, eax
    "7e2c"  #               jle  end                        nobody is there any more
    "01c3"  #               add  ebx, eax
    "83fb08"  #             cmp  ebx, 8
    "72e3"  #               jb   more
    "483b5d00"  #           cmp  rbx, [rbp]                 the message begins with its size
    "72dd"  #               jb   more
    "4883c508"  #           add  rbp, 8
    "488b4500"  # next:     mov  rax, [rbp]                 then 32 bytes for each call
    "488b7d08"  #           mov  rdi, [rbp + 8]
    "488b7510"  #           mov  rsi, [rbp + 16]
    "488b5518"  #           mov  rdx, [rbp + 24]
    "0f05"  #               syscall
    "4883c520"  #           add  rbp, 32
    "4885c0"  #             test rax, rax
    "79e5"  #               jns  next
    "bf7d000000"  # end:    mov  edi, 125                   exit(125)
    "b83c000000"  #         mov  eax, 60
    "0f05"  #               syscall
)


def program() -> bytes | None:
    """An executable for this machine's engine; None where there is none."""
    if platform.machine() != "x86_64":
        return None
    at = 64 + 2 * 56
    header = struct.pack("<4s5B7xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 0, 2, 62, 1, _CODE_AT + at, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    code = struct.pack("<IIQQQQQQ", 1, 5, 0, _CODE_AT, _CODE_AT, at + len(_CODE), at + len(_CODE), 4096)
    memory = struct.pack("<IIQQQQQQ", 1, 6, 0, _MESSAGE_AT, _MESSAGE_AT, 0, LARGEST, 4096)
    return header + code + memory + _CODE


def message(argv: Sequence[str], environment: Mapping[str, str], directory: str) -> bytes | None:
    """Has the waiter become `argv`, with nothing on its stdin, as if it had been started so. It is a picture of the memory that it is read into.
    None for what the kernel may not take: an engine says why."""
    calls = 6 * 32
    table_at = _MESSAGE_AT + 8 + calls
    texts = [*argv, *(f"{key}={value}" for key, value in environment.items())]
    pointers = 8 * (len(texts) + 2)
    data, places = bytearray(), []
    for text in (*(each.encode() for each in (*texts, directory)), b"/dev/null", BEGUN):
        if len(text) > LONGEST or b"\0" in text:
            return None
        places.append(table_at + pointers + len(data))
        data += text + b"\0"
    *here, where, null, begun = places
    end = len(argv)
    table = [*here[:end], 0, *here[end:], 0]
    made = [
        (_CLOSE, 0, 0, 0),
        (_OPEN, null, 0, 0),
        (_CHDIR, where, 0, 0),
        (_WRITE, 1, begun, 1),
        (_EXECVE, here[0], table_at, table_at + 8 * (end + 1)),
        (-1, 0, 0, 0),
    ]
    body = b"".join(struct.pack("<qQQQ", *call) for call in made) + struct.pack(f"<{len(table)}Q", *table) + bytes(data)
    return struct.pack("<Q", 8 + len(body)) + body if 8 + len(body) <= LARGEST else None
