"""Networks for the tests of shared backwards: each makes a model and a batch for it, and gives logits (B, 3)."""

import pytest
import torch
from torch import nn

BATCH, CLASSES = 4, 3


def images(size=16, batch=BATCH):
    return (torch.randn(batch, 3, size, size),)


def _transformers(kind, config, size=16, **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(num_labels=CLASSES, **config)
    return getattr(transformers, options.pop("head", f"{kind}ForImageClassification"))(config), images(size)


_VIT = {
    "image_size": 16, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 40, "hidden_dropout_prob": 0.1,
}  # fmt: skip


class Logits(nn.Module):
    """A network of transformers as one from tensors to logits."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, *inputs):
        return self.body(*inputs).logits


def vit():
    model, x = _transformers("ViT", _VIT)
    return Logits(model), x


def swin():
    config = {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 12,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    }
    model, x = _transformers("Swin", config, 32)
    return Logits(model), x


def convnext():
    config = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 2, 1], "drop_path_rate": 0.1}
    model, x = _transformers("ConvNext", config, 64)
    return Logits(model), x


def beit():
    config = {**_VIT, "use_relative_position_bias": True, "layer_scale_init_value": 0.1, "drop_path_rate": 0.1}
    model, x = _transformers("Beit", config)
    return Logits(model), x


def bert():
    config = {
        "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40,
        "max_position_embeddings": 12,
    }  # fmt: skip
    model, _ = _transformers("Bert", config, head="BertForSequenceClassification")
    mask = torch.ones(BATCH, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return Logits(model), (torch.randint(0, 50, (BATCH, 9)), mask)


def vit_lora():
    peft = pytest.importorskip("peft")
    model, x = _transformers("ViT", _VIT)
    config = peft.LoraConfig(r=3, target_modules="all-linear", modules_to_save=["classifier"], lora_dropout=0.1)
    return Logits(peft.get_peft_model(model, config)), x


class Prompted(nn.Module):
    """Visual prompt tuning: trained tokens before the patches of a frozen network, in every layer."""

    def __init__(self, vit, tokens=3):
        super().__init__()
        self.vit = vit.requires_grad_(False)
        vit.classifier.requires_grad_(True)
        layers = len(self.layers)
        self.prompts = nn.Parameter(torch.randn(layers, tokens, vit.config.hidden_size))

    @property
    def layers(self):
        return self.vit.vit.layers if hasattr(self.vit.vit, "layers") else self.vit.vit.encoder.layer

    def forward(self, x):
        h = self.vit.vit.embeddings(x)
        for number, layer in enumerate(self.layers):
            prompt = self.prompts[number].expand(len(x), -1, -1)
            h = torch.cat([h[:, :1], prompt, h[:, 1 if number == 0 else 1 + prompt.shape[1] :]], 1)
            h = layer(h)
            h = h[0] if isinstance(h, tuple) else h
        return self.vit.classifier(self.vit.vit.layernorm(h)[:, 0])


def vit_prompts():
    model, x = _transformers("ViT", _VIT)
    return Prompted(model), x


class Mixing(nn.Module):
    """A block of MLP-Mixer."""

    def __init__(self, tokens, width):
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.over_tokens = nn.Sequential(nn.Linear(tokens, 20), nn.GELU(), nn.Linear(20, tokens))
        self.over_channels = nn.Sequential(nn.Linear(width, 30), nn.GELU(), nn.Linear(30, width))

    def forward(self, x):
        x = x + self.over_tokens(self.before(x).transpose(1, 2)).transpose(1, 2)
        return x + self.over_channels(self.after(x))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 4, 4)
        self.blocks = nn.Sequential(Mixing(16, 12), Mixing(16, 12))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


class Encoder(nn.Module):
    """torch's own encoder, with the batch second as it is by default."""

    def __init__(self, batch_first=False):
        super().__init__()
        self.first = batch_first
        self.embed = nn.Linear(5, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = x if self.first else x.transpose(0, 1)
        return self.head(self.encoder(self.embed(x)).mean(1 if self.first else 0))


class Residual(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 2, dilation=2, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut = nn.Conv2d(inside, outside, 1, stride)

    def forward(self, x):
        return (self.shortcut(x) + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


class ResNet(nn.Module):
    """Its batch norms stay in evaluation mode, with weights that are trained."""

    def __init__(self, frozen=True):
        super().__init__()
        self.frozen = frozen
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Residual(8, 8, 1), Residual(8, 12, 2), nn.GroupNorm(3, 12))
        self.head = nn.Linear(12, CLASSES)

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if self.frozen and isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def _own(make, inputs):
    def network():
        torch.manual_seed(0)
        return make(), inputs()

    return network


class Tied(nn.Module):
    """A module used twice, a weight used by two modules, and one that meets the samples without a module."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.back = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 6, bias=False)
        self.norm, self.rms = nn.LayerNorm(8), nn.RMSNorm(8)
        self.back.weight = nn.Parameter(self.first.weight.detach().t().clone())
        self.scale, self.shift = nn.Parameter(torch.rand(1, 8)), nn.Parameter(torch.rand(8))
        self.weighted = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, CLASSES))

    def forward(self, x):
        h = self.norm(self.first(x)).relu()
        h = self.norm(self.again(self.again(h).relu())) * self.scale + self.shift
        h = nn.functional.linear(self.back(h), self.first.weight, self.shift) * self.scale
        return self.weighted(self.rms(h))


class Sequence(nn.Module):
    """Convolutions in one dimension over embeddings, and in three."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.conv = nn.Conv1d(8, 12, 3, stride=2, groups=4)
        self.up = nn.ConvTranspose1d(12, 6, 2)
        self.deep = nn.Conv3d(1, 2, 2, bias=False)
        self.head = nn.Linear(2, CLASSES)

    def forward(self, tokens):
        h = self.up(self.conv(self.embed(tokens).transpose(1, 2)).relu())
        return self.head(self.deep(h.unflatten(2, (2, 4)).unsqueeze(1)).mean((2, 3, 4)))


def smooth(num_classes, image_shape, cosine_head):
    """A factory for ltsam_fast.models. Without kinks rounding stays rounding: at a ReLU's it may become another path."""
    size = image_shape[0] * image_shape[1] * image_shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 16), nn.Tanh(), nn.Linear(16, num_classes))


NETWORKS = {
    "ViT": vit,
    "Swin": swin,
    "ConvNeXt": convnext,
    "BEiT": beit,
    "BERT": bert,
    "MLP-Mixer": _own(Mixer, images),
    "TransformerEncoder": _own(Encoder, lambda: (torch.randn(BATCH, 7, 5),)),
    "ResNet, frozen BN": _own(ResNet, lambda: images(8)),
    "ViT + LoRA": vit_lora,
    "ViT + prompts": vit_prompts,
    "batch first": _own(lambda: Encoder(True), lambda: (torch.randn(BATCH, 8, 5),)),
    "tied": _own(Tied, lambda: (torch.randn(BATCH, 6),)),
    "convolutions": _own(Sequence, lambda: (torch.randint(0, 11, (BATCH, 16)),)),
}
