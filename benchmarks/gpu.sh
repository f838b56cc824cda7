#!/usr/bin/env bash
# Measures what is worth measuring on one GPU, in about eleven minutes, and prints one report in Markdown; needs no network.
#
#   benchmarks/gpu.sh [PART ...]     parts: compile steps sampling run resume images more latents recipes; all of them by default, in this order
#
# PYTHON names the interpreter (.venv/bin/python by default), IMAGES a folder of images for the part `images`, which is left out without it.
# Each part has a time limit of its own. Without a GPU all parts run, on few images, and say what they ran on.
set -uo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}")
parts=${*:-compile steps sampling run resume images more latents recipes}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$HOME/.cache/ddpm-pipeline/compiled}
export TMPDIR=$work

limited() { # SECONDS TITLE COMMAND ...: its time, or that it took too long
  local seconds=$1 title=$2 started=$SECONDS
  shift 2
  printf '\n## %s\n\n' "$title"
  timeout -k 20 "$seconds" "$@" 2>"$work/errors" || { printf '\nended with code %s (124: longer than %s s)\n' "$?" "$seconds" && tail -n 30 "$work/errors"; }
  printf '\n(%s s)\n' $((SECONDS - started))
}

train=("$python" benchmarks/training.py)
sample=("$python" benchmarks/evaluate.py --only-sampling)
ddpm=("$python" -m workflows)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# Compiled at the same time, for it is the CPU that works; what follows finds the results on disk.
part_compile() {
  [ "$gpu" = 1 ] || return 0
  limited 240 "Compilation of steps of 128 and 512 images and of a sampler, from nothing, at the same time" bash -c '
    cd "$1" && "$2" "$3/benchmarks/training.py" --batch 512 --rounds 0 --steps 1 --only ours >512 &
    cd "$1" && "$2" "$3/benchmarks/training.py" --batch 128 --rounds 0 --steps 1 --only ours >128 &
    cd "$1" && "$2" "$3/benchmarks/evaluate.py" --preset cifar10 --images 256 --steps 2 --rounds 1 --only-sampling >sampling &
    wait && cat "$1/512" "$1/128" "$1/sampling"' - "$work" "$python" "$PWD"
}

part_steps() {
  if [ "$gpu" = 1 ]; then
    limited 120 "Training steps, batch 512" "${train[@]}" --batch 512 --rounds 3 --steps 8 --only "ours,diffusers bf16"
    limited 150 "Training steps, batch 128" "${train[@]}" --batch 128 --rounds 3 --steps 15 --only "ours,ours eager,diffusers float32,diffusers bf16,diffusers bf16 compiled"
  else
    limited 200 "Training steps, batch 16" "${train[@]}" --batch 16 --rounds 3 --steps 1 --only "ours,ours float32,diffusers float32,diffusers bf16"
    limited 60 "Training steps of cifar10-small" "${train[@]}" --preset cifar10-small --batch 32 --rounds 3 --steps 2 --only "ours,ours float32,diffusers float32,diffusers bf16"
  fi
}

part_sampling() {
  if [ "$gpu" = 1 ]; then
    limited 150 "Sampling, 512 images, DDIM of 50 steps" "${sample[@]}" --preset cifar10 --images 512 --steps 50 --rounds 2
  else
    limited 150 "Sampling, 16 images, DDIM of 5 steps" "${sample[@]}" --preset cifar10-small --images 16 --steps 5 --rounds 2
  fi
}

part_more() {
  [ "$gpu" = 1 ] || return 0
  limited 90 "Training steps, batch 128, deterministic" "${train[@]}" --batch 128 --rounds 3 --steps 15 --only "ours eager" --deterministic
  limited 60 "Training steps of cifar10-small" "${train[@]}" --preset cifar10-small --batch 128 --rounds 3 --steps 20 --only "ours,ours eager,diffusers bf16"
}

part_run() {
  limited 200 "ddpm run digits" env -C "$work" "${ddpm[@]}" run digits --verbose
  grep -a "workers\|worker with\|of a worker in\|compiled" "$work/errors"
}

part_resume() {
  limited 150 "Bit for bit after two SIGKILLs, with train.deterministic=true" env -C "$work" "${ddpm[@]}" verify-resume digits train.deterministic=true --steps 150 --kills 2
}

part_images() {
  [ -n "${IMAGES:-}" ] || return 0
  limited 130 "ddpm train cifar10 for two minutes" env -C "$work" timeout -s TERM 110 "${ddpm[@]}" train cifar10 data.source="$IMAGES" train.log_every=100
  tail -n 15 "$work/errors"
}

# Needs diffusers for all but the Transformer.
part_latents() {
  local latents=("$python" benchmarks/latents.py)
  if [ "$gpu" = 1 ]; then
    limited 120 "DiT-B/2, training steps on latents of 32x32x4" "${latents[@]}" dit --model B --batch 256 --rounds 3 --steps 10
    limited 90 "Encoding 512 images of 256x256" "${latents[@]}" encode --size 256 --rounds 2 --base 128
    limited 150 "Training steps at 256x256, pixels and latents" "${latents[@]}" steps --size 256 --batch 8 --rounds 1 --steps 3
  else
    limited 100 "DiT-S/2, training steps on latents of 32x32x4" "${latents[@]}" dit --model S --batch 2 --rounds 3
    limited 100 "Encoding 128 images of 64x64" "${latents[@]}" encode --size 64 --count 128 --rounds 2
    limited 200 "Training steps at 64x64, pixels and latents" "${latents[@]}" steps --size 64 --batch 2 --rounds 1
  fi
}

# What trains in graphs and compiled: each has to end like the others, with a finite loss.
part_recipes() {
  local settings=(train.steps=200 train.sample_every=200 train.checkpoint_every=200 evaluate.num_samples=200 evaluate.extractor=dct8 cluster.num_workers=1)
  for recipe in "diffusion.process=flow train.optimizer=muon" "diffusion.process=edm train.rotation=20 train.augment_conditioning=true" \
    "train.spike_deviations=3 train.skip_spikes=true train.ema_widths=[0.1]" "model.kind=dit model.patch_size=1 model.depth=4 model.hidden_size=96 model.num_heads=4"; do
    # shellcheck disable=SC2086
    limited 60 "200 steps of digits: $recipe" env -C "$work" "${ddpm[@]}" evaluate digits --name "recipe-$((++number))" "${settings[@]}" $recipe train.compile=true
    grep -a "of a worker in\|compiled" "$work/errors"
  done
  limited 150 "ddpm run digits-latent" env -C "$work" "${ddpm[@]}" run digits-latent
}

printf '# Measured on %s\n' "$("$python" -c 'import os, torch; print((torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"), os.cpu_count(), "CPUs, torch", torch.__version__)')"
for part in $parts; do "part_$part"; done
