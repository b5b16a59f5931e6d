"""The op tests' rows: shapes, element types, layouts, tolerances and ways to call an op; and what compares."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ltsam_fast import ops, reference
from ltsam_fast.ops import OPS

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, F64, BF16, F16)


class Tolerance(NamedTuple):
    """What may be lost besides what plain torch loses: half a unit in the last place stored, and rounding on the way."""

    relative: float
    absolute: float


TOLERANCES = {
    F32: Tolerance(2**-23, 2e-6),
    F64: Tolerance(2**-52, 4e-15),
    BF16: Tolerance(2**-8, 2e-6),
    F16: Tolerance(2**-11, 2e-6),
}
NORM_TOLERANCES = {F32: Tolerance(4e-6, 1e-6), F64: Tolerance(1e-14, 1e-14)}
"""Sums of many squares or products; the absolute one is of the largest."""

# Zero elements first, in the middle and last; a number; both sides of the edges of lanes, tiles (1024), blocks (2048, 4096)
# and chunks (16384).
SHAPES = ((0,), (1,), (7,), (), (4095,), (4097,), (3, 0, 2), (16384,), (16385,), (5, 3, 2, 4), (2, 1, 33), (0, 4))
FEW_SHAPES = ((), (6, 5), (0,), (2, 3, 4, 5), (1025,))
BIG_SHAPES = ((2**20 + 3,),)

KINDS = {
    "fp32": lambda tensor, role: F32,
    "fp64": lambda tensor, role: F64,
    "bf16": lambda tensor, role: BF16,
    "fp16": lambda tensor, role: F16,
    "tensors differ": lambda tensor, role: DTYPES[tensor % 4],
    "roles differ": lambda tensor, role: (BF16, F32, F16)[(tensor + role) % 3],
    "a role is fp64": lambda tensor, role: F64 if role == 1 else F32,
}
"""The element type of a tensor's role, by the numbers of both."""

LAYOUTS = ("contiguous", "transposed", "channels_last", "sliced")
SENTINEL = 7.25


