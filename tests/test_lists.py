"""What is done to long lists natively is what its definition in Python says."""

from collections import defaultdict

import numpy as np
import pytest
import torch

from ltsam_fast import lists, ops
from ltsam_fast.ops import OPS
from ltsam_fast.snapshot import CHANGED, COLUMNS, NEVER_READ, SAME, ReadOnce, native, read_in_python, reader
from ltsam_fast.table import TensorTable


class OwnGradient(torch.nn.Parameter):
    """A parameter whose gradient is Python's to say."""

    grad = property(lambda self: vars(self).get("own"), lambda self, value: vars(self).update(own=value))


@pytest.fixture(params=("Python", "native"))
def call(request):
    """Calls a function by its name."""
    if request.param == "native" and native() is None:
        pytest.skip("the C++ core is not built")
    return lambda name, *arguments: (getattr(native(), name) if request.param == "native" else lists.DEFINITIONS[name])(
        *arguments
    )


@pytest.fixture
def params():
    """Of several kinds, with gradients but for the third; the second is frozen."""
    found = [torch.nn.Parameter(torch.ones(3)), torch.ones(2), torch.nn.Parameter(torch.ones(4))]
    found += [OwnGradient(torch.ones(2)), torch.nn.Parameter(torch.ones(5, dtype=torch.float64))]
    for param in (*found[:2], *found[3:]):
        param.grad = torch.ones_like(param.detach())
    return found


def test_gradients(call, params):
    wanted = [param.grad for param in params]
    wanted[1] = None
    assert lists.same_items(call("gradients_of", params), wanted)
    call("clear_gradients", params)
    assert [param.grad for param in params] == [None] * 5
    assert call("gradients_of", params) == [None] * 5 and call("gradients_of", []) == []


def test_what_has_no_gradient_is_an_error(call, params):
    with pytest.raises(AttributeError):
        call("gradients_of", [params[0], 1])
    with pytest.raises(AttributeError):
        call("clear_gradients", [params[0], object()])


def test_missing_and_views(call):
    x, y = torch.ones(3), torch.ones(4)
    assert not call("has_none", [x, y]) and call("has_none", (x, None)) and not call("has_none", [])
    assert not call("has_views", [x, None, y]) and call("has_views", [x, y[:2]]) and not call("has_views", [])


def test_same_items(call):
    x, y = torch.ones(3), torch.ones(3)
    assert call("same_items", [x, y], [x, y]) and call("same_items", [], [])
    assert not call("same_items", [x, y], [y, x]) and not call("same_items", [x], [x, y])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1), (1, 3), (3, 3, 0)])
def test_values(call, params, order):
    state = defaultdict(dict, {param: {"m": i, "n": None} for i, param in enumerate(params[:4])})
    found = call("values_of", state, [params[i] for i in order])
    assert all(one is state[params[i]] for one, i in zip(found, order, strict=True))
    assert call("entries", found, "m") == [*order] and call("entries", found, "missing") == [None] * len(order)
    assert call("values_of", state, params)[4] == {} and params[4] in state  # torch's optimizers make it too
    with pytest.raises(KeyError):
        call("values_of", dict(state), [torch.ones(1)])


def test_entries_of_other_mappings(call):
    class Counted(dict):
        def get(self, name):
            return name

    assert call("entries", [Counted(), {"m": 1}], "m") == ["m", 1]


def test_what_is_read_once_serves_other_tables():
    """Whatever reads it: natively or in Python."""
    w, backups = [torch.ones(5), None, torch.ones(3, 2)], ReadOnce([torch.zeros(5), None, torch.zeros(3, 2)])
    for read in {reader(), read_in_python}:
        backups.rows = None
        first, second, whole = (np.full((3, roles, COLUMNS), NEVER_READ, np.int64) for roles in (2, 1, 1))
        assert read((w, backups), first, (True, True), None) == CHANGED
        rows = backups.rows
        assert read((backups,), second, (False,), None) == CHANGED and backups.rows is rows
        read((list(backups),), whole, (False,), None)
        assert (first[:, 1] == rows).all() and (second == whole).all() and (whole[:, 0] == rows).all()
        assert read((w, backups), first, (True, True), None) == SAME


def test_tables_ask_no_more_where_a_list_is_read_once():
    w, g = [torch.ones(4)], ReadOnce([torch.full((4,), 3.0)])
    tables = [TensorTable(OPS[name]) for name in ("grad_norm", "perturb_")]
    norm = ops.grad_norm(g, table=tables[0])
    rows = g.rows
    ops.perturb_(w, g, None, norm, rho=6.0, table=tables[1])
    assert g.rows is rows and w[0].tolist() == [4.0] * 4
    with pytest.raises(ValueError, match="grads\\[0\\] has shape"):
        ops.perturb_([torch.ones(5)], g, None, norm, rho=6.0, table=tables[1])
    with pytest.raises(ValueError, match="grads\\[0\\] is sparse"):
        ops.grad_norm(ReadOnce([torch.ones(2, 2).to_sparse()]))
