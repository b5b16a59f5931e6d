"""Random numbers: the same bits on every backend, and the right distributions."""

from __future__ import annotations

import math

import pytest
import torch

import ltsam_fast as lf
from ltsam_fast import ops, reference
from ltsam_fast.backend import why_not

from .cases import DTYPES, assert_same_bits

SIZES = (0, 1, 3, 4, 5, 1023, 1025, 2048, 16385)
KEYS = ((0, 0), (1, 0), (0, 1), (2**53 - 1, 2**32 - 1), (2**32, 7))
needs_core = pytest.mark.skipif(why_not("cpu") is not None, reason=f"cpu: {why_not('cpu')}")


def weights(dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=generator, dtype=torch.float64).to(device, dtype) for n in SIZES]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_has_the_bits_of_the_reference(dtype, key, backend, device):
    ours, theirs = weights(dtype, device), weights(dtype)
    named = {"amplitude": 0.3, "sigma": 1.0, "clip": 4.0, "seed": key[0], "step": key[1]}
    ops.gaussian_perturb_(ours, None, **named)
    reference.gaussian_perturb_(theirs, None, **named)
    for one, other in zip(ours, theirs, strict=True):
        assert_same_bits(one.cpu(), other)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_have_the_bits_of_the_reference(dtype, key, backend, device):
    ours, theirs = weights(dtype, device), weights(dtype)
    named = {"rho": 0.125, "eps": 0.0, "probability": 0.6, "stochastic": True, "seed": key[0], "step": key[1]}
    for module, w in ((ops, ours), (reference, theirs)):
        grads = [one.flip(0) for one in w]
        module.perturb_(w, grads, None, torch.tensor(2.0, device=w[0].device, dtype=torch.float64), **named)
    for one, other in zip(ours, theirs, strict=True):
        assert_same_bits(one.cpu(), other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_of_all_numbers(dtype, backend, device):
    """What is not moved stays, subnormal numbers too; moved by a third of its last place it goes where the reference's does."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()] + 0.0  # no -0
    if backend == "triton" and device == "cpu":  # the interpreter knows no tiny bf16
        numbers = numbers[(numbers == 0) | (numbers.abs() >= torch.finfo(dtype).tiny)]
    thirds = numbers.float().diff(append=torch.zeros(1)) / 3
    for rho in (0.0, 1.0):
        ours, theirs = numbers.to(device, copy=True), numbers.clone()
        for module, w in ((ops, ours), (reference, theirs)):
            norm = torch.ones((), device=w.device)
            module.perturb_([w], [thirds.to(w.device)], None, norm, rho=rho, eps=0.0, stochastic=True, seed=3)
        assert_same_bits(ours.cpu(), theirs)
        assert torch.equal(theirs, numbers) == (rho == 0.0)


@pytest.mark.parametrize("offset", [0, 4, 4096, 3, 2**33 + 1, 2**39 + 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_shard_has_the_whole_tensors_noise(dtype, offset, backend, device):
    named = {"amplitude": 0.3, "seed": 5, "step": 2}
    ours, theirs = weights(dtype, device), weights(dtype)
    kept = [torch.empty_like(one) for one in ours]
    old = [one.clone() for one in ours]
    ops.gaussian_perturb_(ours, kept, offsets=[offset] * len(ours), **named)
    reference.gaussian_perturb_(theirs, None, offsets=[offset] * len(theirs), **named)
    for one, other, backup, before in zip(ours, theirs, kept, old, strict=True):
        assert_same_bits(one.cpu(), other)
        assert_same_bits(backup, before)
    if offset < 5000:
        whole = torch.zeros(offset + max(SIZES), dtype=dtype, device=device)
        whole[offset:] = weights(dtype, device)[-1]
        ops.gaussian_perturb_([torch.zeros(0, device=device)] * 8 + [whole], None, **named)
        assert_same_bits(whole[offset:], ours[-1])


def test_anew_from_old_weights_of_a_shard(backend, device):
    named = {"amplitude": 0.3, "seed": 5, "step": 2, "offsets": [5] * len(SIZES)}
    first, again = weights(torch.float32, device), weights(torch.float32, device)
    old = weights(torch.float32, device)
    ops.gaussian_perturb_(first, None, **named)
    for one in again:
        one.add_(1.0)
    ops.gaussian_perturb_(again, None, original_params=old, **named)
    for one, other in zip(first, again, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("skipped", [0.0, 3.0])
def test_skipped_steps_do_not_count(skipped, backend, device):
    signal = torch.tensor(skipped, device=device)
    norm = torch.ones((), device=device)
    for run in (
        lambda w, **named: ops.gaussian_perturb_(w, None, amplitude=0.3, seed=5, **named),
        lambda w, **named: ops.perturb_(
            w, [x.flip(0) for x in w], None, norm, rho=0.1, probability=0.5, seed=5, **named
        ),
    ):
        ours, other = weights(torch.float32, device), weights(torch.float32, device)
        run(ours, step=9, skipped=signal)
        run(other, step=9 - int(skipped))
        for one, two in zip(ours, other, strict=True):
            assert_same_bits(one, two)


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ([0], "offsets has 1 entries"),
        ([-4, 0], r"offsets\[0\] .* got -4"),
        ([0, 0.5], r"offsets\[1\]"),
        ([0, 2**40], r"offsets\[1\]"),
    ],
)
def test_wrong_offsets(offsets, words):
    w = [torch.zeros(3), torch.zeros(4)]
    with pytest.raises(ValueError, match=words):
        ops.gaussian_perturb_(w, None, amplitude=1.0, offsets=offsets)
    with pytest.raises(ValueError, match=r"params\[0\] must be contiguous"):
        ops.gaussian_perturb_([torch.zeros(4, 2).T], None, amplitude=1.0, offsets=[1])
    assert not any(one.any() for one in w)


def draws(count=10**6, *, number=0, seed=3, step=0, clip=50.0, sigma=1.0):
    w = [torch.zeros(0)] * number + [torch.zeros(count)]
    ops.gaussian_perturb_(w, None, amplitude=1.0, sigma=sigma, clip=clip, seed=seed, step=step)
    return w[-1].double()


@needs_core
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_noise_is_standard_normal(seed):
    z = draws(seed=seed)
    n = len(z)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(z.pow(power).mean().item() - moment) < 5 * math.sqrt(variance / n), power
    for lag in (1, 2, 3, 4, 5, 1024, 16384):
        assert abs((z[lag:] * z[:-lag]).mean().item()) < 5 / math.sqrt(n), lag
    # Kolmogorov: sqrt(n) D exceeds 1.95 in one of a thousand.
    p = torch.special.ndtr(z.sort().values)
    ranks = torch.arange(1, n + 1, dtype=torch.float64) / n
    distance = max((ranks - p).max().item(), (p - ranks + 1 / n).max().item())
    assert distance * math.sqrt(n) < 1.95
    assert 4.2 < z.abs().max() < 6.4


@needs_core
def test_clipping_gathers_the_tails():
    e = draws(clip=0.5, sigma=1 / 3)
    share = (e.abs() == 0.5).double().mean().item()
    expected = 2 * torch.special.ndtr(torch.tensor(-1.5, dtype=torch.float64)).item()
    assert abs(share - expected) < 5 * math.sqrt(expected / len(e))
    assert e.abs().max() == 0.5


@needs_core
def test_every_part_of_the_key_counts():
    base = draws(10**5)
    for other in (draws(10**5, seed=4), draws(10**5, step=1), draws(10**5, number=1), draws(10**5, seed=3 + 2**32)):
        assert abs((base * other).mean().item()) < 5 / math.sqrt(len(base))
    assert torch.equal(base[:1000], draws(1000))


@needs_core
def test_same_bits_for_any_number_of_threads(threads):
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(draws(300001))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_core
@pytest.mark.parametrize("probability", [0.0, 0.25, 0.6, 1.0])
def test_coordinates_move_with_their_chance(probability):
    w, count = torch.zeros(10**6), 10**6
    ops.perturb_([w], [torch.ones(count)], None, torch.tensor(1.0), rho=1.0, probability=probability, seed=1)
    spread = 5 * math.sqrt(probability * (1 - probability) / count) + 2**-16
    assert abs((w != 0).double().mean().item() - probability) <= spread


@needs_core
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_perturbations_of_16_bit_weights_survive(dtype):
    """At rho 0.05 and 25 million weights most of the perturbation is below half a unit in the last place."""
    generator = torch.Generator().manual_seed(0)
    count, rho = 10**6, 0.01  # of the same size for each element as 0.05 in 25 million
    w = (0.05 * torch.randn(count, generator=generator)).to(dtype)
    g = torch.randn(count, generator=generator).to(dtype)
    cosines = []
    for named in ({}, {"stochastic": True, "seed": 1}):
        mean = torch.zeros(count, dtype=torch.float64)
        for step in range(1 if not named else 64):
            moved = w.clone()
            ops.perturb_([moved], [g], None, g.float().norm(), rho=rho, **named, **({"step": step} if named else {}))
            mean += moved.double() - w.double()
        cosines.append(torch.cosine_similarity(mean, g.double(), dim=0).item())
    assert cosines[1] > cosines[0]
    wanted = rho * g.double() / g.double().norm()
    drift = (mean / 64 - wanted).norm() / wanted.norm()
    assert abs((mean @ wanted / 64 / (wanted @ wanted)).item() - 1) < 0.02, "rounding must keep the mean"
    assert drift < 8 * 64**-0.5 * 8


def test_seed_and_chance_go_together():
    w = torch.zeros(3)
    with pytest.raises(ValueError, match="seed must be given"):
        ops.perturb_([w], [w.clone()], None, torch.tensor(1.0), rho=0.1, probability=0.5)
    with pytest.raises(ValueError, match="probability must be"):
        ops.perturb_([w], [w.clone()], None, torch.tensor(1.0), rho=0.1, probability=1.5, seed=1)
    with pytest.raises(ValueError, match="seed must be"):
        ops.gaussian_perturb_([w], None, amplitude=0.1, seed=2**53)


def test_both_backends_draw_alike_in_an_optimizer():
    results = []
    for name in lf.backends():
        if name == "triton":
            continue  # slow in the interpreter; the ops above have it
        device = "cuda" if name == "cuda" else "cpu"
        with lf.use_backend(name):
            torch.manual_seed(0)
            model = torch.nn.Linear(40, 30).to(device)
            opt = lf.GNM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, seed=9)
            x = torch.randn(8, 40).to(device)
            for _ in range(3):
                opt.step(lambda model=model, x=x: model(x).square().mean(1))
            results.append(model.weight.detach().cpu())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-7)
