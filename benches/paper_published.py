"""What the two papers print, figure by figure; nothing here is measured.

DynaMo is arXiv 2503.21135v3, MoQa is v1 of the same number. Figures of theirs that are only drawn are not here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

DYNAMO, MOQA = "DynaMo (arXiv 2503.21135v3)", "MoQa (arXiv 2503.21135v1)"
ORIGINAL, GPTQ_3, GPTQ_2, RANDOM = "original", "GPTQ-3", "GPTQ-2", "random half (MoEPTQ-R)"
OURS = {DYNAMO: "DynaMo", MOQA: "MoQa"}
TASKS = ("arc_challenge", "arc_easy", "rte", "piqa", "copa", "cb")
"""In the order of the papers' columns."""

COLLAPSE = math.inf
"""MoQa writes AC, accuracy collapse."""

SPEEDUP = (2.91, 3.08)
"""Tokens per second over the FP16 model, the least and the most of four models on an A100 (DynaMo, VI-C, figure 8)."""
ANALYSIS_SHARE = (0.1490, 0.1733)
"""Of the offline time, the analysis (DynaMo, VI-E, figure 9)."""
SWITCH_SHARE = (0.0773, 0.1068)
"""Of the online time, the switching; the rest is generating 1,024 tokens (DynaMo, VI-E, figure 9)."""
CACHE_MB, CACHE_SHARE = 152.8, 0.0102
"""The channel cache of a 7B model, and its share of the weights (DynaMo, V-A)."""


@dataclass(frozen=True)
class Perplexities:
    """One line of a table of perplexities.

    Attributes:
        bits: as the table's column #Bits has it.
        wiki: on WikiText-2.
        c4: on C4.
    """

    bits: float
    wiki: float
    c4: float


@dataclass(frozen=True)
class Accuracies:
    """One line of a table of zero-shot accuracies.

    Attributes:
        bits: as the table's column #Bits has it.
        accuracy: per cent, in the order of `TASKS`.
    """

    bits: float
    accuracy: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean of the line's six accuracies. The averages the papers print are not always that."""
        return sum(self.accuracy) / len(self.accuracy)


PERPLEXITY: Mapping[str, Mapping[str, Mapping[str, Perplexities]]] = {
    DYNAMO: {
        "OLMoE": {
            ORIGINAL: Perplexities(16, 7.41, 11.42),
            GPTQ_3: Perplexities(3, 11.65, 18.86),
            RANDOM: Perplexities(3.26, 15.44, 26.04),
            "DynaMo": Perplexities(2.95, 9.64, 15.31),
        },
        "MoE-Girl": {
            ORIGINAL: Perplexities(16, 8.43, 13.13),
            GPTQ_3: Perplexities(3, 12.77, 21.38),
            RANDOM: Perplexities(3.26, 16.88, 29.40),
            "DynaMo": Perplexities(2.89, 10.47, 17.87),
        },
        "Qwen1.5-MoE": {
            ORIGINAL: Perplexities(16, 7.02, 10.03),
            GPTQ_3: Perplexities(3, 10.99, 20.84),
            RANDOM: Perplexities(3.35, 9.93, 18.49),
            "DynaMo": Perplexities(3.05, 8.51, 14.24),
        },
        "DeepSeek-MoE": {
            ORIGINAL: Perplexities(16, 7.36, 9.22),
            GPTQ_3: Perplexities(3, 10.47, 15.19),
            RANDOM: Perplexities(3.31, 8.49, 15.61),
            "DynaMo": Perplexities(2.98, 7.94, 11.49),
        },
    },
    MOQA: {
        "OLMoE": {
            ORIGINAL: Perplexities(16, 7.41, 11.42),
            GPTQ_3: Perplexities(3, 11.65, 18.86),
            RANDOM: Perplexities(3.26, 15.44, 26.04),
            GPTQ_2: Perplexities(2, COLLAPSE, COLLAPSE),
            "MoQa": Perplexities(2.95, 10.59, 18.42),
        },
        "MoE-Girl": {
            ORIGINAL: Perplexities(16, 8.43, 13.13),
            GPTQ_3: Perplexities(3, 12.77, 21.38),
            RANDOM: Perplexities(3.26, 16.88, 29.40),
            GPTQ_2: Perplexities(2, COLLAPSE, COLLAPSE),
            "MoQa": Perplexities(2.89, 11.24, 20.89),
        },
        "Qwen1.5-MoE": {
            ORIGINAL: Perplexities(16, 7.02, 10.03),
            GPTQ_3: Perplexities(3, 10.99, 20.84),
            RANDOM: Perplexities(3.36, 9.93, 18.49),
            GPTQ_2: Perplexities(2, COLLAPSE, COLLAPSE),
            "MoQa": Perplexities(3.15, 8.51, 15.24),
        },
    },
}
"""By paper, model and method: table I of DynaMo, table 2 of MoQa."""