def rising(count):
    """Three groups, in order, the second without a tensor."""
    return [2 * (2 * i // max(count, 1)) for i in range(count)]


def shuffled(count):
    """Three groups, out of order."""
    return [(i * i + 2) % 3 for i in range(count)]


def numbered(count):
    """Another number for each tensor."""
    return [0.1 * (i - 2) for i in range(count)]


@dataclass(frozen=True)
class Case:
    """One way to call an op: the lists of tensors and the other arguments. Signals are numbers here."""

    op: str
    name: str
    lists: str
    values: dict[str, Any] = field(default_factory=dict)
    missing: bool = False

    def __str__(self):
        return f"{self.op} {self.name}"


def _sgd(name, *lists, missing=False, lr=0.1, **values):
    return Case("sgd_step_", name, " ".join(("params grads", *lists)), {"lr": lr, **values}, missing)


def _adam(name, *lists, missing=False, lr=0.1, **values):
    lists = " ".join(("params grads exp_avgs exp_avg_sqs steps", *lists))
    return Case("adam_step_", name, lists, {"lr": lr, **values}, missing)


def _perturb(name, *lists, missing=False, rho=0.05, norm=3.0, **values):
    op = "random_perturb_" if "seed" in values else "perturb_"
    lists = " ".join(("params grads", *(lists or ("backups",))))
    return Case(op, name, lists, {"rho": rho, "norm": norm, **values}, missing)


def _gaussian(name, *lists, amplitude=0.05, **values):
    return Case("gaussian_perturb_", name, " ".join(("params", *lists)), {"amplitude": amplitude, **values})


C = (0.7, -0.4, 0.3, 1.5)

CASES = (
    Case("grad_norm", "plain", "grads"),
    Case("grad_norm", "missing", "grads", missing=True),
    Case("grad_norm", "kept_grads", "grads kept_grads"),
    Case("grad_norm", "kept_grads missing", "grads kept_grads", missing=True),
    Case("grad_norm", "combination", "grads kept_grads params", {"combination": C, "adaptive": True}, missing=True),
    Case("grad_norm", "adaptive", "grads params", {"adaptive": True, "eta": 0.01}),
    Case("grad_norm", "adaptive kept_grads", "grads kept_grads params", {"adaptive": True, "eta": 0.5}, missing=True),
    Case("grad_norm", "found", "grads", {"found_inf": 0.0}),
    Case("grad_norm", "per group", "grads", {"groups": rising, "per_group": True}),
    Case("grad_norm", "per group shuffled", "grads kept_grads", {"groups": shuffled, "per_group": True}, missing=True),
    Case(
        "grad_norm", "per group adaptive", "grads params",
        {"groups": shuffled, "per_group": True, "adaptive": [True, False, True], "eta": [0.1, 0.2, 0.3]},
    ),
    Case("grad_norm", "groups adaptive", "grads params", {"groups": shuffled, "adaptive": [0, 1, 1], "eta": 0.01}),
    _perturb("plain"),
    _perturb("missing", missing=True),
    _perturb("adaptive", adaptive=True, eta=0.01),
    _perturb("scaled", grad_scale=1024.0, norm=3072.0, eps=0.1),
    _perturb("found nothing", found_inf=0.0, rho=0.0),
    _perturb("found", found_inf=1.0),
    _perturb("groups", groups=shuffled, rho=[0.0, 0.5, 1.0], adaptive=[True, False, True], eta=[0.0, 0.0, 0.1]),
    _perturb("again", "original_params"),
    _perturb("means", "backups", "means", combination=C, decay=0.9),
    _perturb("means missing", "backups", "means", missing=True, combination=C, decay=0.6),
    _perturb("mask", "backups", "mask"),
    _perturb("mask again", "original_params", "mask", adaptive=True),
    _perturb("found means", "backups", "means", combination=C, decay=0.5, found_inf=1.0),
    _perturb(
        "everything", "original_params", "backups", "means", "mask", combination=C, decay=0.5, adaptive=True,
        eta=0.1, grad_scale=8.0, norm=24.0, found_inf=0.0,
    ),
    _perturb("probability", seed=3, probability=0.6),
    _perturb("stochastic", seed=2**52 + 1, step=7, stochastic=True),
    _perturb(
        "probability everything", "original_params", "backups", "means", "mask", combination=C, decay=0.5, seed=11,
        step=2**31, probability=0.25, stochastic=True,
    ),
    _perturb("probability groups", seed=11, probability=[0.0, 0.5, 1.0], groups=shuffled, rho=[0.0, 0.5, 1.0]),
    _gaussian("plain", "backups"),
    _gaussian("not kept", "original_params", seed=2**40 + 3, step=2**32 - 1, clip=0.5, sigma=1.0),
    _gaussian("groups", "backups", groups=shuffled, amplitude=[0.0, 0.5, 2.0], seed=9),
    Case("perturb_by_class_", "plain", "params class_grads", {"scales": numbered}),
    Case("combine_", "plain", "out grads kept_grads", {"combination": C}),
    Case("combine_", "missing", "out grads kept_grads", {"combination": C, "found_inf": 0.0}, missing=True),
    Case("combine_", "found", "out grads kept_grads", {"combination": C, "found_inf": 1.0}),
    Case("grad_dots", "plain", "grads other"),
    Case("grad_dots", "missing", "grads other", missing=True),
    Case("restore_", "plain", "params backups"),
    _sgd("plain"),
    _sgd("missing", missing=True, weight_decay=0.01),
    _sgd("momentum", "momentum_buffers", momentum=0.9),
    _sgd("momentum missing", "backups kept_grads momentum_buffers", missing=True, momentum=0.9),
    _sgd("nesterov", "momentum_buffers backups", momentum=0.9, nesterov=True, weight_decay=0.1),
    _sgd("dampening", "momentum_buffers steps", momentum=0.9, dampening=0.3),
    _sgd("maximize", "kept_grads backups", maximize=True, weight_decay=0.1),
    _sgd("clipped", "kept_grads", max_norm=1.0, norm=3.0),
    _sgd("not clipped", "kept_grads", max_norm=10.0, norm=3.0),
    _sgd("clipped scaled", max_norm=1.0, norm=3072.0, grad_scale=1024.0),
    _sgd("idle momentum", "momentum_buffers steps"),
    _sgd("found", "backups momentum_buffers steps", momentum=0.9, found_inf=1.0),
    _sgd(
        "combination", "backups kept_grads momentum_buffers", momentum=0.9, combination=C, maximize=True, grad_scale=2.0,
        max_norm=1.0, norm=3.0,
    ),
    _sgd(
        "everything", "backups kept_grads momentum_buffers steps", momentum=0.9, dampening=0.1, weight_decay=0.05,
        maximize=True, max_norm=2.0, norm=2048.0, grad_scale=512.0, found_inf=0.0,
    ),
    _sgd(
        "groups", "backups momentum_buffers", groups=shuffled, lr=[0.1, 0.2, 0.0], momentum=[0.0, 0.9, 0.5],
        weight_decay=[0.1, 0.0, 0.2], nesterov=[False, True, False], maximize=[0, 0, 1],
    ),
    _adam("plain"),
    _adam("missing", "backups kept_grads", missing=True, weight_decay=0.01),
    _adam("decay", "backups", weight_decay=0.1, eps=0.01),
    _adam("decoupled", "backups", weight_decay=0.1, decoupled=True),
    _adam("amsgrad", "max_exp_avg_sqs"),
    _adam("no betas", beta1=0.0, beta2=0.0),
    _adam("clipped scaled", "kept_grads", max_norm=1.0, norm=3072.0, grad_scale=1024.0),
    _adam("found", "backups max_exp_avg_sqs", found_inf=1.0),
    _adam("combination", "backups kept_grads", weight_decay=0.1, decoupled=True, combination=C),
    _adam(
        "everything", "backups kept_grads max_exp_avg_sqs", weight_decay=0.1, decoupled=True, maximize=True, max_norm=2.0,
        norm=4.0, grad_scale=2.0, found_inf=0.0,
    ),
    _adam(
        "groups", "backups", groups=shuffled, lr=[0.1, 0.2, 0.3], beta1=[0.9, 0.8, 0.0], beta2=[0.99, 0.9, 0.5],
        weight_decay=0.1, decoupled=[0, 1, 0],
    ),
)  # fmt: skip
BY_NAME = {str(case): case for case in CASES}
RICHEST = tuple(
    BY_NAME[name]
    for name in (
        "grad_norm adaptive kept_grads",
        "grad_dots plain",
        "perturb_ everything",
        "random_perturb_ probability everything",
        "gaussian_perturb_ plain",
        "perturb_by_class_ plain",
        "combine_ plain",
        "restore_ plain",
        "sgd_step_ everything",
        "adam_step_ everything",
    )
)
"""Of each op the row with most roles."""

SIGNALS = ("norm", "grad_scale", "found_inf", "combination", "scales", "skipped")


def place(values, layout="contiguous", offset=0):
    """A tensor with these values in a buffer of its own that holds SENTINEL everywhere else."""
    shape, gap = values.shape, 2 if layout == "sliced" else 1
    strides, reach = [0] * len(shape), gap
    order = range(len(shape))
    if layout == "transposed":
        order = reversed(order)
    elif layout == "channels_last" and len(shape) == 4:
        order = (0, 2, 3, 1)
    for dim in reversed(tuple(order)):
        strides[dim], reach = reach, reach * max(shape[dim], 1)
    buffer = torch.full((reach + 48,), SENTINEL, dtype=values.dtype, device=values.device)
    tensor = buffer.as_strided(shape, strides, 16 + offset)
    return tensor.copy_(values)


def assert_surroundings_untouched(tensor):
    """Nothing was written to a placed tensor's buffer but the tensor."""
    whole = torch.tensor([], dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    outside = torch.ones(whole.shape, dtype=torch.bool, device=tensor.device)
    outside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(False)
    assert bool((whole[outside] == SENTINEL).all()), "memory around the tensor was written to"


def build(case, generator, device="cpu", shapes=SHAPES, kind="fp32", layout="contiguous", offsets=False):
    """The keyword arguments of a call, with fresh tensors. ``layout`` "mixed": another one for each role."""
    dtype_of = KINDS[kind]
    roles = OPS[case.op].arguments
    call = {}
    for role, name in enumerate(roles):
        if name not in case.lists.split():
            if name == "backups" and "perturb" in case.op:
                call[name] = None
            continue
        call[name] = []
        for i, shape in enumerate(shapes):
            if name == "steps":
                call[name].append(torch.tensor(float(i % 3), device=device))
                continue
            if name == "mask":
                size = (-(-torch.Size(shape).numel() // 8),)
                call[name].append(torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).to(device))
                continue
            if case.missing and name in ("grads", "kept_grads", "other") and (i + role) % 3 == 0:
                call[name].append(None)
                continue
            values = torch.randn(shape, generator=generator, dtype=F64)
            if name.endswith("_sqs"):  # not too small, for it divides
                values = values.square() + 0.01
            if name == "backups" and "perturb" in case.op:
                values = torch.full(shape, torch.nan)
            mixed = LAYOUTS[(role + i) % len(LAYOUTS)] if layout == "mixed" else layout
            offset = (i + 5 * role * (offsets == "mixed")) % 16 if offsets else 0
            call[name].append(place(values.to(device, dtype_of(i, role)), mixed, offset))
    for name, value in case.values.items():
        value = value(len(shapes)) if callable(value) else value
        call[name] = torch.tensor(value, device=device) if name in SIGNALS else value
    return call


def tensors_of(call):
    """(name, tensor) for each tensor of a call."""
    for name, value in call.items():
        for i, tensor in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(tensor, torch.Tensor):
                yield f"{name}[{i}]" if isinstance(value, list) else name, tensor


def plain(call, double=False):
    """A copy of a call, in tensors of their own without holes; in double precision if asked for."""

    def copy(name, value):
        if isinstance(value, list):
            return [copy(name, one) for one in value]
        if not isinstance(value, torch.Tensor):
            return value
        keep = not double or name in ("steps", "found_inf", "mask")
        return value.detach().clone().to(value.dtype if keep else F64)

    return {name: copy(name, value) for name, value in call.items()}


def bits(tensor):
    """A tensor's elements as integers, so that NaN equals itself and 0 does not equal -0."""
    whole = tensor.detach().cpu().contiguous()
    return whole.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.element_size()])


def same_bits(one, other):
    """Whether two tensors have the same element type, shape and bits."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def assert_same_bits(one, other, what=""):
    """As :func:`same_bits`, and says which element differs."""
    if not same_bits(one, other):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), what
        differs = (bits(one) != bits(other)).flatten()
        at = int(differs.int().argmax())
        values = [t.detach().cpu().flatten()[at].item() for t in (one, other)]
        raise AssertionError(
            f"{what}: {int(differs.sum())} elements differ, the first is {at}: {values[0]} != {values[1]}"
        )


def snapshot(call):
    """The bits of all tensors of a call that have any."""
    return [
        (name, tensor, bits(tensor).clone())
        for name, tensor in tensors_of(call)
        if tensor.layout == torch.strided and tensor.device.type != "meta"
    ]


def assert_unchanged(before):
    """No tensor of a :func:`snapshot` has changed."""
    for name, tensor, old in before:
        assert torch.equal(bits(tensor), old), f"{name} was changed"


def assert_as_good(ours, plain, exact, tolerance, what="", scale=1.0):
    """|ours - exact| <= |plain - exact| + tolerance, element by element; what is not finite must be the same.

    Args:
        ours: What an op computed.
        plain: What plain torch computes from the same input, in the same element types.
        exact: What plain torch computes in double precision.
        tolerance: What may be lost in addition.
        what: A name for the message.
        scale: Size of the values, for the absolute tolerance.
    """
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    assert ours.dtype == plain.dtype, f"{what}: {ours.dtype}, not {plain.dtype}"
    rounded = exact.detach().cpu().to(ours.dtype).double().flatten()
    ours, plain, exact = (tensor.detach().cpu().double().flatten() for tensor in (ours, plain, exact))
    error = (ours - exact).abs()
    allowed = (
        (plain - exact).abs().nan_to_num(torch.inf) + tolerance.relative * exact.abs() + tolerance.absolute * scale
    )
    same = (ours == rounded) | (ours.isnan() & exact.isnan())
    same |= torch.as_tensor(scale).isinf()  # terms overflow in double precision too
    same |= (ours == plain) | (ours.isnan() & plain.isnan())  # both overflowed, or neither and what is exact did
    bad = ~(error.isfinite() & (error <= allowed)) & ~same
    if bad.any():
        excess = torch.where(bad, (error / allowed).nan_to_num(torch.inf, torch.inf), -torch.inf)
        worst = int(excess.argmax())
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {len(bad)} elements are off, the worst is {worst}: got {ours[worst]:.17g}, "
            f"exactly {exact[worst]:.17g}, plain torch has {plain[worst]:.17g}; "
            f"error {error[worst]:.3g}, allowed {allowed[worst]:.3g}"
        )


def run(module, case, call, **named):
    """Calls the op; the result, if there is one, joins the call's tensors."""
    named |= call
    if case.op == "perturb_by_class_":  # as many classes as tensors would be a tensor each: here it is one class
        named |= {"class_grads": [call["class_grads"]], "scales": call["scales"][None]}
    result = getattr(module, case.op.removeprefix("random_"))(**named)
    return call if result is None else call | {"result": result}


def written(op):
    """The arguments whose tensors an op writes."""
    return {name for role, name in zip(op.roles, op.arguments, strict=True) if role in op.writes}


def check(case, call, scale_of=None, placed=True, **named):
    """Runs a call from build() and compares all of its tensors with those of the reference implementation.

    Args:
        case: How the op is called.
        call: The arguments, of which the reference implementation gets copies.
        scale_of: (name, exact result) -> size of the values, for the absolute tolerance.
        placed: Whether each tensor has a buffer of its own, see place().
        named: More arguments for the op, and for it alone.
    """
    theirs = run(reference, case, plain(call))
    exact = run(reference, case, plain(call, double=True))
    before = plain(call)
    ours = run(ops, case, call, **named)
    assert [name for name, _ in tensors_of(ours)] == [name for name, _ in tensors_of(theirs)]
    changes = written(OPS[case.op]) | {"found_inf", "result"}
    places = {tensor.data_ptr() for name, tensor in tensors_of(call) if name.partition("[")[0] in changes}
    exact_sum = all(tensor.dtype == F64 for name, tensor in tensors_of(call) if "[" in name)
    rows = zip(tensors_of(ours), tensors_of(theirs), tensors_of(exact), strict=True)
    for (name, tensor), (_, working), (_, truth) in rows:
        if name.partition("[")[0] not in changes:
            continue
        tolerance = NORM_TOLERANCES[F64 if exact_sum else F32] if name == "result" else TOLERANCES[tensor.dtype]
        scale = float(truth.abs().max()) if name == "result" and truth.numel() else 1.0
        scale = scale_of(name, truth) if scale_of else scale
        assert_as_good(tensor, working, truth, tolerance, f"{case} {name} {tuple(tensor.shape)} {tensor.dtype}", scale)
    for (name, tensor), (_, old) in zip(tensors_of(call), tensors_of(before), strict=True):
        if name.partition("[")[0] not in changes and tensor.data_ptr() not in places:
            assert_same_bits(tensor.detach(), old, f"{case} {name}, which is only read")
        if placed and "[" in name and not name.startswith("steps"):
            assert_surroundings_untouched(tensor)
    return ours
