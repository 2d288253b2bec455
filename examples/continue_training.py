"""Continue training an exported model in plain torch, with its sparsity under control.

    python examples/continue_training.py MODEL TEXT --out NEW --steps 100

MODEL is a folder of `remoe convert to-hf`, TEXT a text file. The coefficient of the penalty starts
from the one that travelled in the model's config and moves once per step, as in pretraining.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import remoe.hf  # registers the model with transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-4)
    options = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).train()
    config = model.config
    if not isinstance(model, remoe.hf.ReMoEForCausalLM) or config.router_type != "relu":
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
        output = model(batch, labels=batch)  # the loss has the penalty in it
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        sparsity = model.update_l1_coeff()  # saved with the model
        print(f"{step} loss {output.loss - output.penalty:.4f} sparsity {sparsity:.4f} "
              f"coefficient {config.l1_coeff[0]:.2e}")  # fmt: skip

    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
