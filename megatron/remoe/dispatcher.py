"""All-to-all dispatch of a number of assignments that is not `tokens * topk`."""

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
