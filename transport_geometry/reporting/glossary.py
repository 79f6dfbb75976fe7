"""What the columns of tables mean: the last section of a report, and the tooltips of its page."""

import re

from transport_geometry.saes import sinks

# the twenty to know before any other, in the order in which a reader meets them
FIRST = {
    "hook": "the output of a transformer block: activations h, one vector of d_model numbers for each token",
    "SAE": "sparse autoencoder: h is rebuilt as ĥ from few of d_sae latents",
    "k": "number of latents that are active at a token (TopK); L0 is its mean where it varies",
    "budget": "number of tokens that an SAE is trained on",
    "error δ": "ĥ - h",
    "patch": "the model runs on with ĥ in place of h, and we measure what that changes",
    "dCE": "cross-entropy (mean loss of the next token, nats) with the patch minus without it",
    "CE_rec": "2 - (patched CE / clean CE): 1 for a perfect patch, 0 where CE doubles",
    "R²": "1 - SSE/SST over the evaluation set: the share of h that ĥ explains",
    "proxy": "a score that needs no patched run, such as R², cosine or SWD",
    "Euclidean control": "a plain error score without sinks or the top direction, which SWD has to beat",
    "SWD": "sensitivity-weighted distortion, the mean of (g·δ)², g the gradient of CE at the hook",
    "Fisher form": "δᵀGδ, G the output's Fisher information at the hook: twice the KL of a small error",
    "sink": f"a position of huge norm, which can determine R²; counted as sinks: {sinks.RULE}",
    "sinks clean": "patched at every position but sinks, which keep their activation",
    "kl_excess": "log of (KL of the SAE's error / KL of a random error of the same length)",
    "partial Spearman": "rank correlation with CE_rec among SAEs of one k",
    "here": "about these SAEs on these layers; units are documents and seeds",
    "in general": "about other layers of these models; units are hooks, six effective ones at least",
    "leaf": "the outcome, one word, of a decision rule that was fixed before the results",
}

TERMS = {
    "r2": "R² = 1 - SSE/SST over the evaluation set, SST about its one mean",
    "r2_nosink": "R² without sink positions",
    "r2_defl1": "R² without the first eigenvector of h's covariance",
    "r2_ln": "R² after LayerNorm of h and ĥ",
    "nmse": "SSE over the sum of |h|²",
    "nmse_tok": "mean over tokens of |δ|²/|h|², δ = ĥ - h",
    "mse": "mean squared error per dimension",
    "cosine": "mean over tokens of the cosine between h and ĥ",
    "relerr": "mean over tokens of |δ|/|h|",
    "swd_tok": "SWD: mean over tokens of (g·δ)², g the gradient of CE at the hook",
    "swd_seq": "SWD with all positions of a row moved together",
    "swd_sampled": "SWD with labels drawn from the model; half of it is KL for small errors",
    "gd_mean": "mean of g·δ: the first-order change of CE",
    "gd_abs": "mean of |g·δ|",
    "ce_rec": "CE_rec = 2 - patched CE / clean CE: 1 for a perfect patch, 0 where CE doubles",
    "ce_rec_sinkclean": "CE_rec where sink positions keep their activation",
    "dce": "patched CE minus clean CE, nats per token",
    "frac_zero": "share of what zero ablation costs that the patch does not: CE loss score, loss recovered",
    "frac_mean": "the same beside mean ablation",
    "kl": "KL of the clean from the patched next-token distribution, nats a token",
    "kl_excess": "log of (KL of the SAE's error / KL of a random error of the same length), sinks clean",
    "sink_share": "share of SST in sink positions",
    "calm_share": "the most of SST that one position has which is no sink",
    "word": "what is said of the SAE: the first finding that holds",
    "also": "other findings that hold",
    "dominated_by": "an SAE of the hook with no more latents active and a higher CE_rec",
    "alive": "share of latents that fire at all",
    "dead": "share of latents that never fire",
    "dense": "share of latents that fire on more than a tenth of the tokens",
    "l0": "latents active a token",
    "bits": "bits a token: which latents are active, and eight for each value",
    "bits_idx": "bits a token that name the active latents",
    "fed": "log of how much larger the error is in Fisher than in Euclidean geometry",
    "fed_nosink": "fed without sink positions",
    "fed_iso_nosink": "what fed_nosink is expected to be for a random error of the same length",
    "fed_excess": "fed_nosink minus fed_iso_nosink: kl_excess estimated from gradients",
    "rho": "fed_excess not as a log, over all positions",
    "partial Spearman": "rank correlation with the target among SAEs of one k",
    "minus r2": "partial Spearman minus that of R², with its 95% interval",
    "minus best control": "the same against the best Euclidean control, chosen on the other documents",
    "swd_tok minus it": "partial Spearman of SWD minus that of this score, 95% over documents",
    "pairs": "of SAEs of one model, k and budget whose CE_rec clearly differ",
    "rightly": "share of these pairs that the score orders as CE_rec does",
    "rightly, minus r2": "that share minus the share of R²",
    "rightly, sinks keep": "that share among SAEs trained with sinks",
    "rightly, sinks drop": "that share among SAEs trained without sinks",
    "φ": "how far what the score gets wrong at one layer correlates with what it gets wrong at the next",
    "hooks": "as how many independent hooks they count",
    "p_r2": "p that the difference from R² is none",
    "p_ctl": "p that the difference from the best control is none",
    "loho": "error of log10 dCE predicted for a hook that was left out",
    "bias": "mean of that error",
    "loho gain": "how much smaller it is than the best control's",
    "p_loho": "p that it is no smaller",
    "transfer gap": "what CE_rec differs by between models at one value of the score",
    "in range": "share of the larger model's values inside the smaller one's range",
    "same ranks as": "an earlier score that orders these SAEs alike",
    "Pearson": "correlation with the target",
    "Spearman": "rank correlation with the target, over all k",
    "k": "latents kept a token",
    "layer": "block whose output is the hook",
    "tokens": "that the SAE was trained on",
}


def columns(report: str) -> list[str]:
    """Of the tables of a report in Markdown, each once."""
    lines = report.splitlines()
    heads = [line for line, rule in zip(lines, lines[1:]) if re.fullmatch(r"\|[-|]+\|", rule)]
    return list(dict.fromkeys(cell.strip() for head in heads for cell in head.strip("|").split("|")))


def with_glossary(report: str) -> str:
    """The report, and what the columns of its tables mean behind it."""
    lines = [f"- `{name}`: {TERMS[name]}" for name in sorted(columns(report)) if name in TERMS]
    return report.rstrip("\n") + "\n\n## Glossary\n\n" + "\n".join(lines) + "\n" if lines else report
