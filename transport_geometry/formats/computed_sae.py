"""One module that computes any SAE of another library's files.

Shapes: N tokens, d = d_model, F = d_sae.
"""

import hashlib
from typing import Any

from transport_geometry import kernels
from transport_geometry.errors import UserError
from transport_geometry.formats.known_fields import Fields
from transport_geometry.models.loading import fingerprint
from transport_geometry.saes.sae import SAE, TopKSAE

import torch


class FileSAE(SAE):
    """Any SAE whose code is a function of single tokens, for raw activations h [N,d].

    x = (h - shift) / scale for each token, by `norm`; z = W_enc (x - b_in) + b_enc; a code by `rule`; h_hat =
    (a W_dec + b_dec) scale + shift, plus W_skip h. Rules: `topk` and `groupmax` (k latents), `signed` (the k
    of the largest |z|, with their sign), `threshold` (z where it exceeds `threshold` and 0: ReLU, JumpReLU,
    BatchTopK at inference), `gated` (relu(gain z' + b_mag) where z > 0, z' = z - b_enc).
    """

    fields = Fields()  # of its files

    b_in: torch.Tensor
    threshold: torch.Tensor
    gain: torch.Tensor
    b_mag: torch.Tensor
    W_skip: torch.Tensor | None

    def __init__(
        self, rule: str, k: int | None = None, norm: str = "none", **tensors: torch.Tensor | None
    ) -> None:
        """tensors: W_enc, W_dec [F,d]; b_enc [F]; b_dec [d]. b_in [d]: 0 where there is none. As the rule has
        them: threshold [F] or []; gain, b_mag [F]. W_skip [d,d].
        """
        super().__init__()
        self.rule, self.k, self.norm = rule, k, norm
        # True: an SAE of h less its mean over d (TransformerLens' processed weights), which is added again
        self.centred = False
        for name in "W_enc b_enc W_dec b_dec b_in threshold gain b_mag W_skip".split():
            self.register_buffer(name, tensors.get(name))
        if self.b_in is None:
            self.b_in = torch.zeros_like(self.b_dec)

    def normalised(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x [N,d], shift, scale): the way in, and the way back x scale + shift."""
        shift = h.mean(1, keepdim=True) if self.centred else torch.zeros_like(h[:, :1])
        x = h - shift
        # eps on the way in only, and the sample's standard deviation: SAELens, OpenAI and mlsae agree
        if self.norm == "layer_norm":
            mean, scale = x.mean(1, keepdim=True), x.std(1, keepdim=True)
            return (x - mean) / (scale + 1e-5), shift + mean, scale
        if self.norm == "constant_norm_rescale":
            scale = torch.linalg.vector_norm(x, dim=1, keepdim=True) / x.shape[1] ** 0.5
            return x / scale, shift, scale
        return x, shift, torch.ones_like(shift)

    def encode(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """values [N,K], >= 0 except by `signed`, and indices [N,K], ascending; K = k, or the most that a
        token of h has (the others end in zeros).
        """
        k = self.k or 0  # `topk`, `groupmax` and `signed` have one
        x = self.normalised(h)[0] - self.b_in
        if self.rule == "topk":
            return kernels.topk_encode(x, self.W_enc, self.b_enc, k)
        z = torch.nn.functional.linear(x, self.W_enc)
        if self.rule == "gated":
            return sparse((z * self.gain + self.b_mag).relu() * (z + self.b_enc > 0))
        z = z + self.b_enc
        if self.rule == "groupmax":
            values, within = z.relu().unflatten(1, (k, -1)).max(2)
            return values, within + torch.arange(k, device=z.device) * (z.shape[1] // k)
        if self.rule == "signed":
            indices = z.abs().topk(k, 1).indices.sort(1).values
            return z.gather(1, indices), indices
        return sparse(z.relu() * (z > self.threshold))

    def reconstruct(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values, indices = self.encode(h)
        _, shift, scale = self.normalised(h)
        h_hat = kernels.sparse_decode(values, indices, self.W_dec, self.b_dec) * scale + shift
        if self.W_skip is not None:
            h_hat = h_hat + h @ self.W_skip.t()
        return values, indices, h_hat


def sparse(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices [N,K] of what is not 0 in a [N,F], ascending; K: the most that a row has."""
    token, latent = a.nonzero(as_tuple=True)
    count = (a != 0).sum(1)
    place = torch.arange(len(token), device=a.device) - (count.cumsum(0) - count)[token]
    indices = torch.zeros(len(a), max(1, int(count.max())), dtype=torch.int64, device=a.device)
    values = torch.zeros(indices.shape, dtype=a.dtype, device=a.device)
    indices[token, place], values[token, place] = latent, a[token, latent]
    return values, indices


def check_args(args: dict[str, Any]) -> None:
    """Raises UserError where the arguments of a FileSAE do not fit together, or are not finite."""
    F, d = args["W_enc"].shape if args["W_enc"].ndim == 2 else (0, 0)
    if not F * d:
        raise UserError(f"its encoder is {list(args['W_enc'].shape)}, where a matrix belongs")
    shapes = dict(W_enc=(F, d), W_dec=(F, d), W_skip=(d, d), b_dec=(d,), b_in=(d,))
    shapes |= dict.fromkeys(("b_enc", "gain", "b_mag", "threshold"), (F,))
    for name, tensor in args.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        one_for_all = name == "threshold" and tensor.shape in ((), (1,))
        if tensor.shape != shapes[name] and not one_for_all:
            raise UserError(
                f"{name} is {list(tensor.shape)}, and W_enc {[F, d]} asks for {list(shapes[name])}"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name} holds values that are not finite")
    if "k" in args and not 1 <= (args["k"] or 0) <= F:
        raise UserError(f"k = {args['k']} of {F} latents")
    if args["rule"] == "groupmax" and F % args["k"]:
        raise UserError(f"k = {args['k']} groups of equal size cannot be made of {F} latents")


def fused(sae: FileSAE) -> TopKSAE | FileSAE:
    """The same SAE as a TopKSAE, which the fused kernels compute, where it is one."""
    plain = sae.rule == "topk" and sae.norm == "none" and not sae.centred and sae.W_skip is None
    if not plain or not torch.equal(sae.b_in, sae.b_dec):
        return sae
    return TopKSAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.k or 0).requires_grad_(False)


def sae_fingerprint(sae: FileSAE) -> str:
    """Short hash of all that an SAE computes with, so that a run is not continued with another one of the
    same name.
    """
    return hashlib.sha256(f"{sae.rule} {sae.k} {sae.norm} {fingerprint(sae)}".encode()).hexdigest()[:16]
