"""Build what every rank of a run builds, before the run is started, and report what fails."""

import argparse
import contextlib
import copy
import os
import sys
import traceback

import torch


def build(args):
    """Model, optimizer, learning rate schedule and tokenizer"""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.enums import ModelType
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.global_vars import set_global_variables
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import setup_model_and_optimizer
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron.remoe.arguments import configure

    args = copy.copy(args)
    args.tensorboard_dir = args.load = args.pretrained_checkpoint = None
    args.wandb_project = ""
    args.save = None
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=0, world_size=args.world_size
    )
    new_group = torch.distributed.new_group
    torch.distributed.new_group = lambda *a, **k: new_group(*a, **(k | {"backend": "fake"}))
    set_global_variables(args)
    initialize_megatron()
    model_config = gpt_config_from_args(args)
    configure(model_config, args)
    container = pretrain_cfg_container_from_args(args, model_config)
    torch.cuda.current_device = lambda: torch.device("meta")
    with torch.device("meta"):
        setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            checkpointing_context={},
            cfg_container=container,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )


def rehearse(args) -> str:
    reader, writer = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        message = ""
        try:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1)
            os.dup2(null, 2)
            build(args)
        except BaseException as error:
            message = "".join(traceback.format_exception(error))
        os.write(writer, message.encode()[:60000])
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    return text or (f"status {status}" if status else "")
