"""How often tokens are used, and how re-weighting changes what each counts for."""

from __future__ import annotations

import torch

from moe_compiler.analysis import Analysis, TokenFrequencies
from moe_compiler.passes.significance import token_weights
from moe_compiler.report.figure import OKABE_ITO, Figure, Text, canvas, finish, grid, shown_of, styled

SHOWN_DATASETS = 8


def token_utilization(analysis: Analysis) -> Figure:
    """Token utilization before and after re-weighting, by rank (MoQa, arXiv 2503.21135v1, figure 2)."""
    top_k = next(iter(analysis.layers.values())).top_k
    shown = dict(list(analysis.tokens.items())[:SHOWN_DATASETS])
    columns = min(3, len(shown))
    with canvas(1 + 3.4 * columns, 0.7 + 2.7 * -(-len(shown) // columns)) as picture:
        for axes, (name, tokens) in zip(grid(picture, len(shown), columns, sharey=True), shown.items(), strict=True):
            rank = torch.arange(1, len(tokens.counts) + 1)
            before = tokens.utilization(top_k)
            after = before * weights_by_rank(tokens, analysis.alpha)
            law = tokens.law
            axes.loglog(rank, before, color=OKABE_ITO[0], linewidth=1.8, label="before")
            axes.loglog(rank, after, color=OKABE_ITO[4], linewidth=1.8, label="after")
            axes.loglog(
                rank, top_k * law(rank), color="black", linestyle="--", linewidth=0.9, label="fitted law, before"
            )
            axes.set_title(f"{name}: C = {law.C:.3f}, β = {law.beta:.2f}", fontsize=9)
            axes.set_xlabel("rank of the token")
            axes.set_ylabel("utilization (times per token)")
            styled(axes, "both")
        handles, names = axes.get_legend_handles_labels()
        picture.legend(handles, names, loc="outside upper center", ncols=3)
        used = "with" if analysis.reweighted else "without"
        return finish(
            picture,
            Text(
                "token-utilization",
                "Token utilization before and after re-weighting",
                "Utilization U = k·f of each token (how often some expert works on it, per token of the dataset), f "
                "the token's relative frequency, against the token's rank; the dashed law is f = C·rank^(-β), fitted "
                "by least squares on logarithms (MoQa's equation 1). After: U times the token weight "
                f"(f(rank)/f(1))^α with α = {analysis.alpha:g} (MoQa's equation 2, in the decreasing form that its "
                f"text asks for). The statistics of this model were collected {used} these weights. MoQa's figure 2."
                + shown_of(len(shown), len(analysis.tokens), "datasets"),
                f"Falling curves on logarithmic axes for {', '.join(shown)}.",
            ),
        )


def weights_by_rank(tokens: TokenFrequencies, alpha: float) -> torch.Tensor:
    """`(V',)` the weight of each token of a dataset in the order of `TokenFrequencies.ids`."""
    return token_weights(tokens.counts, alpha)
