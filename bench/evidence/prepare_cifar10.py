"""python -m bench.evidence.prepare_cifar10 SOURCE: writes .data/cifar10-16.tar, the images that cifar10-lt.toml needs, 16 x 16.

SOURCE is a tree train/class/image, test/class/image of CIFAR-10, or an archive of one. Of each class the first 700 training
and 200 test images in alphabetical order are taken and resized, as ``data.load(..., size=16)`` does it.
"""

from __future__ import annotations

import io
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

from PIL import Image

from ltsam_fast import data

TAKEN = {"train": 700, "test": 200}
SIZE = 16


def main(source: Path, out: Path = Path(".data/cifar10-16.tar")) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if source.is_file():
            with tarfile.open(source) as archive:
                files = (member for member in archive.getmembers() if member.isfile())
                seen: Counter[str] = Counter()
                for member in sorted(files, key=lambda member: member.name):
                    kind = str(Path(member.name).parent)
                    if seen[kind] < TAKEN[Path(member.name).parts[0]]:
                        seen[kind] += 1
                        archive.extract(member, folder, filter="data")
            source = Path(folder)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(out, "w") as archive:
            for split, limit in TAKEN.items():
                images = data.load(source, split, size=SIZE)
                written: Counter[int] = Counter()
                for pixels, label in zip(images.pixels, images.labels.tolist(), strict=True):
                    if written[label] < limit:
                        content = io.BytesIO()
                        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(content, "png")
                        member = tarfile.TarInfo(f"cifar10-16/{split}/{images.classes[label]}/{written[label]:04}.png")
                        member.size = content.tell()
                        content.seek(0)
                        archive.addfile(member, content)
                        written[label] += 1
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
