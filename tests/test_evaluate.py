"""What the evaluation shares and does not hold: runs that go on from others give the same bits, and of the
vocabulary there is a tile at a time.
"""

import contextlib
import gc
import itertools

from helpers import Largest, tiny_model
from transport_geometry.measuring import evaluate as module
from transport_geometry.measuring.evaluate import (
    ablated,
    activations,
    clean_run,
    evaluate,
    keeping_clean_runs,
)
from transport_geometry.models import lm
from transport_geometry.models.lm import Hook, keeping_heads
from transport_geometry.models.loading import load_model
from transport_geometry.progress import Progress
from transport_geometry.saes.sae import tied_init
from transport_geometry.text import heldout

import pytest
import torch


@contextlib.contextmanager
def watched_blocks(model, runs):
    """`runs` gets the number of every block that runs within."""
    with contextlib.ExitStack() as hooks:
        for layer, block in enumerate(lm.blocks(model)):
            hooks.enter_context(block.register_forward_hook(lambda *_, layer=layer: runs.append(layer)))
        yield


def saes_of(hook, rows, n, k=4):
    h = hook.head(rows).flatten(0, 1)
    return {i: tied_init(h.shape[1], 64, k, i, h.mean(0)).requires_grad_(False) for i in range(n)}


# ------------------------------------------------------------------------------------------------- bits
@pytest.fixture(scope="module")
def model():
    return tiny_model(d=32, layers=4, vocab=301, dtype=torch.float32)


@pytest.fixture(scope="module")
def long_rows():
    return torch.randint(0, 301, (3, 20), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1), (1, 1, 3)])
def test_what_goes_on_from_another_hook_has_the_same_bits(model, long_rows, order):
    """h, what the unembedding is given and every gradient: in company or alone, in any order, so that an
    interrupted run that goes on is the run that was not.
    """
    uniforms = torch.rand(2, 3, 19, generator=torch.Generator().manual_seed(6))
    alone = {}
    for layer in set(order):
        h = Hook(model, layer).head(long_rows)
        alone[layer] = h, *Hook(model, layer).clean_pass(long_rows, h, uniforms)
    with keeping_heads(Hook(model, layer) for layer in order), keeping_clean_runs():
        for layer in order:
            hook = Hook(model, layer)
            h = hook.head(long_rows)
            final, gradients = clean_run(hook, long_rows, h, uniforms)
            truth_h, truth_final, truth = alone[layer]
            assert torch.equal(h, truth_h) and torch.equal(final, truth_final)
            assert all(torch.equal(a, b) for a, b in zip(gradients, truth, strict=True))


def test_another_text_or_other_labels_are_another_run(model, long_rows):
    hook, uniforms = Hook(model, 1), torch.rand(2, 3, 19, generator=torch.Generator().manual_seed(6))
    with keeping_heads([hook]), keeping_clean_runs():
        for rows, u in itertools.product((long_rows, long_rows.flip(1)), (uniforms, 1 - uniforms)):
            h = hook.head(rows)
            _, gradients = clean_run(hook, rows, h, u)
            truth = hook.clean_pass(rows, h, u)[1]
            assert all(torch.equal(a, b) for a, b in zip(gradients, truth, strict=True))


def test_the_heads_of_a_model_are_one_forward(model, long_rows):
    runs, hooks = [], [Hook(model, layer) for layer in (3, 1, 0)]
    for hook in hooks:
        hook.way_to_patch(long_rows)  # looked for once, by runs of its own
    with keeping_heads(hooks), watched_blocks(model, runs):
        for hook in hooks:
            hook.head(long_rows)
    assert runs == [0, 1, 2, 3]


def test_rows_that_are_kept_are_the_rows(tmp_path):
    """Whoever reads further than those before begins where they stopped."""

    class Letters:
        eos_token_id, bos_token_id, backend_tokenizer = 0, None, None

        def __call__(self, document, add_special_tokens=False):
            return type("Ids", (), {"input_ids": [ord(c) % 50 for c in document]})

        def get_vocab(self):
            return {}

    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(f"number {i} of some short texts " * 9)

    def first(n):
        rows = heldout.train_rows(str(tmp_path), Letters(), 8, 1)
        return torch.cat(list(itertools.islice(rows, n)))

    truth = first(60)
    with heldout.keeping_rows():
        for n in (7, 3, 31, 60, 60):
            assert torch.equal(first(n), truth[:n])
    with heldout.keeping_rows():  # two that overtake each other, and one that comes after
        one, other = (heldout.train_rows(str(tmp_path), Letters(), 8, 1) for _ in range(2))
        for rows, n in ((one, 5), (other, 6), (one, 2)):
            list(itertools.islice(rows, n))
        assert torch.equal(first(60), truth)


