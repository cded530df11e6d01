#!/usr/bin/env bash
# The whole story: supervised fine-tuning, reward model, PPO, and a chat with the result.
#
#   bash run_all.sh MODEL HARDWARE [flags for all three stages]
#
#   MODEL      tiny (a 1M-parameter OPT, trained from nothing on the built-in task) | smollm2-135m (a chat model for a laptop, or
#              a folder of that name) | opt-125m | opt-350m | opt-1.3b | opt-2.7b | opt-6.7b | opt-13b | opt-30b | opt-66b |
#              opt-175b | llama-2-7b | llama-2-13b | llama-2-70b | a model folder | a hub name
#   HARDWARE   cpu | 1gpu | 1node (all GPUs of this host) | multinode (the hosts of $HOSTFILE, default /job/hostfile; start
#              it on the first of them; $LAUNCHER_ARGS goes to DeepSpeed's launcher: --master_port 29600, --launcher openmpi)
#
#   bash run_all.sh tiny cpu                                   # minutes on a laptop
#   bash run_all.sh opt-1.3b 1gpu
#   bash run_all.sh opt-13b 1node --data_path Dahoas/rm-static my_pairs.jsonl --output_dir runs/13b
#   STEP3_ARGS="--kl_coef 0.1 --ppo_epochs 2" bash run_all.sh tiny cpu        # flags for one stage
#   bash run_all.sh opt-1.3b 1gpu --save_steps 200 --resume                    # the same line again goes on where it was
#   bash run_all.sh opt-13b 1node --dry_run                    # will it fit, and what will it cost? plans without network or data
#   bash run_all.sh opt-66b multinode --dry_run 32 --device h100
#   bash run_all.sh setup                                      # only make the environment (.venv)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
stop() { echo "run_all.sh: error: $*" >&2; exit 2; }

case ${1:-} in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
[ "${1:-}" = setup ] && set -- tiny cpu && setup_only=1
[ $# -ge 2 ] || stop "usage: bash run_all.sh MODEL HARDWARE [flags]; for example: bash run_all.sh tiny cpu"
model=$1 hardware=$2
RUN_COMMAND="bash run_all.sh$(printf ' %q' "$@")"  # kept in summary.json
for name in LAUNCHER_ARGS HOSTFILE STEP3_ARGS STEP2_ARGS STEP1_ARGS; do
  [ -z "${!name:-}" ] || RUN_COMMAND="$name=$(printf %q "${!name}") $RUN_COMMAND"
done
export RUN_COMMAND
shift 2
case " $* " in *" --dry_run"*) dry_run=1 ;; *) dry_run= ;; esac  # plans, asks no other host and writes nothing
case " $* " in *" --verbose"*) quiet= ;; *) quiet=--quiet ;; esac  # what DeepSpeed's launcher says

# -----------------------------------------------------------------------------
# hardware: how the processes are started. One needs no launcher, because DeepSpeed's takes as long to start as a stage

case $hardware in
  cpu)       launch=(python3)
             export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=  # on a machine with GPUs too
             # idle OpenMP threads soon sleep: where other programs run, spinning ones make this 4 to 50 times slower
             export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000} ;;
  1gpu)      launch=(python3) ;;
  1node)     launch=(deepspeed $quiet) ;;
  multinode) hostfile=${HOSTFILE:-/job/hostfile}
             [ -e "$hostfile" ] || [ $dry_run ] || stop "multinode needs a hostfile with lines like 'host1 slots=8'; name it in HOSTFILE"
             [ $dry_run ] || hosts=$(awk 'NF && !/^#/ {print $1}' "$hostfile")
             launch=(deepspeed $quiet --hostfile "$hostfile" ${LAUNCHER_ARGS:-})
             # without these, ssh, and with it the launcher, waits for ever for a host that was cut off
             export PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=15 -o ServerAliveCountMax=4 ${PDSH_SSH_ARGS_APPEND:-}" ;;
  *) stop "HARDWARE '$hardware' is unknown; accepted: cpu, 1gpu, 1node, multinode" ;;
esac

# -----------------------------------------------------------------------------
# model: what to start from, and flags by size. The OPT recipes are DeepSpeed-Chat's (learning rates, batch sizes, OPT-350M as
# critic) but for what its authors found out later: 1 epoch of SFT instead of 16, LoRA alone where it is used.

