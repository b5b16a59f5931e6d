"""Calls each op once, for compute-sanitizer, with odd sizes, empty tensors and an unaligned view.

"large": passes over a tensor larger than all caches, for hardware counters. "graphs": steps as CUDA graphs, compared with
eager steps.
"""

import sys

import torch

import ltsam_fast as lf


def large(device: str) -> None:
    """Takes steps over a tensor larger than all caches."""
    param = torch.randn(2**26 if device == "cuda" else 2**10, device=device).requires_grad_()
    optimizer = lf.FocalSAM([param], torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    for _ in range(2):
        for phase in (optimizer.first_step, optimizer.second_step, optimizer.third_step):
            param.grad = torch.randn_like(param)
            phase()
    logits = torch.randn(2**14 if device == "cuda" else 4, 1000, device=device, requires_grad=True)
    lf.ops.adjusted_cross_entropy(logits, torch.arange(len(logits), device=device) % 1000).sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()


def graphs(device: str) -> None:
    """Compares five steps of graph_step, four of them replays with changing learning rates, with eager steps."""
    counts = [40, 20, 5]
    for method, options in ((lf.SAM, {}), (lf.FocalSAM, {"class_counts": counts}), (lf.ESAM, {})):
        results = []
        for captured in (False, True):
            torch.manual_seed(0)
            layers = torch.nn.Linear(4, 33), torch.nn.BatchNorm1d(33), torch.nn.Tanh(), torch.nn.Linear(33, 3)
            model = torch.nn.Sequential(*layers).to(device)
            optimizer = method(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, **options)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            criterion = lf.losses.LDAM(counts, reduction="none").to(device)
            x, y = torch.randn(5, 9, 4, device=device), torch.randint(0, 3, (5, 9), device=device)
            step = lf.graph_step(model, criterion, optimizer, (x[0], y[0]), warmup=1) if captured else None
            for inputs, targets in zip(x, y, strict=True):
                if step:
                    step(inputs, targets)
                else:

                    def losses(i=slice(None), x=inputs, y=targets, model=model):
                        return criterion(model(x[i]), y[i])  # noqa: B023

                    optimizer.step(losses, targets=targets)
                schedule.step()
            results.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
        print(
            f"{method.__name__}: {float((results[1] - results[0]).norm() / results[0].norm()):.1e} relative difference"
        )


def main() -> None:
    """Runs Focal-SAM with SGD and AdamW for two steps, then every op once."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if sys.argv[1:] == ["large"]:
        large(device)
        return
    if sys.argv[1:] == ["graphs"]:
        print("graphs need a GPU") if device == "cpu" else graphs(device)
        return
    for base, options in ((torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.1})):
        params = [torch.randn(n, device=device).requires_grad_() for n in (0, 1, 7, 4097, 40001, 0)]
        params.append(torch.randn(1001, device=device)[1:].requires_grad_())
        optimizer = lf.FocalSAM(params, base, rho=0.1, **options)
        for _ in range(2):
            for phase in (optimizer.first_step, optimizer.second_step, optimizer.third_step):
                for param in params:
                    param.grad = torch.randn_like(param)
                phase()
    w, g, h, out = ([torch.randn(n, device=device) for n in (0, 1, 7, 4097, 40001)] for _ in range(4))
    bits = [torch.randint(0, 256, (-(-len(x) // 8),), dtype=torch.uint8, device=device) for x in w]
    mix = torch.rand(4, device=device)
    norm = lf.ops.grad_norm(g, w, kept_grads=h, combination=mix, adaptive=True)
    lf.ops.grad_dots(g, h)
    lf.ops.perturb_(w, g, out, norm, rho=0.1, means=h, mask=bits, combination=mix, decay=0.5)
    lf.ops.perturb_(w, g, None, norm, rho=0.1, original_params=out, probability=0.5, stochastic=True, seed=1)
    lf.ops.gaussian_perturb_(w, out, amplitude=0.1)
    lf.ops.combine_(out, g, h, mix)
    lf.ops.perturb_by_class_(w, [g, h], torch.rand(2, device=device))
    logits = torch.randn(5, 1003, device=device)
    targets, vector = torch.arange(5, device=device), torch.rand(1003, device=device)
    lf.ops.focal_cross_entropy(logits, targets, vector)
    vectors = dict.fromkeys(("scale", "shift", "margin", "weight"), vector)
    noise = {"spread": vector, "draw": torch.ones((), dtype=torch.int64, device=device)}
    for options in ({}, vectors | {"label_smoothing": 0.1}, vectors | noise | {"gamma": 1.0}):
        lf.ops.adjusted_cross_entropy(logits.requires_grad_(), targets, **options).sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
