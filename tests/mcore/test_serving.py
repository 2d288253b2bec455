"""Megatron's own inference engine generates with our layers what a full forward pass would."""

import pytest

from tests.mcore import moe_cases
from tests.mcore.test_compat import default_groups

VOCABULARY, NEW_TOKENS, LONGEST = 64, 12, 32
PROMPTS = ("remoe", "a", "sparse experts")
ROUTINGS = {
    "relu": {},
    "relu, many experts": {},
    "relu, mostly no expert": {},
    "hash": {},
    "relu, recurrent": {"recurrence": "gru", "recurrent_size": 8},
}
SHIFTS = {"relu, many experts": 0.7, "relu, mostly no expert": -0.5}


class Letters:
    """A tokenizer whose tokens are letters."""

    eod = bos = VOCABULARY - 1

    def tokenize(self, text: str) -> list[int]:
        return [ord(letter) % (VOCABULARY - 2) for letter in text]

    def detokenize(self, ids: list[int], **_) -> str:
        return "".join(chr(number + 32) for number in ids)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("name", ROUTINGS)
def test_the_static_engine_generates_what_a_full_forward_does(name, grouped, call):
    generated, expected, active = call(generate, name, grouped)
    assert generated == expected
    assert len({tuple(tokens) for tokens in generated}) > 1
    if name == "relu, many experts":
        assert active.double().mean() > 2
    if name == "relu, mostly no expert":
        assert (active == 0).double().mean() > 0.5 and active.max() > 0


def generate(name: str, grouped: bool):
    """Return the new tokens of the engine and of full forwards, and the experts per token."""
    import torch
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines.static_engine import StaticInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
        GPTInferenceWrapper,
    )
    from megatron.core.inference.sampling_params import SamplingParams
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )
    from megatron.core.inference.utils import InferenceMode

    model = build(name, grouped)
    context = StaticInferenceContext(max_batch_size=len(PROMPTS), max_sequence_length=LONGEST)
    controller = TextGenerationController(GPTInferenceWrapper(model, context), Letters())
    engine = StaticInferenceEngine(controller, max_batch_size=len(PROMPTS), legacy=True)
    greedy = SamplingParams(top_k=1, num_tokens_to_generate=NEW_TOKENS)
    done = engine.generate(prompts=list(PROMPTS), sampling_params=greedy)
    generated = [[int(token) for token in one.generated_tokens] for one in done]

    InferenceMode.unset_active()  # the engine has set it for the whole process
    active: list[torch.Tensor] = []
    for layer in model.decoder.layers:
        layer.mlp.router.register_forward_hook(lambda _, __, out: active.append(out[1].sum(dim=1)))
    expected = []
    with torch.no_grad():
        for prompt in PROMPTS:
            tokens = Letters().tokenize(prompt)
            start = len(tokens)
            for _ in range(NEW_TOKENS):
                logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)
                tokens.append(int(logits[0, -1].argmax()))
            expected.append(tokens[start:])
    return generated, expected, torch.cat(active)


def build(name: str, grouped: bool):
    """A model of two layers with weights that make its words depend on all that came before."""
    import torch
    from megatron.core.models.gpt import GPTModel

    from megatron.remoe.moe.hash_router import keep_token_ids
    from megatron.remoe.moe.spec import block_spec
    from remoe.config import ROUTINGS as KINDS

    kind = name.partition(",")[0]
    layout = moe_cases.Layout(grouped=grouped)
    moe_cases.initialize(layout)
    torch.manual_seed(1)
    config = moe_cases.transformer_config(
        layout,
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        moe_ffn_hidden_size=24,
        init_method_std=0.4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=False,
    )
    model = GPTModel(
        config,
        block_spec(config, KINDS[kind](**ROUTINGS[name])),
        vocab_size=VOCABULARY,
        max_sequence_length=LONGEST,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        pg_collection=default_groups(),
    ).eval()
    # All tokens share a direction, which the routers like or dislike.
    shift = SHIFTS.get(name, 0)
    with torch.no_grad():
        model.embedding.word_embeddings.weight.add_(0.7)
        for layer in model.decoder.layers:
            if shift:
                layer.mlp.router.weight.add_(shift)
    keep_token_ids([model])
    return model