out=output
for ((i = 1; i <= $#; i++)); do
  case ${!i} in
    --output_dir) next=$((i + 1)) out=${!next:-} ;;
    --output_dir=*) out=${!i}; out=${out#*=} ;;
  esac
done
case " ${STEP1_ARGS:-} ${STEP2_ARGS:-} ${STEP3_ARGS:-} " in
  *" --output_dir"*) stop "--output_dir is for all three stages, which read each other's models: give it to run_all.sh" ;;
esac
data="--data_path Dahoas/rm-static"
critic=facebook/opt-350m
sft="--learning_rate 9.65e-6" reward="--learning_rate 5e-5 --weight_decay 0.1"
ppo="--actor_learning_rate 9.65e-6 --critic_learning_rate 5e-6 --num_warmup_steps 100"
case $model in
  tiny)
    base=tiny critic=$out/sft data="--data_path toy"
    sft="--learning_rate 2e-3 --num_warmup_steps 60 --max_steps 1500 --per_device_train_batch_size 16
         --gradient_accumulation_steps 2"
    reward="--learning_rate 3e-4 --num_warmup_steps 30 --max_steps 1200 --per_device_train_batch_size 16"
    ppo="--actor_learning_rate 3e-4 --critic_learning_rate 3e-4 --num_warmup_steps 5 --max_steps 160
         --per_device_generation_batch_size 64 --per_device_train_batch_size 32"
    sft+=" --length_window 1" reward+=" --length_window 1"  # the toy's styles differ in length, and a step needs them all
    data+=" --max_answer_seq_len 40" ;;
  smollm2-135m | */smollm2-135m)  # planned: an hour on 2 cores in float32, whatever the data: short rows, few steps, PPO by adapters
    base=$model critic=$out/sft
    [ -d "$model" ] || base=HuggingFaceTB/SmolLM2-135M-Instruct
    data+=" --max_seq_len 256 --max_prompt_seq_len 128 --max_answer_seq_len 64 --max_eval_samples 128"
    sft="--learning_rate 2e-5 --per_device_train_batch_size 8 --max_steps 48"
    reward="--learning_rate 3e-5 --per_device_train_batch_size 8 --max_steps 49"
    ppo="--lora_dim 16 --only_optimize_lora --actor_learning_rate 2e-4 --critic_learning_rate 2e-4 --num_warmup_steps 2
         --per_device_generation_batch_size 32 --per_device_train_batch_size 16 --max_steps 40" ;;
  opt-125m | opt-350m | opt-1.3b | opt-2.7b)
    base=facebook/$model
    rows=16
    [ $hardware != cpu ] || rows=4  # in float32 the activations are what a laptop lacks
    sft+=" --per_device_train_batch_size $rows --gradient_accumulation_steps $((64 / rows))"
    reward+=" --per_device_train_batch_size $rows --gradient_accumulation_steps $((64 / rows))"
    ppo+=" --per_device_generation_batch_size 64 --per_device_train_batch_size $rows --gradient_accumulation_steps $((32 / rows))" ;;
  opt-6.7b | opt-13b | opt-30b | opt-66b | opt-175b | llama-2-7b | llama-2-13b | llama-2-70b)
    case $model in opt-*) base=facebook/$model ;; *) base=meta-llama/Llama-${model#llama-}-hf critic=$out/sft ;; esac
    # What fits on cards of 80 GB, by --dry_run: configs/README.md has the table. Rollouts of 1,024
    # prompts on 64 GPUs, as in DeepSpeed-Chat's recipes.
    rollout=32 share= tp=1 adapters=
    case $hardware/$model in
      multinode/opt-175b)                              adapters=1 tp=8 rollout=4 ;;
      multinode/opt-66b | multinode/opt-30b | multinode/llama-2-70b) tp=8 rollout=16 ;;
      multinode/*)                                     rollout=16 ;;
      1node/opt-6.7b)                                  ;;
      1node/opt-13b | 1node/llama-2-7b)                share=" --zero_stage 3" tp=2 ;;
      1node/llama-2-13b)                               share=" --zero_stage 3" tp=8 rollout=16 ;;
      1node/*)                                         share=" --zero_stage 3" adapters=1 tp=8 rollout=16 ;;
      *)                                               adapters=1 ;;
    esac
    batch=4
    [ $rollout -ge 16 ] || batch=1
    sft+=" --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --gradient_checkpointing$share"
    reward+=" --per_device_train_batch_size 4 --gradient_accumulation_steps 4"
    ppo+=" --per_device_generation_batch_size $rollout --per_device_train_batch_size $batch --gradient_accumulation_steps 4
         --gradient_checkpointing --inference_tp_size $tp$share"
    [ "$critic" != "$out/sft" ] || reward+=" --gradient_checkpointing$share"  # a critic of the actor's size
    if [ $adapters ]; then  # the reference model for nothing; scaled by 1 / 128 at this rate, as there
      lora=" --lora_dim 128 --lora_alpha 1 --only_optimize_lora"
      sft+="$lora --learning_rate 5e-4"
      ppo+="$lora --actor_learning_rate 5e-4 --critic_learning_rate 5e-4"
      [ "$critic" != "$out/sft" ] || reward+="$lora --learning_rate 5e-4"
    fi ;;
  */* | .*)
    base=$model critic=$out/sft
    case $model in
      /* | ./* | ../*) [ -d "$model" ] || stop "MODEL '$model': no such folder" ;;
    esac
    sft="--learning_rate 1e-5" reward="--learning_rate 1e-5" ppo="" ;;
  *)
    [ -d "$model" ] || stop "MODEL '$model' is neither a preset, a folder nor a hub name (owner/name); presets: tiny, smollm2-135m," \
      "opt-125m, opt-350m, opt-1.3b, opt-2.7b, opt-6.7b, opt-13b, opt-30b, opt-66b, opt-175b, llama-2-7b, llama-2-13b, llama-2-70b"
    base=$model critic=$out/sft sft="" reward="" ppo="" ;;
esac

# -----------------------------------------------------------------------------
# the environment: the Python at hand if it has all that is needed, else .venv, made on the first run

python=python3
if ! "$python" -c '
from importlib import metadata, util
needed = "torch deepspeed transformers datasets sentencepiece accelerate google.protobuf peft pytest".split()
assert all(map(util.find_spec, needed)) and int(metadata.version("transformers").split(".")[0]) >= 5' 2>/dev/null; then
  python=$here/.venv/bin/python
  if ! { [ -e "$here/.venv/ready" ] && cmp -s "$here/.venv/ready" "$here/requirements.txt"; }; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      stop "$(python3 --version) is at hand, and Python 3.11 or later is needed; put one first in PATH"
    echo "run_all.sh: installing requirements.txt into $here/.venv (once, some minutes)"
    python3 -m venv "$here/.venv"
    "$python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
    cp "$here/requirements.txt" "$here/.venv/ready"
  fi
  export PATH="$here/.venv/bin:$PATH"
fi
[ "${setup_only:-}" ] && exit 0

# -----------------------------------------------------------------------------
# several hosts: all have the same, in the same place

if [ "${hosts:-}" ]; then
  state="cd '$PWD' && ls '$("$python" -c 'import sys; print(sys.executable)')' &&
         cat '$here'/*.py '$here'/kernels/*.py '$here'/support/*.py | cksum"
  mine=$(eval "$state")
  for host in $hosts; do
    code=0 theirs=$(ssh -n -o BatchMode=yes -o ConnectTimeout=10 "$host" "$state" 2>&1) || code=$?
    [ $code != 255 ] || stop "host $host of $hostfile: 'ssh $host' must work without a password; it says: $theirs"
    [ "$theirs" = "$mine" ] || stop "host $host differs from this one: '$theirs' there, '$mine' here; every host needs the folder $PWD," \
      "the same commit in $here and its own 'bash run_all.sh setup', or a file system that they share"
  done
fi
hand_out() {  # a model: to hosts that do not see this host's $out, told by the times in its summary.json
  local folder; folder=$(realpath -m "$out")
  for host in ${hosts:-}; do
    ssh -n "$host" "cat '$folder/summary.json'" 2>/dev/null | cmp -s - "$folder/summary.json" && continue
    echo "=== $host does not share $folder with this host: copying $1"
    tar -C "$folder" --exclude 'checkpoint-*' -c "$1" summary.json |
      ssh "$host" "mkdir -p '$folder/$1' && rm -f '$folder/$1/'*.safetensors* && tar -C '$folder' -x" ||
      stop "$1 could not be copied to $host; start run_all.sh on the first host of $hostfile, or share $folder"
  done
}

# -----------------------------------------------------------------------------
# the three stages; the first that fails ends the run

config=(--deepspeed_config "$here/configs/$hardware.json")
if [ "$hardware" = 1node ]; then  # a port of its own, so that two runs on one host do not meet
  launch+=(--master_port "$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')")
fi
hand_on() {  # a SIGTERM, to the children of the launcher's child: the ranks, which save. The launcher would kill a rank that
  # needs more than 30 s for it. Before there are ranks, and where they are on other hosts, it goes to the launcher's child.
  local child ranks=
  [ "${launch[0]}" = deepspeed ] || { kill "$1" 2> /dev/null; return; }  # the rank itself
  child=$(cat "/proc/$1/task/$1/children" 2> /dev/null)
  [ -n "${hosts:-}" ] || [ -z "$child" ] || ranks=$(cat /proc/${child%% *}/task/${child%% *}/children 2> /dev/null)
  kill ${ranks:-${child:-$1}} 2> /dev/null
}
last_of_each() {  # flags -> the same, of those that are there twice (a preset's and the user's) the last
  local -A values=()
  local word flag= order=()
  for word; do
    case $word in
      --*) flag=${word%%=*} order+=("$flag") values[$flag]=$word ;;
      *) values[$flag]+=" $word" ;;
    esac
  done
  for flag in "${order[@]}"; do
    [ -z "${values[$flag]}" ] || printf '%s ' "${values[$flag]}"
    values[$flag]=
  done
}
report() {  # the page of the run, as far as it came; without one the run is what it is
  ls "$out"/*/metrics.jsonl > /dev/null 2>&1 || return 0
  echo "=== report: $("$python" -P "$here/support/report.py" "$out" 2>&1 | tail -n 1)"
}
stage() {  # name, flags
  local name=$1 began=$SECONDS code=0 told= number
  shift
  number=$((${#clock[@]} + 1))
  echo; echo "=== $number of 3: ${launch[*]} $name.py $(last_of_each "$@")"
  export RUN_STAGES="$number/3 $work"  # for the time that is left
  "${launch[@]}" "$here/$name.py" "$@" &
  # so does Ctrl-C, which a launcher in the background does not hear
  trap 'told=1; hand_on $! || true' TERM INT
  wait $! || while kill -0 $! 2> /dev/null; do wait $! || true; done  # a signal ends a `wait`, and not the stage
  wait $! || code=$?
  trap - TERM INT
  [ $code = 0 ] || report
  # 143: a rank was told to stop by somebody else; 2: it was told, and then could not save
  if [ $code = 143 ] || { [ "$told" ] && [ $code != 2 ]; }; then
    echo "run_all.sh: $name.py was stopped; the same line with --resume goes on from what is saved" >&2
    exit 143
  fi
  [ $code = 0 ] || stop "$name.py failed; its last lines above say why"
  clock+=($((SECONDS - began)))
}
step1=("${config[@]}" --model_name_or_path "$base" $data $sft "$@" ${STEP1_ARGS:-})
step2=("${config[@]}" --model_name_or_path "$critic" $data $reward "$@" ${STEP2_ARGS:-})
step3=("${config[@]}" --actor_model_name_or_path "$out/sft" --critic_model_name_or_path "$out/reward" $data $ppo "$@" ${STEP3_ARGS:-})

# a wrong flag of the last stage, data that it cannot use, or too little memory must not show after the hours of the first
support() { PYTHONPATH=$here "$python" -P -m "support.$1" "${@:2}"; }  # -P: not this working directory's modules
stages=(step1_sft "${step1[@]}" -- step2_reward "${step2[@]}" -- step3_ppo "${step3[@]}")
[ -z "$dry_run" ] || { support run_all plan "$hardware" "${stages[@]}"; exit; }
echo "run_all.sh: checking the flags, the data and the memory of all stages"
work=$(support run_all check "$hardware" "${stages[@]}") clock=()

stage step1_sft "${step1[@]}"
hand_out sft
stage step2_reward "${step2[@]}"
hand_out reward
stage step3_ppo "${step3[@]}"

# -----------------------------------------------------------------------------
# the numbers, from output/summary.json

support table "$out/summary.json" "${clock[@]}" $SECONDS
report
echo; echo "Talk to it: $python chat.py --path $out/actor"
