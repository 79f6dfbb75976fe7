"""The audit: for SAEs that others trained, one row each, with every library's R^2 under its name, and the flag.

Shapes: S evaluation sequences, T positions of which T-1 are evaluated, N = S (T-1) tokens, d = d_model.
"""
from common import markdown

import numpy as np
import torch
from tqdm import tqdm

from formats import hub_name
from leaderboard import FLAG_COLUMNS, FLAG_TEXT

# What libraries call R^2, explained variance or 1 - FVU. `r2` itself is SAELens' since 6.30 (and the only one of them for which
# predicting the mean is 0, a constant error costs, and neither batches nor single tokens matter).
LIBRARIES = {
    "r2_saelens_legacy": "mean over tokens of 1 - |delta_t|^2 / |h_t - mean|^2 (SAELens until 6.29 and `_legacy`; e2e_sae)",
    "r2_sparsify": "1 - FVU of each batch about its own mean, averaged (a batch is a sequence here; sparsify: one of training)",
    "r2_dictionary_learning": "1 - sum_d var(delta) / sum_d var(h): a constant error is free",
    "r2_saebench": "1 - E|delta|^2 / (E|h|^2 - (E|h|^2 / d)^2): about 1 - NMSE",
    "r2_overcomplete": "1 - MSE / variance about one scalar mean",
    "r2_openai": "1 - mean over tokens of |delta_t|^2 / |h_t|^2",
    "r2_per_dim": "mean over dimensions of 1 - SSE_d / SST_d",
}


@torch.no_grad()
def r2_by_library(shared: dict, reconstructions: dict, device: torch.device) -> dict:
    """{name: {definition: value, definition_nosink: value}} over the evaluated positions. shared: `proxies.hook_statistics`."""
    h, sink = shared["h"][:, :-1].double(), shared["sink"]
    out = {}
    for name, reconstruction in tqdm(reconstructions.items(), desc="every library's R²", leave=False):
        one = lambda x: reconstruction.reconstruct(x)[2] if isinstance(reconstruction, torch.nn.Module) else reconstruction(x, shared["mean"])
        h_hat = torch.stack([one(x.to(device)).cpu() for x in shared["h"][:, :-1]]).double()
        out[name] = definitions(h, h_hat, torch.ones_like(sink)) | {f"{key}_nosink": v for key, v in definitions(h, h_hat, ~sink).items()}
    return out


def definitions(h: torch.Tensor, h_hat: torch.Tensor, keep: torch.Tensor) -> dict[str, float]:
    """LIBRARIES, of h and h_hat [S,T-1,d] in float64 at the positions keep [S,T-1]."""
    error = h_hat - h
    x, delta = h[keep], error[keep]
    n, d = x.shape
    centred = x - x.mean(0)
    sse_d, sst_d = delta.square().sum(0), centred.square().sum(0)
    sse, square = sse_d.sum(), x.square().sum() / n
    fvu = [e[k].square().sum() / (y[k] - y[k].mean(0)).square().sum() for y, e, k in zip(h, error, keep)]
    values = dict(
        r2_saelens_legacy=(1 - delta.square().sum(1) / centred.square().sum(1)).mean(),
        r2_sparsify=1 - torch.stack(fvu).mean(),
        r2_dictionary_learning=1 - (sse - delta.sum(0).square().sum() / n) / sst_d.sum(),
        r2_saebench=1 - sse / n / (square - (square / d) ** 2),
        r2_overcomplete=1 - sse / (x - x.mean()).square().sum(),
        r2_openai=1 - (delta.square().sum(1) / x.square().sum(1)).mean(),
        r2_per_dim=(1 - sse_d / sst_d).mean())
    return {name: value.item() for name, value in values.items()}


