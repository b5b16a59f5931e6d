"""``pytest -p tests.fake_gpu``: the tests as a machine with a GPU collects and starts them, where there is none.

torch says that there is a GPU, so backends are chosen as there; a test ends, skipped, where it first needs its memory.
What fails before that would fail on every machine with a GPU.
"""

import pytest
import torch


def needs_a_gpu(*_, **__):
    """Ends the test."""
    pytest.skip("a GPU that is none has no memory")


class Stream:
    """A class, for it is named in annotations."""

    __init__ = needs_a_gpu


_join = torch.distributed.init_process_group

for _name, _value in (("is_available", True), ("device_count", 1), ("get_device_capability", (9, 0))):
    setattr(torch.cuda, _name, lambda *_, _value=_value: _value)
for _name in ("_lazy_init", "set_device", "current_stream", "synchronize", "mem_get_info", "get_device_name"):
    setattr(torch.cuda, _name, lambda *_, **__: needs_a_gpu())  # one function each: torch.compile has a table of them
torch.cuda.random._lazy_init = torch.cuda._lazy_init
torch.cuda.Stream = Stream
torch.distributed.init_process_group = lambda backend=None, *args, **named: (
    needs_a_gpu() if "nccl" in str(backend) else _join(backend, *args, **named)
)
