"""What predictions are worth: the measures of GLUE, by scikit-learn and SciPy."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

MEASURES: Mapping[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "choice": ("accuracy",),
    "exact": ("accuracy",),
}
"""What each kind of task measures; the first is its score unless told."""

Numbers = NDArray[Any]


def of_classes(predicted: Numbers, true: Numbers, classes: int) -> dict[str, float]:
    """Accuracy, F1 (of class 1 where there are two, else the mean over classes) and Matthews' correlation.

    Shapes:
        predicted, true: [n], numbers of classes.

    Example:
        >>> of_classes(np.array([0, 1, 1, 1]), np.array([0, 1, 1, 0]), 2)
        {'accuracy': 0.75, 'f1': 0.8, 'matthews': 0.5773502691896258}
    """
    alike = len(np.union1d(true, predicted)) == 1  # scikit-learn warns, and says 0
    average = {"average": "binary"} if classes == 2 else {"average": "macro", "labels": range(classes)}
    return {
        "accuracy": float(accuracy_score(true, predicted)),
        "f1": float(f1_score(true, predicted, zero_division=0.0, **average)),
        "matthews": 0.0 if alike else float(matthews_corrcoef(true, predicted)),
    }


def of_numbers(predicted: Numbers, true: Numbers) -> dict[str, float]:
    """Pearson's and Spearman's correlation; 0 where one side is constant, which neither is defined for.

    Shapes:
        predicted, true: [n].
    """
    if np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(pearsonr(predicted, true).statistic),
        "spearman": float(spearmanr(predicted, true).statistic),
    }
