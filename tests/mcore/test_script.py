"""`remoe convert script`: launch scripts in the published style become configs."""

import subprocess

import pytest
import yaml

from megatron.remoe.convert.shell import read_script
from tests.mcore import tiny
from tests.mcore.test_convert import fails

LAUNCH = """\
#!/usr/bin/env bash
export CUDA_DEVICE_MAX_CONNECTIONS=1
GPUS=${1:-"1"}
NODES=${SLURM_NNODES:-"1"}
WORLD=$(($GPUS*$NODES))
ITERS=${2:-"60000"}
HIDDEN=768
LOGS="./logs/${3:-"trial"}"  # where the run goes
mkdir -p $LOGS
FILES="\\
1.0 \\
../pile/01_text_document \\
0.5 \\
../pile/02_text_document"

LAUNCHER=(
    --nproc_per_node $GPUS
    --nnodes $NODES
)
MODEL=(
    --use-mcore-models
    --disable-bias-linear
    --seq-length 1024
    --max-position-embeddings 1024
    --num-layers 12
    --hidden-size $HIDDEN
    --ffn-hidden-size $((HIDDEN * 4))
    --num-attention-heads 12
    --init-method-std 0.01
    --attention-dropout 0.0 --hidden-dropout 0.0
    --normalization RMSNorm
    --position-embedding-type rope
    --swiglu
    --untie-embeddings-and-output-weights
    --group-query-attention
    --num-query-groups 4
    --no-masked-softmax-fusion
    --no-position-embedding
    --rotary-base 1000000
    --use-flash-attn
)
EXPERTS=(@EXPERTS@)
TRAINING="--micro-batch-size 16 --global-batch-size 512 --lr 5e-4 --min-lr 5e-5 \\
    --train-iters $ITERS --lr-decay-style cosine --lr-warmup-fraction 0.01 --clip-grad 1.0 --bf16"
MORE=(
    --vocab-file ../vocab.json \\
    --merge-file ../merges.txt \\
    --make-vocab-size-divisible-by 1024
    --data-path $FILES
    --split 969,30,1
    --tensor-model-parallel-size 1
    --use-distributed-optimizer
    --sequence-parallel
    --log-interval 10
    --save-interval 5000
    --eval-iters 100
    --save $LOGS
    --load $LOGS
    --tensorboard-dir "${LOGS}/tensorboard"
)
if [ -n "${WANDB_API_KEY}" ]; then
    MORE+=(--wandb-project "Mine" --wandb-exp-name $LOGS)
fi

torchrun ${LAUNCHER[@]} pretrain_gpt.py \\
    ${MODEL[@]} ${EXPERTS[@]} \\
    $TRAINING "${MORE[@]}" |& tee -a $LOGS/train.log
"""
TOPK = """
    --num-experts ${4:-"8"}
    --moe-router-topk 1
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 1e-2
    --moe-token-dispatcher-type alltoall
    --overlap-param-gather
    --overlap-grad-reduce
    --moe-router-pre-softmax
    --moe-grouped-gemm
    # --moe-extended-tp
    --moe-layer-recompute
"""
SCRIPTS = {
    "dense": LAUNCH.replace("@EXPERTS@", ""),
    "moe": LAUNCH.replace("@EXPERTS@", TOPK),
    "remoe": LAUNCH.replace("@EXPERTS@", f"{TOPK}    --moe-relu-routing\n"),
}
# What the presets choose otherwise than the scripts: data, its tokenizer, logs, and what no script
# of 2024 had.
OTHERWISE = {"data_path", "tokenizer_model", "log_interval", "save_interval", "num_workers",
             "overlap_param_gather", "overlap_grad_reduce", "tensorboard_dir"}  # fmt: skip


def differences(found: str, preset: str) -> set[str]:
    """Arguments that a preset sets to other values than a config."""
    from pathlib import Path

    from megatron.remoe.arguments import megatron_parser
    from megatron.remoe.run.argv import to_argv
    from megatron.remoe.run.config import load_config

    parser = megatron_parser()
    ours, theirs = (
        vars(parser.parse_args(to_argv(load_config(Path(path)).flags, parser)))
        for path in (preset, found)
    )
    return {key for key in ours if ours[key] != theirs[key]}


