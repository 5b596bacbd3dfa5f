"""Without a GPU, Triton kernels run in Triton's interpreter. It must be chosen before anything imports triton, as transformers does."""

import os
import sys

import torch

assert "triton" not in sys.modules, "triton is imported before it is told whether to interpret"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
