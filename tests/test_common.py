"""Text, the split model, gradients and KL against truths computed another way; arguments."""

import itertools
import json
import math
import types

import common
from transport_geometry import tables, text, train
from transport_geometry.errors import UserError
from transport_geometry.lm import Hook, cross_entropy, kl_divergence, log_probs

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


# ---------------------------------------------------------------------------------------------- model split
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_patched_run_equals_hooked_full_forward(tiny, rows, layer):
    h = Hook(tiny, layer).head(rows)
    h_hat = h + 0.1 * torch.randn(h.shape, generator=torch.Generator().manual_seed(2), dtype=h.dtype)
    handle = tiny.gpt_neox.layers[layer].register_forward_hook(lambda module, inputs, output: h_hat)
    hooked = tiny(rows).logits
    handle.remove()
    torch.testing.assert_close(Hook(tiny, layer).tail(rows, h_hat), hooked, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Hook(tiny, layer).tail(rows, h), tiny(rows).logits, rtol=1e-12, atol=1e-12)
    assert (hooked - tiny(rows).logits).abs().max() > 1e-3  # the patch did something


def test_head_is_the_block_output_not_the_normed_hidden_state(tiny, rows):
    states = tiny(rows, output_hidden_states=True).hidden_states
    for layer in (0, 1):
        torch.testing.assert_close(Hook(tiny, layer).head(rows), states[layer + 1], rtol=0, atol=0)
    last = Hook(tiny, 2).head(rows)
    assert (last - states[3]).abs().max() > 0.1
    torch.testing.assert_close(tiny.gpt_neox.final_layer_norm(last), states[3])


def test_a_failing_tail_leaves_the_model_whole(tiny, rows):
    before = tiny(rows).logits
    h = Hook(tiny, 1).head(rows)
    with pytest.raises(RuntimeError):
        Hook(tiny, 1).tail(rows, h[..., :3])
    assert torch.equal(tiny(rows).logits, before)


# ------------------------------------------------------------------------------------------------ gradients
def summed_ce(model, layer, rows, h):
    return cross_entropy(log_probs(Hook(model, layer).tail(rows, h).double()), rows).sum()


def double_log_probs(logits):
    return torch.log_softmax(logits[:, :-1], -1)


@pytest.fixture
def exact(monkeypatch):
    """log_probs casts to float32 in production; the truths below need float64."""
    monkeypatch.setattr(common, "log_probs", double_log_probs)


@pytest.mark.parametrize("layer", [0, 2])
def test_g_against_central_differences(tiny, rows, layer, exact):
    h = Hook(tiny, layer).head(rows)
    _, (g,) = Hook(tiny, layer).clean_pass(rows, h)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        delta = torch.randn(h.shape, generator=generator, dtype=h.dtype)
        eps = 1e-5
        ce = lambda x: cross_entropy(double_log_probs(Hook(tiny, layer).tail(rows, x)), rows).sum()
        slope = (ce(h + eps * delta) - ce(h - eps * delta)) / (2 * eps)
        assert abs(slope - (g * delta).sum()) < 1e-7 * slope.abs().clamp(min=1)


def test_g_is_of_the_sum_so_batches_do_not_matter(tiny, rows, exact):
    h = Hook(tiny, 1).head(rows)
    _, (g,) = Hook(tiny, 1).clean_pass(rows, h)
    one_by_one = [Hook(tiny, 1).clean_pass(rows[i : i + 1], h[i : i + 1])[1][0] for i in range(len(rows))]
    torch.testing.assert_close(g, torch.cat(one_by_one), rtol=1e-10, atol=1e-12)


def test_last_position_has_no_gradient_and_the_first_has(tiny, rows):
    _, gradients = Hook(tiny, 1).clean_pass(rows, Hook(tiny, 1).head(rows), torch.rand(2, 3, 11))
    for g in gradients:
        assert (g[:, -1] == 0).all() and (g[:, 0].abs().sum(-1) > 0).all()


def test_all_ones_is_a_null_direction_of_a_gpt_neox_hook(tiny, rows, exact):
    """Every reader of the residual stream is a LayerNorm, which removes the mean over d."""
    h = Hook(tiny, 1).head(rows)
    log_p, (g,) = Hook(tiny, 1).clean_pass(rows, h)
    assert g.sum(-1).abs().max() < 1e-12 * g.abs().max() * h.shape[-1]
    shifted = double_log_probs(Hook(tiny, 1).tail(rows, h + 10 * torch.randn(3, 12, 1, dtype=h.dtype)))
    torch.testing.assert_close(shifted, log_p, rtol=0, atol=1e-10)


