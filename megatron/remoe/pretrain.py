"""Pretrain a GPT or hybrid model with Megatron's own loop: dense, TopK or ReLU mixture of experts.

    torchrun --nproc-per-node 8 -m megatron.remoe.pretrain --moe-relu-routing <Megatron's flags>

With `--masked-lm` the same model is a bidirectional encoder, which may be a Soft MoE as well.

On a machine without a GPU the same command trains on the CPU over gloo.
"""

import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from megatron.remoe import cpu, processes, unsupported
from megatron.remoe.data import masked

Loss = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]  # what `loss_func` returns


def get_batch(
    data_iterator: Any, args: Namespace, *, training: bool, vp_stage: int | None = None
) -> tuple[Any, ...]:
    """Return the micro-batch of this rank, which Megatron broadcasts to tensor-parallel ranks.

    Returns:
        tokens, labels, loss_mask, attention_mask, position_ids, each `[b, s]` or None where this
        pipeline stage does not need it.
    """
    from megatron.core import mpu
    from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank

    first = mpu.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    last = mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    if not first and not last:
        return (None,) * 5
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        device = torch.cuda.current_device()
        batch = {k: v.to(device, non_blocking=True) for k, v in next(data_iterator).items()}
        batch.setdefault("attention_mask", None)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size if training else args.eval_micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    keys = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
    batch = {key: batch[key] for key in keys}
    if args.context_parallel_size > 1:
        batch = get_batch_on_this_cp_rank(batch, cp_group=mpu.get_context_parallel_group())
    return tuple(batch[key] for key in keys)


def loss_func(loss_mask: torch.Tensor, output: torch.Tensor, *, check_for_nan: bool) -> Loss:
    """Return the sum of the token losses, the number of tokens, and both for Megatron's report.

    Args:
        loss_mask: `[b, s]`, which is zero for tokens that do not count.
        output: token losses `[b, s]`.
        check_for_nan: whether Megatron's rerun state machine sees the loss and stops at NaN or inf.
    """
    mask = loss_mask.reshape(-1).float()
    loss = torch.dot(output.reshape(-1).float(), mask)
    if check_for_nan:
        from megatron.core.rerun_state_machine import get_rerun_state_machine

        for rejection in (torch.isnan, torch.isinf):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=rejection,
                message=f"the loss is {rejection.__name__.removeprefix('is')}, the step is not "
                "taken; lower lr or look at the data, the same command continues from the last "
                "checkpoint",
                tolerance=0.0,  # forward is deterministic
                fatal=True,
            )
    num_tokens = mask.sum().int()
    report = torch.stack([loss.detach(), num_tokens.to(loss)])
    return loss, num_tokens, {"lm loss": report}


def forward_step(
    data_iterator: Any, model: Any
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Loss]]:
    """Run the model on a micro-batch: Megatron's forward step.

    Returns:
        The token losses, and the function that makes the loss of them.
    """
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_args, get_timers

    args, timers = get_args(), get_timers()
    timers("batch-generator", log_level=2).start()
    tokens, labels, loss_mask, attention_mask, position_ids = get_batch(
        data_iterator,
        args,
        training=model.training,
        vp_stage=get_attr_wrapped_model(model, "vp_stage"),
    )
    timers("batch-generator").stop()
    output = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    check_for_nan = args.check_for_nan_in_loss_and_grad
    return output, partial(loss_func, loss_mask, check_for_nan=check_for_nan)


def dataset_config(args: Namespace) -> Any:
    """Return Megatron's configuration of the datasets that the arguments name.

    Raises:
        ValueError: the embedding has no row for the token that hides others.
    """
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.training import get_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, blend_per_split = get_blend_and_blend_per_split(args)
    if args.masked_lm:
        masked.mask_token(get_tokenizer().vocab_size, args.padded_vocab_size)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )


def datasets_provider(num_samples: Sequence[int | None], vp_stage: int | None = None) -> Any:
    """Build the training, validation and test datasets of the `.bin/.idx` files in the arguments.

    Args:
        num_samples: the number of samples of each split.
        vp_stage: the virtual pipeline stage.
    """
    from megatron.core import mpu
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
    from megatron.training import get_args

    args = get_args()
    config = dataset_config(args)

    def is_built_here() -> bool:
        stage = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
        ends = mpu.is_pipeline_first_stage(**stage) or mpu.is_pipeline_last_stage(**stage)
        return bool(ends and mpu.get_tensor_model_parallel_rank() == 0)

    dataset = MockGPTDataset if args.mock_data else GPTDataset
    built = BlendedMegatronDatasetBuilder(dataset, num_samples, is_built_here, config).build()
    return [_masked(one, args) for one in built] if args.masked_lm else built


def _masked(dataset: Any, args: Namespace) -> Any:
    """Return a dataset with hidden tokens, or the same of every dataset in a list."""
    from megatron.training import get_tokenizer

    if dataset is None or isinstance(dataset, list):
        return dataset and [_masked(one, args) for one in dataset]
    tokenizer = get_tokenizer()
    return masked.MaskedTokens(
        dataset,
        seed=args.seed,
        mask=masked.mask_token(tokenizer.vocab_size, args.padded_vocab_size),
        end_of_document=tokenizer.eod,
        vocab_size=tokenizer.vocab_size,
    )


# Megatron then builds the datasets on every rank that needs them, and asks `is_built_here`.
datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def main() -> int:
    """Pretrain as the command line says, and return the exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # `remoe train` ignores it in torchrun
    processes.end_with_parent()
    with processes.exit_at_once(int(os.environ.get("RANK", "0"))):
        _pretrain()
    return 0


def _pretrain() -> None:
    if not torch.cuda.is_available():
        cpu.enable()
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from megatron.remoe.arguments import add_arguments, model_config_of
    from megatron.remoe.session import training

    args = parse_and_validate_args(extra_args_provider=add_arguments)
    model_config = model_config_of(args)
    with processes.mistakes_in_one_line():
        unsupported.refuse_unused(args)
    with training(args, model_config, hides_tokens=args.masked_lm):
        pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            datasets_provider,
            ModelType.encoder_or_decoder,
            forward_step,
        )


if __name__ == "__main__":
    sys.exit(main())
elif __name__ == "__mp_main__":  # a helper process of an asynchronous save that was not forked
    processes.end_with_parent()
