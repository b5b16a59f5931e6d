"""``python -m tests.sanitized``: the ops' tests on cores that GCC's sanitizers watch; ends with an error at the first finding.

First addresses and undefined behaviour, then threads; of the C++ core, and of the CUDA core on the host (see cuda_on_host).
Nothing is suppressed. What the sanitizers cannot see is code that they have not compiled, which is Python's and torch's:

* threads: in place of libgomp, which waits in ways of its own, openmp_on_threads.cpp runs the loops, and accesses from other
  code are not looked at (``ignore_noninstrumented_modules``).
* leaks: Python frees little of what it has when it ends. So leaks are looked for while it is still there, and those count
  that the core has asked for.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SANITIZER = os.environ.get("LTSAM_TEST_SANITIZER")
CHECKS = {"address": "address,undefined,float-cast-overflow,float-divide-by-zero", "thread": "thread"}
