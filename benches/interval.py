"""How sure a ratio is."""

from __future__ import annotations

import math
import statistics

from scipy import stats


def interval(ratios: list[float]) -> list[float]:
    """Its mean within its 95 % interval, by Student's t of the logarithms: low, mean, high."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.mean(logs)
    off = stats.t.ppf(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return [math.exp(mean - off), math.exp(mean), math.exp(mean + off)]
