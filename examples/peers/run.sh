#!/usr/bin/env bash
# Peers beside AR-SSM and the Transformer: 45M tokens each, dense tables that start alike, the same texts in the same order, no copy head.
#
#   bash examples/peers/run.sh OUT DATA STEP...
#
# OUT   folder of the reports; checkpoints go beside it, so that a STEP that was broken off goes on.
# DATA  folder with wikipedia/ (train and valid) and wikitext103/ (valid), as .gpt2.bin or .gpt2.bin.xz files.
# STEP  kda, gla, gated_delta: Kimi Delta Attention, Gated Linear Attention, Gated DeltaNet (refused on Hopper by fla where Triton is
#       below 3.7.1)
#       gated_delta_by_kda  Gated DeltaNet through the kernels of Kimi Delta Attention, which run there
#       llama   transformers' Llama, at the Transformer's learning rate
#       phase1  AR-SSM and the Transformer, compiled
#       parts   AR-SSM with a wider window or attention in every fourth layer; attention with one part of AR-SSM's block, and with all;
#               where queries are not normed at the Transformer's learning rate; compiled
#       compile the kernels of fla's layers, all at once, into Triton's cache: minutes that `speed` then does not take one by one
#       speed   tokens/s and peak memory of each, 64 texts of 512 tokens a step, in a process of its own
#       table   Markdown of what there is in OUT
# FLAGS further flags of phase1 perplexity. Needs a GPU, `pip install flash-linear-attention transformers`, and to be started from the folder of the repository.
set -uo pipefail
out=$1 data=$2
shift 2
tokens=${TOKENS:-44957696}
run="python3 -m phase1"
common=(--dataset-name "$data/wikipedia" --also-evaluate "$data/wikitext103" --train-tokens "$tokens" --micro-batch-size 64
  --batch-size 64 --resume --recompute none
  --no-engine --no-baseline --checkpoint-dir "$out/../peers-checkpoints" ${FLAGS:-})
mixers=examples.peers.mixers
status=0
for step in "$@"; do
  echo "== $step, $(date -u +%H:%M:%S)"
  case $step in
    kda | gla | gated_delta | gated_delta_by_kda)
      $run perplexity "${common[@]}" --model "$step=$mixers:$step" --out-dir "$out/$step" ;;
    llama) $run perplexity "${common[@]}" --learning-rate 3e-3 --model llama=examples.peers.llama:llama --out-dir "$out/llama" ;;
    phase1) $run perplexity "${common[@]}" --compile --cuda-graphs --variants ar_ssm_dense_no_copy transformer_start --out-dir "$out/phase1" ;;
    parts)
      parts=examples.peers.parts compiled="--compile --cuda-graphs"
      $run perplexity "${common[@]}" $compiled --variants transformer_fair --out-dir "$out/parts" \
        --model wide=$parts:wide hybrid=$parts:hybrid qk_norm=$parts:qk_norm
      $run perplexity "${common[@]}" $compiled --learning-rate 3e-3 --out-dir "$out/parts_not_normed" \
        --model conv=$parts:conv gate=$parts:gate ;;
    compile)
      for peer in kda gla gated_delta_by_kda; do
        python3 benchmarks/tune_together.py throughput --no-baseline --seq-lengths 512 --batch-size 64 --no-saturate --no-cuda-graphs \
          --measure-steps 1 --warmup-steps 1 \
          --model "$peer=$mixers:$peer" --out-dir "$out/compile/$peer" &
      done
      wait ;;
    speed)
      for model in ar_ssm=examples.peers.ar_ssm:ar_ssm transformer=examples.peers.parts:transformer llama=examples.peers.llama:llama \
        kda=$mixers:kda gla=$mixers:gla gated_delta_by_kda=$mixers:gated_delta_by_kda; do
        $run throughput --no-baseline --seq-lengths 512 --batch-size 64 --no-saturate --measure-steps 20 --warmup-steps 3 --resume \
          --model "phase1=${model#*=}" --out-dir "$out/speed/${model%%=*}"
      done ;;
    table) python3 examples/peers/table.py "$out" ;;
    *) echo "run.sh: no step is called $step" >&2; exit 2 ;;
  esac
  code=$?
  [ $code -eq 0 ] || [ $code -eq 3 ] || status=$code  # 3: nothing is judged without a baseline
done
exit $status
