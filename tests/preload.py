"""What all ranks import, imported once by the process that they are forked from; see `conftest`."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for GPUs

from megatron.remoe import cpu

cpu.enable()  # before Megatron is imported

import megatron.core.tokenizers.text  # noqa: E402, F401
import megatron.training.training  # noqa: E402, F401
