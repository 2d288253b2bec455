"""ReMoE for transformers: importing this package registers it with the `Auto*` classes.

The modules beside this file need torch and transformers only. They are exported with every
model, so that it loads with `trust_remote_code=True` where this package is missing.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from remoe.hf.configuration_remoe import ReMoEConfig
from remoe.hf.modeling_remoe import ReMoEForCausalLM, ReMoEModel

# Folders that `save_pretrained` writes get the two modules as well.
ReMoEConfig.register_for_auto_class("AutoConfig")
ReMoEModel.register_for_auto_class("AutoModel")
ReMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")

AutoConfig.register(ReMoEConfig.model_type, ReMoEConfig, exist_ok=True)
AutoModel.register(ReMoEConfig, ReMoEModel, exist_ok=True)
AutoModelForCausalLM.register(ReMoEConfig, ReMoEForCausalLM, exist_ok=True)

__all__ = ["ReMoEConfig", "ReMoEForCausalLM", "ReMoEModel"]
