"""One who says very much does not drown the others."""

from itertools import islice

from libs.bus.mailbox import LISTEN_BUFFER, Arrived, Mailbox


async def heard(mailbox: Mailbox, number: int) -> list[str]:
    messages = mailbox.messages()
    try:
        return [(await anext(messages)).subject for _ in range(number)]
    finally:
        await messages.aclose()


async def test_who_says_too_much_loses_its_own_words_and_waits_its_turn():
    """One worker's flood must not make the others count as silent."""
    mailbox = Mailbox()
    others = [f"presence.w{number}" for number in range(3)]
    for subject in others:
        assert mailbox.put(Arrived(subject, b""))
    for _ in range(3 * LISTEN_BUFFER):
        mailbox.put(Arrived("presence.liar", b""))
    assert not mailbox.put(Arrived("presence.late", b""))
    assert set(await heard(mailbox, 5)) == {*others, "presence.liar", "presence.late"}
    assert set(await heard(mailbox, LISTEN_BUFFER - 5)) == {"presence.liar"}


async def test_what_one_says_comes_in_order_and_the_newest_is_kept():
    mailbox = Mailbox()
    for number in range(LISTEN_BUFFER + 2):
        assert mailbox.put(Arrived("a", b"%d" % number)) == (number < LISTEN_BUFFER)
    messages = mailbox.messages()
    kept = [int((await anext(messages)).data) for _ in range(LISTEN_BUFFER)]
    await messages.aclose()
    assert kept == list(islice(range(LISTEN_BUFFER + 2), 2, None))
