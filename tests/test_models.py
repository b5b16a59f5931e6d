"""Networks: shapes, the published sizes, shortcuts, cosine heads, and other packages' models by name."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ltsam_fast import models


@pytest.mark.parametrize("cosine_head", [False, True])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 20, 20)])
@pytest.mark.parametrize("name", [name for name in models.names() if name not in ("resnet56", "resnet110")])
def test_every_name_makes_a_network_that_learns(name, shape, cosine_head, seed):
    torch.manual_seed(seed)
    model = models.create(name, 7, shape, cosine_head=cosine_head)
    out = model(torch.randn(3, *shape))
    assert out.shape == (3, 7)
    F.cross_entropy(out, torch.tensor([0, 3, 6])).backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in model.parameters())
    head = models.classifier(model)
    assert isinstance(head, models.NormedLinear if cosine_head else nn.Linear)
    assert head.out_features == 7
    assert out.abs().max() <= 1.00001 or not cosine_head


def parameters(model):
    return sum(param.numel() for param in model.parameters())


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_resnets_have_the_published_sizes(depth, millions):
    """He et al. 2016, table 6."""
    model = models.resnet(10, depth=depth)
    assert round(parameters(model) / 1e6, 2 if depth < 110 else 1) == millions
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


def test_resnet32_stages():
    blocks = [module for module in models.resnet32(10).modules() if isinstance(module, models.BasicBlock)]
    assert [block.conv1.out_channels for block in blocks] == [16] * 5 + [32] * 5 + [64] * 5
    assert [block.stride for block in blocks] == [1] * 5 + [2] + [1] * 4 + [2] + [1] * 4


@pytest.mark.parametrize("size", [8, 9])
def test_option_a_shortcut(size, seed):
    """With the convolutions' way shut, a block gives every second pixel, with zeros in the new channels on both sides."""
    torch.manual_seed(seed)
    block = models.BasicBlock(4, 8, 2).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, size, size)
    out = block(x)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert not out[:, :2].any() and not out[:, 6:].any()


def test_kaiming_initialization(seed):
    torch.manual_seed(seed)
    for module in models.resnet(10, depth=20).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            fan_in = module.weight[0].numel()
            assert abs(module.weight.std() / (2 / fan_in) ** 0.5 - 1) < 0.1


def test_the_cosine_head_is_the_cosine(seed):
    torch.manual_seed(seed)
    head, x = models.NormedLinear(6, 4), torch.randn(5, 6)
    with torch.no_grad():
        head.weight.mul_(torch.rand(4, 1) + 0.5)
    torch.testing.assert_close(head(x), F.cosine_similarity(x[:, None], head.weight[None], dim=2))


def test_vit_attention_is_multihead_attention(seed):
    torch.manual_seed(seed)
    mine, theirs = models.Attention(12, 3).double(), nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(mine.qkv.weight)
        theirs.in_proj_bias.copy_(mine.qkv.bias)
        theirs.out_proj.weight.copy_(mine.out.weight)
        theirs.out_proj.bias.copy_(mine.out.bias)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(mine(x), theirs(x, x, x, need_weights=False)[0])


def test_vit_defaults():
    model = models.small_vit(100, 32)
    assert model.position.shape == (1, 65, 192)
    per_block = 2 * 2 * 192 + 192 * 576 + 576 + 192 * 192 + 192 + 2 * 192 * 768 + 768 + 192
    assert parameters(model) == 6 * per_block + (48 + 1) * 192 + 192 + 65 * 192 + 2 * 192 + 193 * 100


def test_the_demo_uses_small_cnn():
    from ltsam_fast import demo

    assert parameters(demo.network()) == parameters(models.small_cnn()) == 160 + 4640 + 512 * 36 + 36 + 370


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: models.create("resnet31", 10, (3, 32, 32)),
            ValueError,
            "there is no model 'resnet31': did you mean 'resnet32'",
        ),
        (lambda: models.create("timm/", 10, (3, 32, 32)), ValueError, "there is no model"),
        (lambda: models.create("hub/x", 10, (3, 32, 32)), ValueError, "there is no model"),
        (lambda: models.create("timm/x", 10, (3, 32, 32), cosine_head=True), ValueError, "cosine_head must be False"),
        (lambda: models.create("small_vit", 10, (3, 32, 16)), ValueError, "image_shape must be square"),
        (lambda: models.resnet(10, depth=33), ValueError, r"depth must be 6 n \+ 2.*got 33"),
        (lambda: models.resnet(10, depth=2), ValueError, r"depth must be 6 n \+ 2.*got 2"),
        (lambda: models.small_vit(10, 32, patch=5), ValueError, "patch must divide image_size = 32, got 5"),
        (lambda: models.small_vit(10, 32, heads=5), ValueError, "heads must divide dim = 192, got 5"),
        (lambda: models.classifier(nn.ReLU()), ValueError, "model must have a linear layer, got ReLU"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_package_that_is_not_there_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"'{package}/vit' needs {package}: pip install {package}"):
        models.create(f"{package}/vit", 10, (3, 32, 32))


def test_timm_by_name(monkeypatch):
    """A stand-in with the functions that are called: timm itself needs torchvision, which has no build for every machine."""

    def config(name):
        if name.endswith(".bad"):
            raise RuntimeError("Invalid tag")
        return {
            "vit": types.SimpleNamespace(fixed_input_size=True),
            "net": types.SimpleNamespace(fixed_input_size=False),
        }.get(name)

    def create(name, num_classes, in_chans, **size):
        assert size == ({"img_size": (32, 24)} if name == "vit" else {})
        return nn.Conv2d(in_chans, num_classes, 1)

    timm = types.ModuleType("timm")
    timm.is_model = lambda name: name.partition(".")[0] in ("vit", "net", "new")
    timm.get_pretrained_cfg, timm.create_model = config, create
    monkeypatch.setitem(sys.modules, "timm", timm)
    for name in ("vit", "net", "new"):
        assert models.create(f"timm/{name}", 7, (1, 32, 24)).weight.shape == (7, 1, 1, 1)
    for name in ("vit_huge", "vit.bad"):
        with pytest.raises(ValueError, match=f"timm has no model '{name}'"):
            models.create(f"timm/{name}", 7, (1, 32, 24))


def test_torchvision_by_name(monkeypatch):
    torchvision, inner = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    torchvision.models = inner
    inner.list_models = lambda module: ["resnet50"]
    inner.get_model = lambda name, weights, num_classes: nn.Linear(3, num_classes)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.models", inner)
    assert models.create("torchvision/resnet50", 7, (3, 32, 32)).out_features == 7
    for name, shape, message in (
        ("vgg", (3, 8, 8), "torchvision has no model 'vgg'"),
        ("resnet50", (1, 8, 8), "3 channels"),
    ):
        with pytest.raises(ValueError, match=message):
            models.create(f"torchvision/{name}", 7, shape)
