"""Intervals, an exact test and corrections for many tests, of a few paired differences.

SciPy does the work, but for two things. Holm's correction is not in it. Its sign-flip test takes sums as tied that are
within 2e-14 of the *observed* sum: where the differences cancel to round-off that is no tolerance at all, and the p
comes out too small. See docs/statistics.md for what each number can and can't say.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from adapterzoo.errors import count

LEVEL = 0.95
ALPHA = 0.05
BCA_FROM = 20
"""Values from which an interval is BCa; below, its cover is worse than that of Student's t."""
RESAMPLES = 9_999
# Metrics are often float32: what differs by less, relative to the metric's size, is equal.
_EQUAL = 1e-6
# Above this many pairs two halves of 2^20 sums no longer hold all patterns, and signs are drawn instead.
_EXACT = 40
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Args:
        mean: NaN of no values.
        low: NaN below two values.
        high: likewise.
        method: "t", "BCa", "equal" (all values are equal, the interval is that value) or "" (no interval).
    """

    mean: float
    low: float
    high: float
    method: str


def interval(values: ArrayLike, scale: float | None = None) -> Interval:
    """Mean and 95 % interval: Student's t below 20 values, BCa (bias-corrected, accelerated bootstrap) from 20 on.

    mean ± t(0.975, n − 1) · s / √n

    Args:
        values: one a seed: [n]. All finite.
        scale: the size of the metric, by which "equal" is judged; the largest absolute value if None.

    Returns:
        Without an interval for fewer than two values; values that are all equal say so instead.

    Example:
        >>> found = interval([0.25, 0.5, 0.75])
        >>> print(f"{found.mean} [{found.low:.4f}, {found.high:.4f}] by {found.method}")
        0.5 [-0.1210, 1.1210] by t
        >>> interval([0.5, 0.5, 0.5]).method
        'equal'

    Source:
        DiCiccio & Efron, Bootstrap confidence intervals, Statistical Science 11 (1996).
    """
    sample = _sample(values)
    mean = float(sample.mean()) if len(sample) else math.nan
    if len(sample) < 2:
        return Interval(mean, math.nan, math.nan, "")
    if all_equal(sample, scale):
        return Interval(mean, mean, mean, "equal")
    return t_interval(sample) if len(sample) < BCA_FROM else bca_interval([sample])


def t_interval(values: ArrayLike) -> Interval:
    """Student's t interval of at least two values: [n]."""
    sample = _sample(values)
    n, mean = len(sample), float(sample.mean())
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * sample.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, "t")