def test_g_of_the_last_layer_in_closed_form(tiny, rows, exact):
    """g = J_LN' W_U' (p - e_y), the LayerNorm Jacobian written out."""
    h = Hook(tiny, 2).head(rows)
    log_p, (g,) = Hook(tiny, 2).clean_pass(rows, h)
    norm, W_U = tiny.gpt_neox.final_layer_norm, tiny.get_output_embeddings().weight
    residual = log_p.exp()
    residual.scatter_add_(-1, rows[:, 1:, None], -torch.ones_like(residual[..., :1]))
    upstream = residual @ W_U * norm.weight
    x = h[:, :-1]
    centred = x - x.mean(-1, keepdim=True)
    std = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    unit = centred / std
    expected = (
        upstream - upstream.mean(-1, keepdim=True) - unit * (upstream * unit).mean(-1, keepdim=True)
    ) / std
    torch.testing.assert_close(g[:, :-1], expected, rtol=1e-9, atol=1e-12)


def test_sampled_labels_give_the_true_fisher(tiny, rows, exact):
    """E_y (g_y.delta)^2 summed over a sequence = sum_t Var_p(J delta), J by forward-mode differentiation."""
    h = Hook(tiny, 1).head(rows)
    delta = 0.3 * torch.randn(h.shape, generator=torch.Generator().manual_seed(4), dtype=h.dtype)
    with sdpa_kernel(SDPBackend.MATH):
        logits, change = torch.func.jvp(lambda x: Hook(tiny, 1).tail(rows, x)[:, :-1], (h,), (delta,))
    p = torch.softmax(logits, -1)
    exact_form = (p * (change - (p * change).sum(-1, keepdim=True)).square()).sum((-1, -2))
    draws = torch.cat(
        [
            torch.stack(
                [
                    (g * delta).sum((-1, -2)).square()
                    for g in Hook(tiny, 1).clean_pass(
                        rows, h, torch.rand(50, 3, 11, generator=torch.Generator().manual_seed(i))
                    )[1][1:]
                ]
            )
            for i in range(12)
        ]
    )
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact_form).abs() < 4 * error).all() and (error < 0.2 * exact_form).all()


def test_drawn_labels_follow_p(tiny, rows):
    h = Hook(tiny, 2).head(rows)
    log_p, gradients = Hook(tiny, 2).clean_pass(
        rows, h, torch.tensor([0.0, 1 - 2**-24]).view(2, 1, 1).expand(2, 3, 11)
    )
    assert all(torch.isfinite(g).all() for g in gradients)  # both ends of [0, 1) are labels


# ------------------------------------------------------------------------------------------------------- KL
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 60.0])
def test_kl_is_right_at_every_size(size):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 7, 500, generator=generator, dtype=torch.float64)
    log_p, log_q = (
        torch.log_softmax(logits, -1),
        torch.log_softmax(
            logits + size * torch.randn(logits.shape, generator=generator, dtype=torch.float64), -1
        ),
    )
    truth = (log_p.exp() * (log_p - log_q)).sum(-1)
    kl = lambda a, b: kl_divergence(a.exp(), a, b)
    ours = kl(log_p.float(), log_q.float()).double()
    # at 1e-4 the KL is 3e-9, and rounding the inputs to float32 alone moves it by 1e-3
    assert ((ours - truth).abs() / truth).max() < (1e-3 if size > 1e-4 else 5e-3)
    assert kl(log_p.float(), log_p.float()).abs().max() == 0


# ----------------------------------------------------------------------------------------------------- text
def test_held_out_files_are_disjoint_and_a_tenth():
    train, held = (dict(text.stdlib_documents(split)) for split in ("train", "heldout"))
    assert not train.keys() & held.keys()
    assert 0.05 < len(held) / (len(train) + len(held)) < 0.2
    assert "argparse.py" in train | held and "pydoc_data/topics/assert" in train | held
    assert not any("/test" in name or "idlelib" in name or "site-packages" in name for name in train | held)