# ------------------------------------------------------------------------------------------------- ablations
def test_one_ablated_run_serves_every_sequence(model, long_rows):
    hook, x = Hook(model, 1), torch.randn(32, generator=torch.Generator().manual_seed(7))
    ce, final = ablated(hook, long_rows, x, 2)
    fed = torch.cat([x.expand(3, 19, 32), hook.head(long_rows)[:, -1:]], 1)
    truth = -hook.log_probs(long_rows, fed).gather(-1, long_rows[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(ce.float(), truth, rtol=1e-6, atol=1e-6)
    assert final is not None and len(final) == 1


def test_where_later_blocks_read_the_text_each_sequence_has_its_ablated_run(long_rows):
    """A family whose blocks are given more than h: here the last one adds the embeddings."""
    reader = tiny_model(d=32, layers=3, vocab=301, dtype=torch.float32)
    met, last = [], reader.gpt_neox.layers[2]
    reader.gpt_neox.embed_in.register_forward_hook(lambda module, inputs, output: met.append(output))
    last.register_forward_hook(lambda module, inputs, output: output + met[-1])
    hook, x = Hook(reader, 1), torch.randn(32, generator=torch.Generator().manual_seed(7))
    ce, final = ablated(hook, long_rows, x, 2)
    truth = -hook.log_probs(long_rows, x.expand(3, 20, 32)).gather(-1, long_rows[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(ce.float(), truth, rtol=1e-6, atol=1e-6)
    assert final is None


def test_clean_sinks_after_the_last_block(model, long_rows):
    """No position sees another there: the run that is not made is the run."""
    hook = Hook(model, 3)
    shared = activations(hook, long_rows, 3)
    (clean,) = shared.batches(hook, long_rows, torch.rand(3, 1, 19), 3)
    patch = module.patched(clean, saes_of(hook, long_rows, 1)[0], shared)
    h_hat = torch.where(clean.sink.view(-1, 1), clean.h_flat, patch.h_hat)
    torch.testing.assert_close(module.sinks_clean(patch), clean.final_of(h_hat), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------- memory
def test_evaluation_holds_a_tile_of_the_vocabulary():
    """12 x 64 tokens in one batch, V = 20,000: nothing is larger than two runs' logits of one tile, 128
    positions, where [N,V] would be three times that. An experiment that asks for all has it.
    """
    model = tiny_model(d=16, layers=2, vocab=20_000, dtype=torch.float32)
    rows = torch.randint(0, 20_000, (12, 64), generator=torch.Generator().manual_seed(8))
    hook = Hook(model, 0)
    saes = saes_of(hook, rows, 4)
    hook.unembeds(rows)  # looked at once

    def most(terms=None):
        with Largest(model.parameters()) as seen:
            evaluate(hook, rows, saes, batch=12, terms=terms)
        return seen.most

    tile, whole = 128 * 20_000, 12 * 63 * 20_000
    assert most() <= 2 * tile < whole / 2
    assert most(lambda patch: {"x": patch.log_q[..., 0]}) == whole


# ------------------------------------------------------------------------------------------------- progress
def test_a_phase_ends_where_it_should(capsys):
    """Whatever was counted within it; a line for each, and for none that had nothing to do."""
    bar = Progress(100)
    for what, work, updates in (("a", 30, (5, 2)), ("nothing", 0, ()), ("b", 70, (5, 9, 9))):
        bar.phase(what, work, 10)
        for n in updates:
            bar.update(n)
        assert bar.done <= bar.ends
        bar.end()
    bar.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["a: 30% of the run", "b: 100% of the run"]


def test_what_is_kept_of_a_model_is_not_the_next_one_s():
    """Not even where the next one lies at the address of one that is gone: its name dies with it."""
    ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    with keeping_heads([]):
        (first, _), (twin, _) = (load_model("stdlib-s", torch.device("cpu")) for _ in range(2))
        for weight in twin.parameters():
            weight.data.mul_(1.01)
        kept = Hook(first, 3).head(ids)
        assert not torch.equal(Hook(twin, 3).head(ids), kept)
        del first, twin, weight
        gc.collect()
        assert [key[0]() for key in lm._heads.found] == [None]
