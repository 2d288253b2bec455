"""Continue training an exported model in plain torch, with its sparsity under control.

    python examples/continue_training.py MODEL TEXT --out NEW --steps 100

MODEL is a folder that `remoe convert to-hf` has made, and TEXT is a text file. The coefficient of
the penalty starts from the one in the model's config and moves once per step, as in pretraining.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import remoe.hf  # This import registers the model with transformers.
from remoe.hf.configuration_remoe import L1_ROUTERS


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, help="The folder of the exported model.")
    add("text", type=Path, help="The text file to train on.")
    add("--out", type=Path, required=True, help="The folder to which the new model is written.")
    add("--steps", type=int, default=100, help="The number of training steps.")
    add("--batch", type=int, default=4, help="The number of sequences of a step.")
    add("--length", type=int, default=128, help="The number of tokens of a sequence.")
    add("--lr", type=float, default=1e-4, help="The learning rate of AdamW.")
    return parser


def main() -> None:
    """Train the model and save it."""
    parser = arguments()
    options = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).train()
    config = model.config
    if not isinstance(model, remoe.hf.ReMoEForCausalLM) or config.router_type not in L1_ROUTERS:
        parser.error(f"{options.model} has no ReLU router, so it has no sparsity to control")
    if config.l1_coeff is None:
        config.l1_coeff = [config.l1_coeff_init] * len(config.moe_layers)
    ids = tokenizer(options.text.read_text(), return_tensors="pt")["input_ids"][0]
    if len(ids) <= options.length:
        parser.error(f"{options.text} has {len(ids)} tokens; it needs more than {options.length}")

    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01)

    for step in range(1, options.steps + 1):
        starts = torch.randint(len(ids) - options.length, (options.batch, 1))
        batch = ids[starts + torch.arange(options.length)]
        output = model(batch, labels=batch)  # The loss includes the penalty.
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        sparsity = model.update_l1_coeff()  # The model keeps it in its config.
        print(f"{step} loss {output.loss - output.penalty:.4f} sparsity {sparsity:.4f} "
              f"coefficient {config.l1_coeff[0]:.2e}")  # fmt: skip

    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
