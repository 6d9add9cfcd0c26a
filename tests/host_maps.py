"""What the tests of the host backend share."""

PAGE = 1 << 16


def maps_of(reservation):
    """The kernel's mappings inside a reservation, as (pages, permissions); like ones are joined.

    The kernel need not join neighbours that differ in more than their permissions.
    """
    found = []
    for nbytes, permissions, _ in _inside(reservation, "/proc/self/maps"):
        before = found.pop()[0] if found and found[-1][1] == permissions else 0
        found.append((before + nbytes // PAGE, permissions))
    return found


def lines_of(reservation):
    """The number of the kernel's mappings inside a reservation."""
    return len(_inside(reservation, "/proc/self/maps"))


def rss_of(reservation):
    """Bytes of private memory inside a reservation, by ``smaps``; a memfd's pages are not."""
    return sum(rss for _, permissions, rss in _inside(reservation, "/proc/self/smaps")
               if permissions.endswith("p"))  # fmt: skip


def _inside(reservation, path):
    """``[bytes, permissions, resident bytes]`` of each mapping that lies in a reservation."""
    found, inside = [], False
    with open(path) as maps:
        for line in maps:
            word = line.split(maxsplit=1)[0]
            if word == "Rss:" and inside:
                found[-1][2] = int(line.split()[1]) * 1024
            elif not word.endswith(":"):
                start, end = (int(text, 16) for text in word.split("-"))
                start = max(start, reservation.address)
                end = min(end, reservation.address + reservation.nbytes)
                inside = start < end
                if inside:
                    found.append([end - start, line.split()[1], 0])
    return found
