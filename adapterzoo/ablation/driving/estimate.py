"""How long the rest of a grid takes, from how long its runs have taken."""

from collections.abc import Mapping, Sequence
from statistics import median


def estimate(seconds: Mapping[str, Sequence[float]], left: Mapping[str, int], slots: int) -> float | None:
    """Seconds until all is done; None before anything is known.

    Args:
        seconds: of the runs that have ended, by role.
        left: how many runs are left, by role; those of a role that none has ended of count as the others do.
        slots: how many run at a time.

    Example:
        >>> estimate({"tune": [10, 12, 50]}, {"tune": 4, "report": 6}, slots=2)
        60.0
        >>> estimate({}, {"tune": 4}, slots=2) is None
        True
    """
    known = {role: median(found) for role, found in seconds.items() if found}
    if not known:
        return None
    other = median(known.values())
    return sum(number * known.get(role, other) for role, number in left.items()) / max(1, slots)


def duration(seconds: float | None) -> str:
    """A time to read: 45 s, 12 min, 3.5 h, 2.1 days.

    Example:
        >>> [duration(s) for s in (None, 45, 720, 12600, 180000)]
        ['?', '45 s', '12 min', '3.5 h', '2.1 days']
    """
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 129_600 else f"{seconds / 86_400:.1f} days"
