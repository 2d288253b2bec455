"""A pretraining script as teams write them for Megatron: a GPT on the model provider's defaults.

The script knows nothing of ReMoE, and `remoe.diff` beside it makes it train with ReLU routing. The
lines that the diff touches read as in Megatron-LM's `pretrain_gpt.py` (tag core_v0.19.0), to which
the diff applies too. Everything else is kept as short as possible.
"""
# ruff: noqa: I001

from functools import partial

import torch

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split

try:
    from megatron.post_training.arguments import add_modelopt_args

    has_nvidia_modelopt = True
except ImportError:
    has_nvidia_modelopt = False


def loss_func(loss_mask, output):
    """Return the summed loss, the number of tokens, and what Megatron logs of them."""
    loss = (output.float() * loss_mask).sum()
    num_tokens = loss_mask.sum().int()
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def forward_step(data_iterator, model):
    """Run the model on a micro-batch; return the token losses and their loss function."""
    device = torch.cuda.current_device()
    batch = {key: value.to(device) for key, value in next(data_iterator).items()}
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(loss_func, batch["loss_mask"])


def datasets_provider(num_samples):
    """Return the training, validation and test datasets."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    dataset = MockGPTDataset if args.mock_data else GPTDataset
    is_built_here = mpu.get_tensor_model_parallel_rank() == 0
    return BlendedMegatronDatasetBuilder(
        dataset, num_samples, lambda: is_built_here, config
    ).build()


if __name__ == "__main__":
    # fmt: off
    args = parse_and_validate_args(
        extra_args_provider=add_modelopt_args if has_nvidia_modelopt else None,
        args_defaults={'tokenizer_type': 'GPT2BPETokenizer'},
    )
    # fmt: on
    if getattr(args, "modelopt_enabled", False):
        raise SystemExit("this script trains plain models only")
    else:
        model_cfg = gpt_config_from_args(args)
    full_config = pretrain_cfg_container_from_args(args, model_cfg)
    pretrain(
        full_config,
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )
