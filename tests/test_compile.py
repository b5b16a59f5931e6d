"""torch.compile: compiled models with every method, and training steps whose graph breaks at the optimizer, once."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.optim import SGD, AdamW, RMSprop

from .method_rows import EVERY, closure_of, every
from .oracles import batches, flat, network

STEPS = 8  # SSE-SAM's switch and LookSAM's and sparse SAM's periods are shorter
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch's about itself


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make(name, model, base=SGD, /, **more):
    options = {"switch_step": 3} if name == "SSESAM" else {}
    return EVERY[name].make(model, base, **{"lr": 0.05, **options, **more})


def graphs():
    return counters["stats"]["unique_graphs"]


def breaks():
    return sum(counters["graph_break"].values())


@every
def test_a_compiled_model(name):
    results, seen = [], []
    for compiled in (False, True):
        model = network()
        wrapped = torch.compile(model, backend="aot_eager", dynamic=True) if compiled else model
        opt = make(name, model, model=wrapped)
        for x, y in batches(steps=STEPS):
            opt.step(closure_of(wrapped, x, y), targets=y)
            seen.append(graphs())
        results.append(flat(model))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
    assert seen[-1] == seen[STEPS + 3] > 0 and not breaks()


def test_batch_norm_in_a_compiled_model_has_two_graphs():
    """Running statistics are kept from the perturbed pass: that is another graph, and no more of them."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(network()[0], torch.nn.BatchNorm1d(17).double(), torch.nn.Linear(17, 4).double())
        wrapped = torch.compile(model, backend="aot_eager") if compiled else model
        opt = make("SAM", model, model=model)
        for x, y in batches(steps=5):
            opt.step(closure_of(wrapped, x, y))
        results.append(torch.cat([flat(model), *(b.double().flatten() for b in model.buffers())]))
    torch.testing.assert_close(*results)
    assert graphs() == 2


@pytest.mark.parametrize("base", [SGD, AdamW, RMSprop])
@every
def test_a_compiled_training_step_breaks_once(name, base):
    """The step is left alone; what the user computes before and after it is compiled, and never again."""
    results = []
    for compiled in (False, True):
        model = network()
        opt = make(name, model, base)

        def train_step(x, y, opt=opt, model=model):
            x = x * 2.0 - 1.0
            loss = opt.step(closure_of(model, x, y), targets=y)
            return loss * 3.0 + 1.0

        if compiled:
            train_step = torch.compile(train_step, backend="eager")
        losses = []
        for step, (x, y) in enumerate(batches(steps=STEPS)):
            with torch._dynamo.config.patch(error_on_recompile=step > 1):
                losses.append(train_step(x, y))
        results.append(torch.cat([flat(model), torch.stack(losses).double()]))
    assert torch.equal(*results)
    assert breaks() == 1 and graphs() == 2


@pytest.mark.parametrize("name", ["SAM", "FocalSAM", "GNM"])
def test_phases_in_a_compiled_function_break_once_each(name):
    results = []
    for compiled in (False, True):
        model = network()
        opt = make(name, model)

        def one_phase(loss, phase):
            loss = loss * 2.0
            phase()
            return loss + 1.0

        run = torch.compile(one_phase, backend="eager") if compiled else one_phase
        for step, (x, y) in enumerate(batches(steps=4)):
            for phase in opt.phases:
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                with torch._dynamo.config.patch(error_on_recompile=step > 1):
                    run(loss.detach(), getattr(opt, phase))
        results.append(flat(model))
    assert torch.equal(*results)
    assert breaks() >= 1 and graphs() <= 2 * len(opt.phases)


@pytest.mark.parametrize("name", ["FocalSAM", "CCSAM", "SparseSAM"])
def test_a_graph_that_can_be_differentiated_only_once(name):
    """One that was compiled elsewhere, which torch's own check would have seen."""
    model = network()
    compiled = torch.compile(model, backend="aot_eager")
    ((x, y),) = batches(steps=1)
    F.cross_entropy(compiled(x), y).backward()
    opt, before = make(name, model), flat(model)
    with pytest.raises(ValueError, match="donated_buffer = False before"):
        opt.step(closure_of(compiled, x, y), targets=y)
    assert torch.equal(flat(model), before) and torch._functorch.config.donated_buffer


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a compiler")
def test_inductor():
    model = network(torch.float32)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model)
    for net, parameters in ((compiled, model), (plain, plain)):  # Focal-SAM differentiates its losses twice
        opt = make("FocalSAM", parameters)
        for x, y in batches(torch.float32, steps=3):
            opt.step(closure_of(net, x, y), targets=y)
    torch.testing.assert_close(flat(model), flat(plain), rtol=1e-4, atol=1e-6)


def test_copies_and_pickles_stay_out_of_graphs(tmp_path):
    opt = make("SAM", network())
    torch.save(copy.deepcopy(opt), tmp_path / "opt.pt")
    loaded = torch.load(tmp_path / "opt.pt", weights_only=False)
    assert all(hasattr(getattr(loaded, name), "_torchdynamo_disable") for name in ("step", "first_step", "second_step"))
