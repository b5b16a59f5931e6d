"""What a table says of a call that Ctrl-C ended: which tensors are written, their backups being complete."""

from __future__ import annotations

import sys

import pytest
import torch

from ltsam_fast import backend as backends
from ltsam_fast import ops
from ltsam_fast import table as tables
from ltsam_fast.launch_args import LaunchArgs
from ltsam_fast.ops import dispatch
from ltsam_fast.table import TensorTable

from .cases import F16, F32, F64, assert_same_bits

SIZES = (5, 0, 17000, 3, 40)


def copies(tensors):
    return [tensor.clone() for tensor in tensors]


class Call:
    """An op on tensors of several kinds, with a table of its own."""

    def __init__(self, op, kinds, generator, device):
        self.op, self.table, self.calls = op, TensorTable(ops.OPS[op]), 0
        make = lambda i: torch.randn(SIZES[i], generator=generator, dtype=F64).to(device, kinds(i))  # noqa: E731
        self.w, self.g, self.backup, self.m, self.v = ([make(i) for i in range(len(SIZES))] for _ in range(5))
        self.v = [v.square() for v in self.v]
        self.steps = [torch.zeros((), device=device) for _ in SIZES]
        self.norm = torch.tensor(2.0, device=device)
        self.perturbs = op.endswith("perturb_")
        self.state = [self.m, self.v, self.steps] if op == "adam_step_" else [self.m] if op == "sgd_step_" else []

    def transpose(self, *rows):
        """Has backups and momentum lie otherwise than the weights, so that copies stand in."""
        for i in rows:
            self.w[i], self.g[i], self.v[i] = (torch.stack([x[i]] * 2) for x in (self.w, self.g, self.v))
            self.backup[i], self.m[i] = (torch.stack([x[i]] * 2, dim=1).T for x in (self.backup, self.m))

    def launched(self):
        """What the table says of the latest call, which may not have begun with it."""
        return self.table.launched() if self.table.calls > self.calls else []

    def __call__(self):
        self.calls = self.table.calls
        op, w, table = getattr(ops, self.op), self.w, {"table": self.table}
        if self.op == "perturb_":
            op(w, self.g, self.backup, self.norm, rho=0.5, **table)
        elif self.op == "gaussian_perturb_":
            op(w, self.backup, amplitude=1.0, seed=3, **table)
        elif self.op == "restore_":
            op(w, self.backup, **table)
        elif self.op == "sgd_step_":
            op(w, self.g, lr=0.1, momentum=0.9, momentum_buffers=self.m, backups=self.backup, **table)
        else:
            op(w, self.g, self.m, self.v, self.steps, lr=0.1, backups=self.backup, **table)

    def lists(self):
        return self.w, self.backup, *self.state

    def reset(self, before):
        for now, old in zip(self.lists(), before, strict=True):
            for one, other in zip(now, old, strict=True):
                one.copy_(other)

    def finished(self):
        """The lists before and after a whole call, which leaves no trace."""
        before = [copies(x) for x in self.lists()]
        self()
        done = [copies(x) for x in self.lists()]
        self.reset(before)
        return before, done

    def check(self, launched, before, done):
        """Every tensor that was launched is as after the call, with all that belongs to it; every other as before."""
        wanted = [done if i in launched else before for i in range(len(SIZES))]
        for i, lists in enumerate(wanted):
            if not SIZES[i]:  # Triton knows nothing of it
                continue
            for n, now in enumerate(self.lists()):
                if n == 1 and i not in launched and self.perturbs:
                    continue  # a backup may have been filled in vain
                assert_same_bits(now[i], lists[n][i], f"{self.op} list {n} tensor {i}")


OPS = ("perturb_", "gaussian_perturb_", "restore_", "sgd_step_", "adam_step_")
KINDS = {"one part": lambda i: F32, "two parts": lambda i: (F32, F64)[i % 2], "types": lambda i: (F32, F16, F64)[i % 3]}


@pytest.fixture(params=OPS)
def op(request):
    return request.param


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def call(request, op, backend, device, generator):
    return Call(op, request.param, generator, device)


def some(launched):
    """The tensors that have elements: of the others there is nothing to know."""
    return [i for i in launched if SIZES[i]]


ALL = some(range(len(SIZES)))


def interrupt(call, monkeypatch, where, part):
    """Makes a call that is interrupted before or right after the backend's call for one of the parts."""
    backend_for, parts = dispatch.backend_for, []

    class Interrupting:
        def __init__(self, device):
            self.backend = backend_for(device)

        def __getattr__(self, name):
            return lambda args: self.run(getattr(self.backend, name), args)

        def run(self, function, args):
            parts.append(args)
            if where == "before" and len(parts) == part + 1:
                raise KeyboardInterrupt
            function(args)
            if where == "after" and len(parts) == part + 1:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "backend_for", Interrupting)
        with pytest.raises(KeyboardInterrupt):
            call()


@pytest.mark.parametrize("where", ["before", "after"])
def test_before_and_after_each_part(where, call, monkeypatch):
    before, done = call.finished()
    parts = [part.positions for part in call.table.parts]
    for number in range(len(parts)):
        interrupt(call, monkeypatch, where, number)
        launched = call.launched()
        expected = sorted(sum(parts[: number + (where == "after")], []))
        assert some(launched) == some(expected)
        call.check(launched, before, done)
        call.reset(before)