COLUMNS = (["sae", "model", "layer", "format", "trained_on", "basis", "fvu_as_said", "fvu_otherwise", "ctx", "bos", "d_sae", "k", "l0", "alive"]
           + [f"{name}{end}" for name in ("r2", *LIBRARIES) for end in ("", "_nosink")]
           + ["nmse_tok", "cosine", "ce_orig", "ce_recon", "dce", "ce_rec", "ce_rec_sinkclean", "frac_zero", "frac_mean", "kl", "swd_tok", "swd_seq",
              "swd_sampled", "rho", "fed", "fed_nosink", "fed_nosink_lo", "fed_nosink_hi", "flag", "fed_iso_nosink", "fed_excess", "fed_excess_lo",
              "fed_excess_hi", "kl_swd_ratio", "kl_swd_ratio_lo", "kl_swd_ratio_hi"])


def audit_rows(saes: list[dict], values: dict, settings: dict) -> list[dict]:
    """Of audit.csv, sorted by model, layer and name. saes: rows as `leaderboard.flagged` gives them; values {metric: [W,C]}."""
    rows = []
    for row, (lo, hi) in zip(saes, np.percentile(values["fed_nosink"][3:], [2.5, 97.5], axis=0).T):
        said = settings["saes"][row["sae"]]
        rows.append(row | {name: said[name] for name in ("format", "basis", "ctx", "bos", "unseen")} | {
            "trained_on": hub_name(said["model"]) if said["model"] else "not said", "k": row["k"] or "none", "fed_nosink_lo": lo, "fed_nosink_hi": hi})
    return rows


def warnings(rows: list[dict]) -> list[str]:
    """What makes a row's numbers other than they seem."""
    text = []
    for row in rows:
        if row["trained_on"] not in ("not said", row["model"]):
            text.append(f"{row['sae']}: its files say {row['trained_on']}; measured on {row['model']}")
        if row["r2"] < 0:
            text.append(f"{row['sae']}: worse than predicting the mean (R² {row['r2']:.2f}); the wrong model, layer or normalisation?")
        if row["unseen"]:
            text.append(f"{row['sae']}: never saw some positions ({', '.join(row['unseen'])}) and is patched there too; ce_rec_sinkclean and *_nosink "
                        "leave sinks out")
    return text


def headline(rows: list[dict]) -> str:
    """One line per SAE, best CE_rec first."""
    return markdown(sorted(rows, key=lambda row: -row["ce_rec"]),
                    ["sae", "layer", "k", "l0", "r2", "r2_nosink", "cosine", "ce_rec", "frac_zero", "frac_mean", "swd_tok", *FLAG_COLUMNS])


def audit_report(rows: list[dict]) -> list[str]:
    """The report's section, in Markdown lines: best CE_rec first."""
    ranked = sorted(rows, key=lambda row: -row["ce_rec"])
    text = ["## Can its R² be trusted?", ""] + [f"- **{line}**" for line in warnings(ranked)] + [""]
    text += [headline(rows), "",
             FLAG_TEXT, "", "frac_zero and frac_mean are ablation-normalised (what other libraries call loss or CE recovered), ce_rec "
             "= 2 - L_recon/L_orig is not. All columns: audit.csv.", "",
             "## One reconstruction, every library's R²", "",
             markdown(ranked, ["sae", "r2", *LIBRARIES]), "", markdown([{**row, "r2": row["r2_nosink"], **{n: row[f"{n}_nosink"] for n in LIBRARIES},
                                                                        "sae": f"{row['sae']}, no sinks"} for row in ranked], ["sae", "r2", *LIBRARIES]), "",
             "r2: 1 - SSE/SST over the whole set (SAELens since 6.30).", ""]
    text += [f"{name}: {meaning}." for name, meaning in LIBRARIES.items()]
    contexts = {(row["ctx"], row["bos"]) for row in rows}
    if len(contexts) > 1:
        text += ["", "Not all SAEs were measured on the same tokens: their files ask for contexts of " + ", ".join(
            f"{ctx} tokens{' after a BOS' if bos else ''}" for ctx, bos in sorted(contexts)) + ". Compare within one of them."]
    return text + [""]
