"""All-to-all dispatch of a number of assignments that is not `tokens * topk`."""

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor


class ReLUAlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's all-to-all dispatcher, sized by the routing map instead of by top-k.

    The count reaches the host with the splits, in the copy that Megatron makes anyway.
    """

    def preprocess(self, routing_map: Tensor) -> Tensor:
        tokens_per_local_expert = super().preprocess(routing_map)
        self.num_out_tokens = routing_map.sum()
        self._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_local_expert

    def _maybe_dtoh_and_synchronize(
        self, point: str, tokens_per_expert: Tensor | None = None
    ) -> Tensor:
        tokens_per_expert = super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        if point == self.cuda_dtoh_point:
            # On CUDA these are numpy arrays by now; gloo wants integers, not 0-d tensors.
            self.input_splits = _as_ints(self.input_splits)
            self.output_splits = _as_ints(self.output_splits)
        return tokens_per_expert


def _as_ints(splits: object) -> object:
    if isinstance(splits, torch.Tensor) and splits.device.type == "cpu":
        return splits.tolist()
    return splits