def test_of_a_finished_call_everything_is_launched_until_the_next_begins(call):
    assert call.launched() == []
    call()
    assert call.launched() == list(range(len(SIZES)))
    call.w[2] = call.w[2][:7]
    with pytest.raises(ValueError, match="shape"):
        call()
    assert call.launched() == []


def stop_at_returns_from(name):
    """Interrupts the program right after a native function of this name has returned, as a signal's handler would."""

    def profile(frame, event, argument):
        if event == "c_return" and getattr(argument, "__name__", "") == name:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(profile)


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_right_after_native_code(kinds, op, generator):
    if reason := backends.why_not("cpu"):
        pytest.skip(f"cpu: {reason}")
    with backends.use_backend("cpu"):
        call = Call(op, kinds, generator, "cpu")
        before, done = call.finished()
        try:
            stop_at_returns_from(op)
            with pytest.raises(KeyboardInterrupt):
                call()
        finally:
            sys.setprofile(None)
        launched = call.launched()
        assert launched == call.table.parts[0].positions
        call.check(launched, before, done)


@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_after_every_line_of_python(name, op, generator):
    """Whatever line of ours an interrupt comes after: each tensor is as before or as after the call."""
    if reason := backends.why_not(name):
        pytest.skip(f"{name}: {reason}")
    with backends.use_backend(name):
        call = Call(op, KINDS["types"], generator, "cpu")
        call.transpose(3)
        before, done = call.finished()
        lines, seen = 0, set()
        while True:
            lines += 1
            left = [lines]

            def trace(frame, event, argument, left=left):
                if "ltsam_fast" not in frame.f_code.co_filename:
                    return None
                if event == "line":
                    left[0] -= 1
                    if not left[0]:
                        sys.settrace(None)
                        raise KeyboardInterrupt
                return trace

            call.table, call.calls = TensorTable(ops.OPS[op]), 0
            old = sys.gettrace()
            try:
                sys.settrace(trace)
                call()
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(old)
            if left[0] > 0:
                break
            launched = call.launched()
            seen.add(tuple(launched))
            call.check(launched, before, done)
            call.reset(before)
        assert () in seen and len(seen) >= (3 if op == "restore_" or name == "cpu" else 5) and lines > 50


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_stand_ins_are_written_back_at_once(kinds, where, op, backend, device, generator, monkeypatch):
    call = Call(op, kinds, generator, device)
    call.transpose(0, 4)
    before, done = call.finished()
    copy = torch._foreach_copy_

    def copying(to, copies):
        if sys._getframe(1).f_code.co_name != "finish":  # the reference implementation's
            return copy(to, copies)
        if where == "after":
            copy(to, copies)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "_foreach_copy_", copying)
    if op == "restore_":  # here copies stand in for backups only
        monkeypatch.setattr(TensorTable, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        call()
    launched = call.launched()
    assert some(launched) == (ALL if where == "after" or op == "restore_" else [2, 3])
    call.check(launched, before, done)


def stop(*_):
    raise KeyboardInterrupt


def test_shards_that_begin_in_between(backend, device, generator, monkeypatch):
    """Copies that begin up to three elements earlier stand in for them."""
    w = [torch.randn(n, generator=generator).to(device) for n in (7, 9)]
    old, backup = copies(w), [torch.full_like(x, torch.nan) for x in w]
    table = TensorTable(ops.OPS["gaussian_perturb_"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TensorTable, "finish", stop)
        ops.gaussian_perturb_(w, backup, amplitude=1.0, offsets=[8, 5], table=table)
    assert table.launched() == [0]
    assert_same_bits(w[1], old[1])
    assert_same_bits(backup[0], old[0])


def test_triton_notes_each_set_of_types(generator, monkeypatch):
    """One part, several launches: an interrupt may come in between."""
    if reason := backends.why_not("triton"):
        pytest.skip(f"triton: {reason}")
    from ltsam_fast.kernels import perturb_kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with backends.use_backend("triton"):
        call = Call("perturb_", lambda i: (F32, F16)[i % 2], generator, device)
        before, done = call.finished()
        kernel, runs = perturb_kernels.perturb_kernel, []

        class Interrupting:
            def __getitem__(self, grid):
                def run(*args, **named):
                    if runs:
                        raise KeyboardInterrupt
                    runs.append(grid)
                    kernel[grid](*args, **named)

                return run

        monkeypatch.setattr(perturb_kernels, "perturb_kernel", Interrupting())
        with pytest.raises(KeyboardInterrupt):
            call()
        launched = call.launched()
        assert launched in ([0, 2, 4], [3])
        call.check(launched, before, done)


def test_a_table_relies_on_nothing_that_an_interrupt_cut_off(backend, device, generator, monkeypatch):
    """It comes after tensors have been looked at, and before their new addresses are in the table."""
    call = Call("restore_", KINDS["two parts"], generator, device)
    call()
    call.w = [torch.zeros_like(w) for w in call.w]
    read = tables.reader()

    def reading(*arguments):
        read(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(call.table, "_reader", reading)
        call()
    assert call.table.launched() == []
    call()
    for w, backup in zip(call.w, call.backup, strict=True):
        assert_same_bits(w, backup)


def test_launch_args_begin_unlaunched():
    table = TensorTable(ops.OPS["restore_"])
    (part,) = table.bind(([torch.zeros(3)], [torch.zeros(3)]))
    assert isinstance(part, LaunchArgs) and part.launched is False and table.launched() == []
