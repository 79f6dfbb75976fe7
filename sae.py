"""TopK sparse autoencoders: the model, its training from one activation stream, and the cache of trained ones.

Shapes: N tokens, d = d_model, F = d_sae, k = active latents. Gao et al. 2024, arXiv:2406.04093.
"""
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Iterator

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import kernels
from common import Fault, atomically, head, readable_count, train_rows

CHUNK = 250_000  # tokens shuffled together
SINK_FACTOR = 10  # a position whose norm exceeds this many medians is a sink, and so is position 0
TRAIN_VERSION = 1  # bump when training mathematics changes: older cached SAEs are then left alone


class TopKSAE(torch.nn.Module):
    """z = TopK(W_enc (h - b_dec) + b_enc), h_hat = z W_dec + b_dec, for raw activations h [N,d].

    W_enc, W_dec [F,d]; b_enc [F]; b_dec [d].
    """

    def __init__(self, W_enc: torch.Tensor, b_enc: torch.Tensor, W_dec: torch.Tensor, b_dec: torch.Tensor, k: int):
        super().__init__()
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (torch.nn.Parameter(t) for t in (W_enc, b_enc, W_dec, b_dec))
        self.k = k

    def encode(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """values [N,k] >= 0, indices [N,k] ascending."""
        return kernels.topk_encode(h - self.b_dec, self.W_enc, self.b_enc, self.k)

    def decode(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """h_hat [N,d]."""
        return kernels.sparse_decode(values, indices, self.W_dec, self.b_dec)


def tied_init(d: int, d_sae: int, k: int, seed: int, b_dec: torch.Tensor) -> TopKSAE:
    """Decoder rows of unit norm in random directions, the encoder their copy (drawn on the CPU: the same on every device)."""
    rows = torch.randn(d_sae, d, generator=torch.Generator().manual_seed(seed))
    rows = (rows / rows.norm(dim=1, keepdim=True)).to(b_dec.device)
    return TopKSAE(rows.clone(), torch.zeros(d_sae, device=b_dec.device), rows, b_dec.clone(), k)


# ------------------------------------------------------------------------------------------- activations
def sink_positions(norms: torch.Tensor, median: float) -> torch.Tensor:
    """[B,T] bool: position 0, and every position whose norm exceeds SINK_FACTOR times the median over positions >= 1."""
    sinks = norms > SINK_FACTOR * median
    sinks[:, 0] = True
    return sinks


def activation_chunks(model, layer: int, data: str, tokenizer, ctx: int, tokens: int, sinks: str) -> Iterator[tuple]:
    """(h [n,d], sink [n]) of the training text, n = CHUNK until `tokens` are given out. All positions of every sequence.

    sinks="drop" leaves sink positions out of the stream (and does not count them).
    """
    device = next(model.parameters()).device
    kept: list[tuple] = []
    median, waiting = None, 0
    for rows in train_rows(data, tokenizer, ctx, max(1, 4096 // ctx)):
        h = head(model, layer, rows.to(device))
        norms = torch.linalg.vector_norm(h, dim=-1)
        median = norms[:, 1:].median().item() if median is None else median
        sink = sink_positions(norms, median).flatten()
        h = h.flatten(0, 1)
        if sinks == "drop":
            h, sink = h[~sink], sink[~sink]
        kept.append((h, sink))
        waiting += len(h)
        while waiting >= min(CHUNK, tokens):
            h, sink = (torch.cat(parts) for parts in zip(*kept))
            n = min(CHUNK, tokens)
            yield h[:n], sink[:n]
            kept, waiting, tokens = [(h[n:], sink[n:])], waiting - n, tokens - n
            if not tokens:
                return


# ---------------------------------------------------------------------------------------------- training
class Training:
    """One SAE under recipe `base`: Gao et al. 2024 with every schedule a share of the run.

    Tied unit-norm init, b_dec = mean, activations scaled to E|h|^2 = d, Adam at 2e-4 sqrt(2^14/F) with 5% warm-up and a
    linear decay over the last 20%, decoder rows kept at norm 1 with the parallel part of their gradient removed, AuxK with
    coefficient 1/32 on latents silent for 10% of the budget. Scale and mean leave sink positions out.

    Below 10M tokens the rate grows as sqrt(10M / tokens), at most fivefold: few steps at the long run's rate leave the SAE
    where it began. Measured on stdlib-l layer 3, 200k tokens, held-out R^2 (alive) at 1x, 3x, 5x, 10x: k=8 .669 (.88), .748
    (.83), .768 (.83), .762 (.59); k=32 .755 (1.00), .827 (1.00), .848 (.99), .862 (.89).
    """

    def __init__(self, h: torch.Tensor, sink: torch.Tensor, d_sae: int, k: int, seed: int, tokens: int):
        d = h.shape[1]
        calm = h[~sink]
        self.scale = math.sqrt(d / calm.square().sum(1).mean().item())
        mean = calm.mean(0)
        self.variance = (calm - mean).square().sum(1).mean().item() * self.scale ** 2
        self.sae = tied_init(d, d_sae, k, seed, mean * self.scale)
        self.batch = min(max(tokens // 1000, 256), 4096, tokens)
        whole, rest = divmod(tokens, CHUNK)
        self.steps = whole * (CHUNK // self.batch) + rest // self.batch
        self.lr = 2e-4 * math.sqrt(2 ** 14 / d_sae) * min(max(math.sqrt(1e7 / tokens), 1), 5)
        self.optimiser = torch.optim.Adam(self.sae.parameters(), lr=self.lr, eps=6.25e-10, fused=h.device.type in ("cpu", "cuda"))
        self.dead_after = tokens / 10
        self.idle = torch.zeros(d_sae + 1, device=h.device)  # tokens since a latent fired; the last slot takes the zeros
        self.seed, self.tokens, self.step, self.chunks = seed, tokens, 0, 0

    def rate(self) -> float:
        return self.lr * min((self.step + 1) / (0.05 * self.steps), (self.steps - self.step) / (0.2 * self.steps), 1.0)

    def auxiliary_loss(self, x: torch.Tensor, error: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
        """AuxK (Gao et al. 2024, A.2): the d/2 strongest dead latents reconstruct the error; error variance 1."""
        k = min(x.shape[1] // 2, len(dead))
        values, among_dead = kernels.topk_encode(x - self.sae.b_dec.detach(), self.sae.W_enc[dead], self.sae.b_enc[dead], k)
        guess = kernels.sparse_decode(values, among_dead, self.sae.W_dec[dead], torch.zeros_like(self.sae.b_dec))
        residual = (error - guess).square().sum(1).mean() / (error - error.mean(0)).square().sum(1).mean()
        return torch.nan_to_num(residual) / 32

    def one_step(self, h: torch.Tensor) -> torch.Tensor:
        """An optimiser step on h [n,d], raw; the loss, still on the device: SSE per token over the variance."""
        x = h * self.scale
        values, indices = self.sae.encode(x)
        error = x - self.sae.decode(values, indices)
        loss = error.square().sum(1).mean() / self.variance
        self.idle += len(x)
        self.idle[torch.where(values > 0, indices, len(self.idle) - 1).flatten()] = 0
        dead = (self.idle[:-1] >= self.dead_after).nonzero().squeeze(1)
        total = loss + self.auxiliary_loss(x, error.detach(), dead) if len(dead) else loss
        self.optimiser.zero_grad()
        total.backward()
        self.optimiser.param_groups[0]["lr"] = self.rate()
        with torch.no_grad():
            W_dec = self.sae.W_dec
            along = torch.einsum("fd,fd->f", W_dec.grad, W_dec)
            W_dec.grad.addcmul_(along[:, None], W_dec, value=-1)
            self.optimiser.step()
            W_dec /= torch.linalg.vector_norm(W_dec, dim=1, keepdim=True)
        self.step += 1
        return loss.detach()

    def one_chunk(self, h: torch.Tensor, bar: tqdm, what: str) -> None:
        """Every token of the chunk once, in an order set by the seed alone. Raises Fault on a loss that is not finite."""
        order = torch.randperm(len(h), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + self.chunks)).to(h.device)
        for i in range(len(h) // self.batch):
            loss = self.one_step(h[order[i * self.batch:(i + 1) * self.batch]])
            if (i + 1) % 100 == 0 or i + 1 == len(h) // self.batch:
                if not math.isfinite(loss.item()):
                    raise Fault(f"{what}: the loss is not finite at step {self.step}")
                bar.update(self.batch * ((i % 100) + 1))
                bar.set_postfix_str(f"{what} fvu {loss.item():.3f}", refresh=False)
        self.chunks += 1

    def state(self) -> dict:
        return {"sae": self.sae.state_dict(), "optimiser": self.optimiser.state_dict(), "idle": self.idle, "step": self.step,
                "chunks": self.chunks, "scale": self.scale, "variance": self.variance}

    def load(self, state: dict) -> None:
        self.sae.load_state_dict(state["sae"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.idle, self.step, self.chunks = state["idle"], state["step"], state["chunks"]
        self.scale, self.variance = state["scale"], state["variance"]

    def finished(self) -> TopKSAE:
        """The SAE for raw activations: the scale folded into the biases, the unit-norm decoder as it is."""
        sae = self.sae.requires_grad_(False)
        return TopKSAE(sae.W_enc, sae.b_enc / self.scale, sae.W_dec, sae.b_dec / self.scale, sae.k).requires_grad_(False)


# ------------------------------------------------------------------------------------------------- cache
def save_sae(folder: pathlib.Path, sae: TopKSAE, made_by: dict) -> None:
    """Folder in EleutherAI sparsify's format (cfg.json, sae.safetensors), and provenance.json with what determined it."""
    d_sae, d = sae.W_dec.shape
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    config = {"activation": "topk", "d_in": d, "expansion_factor": d_sae // d, "k": sae.k, "multi_topk": False,
              "normalize_decoder": True, "num_latents": d_sae, "skip_connection": False, "transcode": False}
    for name, content in (("cfg.json", config), ("provenance.json", made_by)):
        with atomically(folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    with atomically(folder / "sae.safetensors") as temporary:  # last: a folder with weights is whole
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary)


def load_sae(folder: pathlib.Path, device: torch.device) -> TopKSAE:
    t = load_file(folder / "sae.safetensors")
    k = json.loads((folder / "cfg.json").read_text())["k"]
    return TopKSAE(t["encoder.weight"], t["encoder.bias"], t["W_dec"], t["b_dec"], k).requires_grad_(False).to(device)


def cache_folder(cache: pathlib.Path, made_by: dict) -> pathlib.Path:
    """A name to read and a short hash of everything that determined the SAE."""
    short = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:8]
    name = "{model}-L{layer}-F{d_sae}-k{k}-{budget}-s{seed}".format(budget=readable_count(made_by["tokens"]), **made_by)
    return cache / f"{pathlib.Path(name.replace('/', '--').lstrip('.-')).name}-{short}"


def get_saes(model, tokenizer, jobs: list[dict], cache: pathlib.Path) -> list[TopKSAE]:
    """The SAEs of one hook, trained together from one activation stream or taken from the cache, in the order of `jobs`.

    A job is the dict of all that determines an SAE: model, fingerprint, layer, data, text, ctx, tokens, d_sae, k, seed,
    recipe, sinks, device, version. An interrupted run goes on from its last chunk.
    """
    device = next(model.parameters()).device
    folders = [cache_folder(cache, job) for job in jobs]
    todo = [(job, folder) for job, folder in zip(jobs, folders) if not (folder / "sae.safetensors").exists()]
    if todo:
        job = todo[0][0]
        longest = max(job["tokens"] for job, _ in todo)
        bar = tqdm(total=sum(job["tokens"] for job, _ in todo), unit="tok", unit_scale=True, leave=False,
                   desc=f"{len(todo)} SAEs, {job['model']} L{job['layer']}")
        trainings: dict[pathlib.Path, Training] = {}
        saved = time.monotonic()
        chunks = activation_chunks(model, job["layer"], job["data"], tokenizer, job["ctx"], longest, job["sinks"])
        for number, (h, sink) in enumerate(chunks):
            if not torch.isfinite(h).all():
                raise Fault(f"{job['model']} layer {job['layer']}: an activation is not finite in chunk {number} of the training text")
            for job, folder in todo:
                n = min(len(h), job["tokens"] - number * CHUNK)
                if n <= 0:
                    continue
                checkpoint = folder / "checkpoint.pt"
                if folder not in trainings:  # the first chunk, always: it sets scale and mean
                    trainings[folder] = Training(h[:n], sink[:n], job["d_sae"], job["k"], job["seed"], job["tokens"])
                    if checkpoint.exists():
                        trainings[folder].load(torch.load(checkpoint, map_location=device))
                training = trainings[folder]
                if training.chunks > number:
                    bar.update(n)
                    continue
                training.one_chunk(h[:n], bar, f"{job['model']} L{job['layer']} k={job['k']} seed {job['seed']}")
                if job["tokens"] <= (number + 1) * CHUNK:
                    save_sae(folder, training.finished(), job)
                    checkpoint.unlink(missing_ok=True)
                    del trainings[folder]
            if time.monotonic() - saved > 60:
                for folder, training in trainings.items():
                    with atomically(folder / "checkpoint.pt") as temporary:
                        torch.save(training.state(), temporary)
                saved = time.monotonic()
        bar.close()
    return [load_sae(folder, device) for folder in folders]
