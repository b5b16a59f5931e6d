"""LoRA on a vision transformer with Hugging Face's Trainer: ``python -m ltsam_fast.examples.hugging_face_lora``.

Nothing is downloaded: the transformer is small and has random weights. For a pretrained one use
``ViTForImageClassification.from_pretrained(...)``. Has a schedule, gradient accumulation, clipping and mixed precision, by the
Trainer's settings; with ``--out`` checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltsam_fast.command_line import one_line
from ltsam_fast.data import LongTailed
from ltsam_fast.examples.common import BATCH, arguments, method_of, report


def vit_with_lora(rank: int = 16) -> Any:
    """Returns a transformer for 8 x 8 images, of which LoRA's matrices in every layer and the classifier are trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=10,
        hidden_dropout_prob=0.0,
    )
    layers = [name for name, one in ViTForImageClassification(config).vit.named_modules() if isinstance(one, nn.Linear)]
    targets = sorted({name.split(".")[-1] for name in layers})
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=["classifier"])
    return get_peft_model(ViTForImageClassification(config), lora)


def samples(data: LongTailed) -> list[dict[str, Tensor]]:
    """Returns the training set in the Trainer's format."""
    return [{"pixel_values": x, "labels": y} for x, y in zip(data.train_x, data.train_y, strict=True)]


def latest(folder: Path) -> str | None:
    """Returns the latest checkpoint that was written to its end, where the Trainer puts the file with its own state."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda one: -int(one.name.split("-")[1])):
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
    return None


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Trains and returns the test accuracies."""
    from transformers import TrainingArguments

    from ltsam_fast.trainers.hugging_face import SharpnessAwareTrainer

    options = arguments(__doc__, argv, epochs=20, lr=6e-3)
    model = vit_with_lora()
    method, own = method_of(options, head=model.base_model.model.classifier.modules_to_save["default"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = SharpnessAwareTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=options.out or folder,
                num_train_epochs=options.epochs,
                per_device_train_batch_size=BATCH // options.accumulate,
                gradient_accumulation_steps=options.accumulate,
                max_grad_norm=options.clip,
                learning_rate=options.lr,
                lr_scheduler_type="cosine",
                weight_decay=0.01,
                bf16=options.bf16,
                use_cpu=not torch.cuda.is_available(),
                seed=options.seed,
                save_strategy="no" if options.out is None else "epoch",
                save_total_limit=2,
                report_to="none",
                logging_steps=50,
                disable_tqdm=True,
                remove_unused_columns=False,
                label_names=["labels"],
            ),
            train_dataset=samples(options.data),
            method=method,
            method_options=own,
        )
        trainer.train(resume_from_checkpoint=options.out and latest(options.out))
    model = model.cpu().eval()
    return report(options, lambda x: model(pixel_values=x).logits)


if __name__ == "__main__":
    with one_line("hugging_face_lora"):
        main()
