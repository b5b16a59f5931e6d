"""Published settings, for ``--recipe``. Values that no paper gives for a dataset are marked as ours."""

from __future__ import annotations

from typing import Any

_CIFAR: dict[str, Any] = {
    # Focal-SAM's scripts: ResNet-32, 200 epochs, cosine to 0 without warm-up.
    "model": "resnet32",
    "imbalance": 100.0,
    "profile": "exp",
    "data_seed": 0,
    "epochs": 200,
    "batch_size": 64,
    "optimizer": "sgd",
    "lr": 0.1,
    "momentum": 0.9,
    "schedule": "cosine",
}
_OTHERS: dict[str, Any] = {
    "gnm.rho": 0.05,  # GNM-PT
    "gnm.dis_mul": 0.1,
    "cc_sam.noise_ratio": 1e-6,  # CC-SAM
    "look_sam.k": 5,
    "look_sam.alpha": 0.7,
    "friendly_sam.lmbda": 0.6,  # Friendly SAM's run.sh
    "sparse_sam.sparsity": 0.5,  # sparse SAM's README
    "sparse_sam.num_samples": 16,
    "sse_sam.switch_step": "70%",  # SSE-SAM's README
}

RECIPES: dict[str, dict[str, Any]] = {
    "digits-lt": {
        # Ours, as in the demo: 134 images of the digit 0, fewer of each following digit.
        "data": "digits",
        "model": "small_cnn",
        "imbalance": 50.0,
        "many": 60,
        "few": 10,
        "epochs": 40,
        "batch_size": 64,
        "lr": 0.05,
        "weight_decay": 5e-4,
        "threads": 1,  # a second thread slows so small a network down
        "options": {
            **_OTHERS,
            "rho": 0.1,
            "asam.rho": 0.5,
            "focal_sam.rho": 0.2,
            "focal_sam.gamma": 3.0,
            "focal_sam.lam": 0.5,
            "imb_sam.eta": 10,
            "sse_sam.eta": 10,
            "cc_sam.noise_ratio": 1e-4,
            "look_sam.k": 2,
            "look_sam.alpha": 0.5,
            "gsam.alpha": 0.2,
            "wsam.gamma": 0.8,
        },
    },
    "cifar10-lt": {
        **_CIFAR,
        "weight_decay": 2e-4,
        "many": 1000,
        "few": 200,
        "options": {
            **_OTHERS,
            "rho": 0.1,  # SAM with cross entropy: Saddle-LongTail's run.sh; for the others ours
            "asam.rho": 0.5,  # ASAM's README
            "focal_sam.rho": 0.2,
            "focal_sam.gamma": 3.0,
            "focal_sam.lam": 0.5,
            "imb_sam.rho": 0.05,
            "imb_sam.eta": 200,  # ours: the few-shot classes; published for CIFAR-100 only
            "sse_sam.rho": 0.05,  # README of SSE-SAM, for CIFAR-100
            "sse_sam.tail_rho": 0.1,
            "sse_sam.eta": 1000,  # ours: published for CIFAR-100 only
            "cc_sam.flat_ratio": 0.3,
        },
        "loss_options": {"ldam.max_m": 0.5, "ldam.s": 30.0},
    },
    "cifar100-lt": {
        **_CIFAR,
        "weight_decay": 1e-3,
        "many": 100,
        "few": 20,
        "options": {
            **_OTHERS,
            "rho": 0.2,  # as above
            "asam.rho": 1.0,
            "focal_sam.rho": 0.3,
            "focal_sam.gamma": 3.2,
            "focal_sam.lam": 0.8,
            "imb_sam.rho": 0.05,
            "imb_sam.eta": 20,
            "sse_sam.rho": 0.05,
            "sse_sam.tail_rho": 0.1,
            "sse_sam.eta": 100,
            "cc_sam.flat_ratio": 0.5,
        },
        "loss_options": {"ldam.max_m": 0.5, "ldam.s": 30.0},
    },
}