@pytest.mark.parametrize("router", SCRIPTS)
def test_a_published_script_becomes_the_preset(call, tmp_path, router):
    (tmp_path / "old.sh").write_text(SCRIPTS[router])
    code, out, error = call(tiny.remoe, tmp_path, "convert", "script", "old.sh", "new.yaml")
    assert code == 0, error
    preset = str(tiny.EXAMPLES / f"llama_182m/{router}.yaml")
    found = call(differences, str(tmp_path / "new.yaml"), preset)
    overlaps = {"overlap_param_gather", "overlap_grad_reduce"} if router != "dense" else set()
    assert found == OTHERWISE - {"overlap_param_gather", "overlap_grad_reduce"} | overlaps
    text = (tmp_path / "new.yaml").read_text()
    line = SCRIPTS[router][: SCRIPTS[router].index("if [ -n")].count("\n") + 1
    notes = [
        f"line {line}: WANDB_API_KEY is not set and counts as empty",
        "--use-flash-attn is left out",
        "--save ./logs/trial is left out",
        "--sequence-parallel is left out",
        "--tensorboard-dir ./logs/trial/tensorboard becomes tensorboard_dir: runs/new/tensorboard",
        "padded_vocab_size: 51200 is added: GPT-2's 50,257 entries",
        "eval_interval: 1000 is added",
    ]
    if router != "dense":
        notes.append("--moe-layer-recompute becomes recompute_granularity: selective")
    for note in notes:
        assert f"- {note}" in out and f"# - {note}" in text, note
    flags = yaml.safe_load(text)
    assert flags["run_dir"] == "runs/new" and "save" not in flags
    assert flags["data_path"] == [1.0, "../pile/01_text_document", 0.5, "../pile/02_text_document"]


def test_values_are_set_and_the_config_is_printed(call, tmp_path):
    (tmp_path / "old.sh").write_text(SCRIPTS["remoe"])
    given = [
        word for pair in ("1=8", "2=70", "4=16", "WANDB_API_KEY=x") for word in ("--set", pair)
    ]
    refused = fails(call, tmp_path, "convert", "script", "old.sh", *given[:4], "--set", "4=0")
    assert "old.sh makes a config that remoe train refuses: num_experts is 0" in refused
    code, out, _ = call(tiny.remoe, tmp_path, "convert", "script", "old.sh", *given[:-2])
    flags = yaml.safe_load(out)
    assert code == 0 and (flags["train_iters"], flags["num_experts"]) == (70, 16)
    (tmp_path / "new.yaml").write_text("mine")
    error = fails(call, tmp_path, "convert", "script", "old.sh", "new.yaml")
    assert "new.yaml exists" in error and (tmp_path / "new.yaml").read_text() == "mine"
    for script, words, message in (
        ("--spam", [], "--spam is a flag of neither"),
        ("--use-legacy-models", [], "--use-legacy-models has no counterpart"),
        ("--num-layers 2 3", [], "--num-layers has 2 values"),
        ("--swiglu yes", [], "--swiglu takes no value"),
        ("--num-layers $N", [], "line 1: $N is not set; give --set N=VALUE"),
        ("--save $N --spam", [], "--spam is a flag"),
        ("", ["--set", "N"], "'N' is not of the form NAME=VALUE"),
    ):
        (tmp_path / "bad.sh").write_text(f"torchrun pretrain_gpt.py {script}\n")
        assert message in fails(call, tmp_path, "convert", "script", "bad.sh", "out.yaml", *words)
    assert "bad.sh: line 1: pretrain_t5.py is another program" in fails_on(
        call, tmp_path, "python pretrain_t5.py"
    )
    assert not (tmp_path / "out.yaml").exists()


def fails_on(call, tmp_path, script: str) -> str:
    (tmp_path / "bad.sh").write_text(script)
    return fails(call, tmp_path, "convert", "script", "bad.sh")


