#!/bin/sh
# Train every part of mini from scratch, as the shipped weights were trained. There are two rounds: the second starts
# from the weights of the first, on more scenes. Then come the weak UNet, the ControlNets, the attribute
# classifier and the export.
# Run from the repository's root. The same command resumes a stopped run.
#
#     sh experiments/mini/retrain.sh                     # into runs/mini, weights to runs/mini/exported
#     QUICK=1 RUNS=/tmp/quick sh experiments/mini/retrain.sh   # two steps of each training, as a test
#     DEVICE=cuda WORKERS=1 sh experiments/mini/retrain.sh
set -eu

RUNS=${RUNS:-runs/mini}
OUT=${OUT:-$RUNS/exported}
DEVICE=${DEVICE:-cpu}
WORKERS=${WORKERS:-2}
PYTHON=${PYTHON:-.venv/bin/python}
FIRST=$RUNS/first
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if [ -n "${QUICK:-}" ]; then
    SHARDS1=1 SHARDS2=1 IMAGES_VAE=4096 STEPS="--steps 2 --batch 16"
else
    SHARDS1=16 SHARDS2=48 IMAGES_VAE=65536 STEPS=
fi
IMAGES1=$((SHARDS1 * 4096))
LATENTS2=$((SHARDS2 < 40 ? SHARDS2 : 40))

run() { # module, arguments...; STEPS last, so that QUICK overrides
    echo "== $*"
    "$PYTHON" -m "experiments.mini.$@"
}
unet() { # images, arguments...
    echo "== train_unet $*"
    images=$1
    shift
    # shellcheck disable=SC2086
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$WORKERS" -m experiments.mini.train_unet \
        --images "$images" --device "$DEVICE" "$@" $STEPS
}

# shellcheck disable=SC2086
{
    mkdir -p "$FIRST"
    run tokenizer --out "$RUNS/tokenizers"
    run render --out "$RUNS/scenes" --shards "$SHARDS2"
    run encode tokens --runs "$RUNS" --shards "$SHARDS2"
    for shared in tokenizers scenes tokens; do ln -sfn "../$shared" "$FIRST/$shared"; done

    # first round
    run train_vae --scenes "$RUNS/scenes" --out "$FIRST/vae" --images "$((SHARDS1 < 4 ? IMAGES1 : 16384))" --device "$DEVICE" $STEPS
    run train_clip --runs "$FIRST" --out "$FIRST/clip" --images "$IMAGES1" --steps 1150 --device "$DEVICE" $STEPS
    run encode latents --runs "$FIRST" --shards "$SHARDS1"
    unet "$IMAGES1" --runs "$FIRST" --out "$FIRST/unet" --steps 4600 --hold 0.2

    # second round
    run train_clip --runs "$RUNS" --out "$RUNS/clip" --weights "$FIRST/clip/clip.pt" --images "$IMAGES1" --steps 1400 \
        --peak 1.2e-3 --seed 1 --device "$DEVICE" $STEPS
    run train_vae --scenes "$RUNS/scenes" --out "$RUNS/vae" --weights "$FIRST/vae/vae.pt" --images "$IMAGES_VAE" \
        --steps 2200 --peak 1.5e-3 --seed 2 --device "$DEVICE" $STEPS
    run encode latents --runs "$RUNS" --shards "$LATENTS2"
    unet "$((LATENTS2 * 4096))" --runs "$RUNS" --out "$RUNS/unet" --weights "$FIRST/unet/unet.pt" --steps 2800 \
        --peak 7e-4 --hold 0.3 --seed 1

    # the weak UNet of autoguidance: half the width and half the transformer blocks, fewer images
    unet "$((SHARDS2 < 12 ? LATENTS2 * 4096 : 49152))" --runs "$RUNS" --out "$RUNS/unet_weak" --width 32 --depth 2 \
        --steps 3000 --peak 1.5e-3 --hold 0.3

    # ControlNets, attribute classifier, export
    for kind in canny depth; do
        run train_controlnet "$kind" --runs "$RUNS" --out "$RUNS/controlnet_$kind" --images "$((SHARDS2 < 32 ? IMAGES1 : 131072))" \
            --device "$DEVICE" $STEPS
    done
    run train_attributes --scenes "$RUNS/scenes" --out "$RUNS/attributes" --images "$IMAGES_VAE" $STEPS
    run export --runs "$RUNS" --out "$OUT"
}
