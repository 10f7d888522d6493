"""Every test computes on one thread, and so does every process that a test starts, whatever OMP_NUM_THREADS says."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for subprocesses

import torch  # noqa: E402

torch.set_num_threads(1)
