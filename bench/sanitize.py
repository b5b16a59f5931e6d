"""A small step of each op, for compute-sanitizer: odd sizes, empty tensors, an unaligned view."""

import torch

import ltsam_fast as lf


def main() -> None:
    """Runs SAM and Focal-SAM with SGD and AdamW for two steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for base, options in ((torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.1})):
        params = [torch.randn(n, device=device).requires_grad_() for n in (0, 1, 7, 4097, 40001, 0)]
        params.append(torch.randn(1001, device=device)[1:].requires_grad_())
        optimizer = lf.FocalSAM(params, base, rho=0.1, **options)
        for _ in range(2):
            for phase in (optimizer.first_step, optimizer.second_step, optimizer.third_step):
                for param in params:
                    param.grad = torch.randn_like(param)
                phase()
    logits = torch.randn(5, 1003, device=device)
    lf.ops.focal_cross_entropy(logits, torch.arange(5, device=device), torch.rand(1003, device=device))
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
