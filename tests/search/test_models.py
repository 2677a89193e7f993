"""Models are given back as they were, whatever happened inside, and hooks act on nobody else's passes."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch

from safescale_lib.search.models import frozen, hooked, straight_through
from safescale_lib.zoo.training import side_by_side


@pytest.fixture
def model():
    """Parts in different modes, some weights already without gradients."""
    parts = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5), torch.nn.Linear(3, 2))
    parts.train()
    parts[1].eval()
    parts[0].weight.requires_grad_(False)
    return parts


def state(model):
    return [m.training for m in model.modules()], [(n, p.requires_grad) for n, p in model.named_parameters()]


def test_inside_it_evaluates_and_learns_nothing(model):
    before = state(model)
    with frozen(model):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        x = torch.randn(8, 3)
        assert torch.equal(model(x), model(x))  # no dropout
    assert state(model) == before


def test_restored_when_the_block_raises(model):
    before = state(model)
    with pytest.raises(KeyError, match="inside"), frozen(model):
        raise KeyError("inside")
    assert state(model) == before


def test_blocks_nest(model):
    before = state(model)
    with frozen(model):
        with frozen(model):
            pass
        assert not any(m.training for m in model.modules())
    assert state(model) == before


def test_blocks_that_overlap_restore_what_they_share_when_the_last_one_ends(model):
    before = state(model)
    whole, part = frozen(model), frozen(model[0])
    whole.__enter__()
    part.__enter__()
    whole.__exit__(None, None, None)
    assert not model[0].training
    assert not model[0].bias.requires_grad
    assert model[3].training
    assert model[3].bias.requires_grad
    part.__exit__(None, None, None)
    assert state(model) == before


def test_blocks_of_many_threads_leave_the_model_as_found(model):
    before = state(model)

    def use(_):
        with frozen(model):
            assert not any(p.requires_grad for p in model.parameters())
            model(torch.ones(4, 3))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(200)))
    assert state(model) == before


def test_a_function_passes_through():
    with frozen(lambda x: x + 1):
        pass
    with pytest.raises(KeyError, match="inside"), frozen(abs):
        raise KeyError("inside")


def test_straight_through_answers_as_before_and_slopes_as_if_the_transform_were_not_there():
    g = torch.Generator().manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    x = torch.rand(20, 3, 2, 2, generator=g).requires_grad_()

    def coarse(pixels):
        return (pixels * 3).round() / 3

    through = straight_through(inner, coarse)
    assert torch.equal(through(x), inner(coarse(x)))
    assert torch.equal(straight_through(abs, lambda p: p / 1000)(x), x / 1000)  # to the last bit, far from the identity too
    (found,) = torch.autograd.grad(through(x)[:, 0].sum(), x)
    at = coarse(x).detach().requires_grad_()
    (wanted,) = torch.autograd.grad(inner(at)[:, 0].sum(), at)
    assert torch.equal(found, wanted)
    assert found.abs().min() > 0
    assert torch.autograd.grad(inner(coarse(x))[:, 0].sum(), x)[0].abs().max() == 0  # what it is there to mend


def test_hooks_belong_to_the_block_that_set_them():
    layer, x = torch.nn.Linear(3, 3), torch.ones(1, 3)
    plain = layer(x)

    def doubled(module, given, out):
        return 2 * out

    started, leave = Event(), Event()

    def beside():
        started.set()
        assert leave.wait(10)
        return layer(x)

    with ThreadPoolExecutor(1) as pool:
        neighbour = pool.submit(beside)  # started outside of the block
        assert started.wait(10)
        with hooked((layer.register_forward_hook, doubled)):
            assert torch.equal(layer(x), 2 * plain)
            assert torch.equal(side_by_side(lambda: layer(x))[0], 2 * plain)  # a job of the block
            with hooked((layer.register_forward_hook, doubled)):
                assert torch.equal(layer(x), 4 * plain)
            leave.set()
            assert torch.equal(neighbour.result(10), plain)
    assert torch.equal(layer(x), plain)
    assert not layer._forward_hooks