def bca_interval(samples: Sequence[ArrayLike], weights: Sequence[float] = (1.0,)) -> Interval:
    """BCa interval of a weighted mean of the means of independent samples; the same draws at every call.

    Args:
        samples: each [n_k], not all of their values equal.
        weights: one a sample, of sum 1.
    """
    data = [_sample(values) for values in samples]

    def mean(*resampled: Values, axis: int = -1) -> Values:
        return np.asarray(sum(w * part.mean(axis=axis) for w, part in zip(weights, resampled, strict=True)))

    batch = max(1, 2**22 // max(map(len, data)))  # 32 MiB at a time, however many examples
    found = stats.bootstrap(
        data, mean, n_resamples=RESAMPLES, batch=batch, vectorized=True, confidence_level=LEVEL, method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return Interval(float(mean(*data)), float(found.low), float(found.high), "BCa")


def all_equal(values: ArrayLike, scale: float | None = None) -> bool:
    """Whether values [n] differ by no more than one part in a million of the metric's size."""
    sample = _sample(values)
    return bool(np.ptp(sample) <= _EQUAL * _scale(sample, scale))


def sign_flip(differences: ArrayLike, scale: float | None = None) -> float:
    """Two-sided p of the sign-flip test: of two that are alike, a difference could as well have its other sign.

    p = share of all 2ⁿ sign patterns whose absolute sum is no smaller than the observed one

    Exact up to 40 pairs: the sums of one half of the differences are sorted, and those of the other half looked up in
    them. Beyond, 9,999 patterns are drawn, and the observed one counts as one more.

    Args:
        differences: one a pair: [n].
        scale: the size of the metric, by which ties are judged; the largest absolute difference if None.

    Returns:
        At least 2^(1 − n); 1 for one pair, and where nothing differs; NaN without pairs.

    Example:
        >>> sign_flip([1, 2, 3, 4, 5, 6])
        0.03125
        >>> sign_flip([1, -1, 2, -2])
        1.0

    Source:
        Fisher, The Design of Experiments (1935), section 21; Pitman, JRSS supplement 4 (1937).

    Deviations:
        Sums within n / 10⁶ of the metric's size count as tied, since metrics come in float32; that makes p larger.
    """
    sample = _sample(differences)
    n = len(sample)
    if n == 0:
        return math.nan
    least = abs(sample.sum()) - n * _EQUAL * _scale(sample, scale)
    if least <= 0:
        return 1.0
    if n > _EXACT:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(RESAMPLES, n))
        return float((np.count_nonzero(np.abs(signs @ sample) >= least) + 1) / (RESAMPLES + 1))
    first, second = _sums(sample[: n // 2]), np.sort(_sums(sample[n // 2 :]))
    above = len(second) - np.searchsorted(second, least - first, side="left")
    return float(2 * above.sum() / 2**n)  # the patterns come in pairs of opposite sums


def _sums(values: Values) -> Values:
    """The sums of all sign patterns of values [k]: [2^k]."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def holm(p: Iterable[float]) -> Values:
    """Adjusted p by Holm's step-down: none of the tests is called by chance, with probability 95 %.

    p̃₍ᵢ₎ = max over j ≤ i of min(1, (m − j + 1) p₍ⱼ₎)

    Args:
        p: of all m tests that were planned: [m]; NaN for one that could not be made, which counts in m.

    Returns:
        [m], NaN where p is.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        array([0.03, 0.06, 0.06])

    Source:
        Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6 (1979).
    """
    given = np.array(list(p), dtype=float)
    order = np.argsort(given, kind="stable")  # NaN last
    stepped = np.maximum.accumulate(np.minimum(1.0, given[order] * np.arange(len(given), 0, -1)))
    adjusted = np.empty_like(given)
    adjusted[order] = stepped
    return np.where(np.isnan(given), np.nan, adjusted)


def benjamini_hochberg(p: Iterable[float]) -> Values:
    """Adjusted p that control the false discovery rate: of the tests that are called, 5 % are expected to be false.

    Args:
        p: of all m tests that were planned: [m]; NaN for one that could not be made, which counts as 1.

    Returns:
        [m], NaN where p is.

    Source:
        Benjamini & Hochberg, Controlling the false discovery rate, JRSS B 57 (1995); SciPy's false_discovery_control.
    """
    given = np.array(list(p), dtype=float)
    if not len(given):
        return given
    adjusted = stats.false_discovery_control(np.where(np.isnan(given), 1.0, given), method="bh")
    return np.where(np.isnan(given), np.nan, adjusted)


def needed_pairs(tests: int) -> int:
    """The fewest pairs n with m · 2^(1 − n) <= 0.05: fewer can't reach a corrected p of 0.05, whatever they show.

    Args:
        tests: m, corrected together; at least 1.

    Example:
        >>> [needed_pairs(m) for m in (1, 4, 12)]
        [6, 8, 9]
    """
    if tests < 1:
        raise ValueError(f"{tests} tests need no pairs; ask for at least 1")
    return next(n for n, _ in enumerate(repeat(None)) if tests * 2.0 ** (1 - n) <= ALPHA)


def too_small(tests: int, pairs: int) -> str | None:
    """A sentence where there are too few pairs for any star, else None; for no tests None.

    Args:
        tests: m, corrected together.
        pairs: n, of each test.

    Example:
        >>> print(too_small(4, 5))
        n too small: 4 tests corrected together need 8 pairs, and there are 5 (the smallest p they can reach is 0.25)
        >>> too_small(4, 8)
    """
    if tests < 1 or pairs >= needed_pairs(tests):
        return None
    best = min(1.0, tests * 2.0 ** (1 - pairs))
    together = "1 test needs" if tests == 1 else f"{tests:,} tests corrected together need"
    return (
        f"n too small: {together} {count(needed_pairs(tests), 'pair')}, and there {'is' if pairs == 1 else 'are'} "
        f"{pairs} (the smallest p they can reach is {best:.2g})"
    )


def effect_size(differences: ArrayLike, scale: float | None = None) -> float:
    """Cohen's d_z with Hedges' correction for small samples: how many of its own deviations the difference is.

    d_z = J(n − 1) · mean / s,    J(k) = Γ(k / 2) / (√(k / 2) Γ((k − 1) / 2))

    Args:
        differences: one a pair: [n].
        scale: the size of the metric, by which "equal" is judged.

    Returns:
        NaN below three pairs, for which J is zero or undefined, and where the differences do not vary.

    Source:
        Hedges, Distribution theory for Glass's estimator of effect size, J. Educ. Statist. 6 (1981).
    """
    sample = _sample(differences)
    k = len(sample) - 1
    if k < 2 or all_equal(sample, scale):
        return math.nan
    correction = math.exp(math.lgamma(k / 2) - math.lgamma((k - 1) / 2)) / math.sqrt(k / 2)
    return float(correction * sample.mean() / sample.std(ddof=1))


def front(values: ArrayLike, costs: ArrayLike, maximise: bool = True) -> NDArray[np.bool_]:
    """Which points no other beats: none is as good at no more cost and better in one of both. NaN is on no front.

    Args:
        values: [n].
        costs: [n], less is better.
        maximise: whether more of the value is better.

    Example:
        >>> front([0.8, 0.9, 0.85], [1, 2, 3])
        array([ True,  True, False])
    """
    value = np.asarray(values, dtype=float) * (1 if maximise else -1)
    cost = np.asarray(costs, dtype=float)
    as_good = (value[:, None] >= value) & (cost[:, None] <= cost)
    better = (value[:, None] > value) | (cost[:, None] < cost)
    return np.asarray(~(as_good & better).any(axis=0) & np.isfinite(value) & np.isfinite(cost))


def _sample(values: ArrayLike) -> Values:
    return np.asarray(values, dtype=float).reshape(-1)


def _scale(sample: Values, scale: float | None) -> float:
    return float(np.abs(sample).max(initial=0.0)) if scale is None else scale