SHELL = {
    "quotes": """A='x $B' B="1  2" C=\\$B; torchrun RUN "$A" $A "$B" $B $C "" '' a"b"c""",
    "continued": 'A="--a \\\n  --b \\\n"\ntorchrun RUN $A \\\n --c # no --d\n',
    "arrays": 'A=(1 "2 3"\n # 4\n 5) ; A+=(6 $A); torchrun RUN "${A[@]}" ${A[@]} x${A}y',
    "defaults": 'A=${B:-"x y"} C=${D-z} E=; torchrun RUN "$A" $C ${E:-e} ${E-f}g ${A:+h}',
    "nested": 'B=2; A=${C:-${B:-"3"}$B}; torchrun RUN $A ${D:=7} $D',
    "sums": "A=7 B=$((A / 2 * -3)); torchrun RUN $((B % 4)) $(($A*(1+$B))) x$((2*3))",
    "if": """A=3; if [ "$A" -gt 2 ]; then B=1; else B=2; fi
        if [ -z "$B" ]; then C=1; elif [ $A = 4 ]; then C=2; else if [[ $A == 3 ]]; then C=3; fi; fi
        if [ ! -n "$D" ]
        then
          C+=d
        fi
        torchrun RUN $B $C""",
    "and": '[ -z "$A" ] && A=1; [ -n "$A" ] || A=2; true && B=3 || B=4; torchrun RUN $A $B',
    "files": "torchrun RUN --a > /dev/null 2>&1; torchrun RUN --a 2>/dev/null",
    "append": 'A="1 2"; A+=" 3"; B=($A); B+=(4); export C=5; torchrun RUN "${B[*]}" $C',
    "commands": "mkdir -p /tmp; echo RUN; cd /; unset A; exec torchrun RUN 1",
}


@pytest.mark.parametrize("script", SHELL.values(), ids=SHELL)
def test_words_are_those_of_bash(script):
    """Bash itself runs the script, with a program that prints what it gets."""
    script = script.replace("RUN", "pretrain_gpt.py")
    prefix = 'torchrun() { printf \'%s\\0\' "$@" >&3; }\nexec() { "$@"; }\n'
    printed = subprocess.run(
        ["bash", "-c", f"{{ {prefix}{script}\n}} 3>&1 >/dev/null"],
        capture_output=True, check=True, text=True, env={"PATH": "/usr/bin:/bin"},
    ).stdout  # fmt: skip
    if script.count("torchrun") > 1:
        with pytest.raises(ValueError, match=r"line 1: a second program starts"):
            read_script(script, {})
        script, printed = script.split(";")[0], printed[: len(printed) // 2]
    found = read_script(script, {}).launch
    assert ["pretrain_gpt.py", *found.flags] == printed.split("\0")[:-1]


REFUSED = {
    "A=1\nfor i in 1 2; do\n A=$i\ndone": "line 2: for cannot be followed",
    "case $A in\n x) ;;\nesac": "line 1: case cannot be followed",
    "f() {\n A=1\n}": "line 1: a function or subshell",
    "\n(A=1)": "line 2: a function or subshell",
    "cat <<END\nx\nEND": "line 1: a here-document",
    "A=1\nread A": "line 2: read cannot be followed",
    "A='1": "line 1: ' is missing",
    'A=1\nB="': "line 2: a quotation has no end",
    "A=(1 2": "line 1: the array has no end",
    "if [ -f x ]; then A=1; fi": "line 1: this condition cannot be followed",
    "if grep x y; then A=1; fi": "line 1: this condition cannot be followed",
    "if [ 1 = 1 ]; then A=1": "an if has no fi",
    "fi": "line 1: fi without if",
    "A=$((1 << 2))": "cannot be computed",
    "A=$((1 / 0))": "cannot be computed",
    "eval $A": "line 1: eval cannot be followed",
    "bash -c 'torchrun pretrain_gpt.py'": "line 1: the program starts inside quotes",
    "exit 1\ntorchrun pretrain_gpt.py": "no line that is run starts a program",
    "": "no line that is run starts a program",
}


@pytest.mark.parametrize(("script", "message"), REFUSED.items())
def test_what_cannot_be_followed_is_named_with_its_line(script, message):
    with pytest.raises(ValueError, match=message.replace("$", r"\$")):
        read_script(script, {})


def test_what_only_the_machine_knows_is_refused_where_it_is_needed():
    script = read_script('D=$(date)\nE=`pwd`/x\ntorchrun pretrain_gpt.py $D "$E" y', {"Z": "1"})
    assert [script.is_known(word) for word in script.launch.flags] == [False, False, True]
    with pytest.raises(ValueError, match=r"line 1: only the machine knows .* \$\(date\)"):
        script.known(script.launch.flags[0])
    given = read_script("D=$(date)\ntorchrun pretrain_gpt.py $D", {"D": "today"})
    assert given.launch.flags == ["today"]