ZERO_SHOT: Mapping[str, Mapping[str, Mapping[str, Accuracies]]] = {
    DYNAMO: {
        "OLMoE": {
            ORIGINAL: Accuracies(16, (29.69, 48.48, 54.51, 61.86, 71.00, 41.07)),
            GPTQ_3: Accuracies(3, (25.34, 41.12, 51.99, 58.81, 62.00, 39.29)),
            RANDOM: Accuracies(3.26, (24.83, 38.38, 50.54, 56.86, 65.00, 42.86)),
            "DynaMo": Accuracies(2.97, (25.85, 43.52, 54.15, 58.87, 65.00, 46.43)),
        },
        "MoE-Girl": {
            ORIGINAL: Accuracies(16, (31.31, 50.84, 55.95, 62.62, 66.00, 41.07)),
            GPTQ_3: Accuracies(3, (25.17, 38.80, 55.59, 60.33, 62.00, 39.28)),
            RANDOM: Accuracies(3.26, (24.23, 37.04, 53.06, 57.88, 59.00, 41.07)),
            "DynaMo": Accuracies(2.88, (26.02, 44.87, 53.43, 61.32, 62.00, 44.64)),
        },
        "Qwen1.5-MoE": {
            ORIGINAL: Accuracies(16, (33.11, 51.30, 71.84, 72.47, 81.00, 25.01)),
            GPTQ_3: Accuracies(3, (26.54, 39.44, 54.51, 63.87, 72.00, 24.76)),
            RANDOM: Accuracies(3.36, (24.23, 37.04, 53.07, 63.22, 67.00, 24.37)),
            "DynaMo": Accuracies(3.04, (27.13, 43.69, 55.23, 68.72, 75.00, 33.93)),
        },
        "DeepSeek-MoE": {
            ORIGINAL: Accuracies(16, (40.61, 71.55, 54.51, 76.22, 82.00, 41.07)),
            GPTQ_3: Accuracies(3, (33.62, 62.04, 52.34, 73.94, 78.00, 44.64)),
            RANDOM: Accuracies(3.36, (31.99, 60.06, 53.43, 69.42, 77.00, 41.07)),
            "DynaMo": Accuracies(2.99, (34.71, 64.19, 53.92, 75.34, 81.00, 47.87)),
        },
    },
    MOQA: {
        "OLMoE": {
            ORIGINAL: Accuracies(16, (29.69, 48.48, 54.51, 61.86, 71.00, 41.07)),
            GPTQ_3: Accuracies(3, (25.85, 43.52, 51.99, 58.81, 62.00, 39.29)),
            RANDOM: Accuracies(3.26, (24.83, 38.38, 50.54, 56.86, 65.00, 42.86)),
            "MoQa": Accuracies(2.95, (25.34, 41.12, 54.15, 58.87, 65.00, 46.43)),
        },
        "MoE-Girl": {
            ORIGINAL: Accuracies(16, (31.31, 50.84, 55.95, 62.62, 66.00, 41.07)),
            GPTQ_3: Accuracies(3, (25.17, 44.87, 55.59, 60.33, 62.00, 39.28)),
            RANDOM: Accuracies(3.26, (24.23, 37.04, 53.06, 57.88, 59.00, 41.07)),
            "MoQa": Accuracies(2.89, (26.02, 38.80, 53.43, 61.32, 62.00, 44.64)),
        },
        "Qwen1.5-MoE": {
            ORIGINAL: Accuracies(16, (33.11, 51.30, 71.84, 72.47, 81.00, 25.01)),
            GPTQ_3: Accuracies(3, (27.13, 43.69, 55.23, 63.87, 72.00, 24.76)),
            RANDOM: Accuracies(3.36, (24.23, 37.04, 53.07, 63.22, 67.00, 24.37)),
            "MoQa": Accuracies(3.15, (26.54, 39.44, 54.51, 68.72, 75.00, 33.93)),
        },
    },
}
"""By paper, model and method: table II of DynaMo, table 3 of MoQa, where GPTQ-2 collapses on every task."""

ABLATION: Mapping[str, Mapping[str, tuple[float, float, float]]] = {
    "OLMoE": {"Wiki": (11.65, 10.78, 9.64), "CB": (39.29, 42.79, 46.43)},
    "MoE-Girl": {"Wiki": (12.77, 11.23, 10.47), "CB": (39.28, 42.66, 44.64)},
    "Qwen1.5-MoE": {"Wiki": (10.99, 9.82, 8.51), "CB": (24.76, 29.69, 33.93)},
    "DeepSeek-MoE": {"Wiki": (10.47, 8.52, 7.94), "CB": (44.64, 45.91, 47.87)},
}
"""DynaMo, table III: by model and task, GPTQ, only the baseline quantization, and with the switching.
Perplexity on WikiText-2, per cent on CB."""