class Letters:
    """A tokenizer of one letter each."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens=False):
        return types.SimpleNamespace(input_ids=[ord(c) % 40 + 1 for c in text])


def test_rows_are_documents_joined_by_the_end_mark(tmp_path):
    path = tmp_path / "d.jsonl"
    texts = [f"document number {i} " * 3 for i in range(60)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    rows = {
        split: torch.cat(list(text.packed_rows(str(path), split, Letters(), 10)))
        for split in ("train", "heldout")
    }
    for split, stream in rows.items():
        mine = [t for t in texts if text.in_heldout(t) == (split == "heldout")]
        whole = list(itertools.chain.from_iterable([ord(c) % 40 + 1 for c in t] + [0] for t in mine))
        assert stream.tolist() == whole[: len(whole) // 10 * 10]
    assert len(rows["heldout"]) > 0


@pytest.mark.parametrize(
    "name, content, word",
    [
        ("e.txt", b"", "empty"),
        ("b.txt", b"abc\0\1\2", "binary"),
        ("s.txt", b"short", "gives 0 sequences"),
        ("x.pdf", b"x", "needs files"),
        ("l.txt", b"\xff\xfe\xfa" * 9, "decode"),
        ("j.jsonl", b"{", "--data"),
    ],
)
def test_bad_data_gets_one_line(tmp_path, name, content, word):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=word) as caught:
        text.heldout_rows(str(tmp_path / name), Letters(), 10, 2)
    assert "\n" not in str(caught.value)


def test_counts_read_both_ways():
    assert [common.parse_count(t) for t in ("300000", "300k", "10M", "1.5M", "2B")] == [
        300000,
        300000,
        10**7,
        1500000,
        2 * 10**9,
    ]
    assert [tables.readable_count(n) for n in (300000, 10**7, 1500000, 77)] == ["300k", "10M", "1500k", "77"]
    for bad in ("", "x", "-1", "0", "nan", "10Q"):
        with pytest.raises(UserError):
            common.parse_count(bad)


GRID = dict(models="stdlib-s", k="4", tokens="1k", expansion=4, eval_seqs=4, ctx=64)
NUMBERS = ["--k", "--seeds", "--tokens", "--expansion", "--eval-seqs", "--ctx"]


@pytest.mark.parametrize(
    "flag, value, word",
    [
        (flag, value, flag)
        for flag in NUMBERS
        for value in ("9" * 5000, "-" + "9" * 5000, str(10**30), "x" * 5000)
    ]
    + [
        ("--models", "a@" + "9" * 5000, "--models a@999"),
        ("--models", f"a@{10**30}", "--models a@1000"),
        ("--models", "x" * 10**5, "--models"),
        ("--seeds", str(2**32), "at most 4294967295"),
        ("--tokens", "1e306", "at most"),
        ("--tokens", "1e300M", "at most"),
        ("--tokens", "1k," + "9" * 5000, "at most"),
        ("--k", "4," * 5000 + "x", "whole numbers"),
        ("--recipe", "x" * 5000, "base, saelens"),
        ("--device", "x" * 5000, "--device"),
    ],
)
def test_absurd_arguments_get_one_short_line(flag, value, word):
    with pytest.raises(UserError) as caught:
        common.parse_args("", [flag, value], **GRID)
    line = str(caught.value)
    assert word in line and flag in line and len(line) < 350 and "\n" not in line


def test_the_largest_arguments_are_taken():
    args = common.parse_args(
        "", ["--seeds", str(2**32 - 1), "--tokens", "1000B", "--expansion", str(10**9)], **GRID
    )
    assert (args.seeds, args.tokens, args.expansion, args.ctx) == ([2**32 - 1], [10**12], 10**9, 64)
    # how the last piece is drawn
    torch.Generator().manual_seed(args.seeds[0] * 1_000_003 + 10**12 // train.CHUNK)


@pytest.mark.parametrize(
    "flag",
    ["--models", "--data", "--split", "--revision", "--sae", "--out", "--cache", "--from", "--verdict"],
)
@pytest.mark.parametrize("control", ["\0", "\n", "\t", "\x1b[31m", "\x7f", "\u2028", "\udc80"])
def test_no_argument_holds_a_control_character(flag, control):
    with pytest.raises(UserError, match=f"{flag} .*control character") as caught:
        common.parse_args("", [flag, f"a{control}b"], **GRID)
    assert control not in str(caught.value)


@pytest.mark.parametrize("gap", [math.nan, math.inf, -math.inf, None])
def test_gaps_have_a_name_in_reports_too(gap):
    assert (
        tables.signed(gap)
        == tables.bounds(gap, 1.0)
        == tables.bounds(0.0, gap)
        == tables.span(gap, gap, gap)
        == tables.span(gap, 0.0, 1.0)
        == "undefined"
    )
    assert (
        tables.span(0.123, gap, gap) == "+0.12 [undefined]"
        and tables.span(0.123, -0.1, 1, 1) == "+0.1 [-0.1, +1.0]"
    )
    assert tables.bounds(0.1, 0.24) == "[+0.10, +0.24]" and tables.signed(-0.5, 3) == "-0.500"
