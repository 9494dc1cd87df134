"""Packs that the store has and the index does not know: the database was lost, or put back as it was some time ago."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

import structlog

from libs.archives.pump import in_thread
from libs.blobstore.index import BlobIndex
from libs.blobstore.objects import ObjectMissing, Objects
from libs.blobstore.packs import FOOTER, InvalidPack, Pack, key, read_footer

logger = structlog.get_logger()

_AT_ONCE = 1000


async def adopt(objects: Objects, index: BlobIndex, threads: ThreadPoolExecutor) -> int:
    """How many. What is no pack is left alone; what is half written is to be collected. Raises LogUnavailable, StoreUnavailable.

    Looked up after it was listed: whatever is listed and not known then was written by nobody who lives, for names are not used again."""
    adopted = 0
    listing = objects.list()
    while keys := await in_thread(lambda: list(islice(listing, _AT_ONCE)), threads):
        listed = [(parts[0], parts[1]) for parts in (found.split("/") for found in keys) if len(parts) == 2]
        for team, name in await index.unknown(listed):
            try:
                pack = await in_thread(partial(_read, objects, key(team, name)), threads)
            except ObjectMissing:
                await index.abandon(team, name)
            except InvalidPack as error:
                logger.warning("an object in the store is no pack", key=key(team, name), why=str(error))
            else:
                adopted += await index.adopt(team, name, pack, partial(_is_there, objects, key(team, name), threads))
    return adopted


def _read(objects: Objects, key: str) -> Pack:
    return read_footer(*objects.end(key, FOOTER))


async def _is_there(objects: Objects, key: str, threads: ThreadPoolExecutor) -> bool:
    try:
        await in_thread(lambda: objects.end(key, 1), threads)
    except ObjectMissing:
        return False
    return True
