"""From rows to claims: correlations, intervals, tests and rankings. No model, no SAE.

Arrays. C conditions. A proxy, larger = better, and the target are both [W, C] under W weightings of the
evaluation documents (`resampling`: ALL, HALF_A, HALF_B, RESAMPLES). R draws of a statistic: each with its
weights of the conditions and its weighting of the documents; draw 0 is the estimate. `meta` maps model,
depth, layer, k, tokens (budget), seed and cell (the condition without seed) to arrays over C.

Two claims. *Here*: about these SAEs; the units are evaluation documents (and seeds): `document_interval`. *In
general*: about hooks, a (model, layer), that were not measured. SAEs of one hook share most of what a proxy
has beyond k and CE_rec (correlation up to .9), so the unit is the hook. Neighbouring hooks of one model
resemble each other too: `dependence`. Models are strata (2 or 3 models are fixed effects; nothing here
generalises over models). Undefined is nan.
"""
