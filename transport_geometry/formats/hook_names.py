"""Other libraries' names of hooks and models, turned into ours and the hub's."""

import re


def hook_of(site: str, layer: int | None) -> tuple[str | None, int | None]:
    """(site, layer) by our names; the input of block L is the output of block L - 1."""
    if site == "resid_pre" and layer:
        return "resid_post", layer - 1
    return "resid_post" if site in ("resid", "resid_out") else site or None, layer


def hook_of_lens(name: str) -> tuple[str | None, int | None]:
    """(site, layer) of TransformerLens' name, or of a module of transformers', gpt_neox.layers.3."""
    if match := re.fullmatch(r"blocks\.(\d+)\.hook_(\w+)", name):
        return hook_of(match[2], int(match[1]))
    site, layer = (None, None) if name.startswith("blocks.") else hook_of_path(name)
    return site or name or None, layer


def hook_of_path(path: str) -> tuple[str | None, int | None]:
    """(site, layer) from the last such name in it: layers.3, h.3, layers.3.mlp, resid_post_layer_3,
    mlp_out_layer3; (None, None) without one.
    """
    for part in reversed(path.split("/")):
        if match := re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)((?:\.\w+)*)$", part):
            return hook_of(match[2].lstrip(".").removeprefix("hook_") or "resid_post", int(match[1]))
        if match := re.fullmatch(r"(\w+?)_?layer_?(\d+)", part):
            return hook_of(match[1], int(match[2]))
    return None, None


# TransformerLens' names of models -> the hub's; the last parts of the others are the hub's own
LENS_MODELS = {
    r"gpt2-small": "gpt2",
    r"disti(?:ll-?|l-)gpt2|gpt2-xs": "distilgpt2",
    r"(?:pythia-|gpt-neo-\d|gpt-neox-|gpt-j-6B).*": r"EleutherAI/\g<0>",
    r"(?:med)?gemma-.*": r"google/\g<0>",
    r"(Llama-2-\d+b(?:-chat)?)": r"meta-llama/\1-hf",
    r"mistral-7b": "mistralai/Mistral-7B-v0.1",
    r"mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.1",
    r"opt-[\d.]+[mb]": r"facebook/\g<0>",
    r"bloom-.*": r"bigscience/\g<0>",
    r"phi-3": "microsoft/Phi-3-mini-4k-instruct",
    r"phi-.*": r"microsoft/\g<0>",
    r"[qQ]wen([\d.]+-[\d.]+)[bB]": r"Qwen/Qwen\1B",
    r"[qQ]wen([\d.]+-[\d.]+)[bB]-[iI]nstruct": r"Qwen/Qwen\1B-Instruct",
    r"[qQ]wen([\d.]+-[\d.]+)[bB]-[cC]hat": r"Qwen/Qwen\1B-Chat",
    r"[qQ]wen([\d.]+-[\d.]+)[bB]-[bB]ase": r"Qwen/Qwen\1B-Base",
    r"tiny-stories-(\d+M)": r"roneneldan/TinyStories-\1",
    r"tiny-stories-instruct-(\d+M)": r"roneneldan/TinyStories-Instruct-\1",
}


def hub_name(name: str) -> str:
    """The hub's name of a model that an SAE's file may call by TransformerLens' name."""
    for pattern, on_hub in LENS_MODELS.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(on_hub)
    return name
