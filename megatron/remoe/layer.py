"""Megatron's MoE layer with dispatchers that are sized by the routing map."""

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.remoe.dispatcher import DISPATCHERS, is_dropless


class DroplessMoELayer(MoELayer):
    """MoE layer for a router that may activate a varying number of experts per token."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules=None,
        layer_number: int | None = None,
        pg_collection=None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        pg_collection = pg_collection or get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection, is_mtp_layer, name)
        if is_dropless(config):
            self.token_dispatcher = DISPATCHERS[config.moe_token_dispatcher_type](
                self.num_local_experts,
                self.local_expert_indices,
                config=config,
                pg_collection=pg_collection,
            )
            if self.use_shared_expert and self.shared_expert_overlap:
                self.token_dispatcher.set_shared_experts(self.shared_experts)
