"""What the code blocks of these pages take for granted: a small network, its data and the usual imports.

The tests run this file, then all blocks of a page in order, as printed. Replace what is here by your own.
"""

import torch
import torch.nn.functional as F

import ltsam_fast as lf

torch.manual_seed(0)

counts = [60, 20, 8]  # training samples of each class, classes in order
labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
images = torch.randn(88, 6) + labels[:, None]

model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))

order = torch.randperm(88)
loader = [(images[part], labels[part]) for part in order.split(22)]  # 4 batches of 22
x, y = loader[0]

epochs = 2
total_steps = epochs * len(loader)
