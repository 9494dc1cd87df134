"""Where a tree's symbolic links lead: none may lead out of it, neither by its text nor through other links."""

from collections.abc import Mapping

from libs.archives.rules import ArchiveRefused, LimitExceeded

_MAX_FOLLOWED = 40
"""Links that lead through one another, as in Linux."""
_MAX_COMPONENTS = 256
_COMPONENTS_PER_LINK, _FREE_COMPONENTS = 16, 1 << 16
"""All links' targets together: following them costs time by components."""


class _Folder:
    """A folder that links lie in, directly or deeper; the rest of the tree does not matter to where links lead."""

    __slots__ = ("children", "parent")

    def __init__(self, parent: "_Folder | None") -> None:
        self.parent = parent
        self.children: dict[bytes, _Folder | _Link] = {}


class _Link:
    __slots__ = ("end", "parent", "path", "target")

    def __init__(self, parent: _Folder, path: bytes, target: bytes) -> None:
        self.parent, self.path, self.target = parent, path, target
        self.end: _End | None = None


_End = tuple[_Folder, int, int]
"""A place in the tree: a folder that links lie in, how many levels below it (where none do), and how many links were followed to come there."""


def refuse_escapes(links: Mapping[bytes, bytes]) -> None:
    """Refuse links (path → target; paths are clean, and none lies under another) that lead out of the tree, in a circle or through too many others.
    Each way is walked component by component, so no length of it hides where it ends, and once. Raises ArchiveRefused."""
    components = sum(target.count(b"/") + 1 for target in links.values())
    if components > _FREE_COMPONENTS + _COMPONENTS_PER_LINK * len(links):
        raise LimitExceeded(b"", f"has links of more than {_COMPONENTS_PER_LINK} components each, taken together")
    root = _Folder(None)
    found: list[_Link] = []
    for path, target in links.items():
        if target.startswith(b"/"):
            raise ArchiveRefused(path, "is a link to an absolute path")
        if target.count(b"/") >= _MAX_COMPONENTS:
            raise ArchiveRefused(path, f"is a link of more than {_MAX_COMPONENTS} components")
        *folders, name = path.split(b"/")
        at = root
        for part in folders:
            inner = at.children.get(part)
            if inner is None:
                inner = at.children[part] = _Folder(at)
            assert isinstance(inner, _Folder), "a link under a link"
            at = inner
        link = at.children[name] = _Link(at, path, target)
        found.append(link)
    for link in found:
        _end(link, ())


def _end(link: _Link, through: tuple[_Link, ...]) -> _End:
    """Where a link ends."""
    if link.end is not None:
        return link.end
    if link in through or len(through) >= _MAX_FOLLOWED:
        raise _circle(through[0])
    at, below, followed = link.parent, 0, 1
    for part in link.target.split(b"/"):
        if part in (b"", b"."):
            continue
        if part == b"..":
            if below:
                below -= 1
            elif at.parent is None:
                raise ArchiveRefused(link.path, "is a link that leads out of the tree")
            else:
                at = at.parent
        elif below or (inner := at.children.get(part)) is None:
            below += 1
        elif isinstance(inner, _Folder):
            at = inner
        else:
            at, below, more = _end(inner, (*through, link))
            followed += more
            if followed > _MAX_FOLLOWED:
                raise _circle(link)
    link.end = at, below, followed
    return link.end


def _circle(link: _Link) -> ArchiveRefused:
    return ArchiveRefused(link.path, f"is a link that leads in a circle or through more than {_MAX_FOLLOWED} links")
