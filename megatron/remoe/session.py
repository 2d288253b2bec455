"""All that surrounds Megatron's `pretrain`, in our entry point and in scripts that ask for it."""

import argparse
from contextlib import _GeneratorContextManager
from typing import Any

from megatron.remoe import processes, unsupported
from megatron.remoe.arguments import configure
from megatron.remoe.train.session import running


def training(
    args: argparse.Namespace, model_config: Any, *, hides_tokens: bool = False
) -> _GeneratorContextManager[None]:
    """Exchange the layers of a model now, and return the context for Megatron's `pretrain`.

        with remoe.training(args, model_config):
            pretrain(pretrain_cfg_container_from_args(args, model_config), ...)

    It is `configure` and `running`, which scripts that need the hook in between may call, and a
    check of what can be built but trains wrong. The context is a decorator as well:
    `pretrain = remoe.training(args, model_config)(pretrain)`. It is for one run; the configuration
    of Megatron may be made before it or in it.

    A mistake of the user ends the process with one line and code 2.

    Args:
        args: Megatron's arguments, parsed with ours.
        model_config: of the model to train, as `gpt_config_from_args` returns it.
        hides_tokens: whether the samples are those of a masked language model.

    Returns:
        The context, in which the run is as reliable as docs/reliability.md says.
    """
    with processes.mistakes_in_one_line():
        unsupported.refuse_in_training(args)
        hook = configure(model_config, args, hides_tokens=hides_tokens)
    return running(args, hook)
