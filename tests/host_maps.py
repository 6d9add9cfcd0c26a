"""What the tests of the host backend share."""

PAGE = 1 << 16


def maps_of(reservation):
    """The kernel's mappings inside a reservation, as (pages, permissions)."""
    found = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, permissions = line.split()[:2]
            start, end = (int(text, 16) for text in span.split("-"))
            start = max(start, reservation.address)
            end = min(end, reservation.address + reservation.nbytes)
            if start < end:
                found.append(((end - start) // PAGE, permissions))
    return found
